"""Which cases, which subset, which slice next.

Volumes are read and preprocessed once, by all cores, kept on disk in half precision and mapped
into memory: a second start takes seconds, and a data set larger than memory still trains.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from utils import worker_threads
from volume import VERSION, Case, Frame, find_cases, preprocess, preprocess_mask

Named = TypeVar("Named", Case, Path)
SUBSETS = ("train", "validation", "test")
SPLITS = Path(__file__).resolve().parent / "splits"
# Of a case name, what follows the patient: the date of an LGG scan, the session of a BIDS one.
SESSION = re.compile(r"(_(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])|_ses-[^_]+.*)$")


def default_cache() -> Path:
    """Where preprocessed volumes are kept unless the caller names another folder."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "brainseg"
    try:
        return Path.home() / ".cache" / "brainseg"
    except RuntimeError:  # a user without a home, as in a container
        return Path(tempfile.gettempdir()) / "brainseg"


def patient_of(case: str) -> str:
    """The patient whom a case belongs to: its name without the date or session at its end."""
    return SESSION.sub("", case)


def is_lgg(case: str) -> bool:
    """Whether a case is of a patient of the published LGG data set."""
    return any(patient_of(case) in _listed(subset) for subset in SUBSETS)


def subset_of(case: str) -> str:
    """`train`, `validation` or `test`: by the lists in splits/ for LGG, else by a stable hash.

    The hash is of the patient's name, so that adding a case moves no other and no patient is in
    two subsets: of 20 patients about 14 train, 2 validate and 4 test.
    """
    patient = patient_of(case)
    for subset in SUBSETS:
        if patient in _listed(subset):
            return subset
    place = _hash(patient) % 1000
    return "train" if place < 700 else "validation" if place < 800 else "test"


def select_cases(
    cases: Sequence[Named], subset: str, folds: int | None = None, fold: int | None = None
) -> list[Named]:
    """The cases (or case folders) of a subset; with `folds`, those of that `fold`.

    A fold's `validation` is held out and its `train` is the rest. Folds are by patient, balanced
    over sites for LGG, the same on every machine, and never touch the test cases. Raises
    ValueError for an unknown subset, too many folds or nothing left.
    """
    if subset not in (*SUBSETS, "all"):
        raise ValueError(f"no subset is called {subset!r}; known: all, {', '.join(SUBSETS)}")
    if folds is None or subset in ("all", "test"):
        chosen = [case for case in cases if subset in ("all", subset_of(case.name))]
    else:
        chosen = _in_fold(cases, subset, folds, fold)
    if not chosen:
        raise ValueError(
            f"none of the {len(cases)} cases falls into the subset {subset!r}; "
            "add cases, or divide what there is with --folds 5 --fold 0"
        )
    return chosen


def _in_fold(cases: Sequence[Named], subset: str, folds: int, fold: int | None) -> list[Named]:
    pool = [case for case in cases if subset_of(case.name) != "test"]
    patients = sorted({patient_of(case.name) for case in pool}, key=lambda p: (_site(p), _hash(p)))
    if not 2 <= folds <= len(patients):
        raise ValueError(
            f"{folds} folds of {len(patients)} patients outside the test subset; "
            f"choose from 2 to {len(patients)}"
        )
    if fold is None or not 0 <= fold < folds:
        raise ValueError(f"fold {fold} of {folds}: --fold runs from 0 to {folds - 1}")
    held_out = set(patients[fold::folds])
    return [case for case in pool if (patient_of(case.name) in held_out) == (subset != "train")]


def _site(patient: str) -> str:
    """The hospital in an LGG patient's name (TCGA_<site>_<number>); the same for all others."""
    return patient.split("_")[1] if patient.startswith("TCGA_") else ""


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@cache
def _listed(subset: str) -> frozenset[str]:
    """The patients of LGG that are in a subset."""
    return frozenset(map(patient_of, (SPLITS / f"{subset}.txt").read_text().split()))


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


def check_channels(volumes: Sequence[Prepared]) -> int:
    """How many channels the volumes have; ValueError, naming two cases, if they differ."""
    channels = {volume.images.shape[1]: volume.case.folder for volume in volumes}
    if len(channels) > 1:
        listed = ", ".join(f"{count} in {folder}" for count, folder in sorted(channels.items()))
        raise ValueError(f"cases with different numbers of channels: {listed}")
    return next(iter(channels))


