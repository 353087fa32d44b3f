"""How benchmarks time, what they keep, and under which conditions."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone

import numpy as np
import torch

from brainseg.devices import has_bfloat16
from utils import git_commit

BATCH = 16
ROWS: list[dict] = []  # what was measured


def seconds(work: Callable[[], object], repeats: int = 1, warm: bool = True) -> float:
    """The median wall time of `work`, to the end on the device, after one that does not count."""
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


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def precisions(device: torch.device) -> dict[str, str]:
    """By the option that asks for it, each precision that is worth timing on the device."""
    return {"--no-amp": "float32"} | ({"--amp": "bfloat16"} if has_bfloat16(device) else {})


def one_thread(work: Callable[[], object]) -> Callable[[], object]:
    def limited() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work()
        torch.set_num_threads(threads)

    return limited


def row(name: str, ours: float, theirs: float | None, unit: str) -> None:
    ROWS.append({"what": name, "plain": theirs, "brainseg": ours, "unit": unit})
    ratio = f"{theirs / ours:.1f}" if theirs is not None else ""
    plain_time = f"{theirs:.4g}" if theirs is not None else ""
    print(f"| {name} | {plain_time} | {ours:.4g} | {unit} | {ratio} |", flush=True)


def conditions(args: argparse.Namespace, cases: list) -> dict:
    cuda = args.device.type == "cuda"
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
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
