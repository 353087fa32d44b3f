"""Several processes that work together, as torchrun starts them: one a GPU, or some on a processor.

One process alone is the usual case: then every function here gives back what it was given. Hosts
talk through gloo, GPUs through NCCL. Process 0 is the main one: it alone prints and writes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .io.files import sentence

T = TypeVar("T")


class SharedError(ValueError):
    """What went wrong in one process, raised in all of them."""


def rank() -> int:
    return dist.get_rank() if _started() else 0


def processes() -> int:
    return dist.get_world_size() if _started() else 1


def is_main() -> bool:
    return rank() == 0


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def local_rank() -> int:
    """The number of this process on its own machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank())) if _started() else 0


def local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes())) if _started() else 1


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has, until the block is left.

    The program ends with one sentence, and status 1, for an error that all share and for the loss
    of another process. Raises ValueError if the processes do not find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "RANK" not in os.environ:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:  # one may wait long for another that preprocesses; one that dies is noticed at once
        dist.init_process_group(backend, timeout=timedelta(days=1))
        largest(0)  # none leaves, for bad arguments say, while another is still joining
    except RuntimeError as error:
        raise ValueError(f"the {count} processes did not all start, or cannot connect") from error
    try:
        yield
    except (SharedError, SystemExit) as end:  # all processes are here
        main = is_main()
        dist.destroy_process_group()
        if isinstance(end, SystemExit):
            raise
        sys.exit(f"error: {end}" if main else 1)
    except KeyboardInterrupt:
        if is_main():
            raise
        sys.exit(1)
    except RuntimeError as error:
        if not _of_connection(error):
            raise
        print(
            f"error: process {rank()} lost another of the {count}: look above for what that one, "
            "or torchrun, says; files are whole, as they were last written",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly end would wait for the process that is lost
    else:
        dist.destroy_process_group()


def _of_connection(error: RuntimeError) -> bool:
    """Whether it is how gloo or NCCL says that another process no longer answers."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def only_main_speaks() -> Iterator[None]:
    """Silence the other processes: what they print, and their progress bars."""
    if int(os.environ.get("RANK", 0)) == 0 or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def own_device(name: str | None) -> str | None:
    """The device of this process: of several, each has a GPU of its machine to itself.

    Raises ValueError for more processes than GPUs, or if one GPU is named for all.
    """
    if processes() == 1:
        return name
    if name and ":" in name:
        raise ValueError(f"--device {name} is one for all processes; give --device cuda")
    if name not in (None, "cuda") or not torch.cuda.is_available():
        return name
    gpus = torch.cuda.device_count()
    if local_processes() > gpus:
        raise ValueError(
            f"{local_processes()} processes for {gpus} GPU(s); "
            f"start torchrun with --nproc-per-node={gpus}"
        )
    torch.cuda.set_device(local_rank())
    return f"cuda:{local_rank()}"


def own_workers(workers: int | None) -> int | None:
    """The number of threads asked for, or this process's part of the cores (None: all of them)."""
    if workers or processes() == 1:
        return workers
    return max(1, (os.cpu_count() or 1) // local_processes())


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of `items` that fall to this process: every n-th, from its own number on."""
    return items[rank() :: processes()]


def share_of_batch(batch: Sequence[T]) -> Sequence[T]:
    """As `share`; where nothing falls to this process, the first as a stand-in, not to be counted.

    So that every process has a slice to compute a step on, whatever the size of the batch.
    """
    return share(batch) if len(batch) > rank() else batch[:1]


def gather(own: Sequence[T]) -> list[T]:
    """The items of every process, in the order that they had before `share`."""
    parts = _all_of(list(own))
    count = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def _all_of(value: Any) -> list[Any]:
    """The value of each process, in order of their numbers."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def largest(number: int) -> int:
    """The largest of the processes' numbers. GPUs work on meanwhile; only the hosts wait."""
    if processes() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def together(work: Callable[[], T]) -> T:
    """What `work` gives; its ValueError or OSError in one process is raised in all of them.

    So no process waits for one that has given up, and what is wrong is said once.
    """
    if processes() == 1:
        return work()
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = sentence(error)
    for found in _all_of(problem):
        if found is not None:
            raise SharedError(found)
    return result


def in_main(work: Callable[[], T]) -> T | None:
    """What `work` gives in the main process, while the others wait for its end; None there."""
    return together(work if is_main() else lambda: None)


def one_first(work: Callable[[], T]) -> T:
    """As `together`, in one process of each machine first: the others find what it has cached."""
    first = local_rank() == 0
    early = together(work if first else lambda: None)
    late = together(work if not first else lambda: None)
    return early if first else late


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, sums: Tensor) -> Tensor:
        sums = sums.clone()
        dist.all_reduce(sums)
        return sums

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * processes()  # DistributedDataParallel takes the mean of the gradients


def total(sums: Tensor) -> Tensor:
    """`sums` added up over the processes.

    A loss that is a function of such sums has, in every process, the value of the whole batch, and
    DistributedDataParallel ends up with the gradient of the whole batch.
    """
    return _Total.apply(sums) if processes() > 1 else sums


def copy_buffers(model: torch.nn.Module) -> None:
    """Give every process the main one's buffers, such as the statistics of batch norm."""
    if processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
