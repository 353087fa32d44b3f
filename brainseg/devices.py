"""Devices, and the threads that work alongside them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:  # torch.hub's bare networks need no NumPy
    import numpy as np

T = TypeVar("T")
R = TypeVar("R")


def pick_device(name: torch.device | str | None = None) -> torch.device:
    """Return the device `name` (None: the accelerator, if any); ValueError if it is missing."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" exists but computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} is not available; leave out --device to use the best one"
        ) from error
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Fast with AVX-512's bfloat16 products or AMX tiles; other CPUs emulate it.
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported and supported():
            return True
    return False


def half_precision(device: torch.device) -> torch.dtype:
    """Choose the data type of --amp: float16 on a CUDA card without bfloat16, else bfloat16."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def available_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Return a GPU's free memory in bytes; 0 for a device that shares the host's."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to `device`; a copy to a GPU is queued there without waiting for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def concatenate(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Concatenate arrays (S, ...) on `device`, moving one at a time to save memory."""
    shape = (sum(map(len, arrays)),) + arrays[0].shape[1:]
    joined = torch.from_numpy(arrays[0]).new_empty(shape, device=device)
    start = 0
    for array in arrays:
        joined[start : start + len(array)].copy_(torch.from_numpy(array))
        start += len(array)
    return joined


@contextmanager
def worker_threads(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Start threads, each on one core: `workers`, or one per available core."""
    # PyTorch gives the last number that any thread has set to the next that asks: without a reset,
    # the caller would continue on one core.
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers or available_cores(), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int | None = None
) -> Iterator[R]:
    """Work like `map`, in threads; only `workers` results may wait to be taken, to save memory."""
    workers = workers or available_cores()
    with worker_threads(workers) as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
