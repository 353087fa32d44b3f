"""Time functions and commands, and collect rows and conditions."""

from __future__ import annotations

import argparse
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from brainseg.devices import available_cores, has_bfloat16
from cli import git_commit

BATCH = 16
ROWS: list[dict] = []  # what was measured
ROOT = Path(__file__).resolve().parents[1]


def seconds(work: Callable[[], object], repeats: int = 1, warm: bool = True) -> float:
    """Time `work`: the median wall time, device included, after an untimed run if `warm`."""
    if warm:
        work()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


class Measured(NamedTuple):
    """The measurements of a command."""

    seconds: float
    memory: float  # peak of all its processes, GiB
    lines: list[tuple[float, str]]  # of stdout, with the seconds since the start


def measure(
    command: Sequence[object],
    enough: Callable[[str], bool] | None = None,
    limit: float = threading.TIMEOUT_MAX,
) -> Measured:
    """Run a command to its end, until a line of its stdout is `enough`, or for `limit` seconds.

    The text of the last of `lines` is empty unless it was `enough`. Memory is measured on Linux
    only, and is 0 elsewhere. Raises ValueError if the command fails.
    """
    start, lines, peak, done = time.perf_counter(), [], [0], threading.Event()
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as child:

        def watch() -> None:
            while not done.wait(0.2):
                peak.append(resident(child.pid))

        watcher, timer = threading.Thread(target=watch), threading.Timer(limit, child.terminate)
        watcher.start()
        timer.start()
        try:
            for line in child.stdout:
                lines.append((time.perf_counter() - start, line))
                if enough and enough(line):
                    child.terminate()
                    break
            else:
                if child.wait() and time.perf_counter() - start < limit:
                    raise ValueError(f"{' '.join(map(str, command[:4]))} ... failed; see above")
                lines.append((time.perf_counter() - start, ""))
        except BaseException:
            child.terminate()
            raise
        finally:
            done.set()
            timer.cancel()
            watcher.join()
    return Measured(lines[-1][0], max(peak) / 2**30, lines)


def resident(process: int) -> int:
    """Sum the memory of a process and its descendants, counting shared pages once (Linux)."""
    parents, kilobytes = {}, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            parents[int(folder.name)] = int(fields[1])
        except OSError:  # it has ended
            continue
    family = {process} & parents.keys()
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for member in family:
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
            kilobytes += int(rollup.split("Pss:")[1].split()[0])
        except (OSError, IndexError):  # it has ended
            continue
    return kilobytes * 1024


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def precisions(device: torch.device) -> dict[str, str]:
    """Map options to the precisions worth timing on the device."""
    return {"--no-amp": "float32"} | ({"--amp": "bfloat16"} if has_bfloat16(device) else {})


def one_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Wrap `work` to run on one core."""

    def limited() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work()
        torch.set_num_threads(threads)

    return limited


def row(name: str, ours: float, theirs: float | None, unit: str) -> None:
    """Keep and print a row of the table; `theirs` is the figure of the plain version, if any."""
    ROWS.append({"what": name, "plain": theirs, "brainseg": ours, "unit": unit})
    ratio = f"{theirs / ours:.1f}" if theirs is not None else ""
    plain_time = f"{theirs:.4g}" if theirs is not None else ""
    print(f"| {name} | {plain_time} | {ours:.4g} | {unit} | {ratio} |", flush=True)


def conditions(args: argparse.Namespace, cases: list) -> dict:
    """Describe the machine, the versions and the data."""
    cuda = args.device.type == "cuda"
    return {
        "processor": processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(args.device) if cuda else str(args.device),
        "bfloat16": has_bfloat16(args.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cases": len(cases),
        "image_size": args.image_size,
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Return the processor's name on Linux, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
