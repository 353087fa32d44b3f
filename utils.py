"""Seeds, signals and settings of the process."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch


def make_generator(seed: int, *stream: int) -> torch.Generator:
    """Make a CPU generator for one stream of draws, e.g. `make_generator(seed, epoch)`.

    Streams are independent and can be remade at any time, so an interrupted training continues
    with the draws that it would have made.
    """
    (state,) = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc, if in use, keep freed memory for the next allocations, if the CPU computes.

    Otherwise each large tensor is mapped afresh, and its pages are cleared when first touched.
    """
    if device.type != "cpu":
        return
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped separately
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt within the block, as Ctrl-C does.

    Signals can be caught only in the main thread; in another thread nothing changes.
    """
    with _handlers({signal.SIGTERM: signal.default_int_handler}):
        yield


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
