"""Options and files that scripts share, seeds, worker threads, and the pictures."""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from config import ConfigParser

T, R = TypeVar("T"), TypeVar("R")
GREEN, RED = (0, 255, 0), (255, 0, 0)


def make_parser(doc: str) -> ConfigParser:
    """A parser whose --help is the script's docstring, then one line an option."""

    class Formatter(argparse.MetavarTypeHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str, **_: object):
            super().__init__(prog, max_help_position=32, width=100)

    parser = ConfigParser(usage="%(prog)s [options]", description=doc, formatter_class=Formatter)
    parser.add_argument("--config", type=Path, help="YAML or args.json with any of these settings")
    return parser


def add_segmenter_options(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """The options of every script that segments; `segmenter_options` reads them."""
    add = parser.add_argument_group("how").add_argument
    add("--image-size", type=int, help="side of a resized slice (as the weights were trained)")
    add("--threshold", type=float, default=0.5, help="least lesion probability (%(default)s)")
    add(
        "--largest-component",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep only the largest connected component (yes)",
    )
    add("--tta", action="store_true", help="average over each slice and its mirror image")
    add("--batch-size", type=int, default=16, help="slices at once (%(default)s)")
    add("--device", type=str, help="cuda, cuda:1, mps, cpu (an accelerator if there is one)")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (where the device is faster so)",
    )
    if workers:
        add("--workers", type=int, help="threads that read and write (all cores)")
    add(
        "--providers",
        type=str,
        nargs="+",
        choices=("tensorrt", "cuda", "cpu"),
        help="tensorrt, cuda, cpu: those of ONNX Runtime to run an .onnx file (all there are)",
    )


def segmenter_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """The options of a Segmenter; ends with a usage error for a value that could not work."""
    if min(args.batch_size, getattr(args, "workers", None) or 1) < 1:
        parser.error("--batch-size and --workers must be at least 1")
    if not 0 < args.threshold < 1:
        parser.error("--threshold is a probability between 0 and 1")
    names = "image_size threshold largest_component tta batch_size device amp providers".split()
    return {name: getattr(args, name) for name in names}


def plain(args: argparse.Namespace) -> dict:
    """The arguments as JSON and a checkpoint can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def provenance(args: argparse.Namespace) -> dict:
    """What args.json says of a run: its arguments (a valid --config), the code and libraries."""
    versions = {}
    for name in ("torch", "numpy", "scikit-image", "medpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"args": plain(args), "commit": git_commit(), "versions": versions}


def git_commit() -> str | None:
    """The commit of this repository, marked if files differ from it; None outside of git."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_generator(seed: int, *stream: int) -> torch.Generator:
    """A generator on the CPU for one stream of draws, e.g. `make_generator(seed, epoch)`.

    Every stream is independent of the others and can be made again at any time, which is what
    lets an interrupted training go on with the draws that it would have made.
    """
    (state,) = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A copy to a GPU is queued there, and nobody waits for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next allocations, where glibc is used.

    Otherwise each large tensor is mapped anew, and its pages are cleared as they are touched.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` once the block is through.

    If the block fails, or the disk is full, what was at `path` is still there, untouched.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stem, *_ = path.name.partition(".")
        handle, name = tempfile.mkstemp(  # with the suffix, .nii.gz say, as writers go by it
            dir=path.parent, prefix=f".{stem}-", suffix=path.name[len(stem) :]
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
    """Dicts as the lines of a CSV file, written whole; a key that one lacks is left empty."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def write_json(path: Path, content: dict) -> None:
    """Indented JSON, written whole; NaN, which JSON does not know, becomes null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(strict, indent=2) + "\n")


def read_scores(path: Path, names: Iterable[str]) -> dict[str, dict]:
    """By case, `trained_on` (bool) and `names` (float) of a metrics.csv that inference.py wrote.

    Raises OSError, or ValueError, naming the file, if it is none or lacks a column.
    """
    wrong = f"{path}: is not a metrics.csv that inference.py wrote"
    try:
        with naming(path), open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise ValueError(wrong) from error
    if not lines or None in lines[0] or not {"case", "trained_on"} <= lines[0].keys():
        raise ValueError(wrong)
    if lacking := [name for name in names if name not in lines[0]]:
        raise ValueError(f"{path}: has no column {lacking[0]}; run inference.py again to make it")
    scores = {}
    for line in lines:
        if line["case"] in scores:
            raise ValueError(f"{path}: scores {line['case']} twice; give one line a case")
        try:
            seen = {"0": False, "1": True}[line["trained_on"]]
            row = {"trained_on": seen, **{name: float(line[name]) for name in names}}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its line of {line['case']} is damaged") from error
        scores[line["case"]] = row
    return scores


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
            raise KeyboardInterrupt
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

    Small slices are enlarged by the whole number that brings their longer side nearest to `side`.
    """
    times = max(1, round(side / max(grey.shape[1:])))
    grey, prediction, truth = (
        array if array is None else array.repeat(times, axis=1).repeat(times, axis=2)
        for array in (grey, prediction, truth)
    )
    pictures = np.repeat(grey[..., None], 3, axis=-1)
    if truth is not None:
        pictures[edge(truth)] = GREEN
    pictures[edge(prediction)] = RED
    return pictures


def montage(pictures: np.ndarray) -> np.ndarray:
    """Pictures (S, H, W, 3) as one, side by side on a grid that is about square."""
    count, height, width, _ = pictures.shape
    columns = max(1, round(math.sqrt(count * height / width)))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, *pictures.shape[1:]), pictures.dtype)
    cells[:count] = pictures
    cells = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, 3)


def save_gif(path: Path | str, pictures: np.ndarray, seconds: float = 0.12) -> None:
    """An endless GIF of pictures (S, H, W, 3), `seconds` a slice."""
    import imageio.v3 as iio

    with written_whole(path) as temporary:
        iio.imwrite(temporary, pictures, duration=int(1000 * seconds), loop=0)


def save_dsc_figure(path: Path | str, scores: dict[str, float], marked: Sequence[str] = ()) -> None:
    """Horizontal bars of each case's DSC, sorted, with mean and median; `marked` cases are pale.

    The marked ones, cases of patients that the weights were trained on, do not count in mean and
    median.
    """
    from matplotlib.figure import Figure

    names = sorted(scores, key=scores.get)
    counted = [scores[name] for name in names if name not in marked]
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#b9c6d3" if name in marked else "#4c78a8" for name in names]
    axes.barh(names, [scores[name] for name in names], color=colours)
    if counted:
        mean, median = np.mean(counted), np.median(counted)
        axes.axvline(mean, color="#e4572e", label=f"mean {mean:.3f}")
        axes.axvline(median, color="#2e933c", ls="--", label=f"median {median:.3f}")
    if marked:
        axes.plot([], [], "s", color="#b9c6d3", label="trained on, not counted")
    axes.set(xlim=(0, 1), xlabel="DSC per volume", ylim=(-0.6, len(names) - 0.4))
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)
