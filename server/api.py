"""Serve the page at / and the API at /api/segment: requests and their responses."""

import asyncio
import contextlib
import json
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .answers import zipped
from .connections import report
from .jobs import STOPPING, Job, Service, Unavailable, shortage
from .security import Guard, as_json, is_loopback

WEB = Path(__file__).resolve().parents[1] / "web"
LINES = "application/x-ndjson"


def make_app(
    service: Service,
    host: str = "127.0.0.1",
    auth: str | None = None,
    queue: int = 64,
    version: str | None = None,
) -> Starlette:
    """Make the app with page and API, for `queue` uploads at once; it closes the service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(report)
        yield
        await asyncio.to_thread(service.close)

    middleware = [Middleware(Guard, most=service.limits.upload, auth=auth)]
    if is_loopback(host):  # else a page of another host could reach it by DNS rebinding
        ours = ["localhost", "127.0.0.1", "[::1]", host]
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=ours))
    segment = Segment(service, queue)

    def health(request: Request) -> JSONResponse:
        if service.reader.closed:
            return as_json(unavailable(STOPPING))
        weights = {path.name: digest for path, digest in service.segmenter.hashes.items()}
        state = {"ready": True, "version": version, "weights": weights}
        state["queue"] = {"uploads": segment.uploads, "places": queue}
        return JSONResponse(state)

    routes = [
        Route("/api", lambda request: FileResponse(WEB / "api.txt")),
        Route("/api/health", health),
        Route("/api/openapi.json", lambda request: FileResponse(WEB / "openapi.json")),
        Route("/api/segment", segment),
        Mount("/", StaticFiles(directory=WEB, html=True)),
    ]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


class Segment:
    """The ASGI endpoint for uploads; each keeps its place in the queue until it is answered."""

    def __init__(self, service: Service, queue: int):
        self.service, self.queue = service, queue
        self.uploads = 0  # that have a place

    async def __call__(self, scope, receive, send) -> None:
        request, response = Request(scope, receive), None
        try:
            if scope["method"] != "POST":
                error = "send an upload by POST; GET /api lists its fields"
                raise HTTPException(405, error, {"Allow": "POST"})
            if self.uploads >= self.queue:
                error = f"{self.queue} uploads are already waiting; try again in a minute"
                raise unavailable(error)
            self.uploads += 1
            try:
                response = await respond(self.service, request)
                # Each upload may take `seconds` to be read and again to be segmented.
                longest = 2 * self.service.limits.seconds * (self.queue + 1)
                await asyncio.wait_for(response(scope, receive, send), longest)
            finally:
                self.uploads -= 1
                await request.close()  # its temporary files
        except HTTPException as error:
            await as_json(error)(scope, receive, send)
        except (ClientDisconnect, asyncio.TimeoutError):
            pass  # the client is gone or too slow
        except asyncio.CancelledError:
            if response is None:
                await as_json(unavailable(STOPPING))(scope, receive, send)


async def respond(service: Service, request: Request) -> Response:
    """Segment an upload and answer with an archive or lines; raise HTTPException for a bad one."""
    limits = service.limits
    try:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ValueError("send multipart/form-data; GET /api lists its fields")
        sent = request.form(max_files=limits.files, max_fields=8)
        form = await asyncio.wait_for(sent, limits.seconds)
        job = service.submit(parts_of(form))
        if LINES in request.headers.get("accept", "").lower():
            return StreamingResponse(lines(service, job), media_type=LINES)
        async with contextlib.aclosing(progress(service, job)) as steps:
            async for _ in steps:
                if await request.is_disconnected():
                    raise ClientDisconnect
        answer = job.future.result()
        archive = await asyncio.to_thread(zipped, answer.files)
    except ClientDisconnect:
        raise
    except asyncio.TimeoutError:
        error = f"the upload took more than {limits.seconds:.0f} s; crop the scan, or compress it"
        raise HTTPException(408, error) from None
    except Exception as error:
        raise refusal(error) from None
    name = quote(f"{answer.summary['case']}.zip")
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}"}
    return Response(archive, 200, headers, media_type="application/zip")


def refusal(error: Exception) -> HTTPException:
    """Turn the error of an upload into a status and a sentence, and close the files it holds."""
    lack = shortage(error)
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, ValueError):
        answer = HTTPException(400, str(error))
    elif isinstance(error, Unavailable):
        answer = unavailable(str(error))
    elif lack:
        answer = unavailable(lack)
    else:
        logging.error("an upload could not be segmented", exc_info=error)
        answer = HTTPException(500, "segmentation failed; see the server log")
    cause = error
    while cause:  # the variables of its frames
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    return answer


def unavailable(error: str) -> HTTPException:
    return HTTPException(503, error, {"Retry-After": "60"})


def parts_of(form: FormData) -> dict[str, list[UploadFile]] | None:
    """Return the files by field, None for the phantom; raise ValueError for an unknown field."""
    if "phantom" in form and len(form.multi_items()) == 1:
        return None
    parts: dict[str, list[UploadFile]] = {}
    for name, sent in form.multi_items():
        if name == "register":
            parts[name] = []
        elif name not in ("images", "flair", "pre", "post", "mask"):
            raise ValueError(f"{name!r} is not a field; GET /api lists the fields")
        elif isinstance(sent, str) or not sent.filename:
            raise ValueError(f"{name}: is not a file; send it with a file name")
        else:
            parts.setdefault(name, []).append(sent)
    return parts


async def progress(service: Service, job: Job) -> AsyncGenerator[dict, None]:
    """Yield the progress of a job twice a second; abandon it if iteration stops."""
    answer = asyncio.wrap_future(job.future)
    try:
        while not answer.done():
            ahead = service.ahead(job)
            if job.done:
                waiting = f"segmenting, {job.done:.0%}"
            elif ahead:
                waiting = f"waiting, {ahead} ahead of you"
            else:
                waiting = "reading"
            yield {"waiting": waiting, "done": job.done}
            await asyncio.wait([answer], timeout=0.5)
        if answer.cancelled():
            raise Unavailable(STOPPING)
        answer.result()
    finally:
        if answer.cancel():  # else it is done
            service.abandon(job)


async def lines(service: Service, job: Job) -> AsyncIterator[str]:
    """Yield the progress of a job, and then what the page shows of it, as lines of JSON."""
    try:
        async for step in progress(service, job):
            yield json.dumps(step) + "\n"
        yield await asyncio.to_thread(job.future.result().shown)
    except Exception as error:
        yield json.dumps({"error": refusal(error).detail})
