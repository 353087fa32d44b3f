"""Time commands, and describe the machine they ran on."""

from __future__ import annotations

import platform
import subprocess
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from brainseg.devices import available_cores, has_bfloat16
from utils import git_commit

ROOT = Path(__file__).resolve().parents[1]


class Measured(NamedTuple):
    """The measurements of a command."""

    seconds: float
    memory: float  # peak of all its processes, GiB; 0 where there is no /proc
    output: str  # its stdout


def measure(command: Sequence[object]) -> Measured:
    """Run a command to its end. Raises ValueError if it fails."""
    start = time.perf_counter()
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        with PeakMemory(child.pid) as memory:
            output, _ = child.communicate()
    if child.returncode:
        raise ValueError(f"{' '.join(words[:4])} ... failed; see above")
    return Measured(time.perf_counter() - start, memory.gib, output)


class PeakMemory:
    """Watch the memory of a process and its descendants while the block runs."""

    def __init__(self, process: int):
        self.process, self.peak = process, resident(process)
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()

    def _watch(self) -> None:
        while not self.done.wait(0.2):
            self.peak = max(self.peak, resident(self.process))

    @property
    def gib(self) -> float:
        return self.peak / 2**30


def resident(process: int) -> int:
    """Sum the memory of a process and its descendants, counting shared pages once (Linux)."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(fields[1])
    family = {process}
    size = 0
    while len(family) > size:  # until no more children are added
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    kilobytes = 0
    for member in family & parents.keys():
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
            kilobytes += int(rollup.split("Pss:")[1].split()[0])
        except (OSError, IndexError):  # it has ended
            continue
    return kilobytes * 1024


def conditions(device: torch.device) -> str:
    """Describe the machine and the versions in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    described = {
        "processor": processor(),
        "cores": available_cores(),
        "device": name,
        "bfloat16": has_bfloat16(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return ", ".join(f"{name}: {value}" for name, value in described.items())


def processor() -> str:
    """Return the processor's name on Linux, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
