"""Serve a web page and an HTTP API that segment uploaded scans.

    python3 app.py                                     http://127.0.0.1:7860, for this machine only
    BRAINSEG_AUTH=me:secret python3 app.py --host 0.0.0.0          for a network, with a password
    curl --fail-with-body -F images=@scan.nii.gz http://127.0.0.1:7860/api/segment -o result.zip

The page takes one case, as inference.py does: a volume file (not .mhd), slices, the files of a
DICOM series or study, or a zip archive of one of these. An upload is deleted once it is segmented,
and its results once they are sent. Nothing is fetched from other hosts. Needs: pip install -r
requirements-app.txt
"""

import argparse
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path

from brainseg.io.files import clear_leftovers
from brainseg.segmenter import Segmenter, settings_text
from brainseg.weights import shipped_weights
from cli import add_segmenter_options, errors_in_one_sentence, fail, make_parser, segmenter_options
from utils import git_commit


# fmt: off
def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add("--weights", type=Path, nargs="+", help="as for inference.py (the shipped weights)")
    add_segmenter_options(parser, workers=False)
    parser.group("server")
    add = parser.add
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=7860, least=0, below=2**16, help="port to listen on")
    add("--auth", help="user:password to ask for (BRAINSEG_AUTH; none)")
    add("--max-upload", type=int, default=256, least=1, help="largest upload in MiB")
    add("--time-limit", type=float, default=300.0, least=1, below=1e6,
        help="seconds to send, to read or to segment one")
    add("--queue", type=int, default=64, least=1,
        help="uploads at once: one is segmented, others wait")
    return parser


# fmt: on
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    options = segmenter_options(parser, args)
    args.auth = args.auth or os.environ.get("BRAINSEG_AUTH")
    if args.auth and not all(args.auth.partition(":")):
        parser.error("--auth must be user:password")
    if not hasattr(os, "fork"):
        fail("app.py needs Linux or macOS; on Windows, start it in WSL or Docker")
    try:
        with errors_in_one_sentence("stopped"):
            run(args, options)
    except ImportError as error:
        fail(f"{error.name} is missing: pip install -r requirements-app.txt")


def run(args: argparse.Namespace, options: dict) -> None:
    """Serve until a signal comes. Raises OSError if the address cannot be listened on."""
    import uvicorn

    from server.api import make_app
    from server.connections import Connection, open_files_limit
    from server.jobs import Service
    from server.security import is_loopback
    from server.unpacking import MIB, Limits

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the response says it all
    segmenter = Segmenter.from_weights(args.weights or shipped_weights("unet"), **options)
    print(f"settings: {settings_text(segmenter)}", flush=True)
    for note in segmenter.notes:
        print(note, file=sys.stderr)
    clear_leftovers(Path(tempfile.gettempdir()))
    files = open_files_limit()
    connections = files // 2  # uploads that are kept in files take the others
    queue = min(args.queue, connections // 2)
    if queue < args.queue:
        print(f"only {queue} uploads at once, as `ulimit -n` is {files}", file=sys.stderr)
    service = Service(segmenter, Limits(upload=args.max_upload * MIB, seconds=args.time_limit))
    app = make_app(service, args.host, args.auth, queue, git_commit())
    host, family = args.host, socket.AF_INET
    if ":" in args.host:
        host, family = f"[{args.host}]", socket.AF_INET6
    try:
        listener = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno and error.errno > 0:  # not so if the host has no address
            reason = os.strerror(error.errno)
        fault = f"{args.host}:{args.port}: {reason.lower()}; change --host or --port"
        raise OSError(fault) from error
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="error",
        limit_concurrency=connections,
        backlog=files // 8,  # so many are accepted before the first is counted
        timeout_graceful_shutdown=1,
    )
    if not args.auth and not is_loopback(args.host):
        print("no --auth: anyone who can reach this machine can use it", file=sys.stderr)
    print(f"http://{host}:{listener.getsockname()[1]}", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.end()


if __name__ == "__main__":
    main()
