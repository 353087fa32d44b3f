"""Seeds, signals, and what a run was made with."""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from brainseg.io.files import MARK


def make_generator(seed: int, *stream: int) -> torch.Generator:
    """Make a CPU generator for one stream of draws, e.g. `make_generator(seed, epoch)`.

    Streams are independent and can be remade at any time, so an interrupted training continues
    with the draws that it would have made.
    """
    (state,) = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep freed memory, if the CPU computes, as mapping each tensor afresh is slow."""
    if device.type != "cpu":
        return
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped separately
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def sigterm_interrupts() -> AbstractContextManager[None]:
    """Make SIGTERM raise KeyboardInterrupt within the block, as Ctrl-C does (main thread only)."""
    return _handlers({signal.SIGTERM: signal.default_int_handler})


class Interruption(ExitStack):
    """Note the first SIGINT or SIGTERM within the block, so that a step can finish first."""

    signal = 0  # none yet

    def __enter__(self) -> Interruption:
        self.enter_context(_handlers({signal.SIGINT: self._note, signal.SIGTERM: self._note}))
        return self

    def _note(self, number: int, _frame: object) -> None:
        if self.signal:  # asked twice: do not wait
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def _handlers(handlers: dict[int, Callable]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cudnn(deterministic: bool) -> Iterator[None]:
    """Make cuDNN deterministic, or let it try which algorithm is the fastest."""
    flags = torch.backends.cudnn
    before = flags.deterministic, flags.benchmark
    flags.deterministic, flags.benchmark = deterministic, not deterministic
    try:
        yield
    finally:
        flags.deterministic, flags.benchmark = before


def plain(args: argparse.Namespace) -> dict:
    """Convert the arguments to types that JSON and a checkpoint can hold."""
    return json.loads(json.dumps(vars(args), default=str))


def provenance(args: argparse.Namespace) -> dict:
    """Describe a run for args.json: arguments (a valid --config), commit and versions."""
    versions = {}
    for name in ("torch", "numpy", "scikit-image", "medpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"program": MARK, "args": plain(args), "commit": git_commit(), "versions": versions}


def git_commit() -> str | None:
    """Return the commit of this repository, marked if files differ; None outside git."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
