"""Devices, and the threads that work beside them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T, R = TypeVar("T"), TypeVar("R")


def pick_device(name: torch.device | str | None = None) -> torch.device:
    """The device called `name`, or the accelerator if there is one, or the CPU.

    Raises ValueError if the device is not there.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" exists but computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} is not there; leave --device out for the best there is"
        ) from error
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # With AVX-512's own bfloat16 products, or AMX tiles; on other processors it is emulated.
    fast = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in fast)


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU; 0 for a device that keeps none apart from the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A copy to a GPU is queued there, and nobody waits for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def worker_threads(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads for reading, preprocessing and pictures; all cores unless `workers` says otherwise.

    The work is done in libraries that release the interpreter, each on one core a thread.
    """
    # PyTorch hands the last number set by any thread to the next that asks, so that the caller's
    # own must be read before, and set again after, or it would go on with one core.
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int | None = None
) -> Iterator[R]:
    """`map` by threads that work at most four items ahead, so that memory stays small."""
    with worker_threads(workers) as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > min(workers or os.cpu_count() or 1, 4):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def in_groups(items: Iterable[T], size: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """The items, in their order, in groups whose sizes add up to `least`, but for the last."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= least:
            yield group
            group, total = [], 0
    if group:
        yield group
