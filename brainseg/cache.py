"""Preprocessed volumes, kept on disk in half precision and mapped into memory.

A second start takes seconds, and a data set larger than memory still trains. A stale or damaged
entry is made again; the folder may be deleted at any time. A file whose size, time and first and
last bytes are as recorded is trusted; one of another time, such as a copy, is read whole once.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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
    with_archives,
)
from .io.slices import Case, errors_name
from .preprocess import VERSION, Frame, preprocess, preprocess_mask

C = TypeVar("C")
R = TypeVar("R")
ARRAYS = ("images", "mask", "truth")
ENTRY = {"entry.json", "images.npy", "mask.npy", "truth.npy"}  # the files of an entry
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
    version: int = VERSION,
    skip_bad: bool = False,
) -> list[Prepared]:
    """Preprocess every case with `workers` threads, or take it from the cache.

    `version` is that of the preprocessing. A case that cannot be read raises ValueError or
    OSError; with `skip_bad`, it is named on stderr and left out.
    """
    cache = Path(cache or default_cache())
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{cache}: cannot be created; name another folder with --cache") from error
    clear_leftovers(cache)
    work = partial(_prepare, image_size=image_size, version=version, cache=cache)
    if skip_bad:
        work = partial(unless_bad, work)
    with worker_threads(workers) as pool:
        volumes = pool.map(work, cases)
        bar = tqdm(volumes, "preprocessing", len(cases), unit="case", disable=None)
        return [volume for volume in bar if volume is not None]


def unless_bad(work: Callable[[C], R], case: C) -> R | None:
    """Call `work` on a case; if it cannot be read, say so on stderr and return None."""
    try:
        return work(case)
    except CacheError:
        raise
    except (ValueError, OSError) as error:
        tqdm.write(f"left out: {sentence(error)}", file=sys.stderr)
        return None


def _prepare(case: Case, image_size: int, version: int, cache: Path) -> Prepared:
    entry = cache / f"{case.name}-{_key(case, image_size, version)}"
    fingerprint = _fingerprint(case, image_size, version)
    prepared = _open_entry(entry, case, fingerprint)
    if prepared is None:
        with errors_name(case.folder):
            prepared = _make_entry(entry, case, fingerprint, image_size, version)
    return prepared


def _key(case: Case, image_size: int, version: int) -> str:
    """Tell entries of a case apart: by its place, the settings, and the folders of its masks."""
    folder = case.folder.resolve()
    parts = [_place(folder), str(image_size)]
    if version > 1:
        parts.append(str(version))
    if case.labels.chosen:
        parts.append(str(case.labels.chosen))
    if case.picked:
        parts.append(str(case.picked))
    mask_folders = {path.resolve().parent for path in case.masks}
    for mask_folder in sorted(mask_folders - {folder, folder.parent}):
        parts.append(_place(mask_folder))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _place(path: Path) -> str:
    """Return where a file or folder lies: of one from an archive, in the archive."""
    return str(Path(with_archives(str(path.resolve()))).resolve())


def _fingerprint(case: Case, image_size: int, version: int) -> str:
    """Identify what an entry is made from: the settings, and each file by place, size and time."""
    files = []
    for path in case.files:
        stat = path.stat()
        files.append((_place(path), stat.st_size, stat.st_mtime_ns))
    revisions = REVISED.get(version, version), TRUTH
    settings = [revisions, image_size, case.aspect, files, case.labels.chosen]
    if case.picked:
        settings.append(case.picked)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _open_entry(entry: Path, case: Case, fingerprint: str) -> Prepared | None:
    """Open a cached volume; None if it is missing, stale or damaged."""
    try:
        record = _read_record(entry)
        checksums = record["checksums"]
        changed = checksums["frame"] != _checksum_of(record["frame"])
        if changed or record["fingerprint"] != fingerprint:
            return None
        stats = _of_arrays(_stat, entry)
        if stats != record.get("stats"):  # a copy, or of an older version
            if not _of_arrays(_checksum, entry).items() <= checksums.items():
                return None
            record |= {"stats": stats, "source": _place(case.folder)}
            with suppress(OSError), scratch(entry.parent) as folder:
                (folder / "entry.json").write_text(json.dumps(record))
                (folder / "entry.json").replace(entry / "entry.json")
        arrays = _of_arrays(_map, entry)
        if _read_record(entry)["fingerprint"] != fingerprint:  # replaced by another process
            return None
        frame: dict[str, Any] = {}
        for name, value in record["frame"].items():
            frame[name] = tuple(value) if isinstance(value, list) else value
        case.labels.note(case.name, record.get("labels", ()))
        return Prepared(case, Frame(**frame), arrays["images"], arrays["mask"], arrays["truth"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _of_arrays(function: Callable[[Path], R], entry: Path) -> dict[str, R]:
    """Call a function on the file of each array of an entry."""
    return {name: function(entry / f"{name}.npy") for name in ARRAYS}


def _map(path: Path) -> np.ndarray:
    """Map the array in a .npy file into memory, copy-on-write."""
    # np.load keeps the file open as long as its array, and a process may only open about 1000.
    with ONE_AT_A_TIME:
        array = np.load(path, mmap_mode="r")
    size = array.offset + array.nbytes
    mapped = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
    return np.ndarray(array.shape, array.dtype, mapped, array.offset, array.strides)


def _stat(path: Path) -> list[int]:
    """Return the size, modification time in ns, and CRC-32 of both ends of a file."""
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        start = file.read(ENDS)
        file.seek(max(0, stat.st_size - ENDS))
        return [stat.st_size, stat.st_mtime_ns, zlib.crc32(file.read(), zlib.crc32(start))]


def prune(cache: Path | str | None = None) -> str:
    """Delete entries that name a source which is gone; say how many. Other files are kept."""
    cache = Path(cache or default_cache())
    count, freed = 0, 0
    for entry in list(cache.glob("*")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if _is_entry(entry) and not _exists(_read_record(entry)["source"]):
                size = sum(path.stat().st_size for path in entry.iterdir())
                shutil.rmtree(entry)
                count, freed = count + 1, freed + size
    return f"cache: deleted {count} volumes whose sources are gone ({freed / 2**30:.1f} GiB)"


def _exists(source: str) -> bool:
    """Tell whether a folder or file exists, or the archive that it is in."""
    path = Path(source)
    return path.exists() or any(parent.is_file() for parent in path.parents)


def _is_entry(folder: Path) -> bool:
    return _holds_only_ours(folder) and FIELDS <= _read_record(folder).keys()


def _holds_only_ours(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= ENTRY


def _read_record(entry: Path) -> dict:
    record = json.loads((entry / "entry.json").read_text())
    return record if isinstance(record, dict) else {}


def _make_entry(
    entry: Path, case: Case, fingerprint: str, image_size: int, version: int
) -> Prepared:
    volume, truth = case.read_pair()
    try:
        images, frame = preprocess(volume, image_size, version, aspect=case.aspect)
    except ValueError as error:
        raise ValueError(f"{case.folder}: {error}") from error
    mask = preprocess_mask(truth, frame).numpy()
    prepared = Prepared(case, frame, images.half().numpy(), mask, truth)
    record = {
        "fingerprint": fingerprint,
        "source": _place(case.folder),
        "labels": case.labels.by_case.get(case.name, []),
        "frame": asdict(frame),
    }
    try:
        _write_entry(entry, record, prepared)
    except OSError as error:
        written = _open_entry(entry, case, fingerprint)
        if written:  # by another process meanwhile
            return written
        remedy = "free space or name" if disk_is_full(error) else "name"
        raise CacheError(
            f"{entry.parent}: cannot keep preprocessed volumes ({error.strerror}); {remedy} "
            "another folder with --cache"
        ) from error
    return _open_entry(entry, case, fingerprint) or prepared


def _write_entry(entry: Path, record: dict, prepared: Prepared) -> None:
    """Write an entry in place of a stale one; OSError, or CacheError if that holds other files."""
    with scratch(entry.parent) as folder:
        new = folder / entry.name  # unlike the scratch folder, it follows the umask
        new.mkdir()
        for name in ARRAYS:
            save_array(new / f"{name}.npy", getattr(prepared, name))
        checksums = _of_arrays(_checksum, new)
        checksums["frame"] = _checksum_of(record["frame"])
        record |= {"checksums": checksums, "stats": _of_arrays(_stat, new)}
        (new / "entry.json").write_text(json.dumps(record))
        try:  # its name is the hash of the source: with no other file in it, it is ours
            remove(entry, _holds_only_ours)
        except ValueError as error:
            raise CacheError(str(error)) from error
        new.rename(entry)


def _checksum_of(frame: dict) -> int:
    return zlib.crc32(json.dumps(frame).encode())


def _checksum(path: Path) -> int:
    """Compute the CRC-32 of a file, piece by piece to save memory."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value
