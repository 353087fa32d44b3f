"""Test many clients at once: is any lost, how long do they wait, how much memory is used?

    python3 -m benchmarks.clients --clients 50

Starts app.py with the project's weights, sends it the same synthetic scan from all clients at the
same time, and compares every mask with the one that a single client gets.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import httpx
import numpy as np

from brainseg.phantom import write_data_set

from .timing import ROOT, PeakMemory, resident


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--slices", type=int, default=24, help="slices of the scan (%(default)s)")
    parser.add_argument("--size", type=int, default=192, help="side of a slice (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_data_set(Path(name) / "images", 1, args.slices, args.size)
        scan = pack_slices(sorted((Path(name) / "images" / "phantom_000").glob("*.tif")))
        run(args, scan, Path(name))


def run(args: argparse.Namespace, scan: bytes, folder: Path) -> None:
    options = ["--queue", args.clients + 1, "--time-limit", 3600]
    with serving(ROOT, options, TMPDIR=str(folder)) as (url, process):
        masks, alone = ask(url, scan)
        if not masks:
            sys.exit("the server refused the scan")
        before = resident(process) / 2**30
        start = time.perf_counter()
        with PeakMemory(process) as memory, ThreadPoolExecutor(args.clients) as pool:
            results = list(pool.map(lambda _: ask(url, scan), range(args.clients)))
        total = time.perf_counter() - start
    right = sum(result == masks for result, _ in results)
    seconds = [seconds for _, seconds in results]
    left = [path for path in folder.iterdir() if path.name != "images"]
    print(f"{args.clients} clients, {args.slices} slices of {args.size} x {args.size} each")
    print(f"answered with the right masks: {right}, lost or wrong: {args.clients - right}")
    print(f"one client alone: {alone:.2f} s; all of them: {total:.1f} s")
    print(f"wait: shortest {min(seconds):.1f} s, median {np.median(seconds):.1f} s, "
          f"longest {max(seconds):.1f} s")  # fmt: skip
    print(f"memory of the server: {before:.2f} GiB before, at most {memory.gib:.2f} GiB; "
          f"files left: {len(left)}")  # fmt: skip


@contextlib.contextmanager
def serving(
    root: Path, options: Sequence[object], log: int | IO[str] | None = None, **environment: str
) -> Iterator[tuple[str, int]]:
    """Run app.py of the checkout `root` while the block runs; yield its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, root / "app.py", "--port", port, *options]
    server = subprocess.Popen(
        [str(word) for word in command], env=os.environ | environment, stdout=log, stderr=log
    )
    try:
        while not answers(url):
            if server.poll() is not None:
                sys.exit("the server did not start; see above")
            time.sleep(0.2)
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()


def pack_slices(paths: Sequence[Path]) -> bytes:
    """Put files into a zip archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(path, path.name)
    return packed.getvalue()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, scan: bytes) -> tuple[dict[str, bytes], float]:
    """Return the masks that a client gets, none if it is refused, and the seconds it waits."""
    start = time.perf_counter()
    sent = {"images": ("scan.zip", scan)}
    answer = httpx.post(f"{url}/segment", files=sent, timeout=3600)
    seconds = time.perf_counter() - start
    if answer.status_code != 200:
        return {}, seconds
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        masks = {n: archive.read(n) for n in archive.namelist() if n.endswith("_mask.tif")}
    return masks, seconds


if __name__ == "__main__":
    main()
