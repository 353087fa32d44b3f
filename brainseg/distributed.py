"""Several ranks that work on one task, started by torchrun: one per GPU, or several on a CPU.

Usually there is only one process: then the functions here change nothing. Every rank runs the same
program on its shard and meets the others only to exchange data, hosts through gloo, GPUs through
NCCL. Rank 0, the main process, prints and writes. A rank that fails says so in one sentence and
ends; the others end with torchrun, or when they lose their connection, or after TIMEOUT.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import local_rank, rank, world_size
from .io.files import check_writable, clear_leftovers, locked, out_of_memory, sentence

T = TypeVar("T")
Items = TypeVar("Items", Tensor, Sequence[Any])
TIMEOUT = timedelta(minutes=30)  # for a rank that no longer answers
PATIENCE = timedelta(days=1)  # for the rank that prepares data for the others
GRACE = 3.0  # seconds that a rank leaves to the one that failed first


def is_main_process() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the ranks that torchrun has started, if any; an error ends a rank with one sentence."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "RANK" not in os.environ:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        all_reduce_max(0)  # none leaves, say for bad arguments, while another is still joining
    except RuntimeError as error:
        raise ValueError(
            f"the {count} processes did not all start, or cannot connect; check torchrun's options"
        ) from error
    main = is_main_process()
    try:
        yield
        if not main:  # done; if another rank fails now, this one ends silently
            _end_on_sigterm()
        dist.destroy_process_group()
    except KeyboardInterrupt:
        if main:
            raise
        os._exit(1)  # the main process reports it
    except SystemExit:  # all ranks are here
        dist.destroy_process_group()
        raise
    except BaseException as error:
        _leave(error)


@contextlib.contextmanager
def main_process_locks(*places: tuple[Path, str, str]) -> Iterator[None]:
    """Lock each (folder, option, name) for this run (`locked`), and clear what killed runs left.

    No rank enters the block before.
    """
    with contextlib.ExitStack() as locks:
        if is_main_process():
            for folder, option, name in places:
                check_writable(folder)
                locks.enter_context(locked(folder, option, name))
                clear_leftovers(folder)
        barrier()
        yield


def _end_on_sigterm() -> None:
    """Let SIGTERM, which torchrun sends to end the other ranks, end this process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(error: BaseException) -> NoReturn:
    """Report the error, unless another rank has failed first, and end this process."""
    _end_on_sigterm()
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    lost = gloo or isinstance(error, dist.DistError)
    if lost:
        time.sleep(2 * GRACE)
        text = (
            f"rank {rank()} lost another of the {world_size()} ranks; see above for the message of "
            "that rank or torchrun. Files are complete as last written"
        )
    else:
        text = "".join(traceback.format_exception(error))
        if isinstance(error, (ValueError, OSError)) or out_of_memory(error):
            text = sentence(error)
        if not is_main_process():
            time.sleep(GRACE)
    print(f"error: {text}", file=sys.__stderr__, flush=True)
    os._exit(1)  # an orderly end would wait for the other ranks


@contextlib.contextmanager
def only_main_process_prints() -> Iterator[None]:
    """Silence the other ranks: their output and progress bars."""
    with contextlib.ExitStack() as silence:
        if int(os.environ.get("RANK", 0)) > 0 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block on the first rank of each machine, then on the others, which use its cache."""
    if world_size() == 1:
        yield
        return
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    if local_rank() != 0:
        dist.barrier(group)
    yield
    if local_rank() == 0:
        dist.barrier(group)


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_max(0)


def shard(items: Items) -> Items:
    """Return this rank's part of `items`: of n ranks, each takes every n-th."""
    return items[rank() :: world_size()]


def shard_of_batch(batch: Items) -> Items:
    """Return `shard`, or if it is empty the first item: every rank must compute a step."""
    if len(batch) <= rank():
        return batch[:1]
    return shard(batch)


def gather(items: Sequence[T]) -> list[T]:
    """Collect the items of every rank, in their order before `shard`."""
    if world_size() == 1:
        return list(items)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    gathered = []
    for i in range(sum(map(len, parts))):
        gathered.append(parts[i % len(parts)][i // len(parts)])
    return gathered


def all_reduce_max(number: int) -> int:
    """Return the largest of the ranks' numbers; hosts wait for it, GPUs keep working."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


class _AllReduceSum(torch.autograd.Function):
    # PyTorch's own, torch.distributed.nn.functional.all_reduce, is deprecated since 2.13 in favour
    # of a private one; it also adds up the gradients, which are equal here, in another exchange.
    @staticmethod
    def forward(context: Any, sums: Tensor) -> Tensor:
        sums = sums.clone()
        dist.all_reduce(sums)
        return sums

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * world_size()  # DistributedDataParallel takes the mean of the gradients


def all_reduce_sum(sums: Tensor) -> Tensor:
    """Add up `sums` over the ranks, with a gradient.

    A loss computed from them has the value of the whole batch on every rank, and
    DistributedDataParallel ends up with the gradient of the whole batch.
    """
    if world_size() == 1:
        return sums
    return _AllReduceSum.apply(sums)  # pyright: ignore[reportReturnType] its stub says Any | None


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every rank the main process's buffers, such as the statistics of batch norm."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
