"""A web page and an HTTP API that segment the scans they are sent.

    python3 app.py                                     http://127.0.0.1:7860, for this machine only
    BRAINSEG_AUTH=me:secret python3 app.py --host 0.0.0.0          for a network, with a password
    curl -F images=@scan.nii.gz http://127.0.0.1:7860/api/segment -o result.zip

The page takes what inference.py takes: a volume file, slices, a zip archive of slices or of a DICOM
series. An upload is deleted once it is segmented, and so is everything made of it once it is sent;
nothing is fetched from other hosts. Needs: pip install -r requirements-app.txt
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import shipped_weights
from segmentation import Segmenter
from service import Answer, Busy, Job, Service, data_url
from upload import MIB, Limits, Named
from utils import add_segmenter_options, fail, make_parser, segmenter_options

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI
    from starlette.datastructures import FormData
    from starlette.requests import Request
    from starlette.routing import Route

WEB = Path(__file__).resolve().parent / "web"
ABOUT = """# brainseg
Finds the FLAIR abnormality of lower-grade glioma in brain MRI. **Research only: not a medical
device, not for diagnosis or treatment.** It was trained on one public data set of adults with a
known glioma; on other scans expect wrong masks without a warning."""
API = """POST /api/segment, multipart/form-data:
  images   a volume file (.nii, .nii.gz, .nrrd, .mha), or slices (.tif, .png), or the files of a
           DICOM series, or a zip archive of one of these
  flair    in place of images: a volume file of this sequence alone; with it maybe pre and post
  mask     maybe the true mask, to be scored against: a volume file, or the masks of the slices
  phantom  in place of all: anything; segments a synthetic head

