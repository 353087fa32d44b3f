"""Test many clients at once: is any lost, how long do they wait, how much memory is used?

    python3 -m benchmarks.clients --clients 50

Starts app.py with the project's weights, sends it the same synthetic scan from all clients at the
same time, and compares every mask with the one that a single client gets.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

from brainseg.phantom import write_data_set

from .timing import ROOT, resident


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
        sent = io.BytesIO()
        with zipfile.ZipFile(sent, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((Path(name) / "images" / "phantom_000").glob("*.tif")):
                archive.write(path, path.name)
        run(args, sent.getvalue(), Path(name))


def run(args: argparse.Namespace, scan: bytes, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port)]
    command += ["--queue", str(args.clients + 1), "--time-limit", "3600"]
    server = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder)})
    try:
        while not answers(url):
            if server.poll() is not None:
                sys.exit("the server did not start; see above")
            time.sleep(0.2)
        masks, alone = ask(url, scan)
        if not masks:
            sys.exit("the server refused the scan")
        memory, done = [resident(server.pid)], threading.Event()
        watcher = threading.Thread(target=watch, args=(server.pid, memory, done))
        watcher.start()
        start = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            results = list(pool.map(lambda _: ask(url, scan), range(args.clients)))
        total = time.perf_counter() - start
        done.set()
        watcher.join()
    finally:
        server.terminate()
        server.wait()
    right = sum(result == masks for result, _ in results)
    seconds = [seconds for _, seconds in results]
    left = [path for path in folder.iterdir() if path.name != "images"]
    print(f"{args.clients} clients, {args.slices} slices of {args.size} x {args.size} each")
    print(f"answered with the right masks: {right}, lost or wrong: {args.clients - right}")
    print(f"one client alone: {alone:.2f} s; all of them: {total:.1f} s")
    print(f"wait: shortest {min(seconds):.1f} s, median {np.median(seconds):.1f} s, "
          f"longest {max(seconds):.1f} s")  # fmt: skip
    print(f"memory of the server: {memory[0] / 2**30:.2f} GiB before, at most "
          f"{max(memory) / 2**30:.2f} GiB; files left: {len(left)}")  # fmt: skip


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


def watch(server: int, memory: list[int], done: threading.Event) -> None:
    while not done.wait(0.2):
        memory.append(resident(server))


if __name__ == "__main__":
    main()
