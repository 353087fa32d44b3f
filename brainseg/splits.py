"""Patients, and which subset or fold each of them is in."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from .devices import in_order
from .io.layouts import case_name
from .io.slices import Case

Named = TypeVar("Named", Case, Path)
SUBSETS = ("train", "validation", "test")
SPLITS = Path(__file__).resolve().parents[1] / "splits"
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
