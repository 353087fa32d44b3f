"""Pick the device, precision, memory, cores and threads of a process.

Under torchrun, it is one of several ranks, and has a share of the machine.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # torch.hub's bare networks need no NumPy
    import numpy as np

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


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


def rank_device(name: str | None) -> str | None:
    """Choose this rank's device, one GPU each; ValueError for too few GPUs, or one for all."""
    if world_size() == 1:
        return name
    if name and ":" in name:
        raise ValueError(f"--device {name} names one device for all processes; give --device cuda")
    if name not in (None, "cuda") or not torch.cuda.is_available():
        return name
    gpus, count, number = torch.cuda.device_count(), local_world_size(), local_rank()
    if count > gpus:
        raise ValueError(
            f"{count} processes for {gpus} GPU(s); start torchrun with --nproc-per-node={gpus}"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


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


def rank_workers(workers: int | None) -> int | None:
    """Return `workers`, or by default this rank's share of the cores (None: all of them)."""
    if workers or world_size() == 1:
        return workers
    return max(1, available_cores() // local_world_size())


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep freed memory, if the CPU computes, as mapping each tensor afresh is slow."""
    if device.type != "cpu":
        return
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped separately
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


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