class BrainSegmentationDataset(Dataset):
    """The slices of a subset: index to (image (C, N, N), mask (1, N, N)), float32, always the same.

    `images_dir` holds one folder a case, with masks. Raises FileNotFoundError or ValueError,
    naming the file or folder, for anything that cannot be used.
    """

    def __init__(
        self,
        images_dir: Path | str,
        subset: str = "train",
        image_size: int = 256,
        folds: int | None = None,
        fold: int | None = None,
        cache: Path | str | None = None,
        workers: int | None = None,
        progress: bool = False,
    ):
        cases = select_cases(find_cases(images_dir), subset, folds, fold)
        self._hold(prepare(cases, image_size, cache, workers, progress))

    def _hold(self, volumes: list[Prepared]) -> BrainSegmentationDataset:
        self.volumes = volumes
        self.in_channels = check_channels(volumes)
        self._place = [(v, s) for v, vol in enumerate(volumes) for s in range(len(vol.mask))]
        return self

    @classmethod
    def train_and_validation(
        cls, images_dir: Path | str, folds: int | None = None, fold: int | None = None, **options
    ) -> tuple[BrainSegmentationDataset, BrainSegmentationDataset]:
        """The two subsets a training needs, read together; `options` are those of `prepare`."""
        cases = find_cases(images_dir)
        train, validation = (select_cases(cases, s, folds, fold) for s in ("train", "validation"))
        volumes = prepare(train + validation, **options)
        check_channels(volumes)
        parts = volumes[: len(train)], volumes[len(train) :]
        return tuple(cls.__new__(cls)._hold(part) for part in parts)

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, masks = self.batch([index])
        return images[0].float(), masks[0].float()

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several slices at once, as stored: (B, C, N, N) float16 and (B, 1, N, N) bool."""
        places = [self._place[index] for index in indices]
        images = np.stack([self.volumes[v].images[s] for v, s in places])
        masks = np.stack([self.volumes[v].mask[s][None] for v, s in places])
        return torch.from_numpy(images), torch.from_numpy(masks)

    def locate(self, index: int) -> tuple[str, int]:
        """The case and the slice number that an item comes from."""
        v, s = self._place[index]
        return self.volumes[v].name, self.volumes[v].case.numbers[s]

    def sampling_weights(self, tumour_share: float = 0) -> Tensor:
        """The probability (len(self),) of each slice in training.

        A case is drawn uniformly, then a slice by its mask area plus a tenth of the case's mean
        area; a case without lesion draws its slices evenly. With a `tumour_share`, that share of
        the draws falls evenly on the slices with lesion, and the rest evenly on the others.
        """
        weights = []
        for volume in self.volumes:
            area = torch.from_numpy(volume.mask.sum(axis=(1, 2))).double()
            lesion = area > 0
            if not lesion.any() or (tumour_share and lesion.all()):
                weight = torch.ones_like(area)
            elif tumour_share:
                inside, outside = lesion.double(), (~lesion).double()
                weight = tumour_share * inside / inside.sum()
                weight = weight + (1 - tumour_share) * outside / outside.sum()
            else:
                weight = area + 0.1 * area.mean()
            weights.append(weight / weight.sum() / len(self.volumes))
        return torch.cat(weights)


def prepare(
    cases: Sequence[Case],
    image_size: int = 256,
    cache: Path | str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> list[Prepared]:
    """Every case preprocessed, from the cache if it is there and sound, by `workers` threads."""
    cache = Path(cache) if cache else default_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{cache}: cannot be made; name another folder with --cache") from error
    with worker_threads(workers) as pool:
        jobs = pool.map(partial(_prepare_one, image_size=image_size, cache=cache), cases)
        quiet = None if progress else True  # None: quiet unless on a terminal
        return list(tqdm(jobs, "preprocessing", len(cases), unit="case", disable=quiet))


def _prepare_one(case: Case, image_size: int, cache: Path) -> Prepared:
    source = f"{case.folder.resolve()} {image_size}"
    entry = cache / f"{case.name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    fingerprint = _fingerprint(case, image_size)
    return _open_entry(entry, case, fingerprint) or _make_entry(
        entry, case, fingerprint, image_size
    )


def _fingerprint(case: Case, image_size: int) -> str:
    """Changes with any source file's name, size or time, and with the settings."""
    files = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in case.slices + case.masks]
    return hashlib.sha256(json.dumps([VERSION, image_size, files]).encode()).hexdigest()


ARRAYS = ("images", "mask", "truth")


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
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in ARRAYS}
        frame = {k: tuple(v) if isinstance(v, list) else v for k, v in about["frame"].items()}
        return Prepared(case, Frame(**frame), **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_entry(entry: Path, case: Case, fingerprint: str, image_size: int) -> Prepared:
    volume, truth = case.read_pair()
    try:
        images, frame = preprocess(volume, image_size)
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
