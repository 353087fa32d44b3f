"""Seeds, files written whole, worker threads, and the pictures."""

from __future__ import annotations

import argparse
import csv
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch

T, R = TypeVar("T"), TypeVar("R")
GREEN, RED = (0, 255, 0), (255, 0, 0)


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help is the script's docstring, then one line an option."""

    class Formatter(argparse.MetavarTypeHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str, **_: object):
            super().__init__(prog, max_help_position=32, width=100)

    return argparse.ArgumentParser(
        usage="%(prog)s [options]", description=doc, formatter_class=Formatter
    )


def make_generator(seed: int, *stream: int) -> torch.Generator:
    """A generator on the CPU for one stream of draws, e.g. `make_generator(seed, epoch)`.

    Every stream is independent of the others and can be made again at any time, which is what
    lets an interrupted training go on with the draws that it would have made.
    """
    (state,) = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` once the block is through.

    If the block fails, or the disk is full, what was at `path` is still there, untouched.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """Dicts of the same keys as a CSV file with a header, written whole."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have every OSError of the block name `path`, not a temporary file or none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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


def check_writable(folder: Path) -> None:
    """Make `folder` if need be; OSError, naming it, if no file can be written there."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


class Interruption:
    """Remembers the first SIGINT or SIGTERM, so that the step under way can be finished first."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None:  # asked twice: wait for nothing
            sys.exit(128 + number)
        self.signal = number


def sentence(error: BaseException | str) -> str:
    """What an error says, as one sentence that names its file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def fail(error: BaseException | str) -> NoReturn:
    """End the program with one sentence on stderr and exit status 1."""
    sys.exit(f"error: {sentence(error)}")


def to_grey(volume: np.ndarray) -> np.ndarray:
    """FLAIR (channel 1 of 3, or the only one) of a volume (S, H, W, C) as (S, H, W) uint8."""
    flair = volume[..., 1 if volume.shape[-1] >= 2 else 0].astype(np.float32)
    low, high = flair.min(), np.percentile(flair, 99.8)
    return (255 * np.clip((flair - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)


def edge(mask: np.ndarray) -> np.ndarray:
    """The voxels of each slice of a bool mask (S, H, W) that touch its outside (4 neighbours)."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask & ~inner


def outline(
    grey: np.ndarray, prediction: np.ndarray, truth: np.ndarray | None = None, side: int = 1
) -> np.ndarray:
    """Slices (S, H, W) uint8 as RGB (S, H, W, 3): green truth, red prediction on top.

    Small slices are enlarged by the whole number that brings their shorter side nearest to `side`.
    """
    times = max(1, round(side / min(grey.shape[1:])))
    grey, prediction, truth = (
        array if array is None else array.repeat(times, axis=1).repeat(times, axis=2)
        for array in (grey, prediction, truth)
    )
    pictures = np.repeat(grey[..., None], 3, axis=-1)
    if truth is not None:
        pictures[edge(truth)] = GREEN
    pictures[edge(prediction)] = RED
    return pictures


def save_gif(path: Path | str, pictures: np.ndarray, seconds: float = 0.12) -> None:
    """An endless GIF of pictures (S, H, W, 3), `seconds` a slice."""
    import imageio.v3 as iio

    with written_whole(path) as temporary:
        iio.imwrite(temporary, pictures, duration=int(1000 * seconds), loop=0)


def save_dsc_figure(path: Path | str, scores: dict[str, float], marked: Sequence[str] = ()) -> None:
    """Horizontal bars of each case's DSC, sorted, with mean and median; `marked` cases are pale.

    The marked ones (cases that the weights were trained on) do not count in mean and median.
    """
    from matplotlib.figure import Figure

    names = sorted(scores, key=scores.get)
    counted = [scores[name] for name in names if name not in marked] or list(scores.values())
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#b9c6d3" if name in marked else "#4c78a8" for name in names]
    axes.barh(names, [scores[name] for name in names], color=colours)
    axes.axvline(np.mean(counted), color="#e4572e", label=f"mean {np.mean(counted):.3f}")
    axes.axvline(
        np.median(counted), color="#2e933c", ls="--", label=f"median {np.median(counted):.3f}"
    )
    axes.set(xlim=(0, 1), xlabel="DSC per volume", ylim=(-0.6, len(names) - 0.4))
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)
