"""Preprocessed volumes, kept on disk.

Volumes are read and preprocessed once, on all cores, kept in half precision and mapped into
memory: a second start takes seconds, and a data set larger than memory still trains. A stale or
damaged entry is made again. The folder may be deleted at any time.

A file whose size, time and first and last bytes are as recorded is trusted without reading the
rest. One with a different time, such as a copy, is checked against its checksum once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from .devices import worker_threads
from .io.files import (
    clear_leftovers,
    default_cache,
    disk_is_full,
    remove,
    save_array,
    scratch,
    sentence,
)
from .io.slices import Case, errors_name
from .preprocess import VERSION, Frame, preprocess, preprocess_mask

C, R = TypeVar("C"), TypeVar("R")
ARRAYS = ("images", "mask", "truth")
ENTRY = {"entry.json", *(f"{name}.npy" for name in ARRAYS)}  # the files of an entry
FIELDS = {"fingerprint", "frame", "checksums"}  # of every entry.json
# numpy parses a file's header with ast, which no two threads may use at once in Python 3.11
# (https://github.com/python/cpython/issues/106905).
ONE_AT_A_TIME = threading.Lock()
ENDS = 1 << 12  # bytes at either end of a file that are read at every start
TRUTH = "grey masks are cut at half"  # entries whose truth was made otherwise are stale
REVISED = {2: "2, air amid tissue is background, and so is fill"}  # entries made before are stale


class CacheError(ValueError):
    """The cache folder cannot be used; the fault is not in a case."""


@dataclass(frozen=True)
class Prepared:
    """One preprocessed case. `images` and `mask` are mapped from disk."""

    case: Case
    frame: Frame
    images: np.ndarray  # (S, C, N, N) float16
    mask: np.ndarray  # (S, N, N) bool
    truth: np.ndarray  # (S, H, W) bool, in the source geometry

    @property
    def name(self) -> str:
        return self.case.name


def prepare(
    cases: Sequence[Case],
    image_size: int = 256,
    cache: Path | str | None = None,
    workers: int | None = None,
    progress: bool = False,
    version: int = VERSION,
    skip_bad: bool = False,
) -> list[Prepared]:
    """Preprocess every case with `workers` threads, or take it from the cache.

    `version` is that of the preprocessing. A case that cannot be read raises ValueError or
    OSError; with `skip_bad`, it is named on stderr and left out.
    """
    cache = Path(cache) if cache else default_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{cache}: cannot be created; name another folder with --cache") from error
    clear_leftovers(cache)
    one = partial(_prepare_one, image_size=image_size, version=version, cache=cache)
    one = partial(unless_bad, one) if skip_bad else one
    with worker_threads(workers) as pool:
        quiet = None if progress else True  # None: quiet unless on a terminal
        bar = tqdm(pool.map(one, cases), "preprocessing", len(cases), unit="case", disable=quiet)
        done = list(bar)
    return [volume for volume in done if volume is not None]


def unless_bad(work: Callable[[C], R], case: C) -> R | None:
    """Call `work` on a case; if it cannot be read, say so on stderr and return None."""
    try:
        return work(case)
    except CacheError:
        raise
    except (ValueError, OSError) as error:
        tqdm.write(f"left out: {sentence(error)}", file=sys.stderr)
        return None


def _prepare_one(case: Case, image_size: int, version: int, cache: Path) -> Prepared:
    source = [case.folder.resolve(), image_size]
    if version > 1:
        source.append(version)
    if case.labels.chosen:
        source.append(case.labels.chosen)
    if case.picked:
        source.append(case.picked)
    # Masks of several readers, in separate folders, are separate entries.
    beside = {case.folder.resolve(), case.folder.resolve().parent}
    source += sorted({path.resolve().parent for path in case.masks} - beside)
    key = hashlib.sha256(" ".join(map(str, source)).encode()).hexdigest()[:16]
    entry = cache / f"{case.name}-{key}"
    fingerprint = _fingerprint(case, image_size, version)
    prepared = _open_entry(entry, case, fingerprint)
    if prepared is None:
        with errors_name(case.folder):
            prepared = _make_entry(entry, case, fingerprint, image_size, version)
    return prepared


def _fingerprint(case: Case, image_size: int, version: int) -> str:
    """Identify what an entry is made from: the settings, and each file by place, size and time."""
    files = []
    for path in case.files:
        about = path.stat()
        files.append((str(path.resolve()), about.st_size, about.st_mtime_ns))
    revisions = REVISED.get(version, version), TRUTH
    settings = [revisions, image_size, case.aspect, files, case.labels.chosen]
    if case.picked:
        settings.append(case.picked)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _open_entry(entry: Path, case: Case, fingerprint: str) -> Prepared | None:
    """Open a cached volume; None if it is missing, stale or damaged."""
    try:
        about = _read_entry(entry)
        sums = about["checksums"]
        if (about["fingerprint"], sums["frame"]) != (fingerprint, _frame_checksum(about["frame"])):
            return None
        stats = _of_arrays(_stat, entry)
        if stats != about.get("stats"):
            if not _of_arrays(_checksum, entry).items() <= sums.items():
                return None
            about |= {"stats": stats, "source": str(case.folder.resolve())}
            with suppress(OSError), scratch(entry.parent) as folder:
                (folder / "entry.json").write_text(json.dumps(about))
                (folder / "entry.json").replace(entry / "entry.json")
        arrays = _of_arrays(_map, entry)
        if _read_entry(entry)["fingerprint"] != fingerprint:  # replaced by another process
            return None
        frame = {k: tuple(v) if isinstance(v, list) else v for k, v in about["frame"].items()}
        case.labels.note(case.name, about.get("labels", ()))
        return Prepared(case, Frame(**frame), **arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _of_arrays(function: Callable[[Path], R], entry: Path) -> dict[str, R]:
    """Call a function on the file of each array of an entry."""
    return {name: function(entry / f"{name}.npy") for name in ARRAYS}


def _map(path: Path) -> np.ndarray:
    """Map the array in a .npy file into memory, copy-on-write.

    np.load keeps the file open as long as its array, and a process may only open about 1000;
    torch.from_file closes it.
    """
    with ONE_AT_A_TIME:
        about = np.load(path, mmap_mode="r")
    size = about.offset + about.nbytes
    mapped = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
    return np.ndarray(about.shape, about.dtype, mapped, about.offset, about.strides)


def _stat(path: Path) -> list[int]:
    """Return the size, modification time in ns, and CRC-32 of both ends of a file."""
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        ends = file.read(ENDS)
        file.seek(max(0, about.st_size - ENDS))
        return [about.st_size, about.st_mtime_ns, zlib.crc32(file.read(), zlib.crc32(ends))]


def prune(cache: Path | str | None = None) -> tuple[int, int]:
    """Delete entries whose sources are gone; return how many, and their bytes.

    What is not an entry by its content, or does not name a source, is kept.
    """
    cache = Path(cache) if cache else default_cache()
    clear_leftovers(cache)
    stale = [entry for entry in cache.glob("*") if _is_stale(entry)]
    freed = sum(path.stat().st_size for entry in stale for path in entry.iterdir())
    for entry in stale:
        remove(entry, _is_entry)
    return len(stale), freed


def _is_stale(entry: Path) -> bool:
    try:
        return _is_entry(entry) and not Path(_read_entry(entry)["source"]).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_entry(folder: Path) -> bool:
    """Tell whether a folder is an entry by its entry.json, and holds nothing else."""
    return _holds_only_ours(folder) and FIELDS <= _read_entry(folder).keys()


def _holds_only_ours(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= ENTRY


def _read_entry(entry: Path) -> dict:
    about = json.loads((entry / "entry.json").read_text())
    return about if isinstance(about, dict) else {}


def _make_entry(
    entry: Path, case: Case, fingerprint: str, image_size: int, version: int
) -> Prepared:
    volume, truth = case.read_pair()
    try:
        images, frame = preprocess(volume, image_size, version, aspect=case.aspect)
    except ValueError as error:
        raise ValueError(f"{case.folder}: {error}") from error
    arrays = {
        "images": images.half().numpy(),
        "mask": preprocess_mask(truth, frame).numpy(),
        "truth": truth,
    }
    about = {
        "fingerprint": fingerprint,
        "source": str(case.folder.resolve()),
        "labels": case.labels.by_case.get(case.name, []),
        "frame": asdict(frame),
    }
    try:
        _write_entry(entry, about, arrays)
        return _open_entry(entry, case, fingerprint) or Prepared(case, frame, **arrays)
    except OSError as error:
        made = _open_entry(entry, case, fingerprint)
        if made:  # by another process meanwhile
            return made
        remedy = "free space or name" if disk_is_full(error) else "name"
        raise CacheError(
            f"{entry.parent}: cannot keep preprocessed volumes ({error.strerror}); {remedy} "
            "another folder with --cache"
        ) from error


def _write_entry(entry: Path, about: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write an entry in place of a stale one.

    Raises OSError, or CacheError if the stale one holds other files.
    """
    with scratch(entry.parent) as folder:
        new = folder / entry.name  # unlike the scratch folder, it follows the umask
        new.mkdir()
        for name, array in arrays.items():
            save_array(new / f"{name}.npy", array)
        sums = _of_arrays(_checksum, new) | {"frame": _frame_checksum(about["frame"])}
        about = about | {"checksums": sums, "stats": _of_arrays(_stat, new)}
        (new / "entry.json").write_text(json.dumps(about))
        try:  # its name is the hash of the source: with no other file in it, it is ours
            remove(entry, _holds_only_ours)
        except ValueError as error:
            raise CacheError(str(error)) from error
        new.rename(entry)


def _frame_checksum(frame: dict) -> int:
    return zlib.crc32(json.dumps(frame).encode())


def _checksum(path: Path) -> int:
    """Compute the CRC-32 of a file, piece by piece to save memory."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value
