"""Preprocessed volumes, kept on disk.

Volumes are read and preprocessed once, by all cores, kept in half precision and mapped into
memory: a second start takes seconds, and a data set larger than memory still trains. An entry
that is stale or damaged is made anew; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .devices import worker_threads
from .io.files import default_cache
from .io.slices import Case
from .preprocess import VERSION, Frame, preprocess, preprocess_mask

ARRAYS = ("images", "mask", "truth")
# np.load parses a file's header with ast, which threads must not do at once in Python 3.11
# (https://github.com/python/cpython/issues/106905).
ONE_AT_A_TIME = threading.Lock()


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
) -> list[Prepared]:
    """Preprocess every case, by `workers` threads, or take it from the cache if it is sound there.

    `version` is that of the preprocessing.
    """
    cache = Path(cache) if cache else default_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{cache}: cannot be made; name another folder with --cache") from error
    with worker_threads(workers) as pool:
        jobs = pool.map(partial(_prepare_one, way=(image_size, version), cache=cache), cases)
        quiet = None if progress else True  # None: quiet unless on a terminal
        return list(tqdm(jobs, "preprocessing", len(cases), unit="case", disable=quiet))


def _prepare_one(case: Case, way: tuple[int, int], cache: Path) -> Prepared:
    image_size, version = way
    source = f"{case.folder.resolve()} {image_size}" + (f" {version}" if version > 1 else "")
    entry = cache / f"{case.name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    fingerprint = _fingerprint(case, image_size, version)
    return _open_entry(entry, case, fingerprint) or _make_entry(entry, case, fingerprint, way)


def _fingerprint(case: Case, image_size: int, version: int) -> str:
    """Changes with any source file's name, size or time, and with the settings."""
    files = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in case.files]
    files += [case.aspect] if case.aspect != 1 else []
    return hashlib.sha256(json.dumps([version, image_size, files]).encode()).hexdigest()


def _open_entry(entry: Path, case: Case, fingerprint: str) -> Prepared | None:
    """The cached volume, or None if it is missing, stale or damaged."""
    try:
        about = json.loads((entry / "entry.json").read_text())
        if about["fingerprint"] != fingerprint:
            return None
        if any(_checksum(entry / f"{name}.npy") != about["checksums"][name] for name in ARRAYS):
            return None
        if _frame_checksum(about["frame"]) != about["checksums"]["frame"]:
            return None
        with ONE_AT_A_TIME:
            arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in ARRAYS}
        frame = {k: tuple(v) if isinstance(v, list) else v for k, v in about["frame"].items()}
        return Prepared(case, Frame(**frame), **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_entry(entry: Path, case: Case, fingerprint: str, way: tuple[int, int]) -> Prepared:
    volume, truth = case.read_pair()
    try:
        images, frame = preprocess(volume, *way, aspect=case.aspect)
    except ValueError as error:
        raise ValueError(f"{case.folder}: {error}") from error
    arrays = {
        "images": images.half().numpy(),
        "mask": preprocess_mask(truth, frame).numpy(),
        "truth": truth,
    }
    try:
        temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
        try:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            checksums = {name: _checksum(temporary / f"{name}.npy") for name in ARRAYS}
            checksums["frame"] = _frame_checksum(asdict(frame))
            about = {"fingerprint": fingerprint, "frame": asdict(frame), "checksums": checksums}
            (temporary / "entry.json").write_text(json.dumps(about))
            if made := _open_entry(entry, case, fingerprint):
                return made  # by another process meanwhile, which may have mapped it
            shutil.rmtree(entry, ignore_errors=True)
            try:
                temporary.rename(entry)
            except OSError:
                if not entry.exists():  # else another process made it meanwhile
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ValueError(
            f"{entry.parent}: cannot keep preprocessed volumes ({error.strerror}); "
            "free space or name another folder with --cache"
        ) from error
    return _open_entry(entry, case, fingerprint) or Prepared(case, frame, **arrays)


def _frame_checksum(frame: dict) -> int:
    return zlib.crc32(json.dumps(frame).encode())


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read in pieces so that memory stays small."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value