200: a zip archive with the mask in the geometry of the source (<scan>_mask.nii.gz, or
<slice>_mask.tif for each slice), montage.png, <case>.gif and summary.json.
Otherwise JSON, {"error": "what is wrong and what to do"}: 400 an upload that cannot be used,
408 one that came too slowly, 413 one that is too large, 503 a full queue (try again in a minute).
"""


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=Path, help="weights file (the one of the project)")
    add_segmenter_options(parser)
    add = parser.add_argument_group("server").add_argument
    add("--host", type=str, default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=7860, help="(%(default)s)")
    add("--auth", type=str, help="user:password that is asked for (BRAINSEG_AUTH; none)")
    add("--max-upload", type=int, default=256, help="MiB of one upload (%(default)s)")
    add("--time-limit", type=float, default=300, help="seconds to read, or segment, one (300)")
    add("--queue", type=int, default=64, help="uploads that may wait (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    options = segmenter_options(parser, args)
    args.auth = args.auth or os.environ.get("BRAINSEG_AUTH")
    if args.auth and not all(args.auth.partition(":")):
        parser.error("--auth is user:password")
    if min(args.max_upload, args.time_limit, args.queue) <= 0:
        parser.error("--max-upload, --time-limit and --queue must be above 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args, options)
    except (ValueError, OSError) as error:
        fail(error)
    except ImportError as error:
        fail(f"{error.name} is missing: pip install -r requirements-app.txt")
    except KeyboardInterrupt:
        sys.exit("stopped")


def run(args: argparse.Namespace, options: dict) -> None:
    """Serve until a signal comes."""
    import logging

    import uvicorn

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a refusal says it all
    segmenter = Segmenter.from_weights(args.weights or shipped_weights("unet"), **options)
    limits = Limits(upload=args.max_upload * MIB, seconds=args.time_limit)
    service = Service(segmenter, limits, args.queue)
    if not args.auth and not is_loopback(args.host):
        print("no --auth: everybody who reaches this machine can use it", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="brainseg-app-") as scratch:
        os.chdir(scratch)  # uploads have a relative path, which tells a browser nothing
        app = make_app(service, args.host, args.auth)
        print(f"http://{args.host}:{args.port}", flush=True)
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(service: Service, host: str = "127.0.0.1", auth: str | None = None) -> FastAPI:
    """The page at /, the API at /api/segment; call it in a folder for uploads, which it fills."""
    os.environ |= {"GRADIO_TEMP_DIR": "uploads", "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from guard import Guard

    app = FastAPI(routes=api_routes(service), docs_url=None, redoc_url=None, openapi_url=None)
    font = ("system-ui", "sans-serif")
    app = gradio.mount_gradio_app(
        app,
        make_page(service),
        path="/",
        show_error=False,
        max_file_size=service.limits.upload,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        theme=gradio.themes.Default(font=font, font_mono=("ui-monospace", "monospace")),
    )
    app.add_middleware(Guard, most=service.limits.upload + MIB, auth=auth)
    if is_loopback(host):  # else a page of another host could reach it by renaming that host
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    return app


def api_routes(service: Service) -> list[Route]:
    from starlette.datastructures import FormData
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def refused(status: int, error: object) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status)

    def about(request: Request) -> Response:
        return PlainTextResponse(API)

    async def segment(request: Request) -> Response:
        form, limits = FormData(), service.limits
        try:
            release = service.admit()
        except Busy as error:
            return refused(503, error)
        try:
            sent = request.form(max_files=limits.files, max_fields=8)
            form = await asyncio.wait_for(sent, limits.seconds)
            job = service.submit(None if "phantom" in form else parts_of(form))
            answer = await finished(job, request)
        except ValueError as error:
            return refused(400, error)
        except HTTPException as error:
            return refused(error.status_code, error.detail)
        except asyncio.TimeoutError:
            return refused(408, f"the upload took more than {limits.seconds:.0f} s")
        finally:
            await form.close()
            release()
        name = answer.summary["case"].encode("ascii", "replace").decode()
        return Response(
            answer.archive(),
            media_type="application/zip",
            headers={"Content-Disposition": f'attachment; filename="{name}.zip"'},
        )

    return [Route("/api", about), Route("/api/segment", segment, methods=["POST"])]


def parts_of(form: FormData) -> dict[str, list[Named]]:
    """The files of a form by their field; ValueError for a field that is not known."""
    parts: dict[str, list[Named]] = {}
    for name, sent in form.multi_items():
        if name not in ("images", "flair", "pre", "post", "mask") or isinstance(sent, str):
            raise ValueError(f"no file is called {name!r} here; GET /api says which there are")
        parts.setdefault(name, []).append(Named(sent.filename or "", sent.file))
    return parts


async def finished(job: Job, request: Request) -> Answer:
    """The answer; a job whose client has gone leaves the queue."""
    answer = asyncio.wrap_future(job.future)
    while not answer.done() and not await request.is_disconnected():
        await asyncio.wait([answer], timeout=1)
    if not answer.done():
        answer.cancel()
    return await answer


def make_page(service: Service) -> gradio.Blocks:
    import gradio

    async def segment(files: list[str] | None, masks: list[str] | None) -> AsyncIterator[tuple]:
        parts = {"images": files or [], "mask": masks or []}
        try:
            if not files:
                raise ValueError("No file yet: drop a scan first, or try a phantom.")
            opened = {
                name: [Named(Path(path).name, open(path, "rb")) for path in paths]
                for name, paths in parts.items()
            }
            async for value in watched(service, opened):
                yield value, gradio.skip(), gradio.skip()
        except (ValueError, OSError) as error:
            yield json.dumps({"error": str(error)}), None, None
        finally:
            for path in (*parts["images"], *parts["mask"]):
                Path(path).unlink(missing_ok=True)
        yield gradio.skip(), None, None

    async def phantom() -> AsyncIterator[str]:
        try:
            async for value in watched(service, None):
                yield value
        except ValueError as error:
            yield json.dumps({"error": str(error)})

    with gradio.Blocks(title="brainseg", analytics_enabled=False, delete_cache=(60, 600)) as page:
        gradio.Markdown(ABOUT)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                files = gradio.File(
                    label="Scan",
                    file_count="multiple",
                    height=140,
                )
                folder = gradio.UploadButton("Choose a folder of slices", file_count="directory")
                with gradio.Accordion("True mask, to score against (optional)", open=False):
                    masks = gradio.File(label="Mask", file_count="multiple", height=110)
                go = gradio.Button("Segment", variant="primary")
                example = gradio.Button("Try a phantom")
                gradio.Markdown(
                    "A scan is a NIfTI, NRRD or MetaImage file, or slices (TIFF, PNG), or a zip "
                    "archive of slices or of a DICOM series. Its channels are pre-contrast, FLAIR "
                    "and post-contrast; one channel is taken for FLAIR. Uploads are deleted once "
                    "they are segmented. Programs can use the [HTTP API](/api)."
                )
            with gradio.Column(scale=3, min_width=300):
                viewer = gradio.HTML(
                    html_template=(WEB / "viewer.html").read_text(),
                    css_template=(WEB / "viewer.css").read_text(),
                    js_on_load=(WEB / "viewer.js").read_text(),
                    elem_id="viewer",
                )
        folder.upload(
            lambda paths: paths, folder, files, show_progress="hidden", api_visibility="private"
        )
        options = {"concurrency_limit": None, "show_progress": "hidden"}
        options |= {"api_visibility": "private", "trigger_mode": "once"}
        go.click(segment, [files, masks], [viewer, files, masks], **options)
        example.click(phantom, None, viewer, **options)
    return page.queue(max_size=None)


async def watched(service: Service, parts: dict[str, list[Named]] | None) -> AsyncIterator[str]:
    """For the viewer, as JSON: how far an upload is, twice a second, and then its slices."""
    try:
        release = service.admit()
    except Busy as error:
        raise ValueError(str(error)) from error
    job = None
    try:
        job = service.submit(parts)
        answer = asyncio.wrap_future(job.future)
        while not answer.done():
            ahead = service.ahead(job)
            waiting = f"waiting, {ahead} before you" if ahead else "reading"
            if job.done:
                waiting = f"segmenting, {job.done:.0%}"
            yield json.dumps({"waiting": waiting, "done": job.done})
            await asyncio.wait([answer], timeout=0.5)
        yield json.dumps(shown(answer.result()))
    finally:
        if job:
            job.future.cancel()
        release()


def shown(answer: Answer) -> dict:
    """What the viewer draws: all of it travels to the browser, and nothing stays here."""
    case, files = answer.summary["case"], answer.files
    film = data_url(files[f"{case}.gif"], "image/gif")
    (mask, *others) = answer.masks
    downloads = {mask: data_url(files[mask], "application/octet-stream")}
    if others:
        zipped = answer.archive(answer.masks)
        downloads = {f"{case}_masks.zip": data_url(zipped, "application/zip")}
    montage = data_url(files["montage.png"], "image/png")
    downloads |= {f"{case}_montage.png": montage, f"{case}.gif": film}
    return {
        "summary": answer.summary,
        "slices": answer.slices,
        "numbers": answer.numbers,
        "first": answer.first,
        "downloads": downloads,
        "montage": montage,
        "film": film,
    }


if __name__ == "__main__":
    main()
