"""Which cases, which subset, which slice next."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache import Prepared, prepare
from cases import case_name, find_cases
from utils import in_order
from volume import VERSION, Case, neighbourhoods

Named = TypeVar("Named", Case, Path)
SUBSETS = ("train", "validation", "test")
SPLITS = Path(__file__).resolve().parent / "splits"
# Of a case name, what follows the patient: the date of an LGG scan, or a session, and the rest.
SESSION = re.compile(r"_((19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])|ses-[^_]+)(_.*)?$")
SUBJECT = re.compile(r"(?<![^_])sub-[^_]+")  # of a BIDS file
TCGA = re.compile(r"(?<![^_])TCGA[-_](\w\w)[-_](\w{4})(?![^-_])")


def patient_of(case: str) -> str:
    """The patient whom a case belongs to.

    `sub-<label>` of a BIDS name, `TCGA_<site>_<patient>` of one of TCGA, with whatever around it;
    else the name up to `_<yyyymmdd>` or `_ses-<label>`, or all of it.
    """
    if subject := SUBJECT.search(case):
        return subject[0]
    if tcga := TCGA.search(case):
        return f"TCGA_{tcga[1]}_{tcga[2]}"
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


def select_cases(cases: Sequence[Named], subset: str) -> list[Named]:
    """The cases (or their paths) of a subset; ValueError if it is unknown or none falls into it."""
    if subset not in (*SUBSETS, "all"):
        raise ValueError(f"no subset is called {subset!r}; known: all, {', '.join(SUBSETS)}")
    chosen = [case for case in cases if subset in ("all", subset_of(_name(case)))]
    if not chosen:
        raise ValueError(
            f"none of the {len(cases)} cases ({len({patient_of(_name(c)) for c in cases})} "
            f"patients by their names) falls into the subset {subset!r}; "
            "choose another --subset, add cases, or divide what there is with --folds 5 --fold 0"
        )
    return chosen


def _name(case: Named) -> str:
    return case_name(case) if isinstance(case, Path) else case.name


def split_folds(
    cases: Sequence[Case], folds: int, fold: int | None, workers: int | None = None
) -> tuple[list[Case], list[Case]]:
    """For cross-validation, the cases to train on and those that a `fold` holds out.

    Folds are by patient, balanced over hospitals (for LGG) and lesion volumes, the same on every
    machine for the same cases and masks; the test cases are in none. Raises ValueError for more
    folds than patients or a fold that is not there.
    """
    pool = [case for case in cases if subset_of(case.name) != "test"]
    lesion = Counter()  # voxels of each patient
    for case, voxels in zip(pool, in_order(_lesion_voxels, pool, workers), strict=True):
        lesion[patient_of(case.name)] += voxels
    # Dealt out one after another, the patients of a site, and of a size, go to different folds.
    patients = sorted(lesion, key=lambda patient: (site_of(patient), lesion[patient], patient))
    if not 2 <= folds <= len(patients):
        raise ValueError(
            f"{folds} folds of {len(patients)} patients outside the test subset; "
            f"choose from 2 to {len(patients)}"
        )
    if fold is None or not 0 <= fold < folds:
        raise ValueError(f"fold {fold} of {folds}: --fold runs from 0 to {folds - 1}")
    held_out = set(patients[fold::folds])
    train = [case for case in pool if patient_of(case.name) not in held_out]
    return train, [case for case in pool if patient_of(case.name) in held_out]


def _lesion_voxels(case: Case) -> int:
    return int(case.read_mask().sum()) if case.masks else 0


def site_of(case: str) -> str:
    """The hospital in an LGG name (TCGA_<site>_<patient>); empty for all others."""
    patient = patient_of(case)
    return patient.split("_")[1] if patient.startswith("TCGA_") else ""


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@functools.cache
def _listed(subset: str) -> frozenset[str]:
    """The patients of LGG that are in a subset."""
    return frozenset(map(patient_of, (SPLITS / f"{subset}.txt").read_text().split()))


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
        cache: Path | str | None = None,
        workers: int | None = None,
        progress: bool = False,
        version: int = VERSION,
    ):
        cases = select_cases(find_cases(images_dir), subset)
        self._hold(prepare(cases, image_size, cache, workers, progress, version))

    def _hold(self, volumes: list[Prepared]) -> BrainSegmentationDataset:
        self.volumes = volumes
        self.in_channels = check_channels(volumes)
        self._place = [(v, s) for v, vol in enumerate(volumes) for s in range(len(vol.mask))]
        return self

    @classmethod
    def of(cls, volumes: list[Prepared]) -> BrainSegmentationDataset:
        """The slices of volumes that are prepared already."""
        return cls.__new__(cls)._hold(volumes)

    @classmethod
    def train_and_validation(
        cls, images_dir: Path | str, folds: int | None = None, fold: int | None = None, **options
    ) -> tuple[BrainSegmentationDataset, BrainSegmentationDataset]:
        """The two subsets a training needs, read together; `options` are those of `prepare`.

        With `folds`, those of a cross-validation (`split_folds`).
        """
        cases = find_cases(images_dir)
        if folds is None:
            train, validation = (select_cases(cases, subset) for subset in ("train", "validation"))
        else:
            train, validation = split_folds(cases, folds, fold, options.get("workers"))
        volumes = prepare(train + validation, **options)
        check_channels(volumes)
        parts = volumes[: len(train)], volumes[len(train) :]
        return tuple(map(cls.of, parts))

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, masks = self.batch([index])
        return images[0].float(), masks[0].float()

    def batch(self, indices: Sequence[int], neighbours: int = 0) -> tuple[Tensor, Tensor]:
        """Several slices at once, as stored: (B, C, N, N) float16 and (B, 1, N, N) bool.

        With K `neighbours` on either side, their channels come too: (B, (2 K + 1) C, N, N).
        """
        places = [self._place[index] for index in indices]
        images = np.stack([self._channels(v, s, neighbours) for v, s in places])
        masks = np.stack([self.volumes[v].mask[s][None] for v, s in places])
        return torch.from_numpy(images), torch.from_numpy(masks)

    def _channels(self, v: int, s: int, neighbours: int) -> np.ndarray:
        images = self.volumes[v].images
        return np.concatenate(images[neighbourhoods(len(images), neighbours)[s].tolist()])

    def locate(self, index: int) -> tuple[str, int]:
        """The case and the slice number that an item comes from."""
        v, s = self._place[index]
        return self.volumes[v].name, self.volumes[v].case.numbers[s]

    def sampling_weights(self, background: float = 0.1) -> Tensor:
        """The probability (len(self),) of each slice in training.

        A case is drawn uniformly, then a slice by its mask area plus `background` times the case's
        mean area, so that background / (1 + background) of the draws are even over its slices; a
        case without lesion draws its slices evenly.
        """
        weights = []
        for volume in self.volumes:
            area = torch.from_numpy(volume.mask.sum(axis=(1, 2))).double()
            weight = area + background * area.mean() if area.any() else torch.ones_like(area)
            weights.append(weight / weight.sum() / len(self.volumes))
        return torch.cat(weights)
