"""The page at / and the API at /api/segment: requests, and what each gets back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from .jobs import Answer, Busy, Job, Named, Service
from .security import Guard, TooLarge, drain, is_loopback, refuse

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.datastructures import FormData
    from starlette.requests import Request
    from starlette.responses import Response


WEB = Path(__file__).resolve().parents[1] / "web"
LINES = "application/x-ndjson"
FAILED = "segmentation failed; see the server log"
API = f"""POST /api/segment, multipart/form-data:
  images   a volume file (.nii, .nii.gz, .nrrd, .mha), or slices (.tif, .png), or the files of a
           DICOM series or study, or a zip archive of one of these
  flair    in place of images: a volume file of this sequence; pre and post beside it if there are
  register any value: pre and post are first moved to fit flair
  mask     optional, the true mask to score against: a volume file, or the masks of the slices
  phantom  any value, in place of all others: segments a synthetic head

200: a zip archive with the mask in the geometry of the source (<scan>_mask.nii.gz, or
<slice>_mask.tif for each slice), montage.png, <case>.gif and summary.json.
Otherwise JSON, {{"error": "what is wrong and what to do"}}: 400 an upload that cannot be used,
401 a wrong password, 403 a request by the page of another host or port, 408 an upload that came too
slowly, 413 one that is too large, 500 a fault of the server, 503 a full queue (try again in a
minute).

With the header Accept: {LINES} the answer is lines of JSON: how far it is, and then
everything that the page shows, or {{"error": ...}}.
"""


def make_app(service: Service, host: str = "127.0.0.1", auth: str | None = None) -> Starlette:
    """The page at /, the API at /api/segment; closes the service when it ends."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    middleware = [Middleware(Guard, most=service.limits.upload, auth=auth)]
    if is_loopback(host):  # else a page of another host could reach it by renaming that host
        ours = ["localhost", "127.0.0.1", "[::1]", host]
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=ours))
    routes = [
        Route("/api", lambda request: PlainTextResponse(API)),
        Route("/api/segment", Segment(service)),
        Mount("/", StaticFiles(directory=WEB, html=True)),
    ]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


class Segment:
    """The ASGI endpoint that takes an upload, and a place in the queue until it is answered."""

    def __init__(self, service: Service):
        self.service = service

    async def __call__(self, scope, receive, send) -> None:
        from starlette.requests import ClientDisconnect, Request

        service = self.service
        if scope["method"] != "POST":
            await drain(receive, service.limits.upload)
            await refuse(send, 405, "send an upload by POST; GET /api lists its fields")
            return
        try:
            service.enter()
        except Busy as error:
            await drain(receive, service.limits.upload)
            await refuse(send, 503, str(error))
            return
        response = None
        try:
            response = await respond(service, Request(scope, receive))
            whole = service.limits.seconds * (service.waiting + 2)  # the queue, and the sending
            await asyncio.wait_for(response(scope, receive, send), whole)
        except (ClientDisconnect, asyncio.TimeoutError):
            pass  # nobody is there to read an answer
        except asyncio.CancelledError:  # the server ends
            if response is None:
                await refuse(send, 503, "the server is stopping")
        finally:
            service.leave()


async def respond(service: Service, request: Request) -> Response:
    """What an upload gets: an archive or lines, or what is wrong with it."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse

    def refused(status: int, error: object) -> Response:
        return JSONResponse({"error": str(error)}, status)

    limits = service.limits
    try:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ValueError("send multipart/form-data; GET /api lists its fields")
        sent = request.form(max_files=limits.files, max_fields=8)
        form = await asyncio.wait_for(sent, limits.seconds)
        job = service.submit(parts_of(form))
        if LINES in request.headers.get("accept", "").lower():
            return StreamingResponse(lines(service, job), media_type=LINES)
        answer = await finished(job, request)
        archive = await asyncio.to_thread(answer.archive)
    except (ClientDisconnect, TooLarge):
        raise
    except ValueError as error:
        return refused(400, error)
    except HTTPException as error:
        return refused(error.status_code, error.detail)
    except asyncio.TimeoutError:
        return refused(408, f"the upload took more than {limits.seconds:.0f} s")
    except Exception:
        logging.exception("an upload could not be segmented")
        return refused(500, FAILED)
    name = quote(f"{answer.summary['case']}.zip")
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}"}
    return Response(archive, 200, headers, media_type="application/zip")


def parts_of(form: FormData) -> dict[str, list[Named]] | None:
    """The files of a form by their field, None for the phantom; ValueError for an unknown field."""
    if "phantom" in form and len(form.multi_items()) == 1:
        return None
    parts: dict[str, list[Named]] = {}
    for name, sent in form.multi_items():
        if name == "register":
            parts[name] = []
            continue
        if name not in ("images", "flair", "pre", "post", "mask"):
            raise ValueError(f"no field is called {name!r}; GET /api lists them")
        if isinstance(sent, str) or not sent.filename:
            raise ValueError(f"{name}: is no file; send it with a file name")
        parts.setdefault(name, []).append(Named(sent.filename, sent.file))
    return parts


async def finished(job: Job, request: Request) -> Answer:
    """The answer of a job, which leaves the queue if its client goes."""
    from starlette.requests import ClientDisconnect

    answer = asyncio.wrap_future(job.future)
    try:
        while not answer.done():
            await asyncio.wait([answer], timeout=1)
            if not answer.done() and await request.is_disconnected():
                raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()


async def lines(service: Service, job: Job) -> AsyncIterator[str]:
    """How far a job is, twice a second, and then what the page shows of it, as lines of JSON."""
    answer = asyncio.wrap_future(job.future)
    try:
        while not answer.done():
            ahead = service.ahead(job)
            waiting = f"waiting, {ahead} before you" if ahead else "reading"
            waiting = f"segmenting, {job.done:.0%}" if job.done else waiting
            yield json.dumps({"waiting": waiting, "done": job.done}) + "\n"
            await asyncio.wait([answer], timeout=0.5)
        shown = answer.result().shown
        yield await asyncio.to_thread(lambda: json.dumps(shown()))
    except ValueError as error:
        yield json.dumps({"error": str(error)})
    except Exception:
        logging.exception("an upload could not be segmented")
        yield json.dumps({"error": FAILED})
    finally:
        answer.cancel()
