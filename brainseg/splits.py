"""Patients, and which subset or fold each of them is in."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from .devices import in_order
from .io.cohorts import parse_sequences
from .io.files import read_rows
from .io.labels import Labels
from .io.layouts import Source, list_cases
from .io.slices import Case

Named = TypeVar("Named", Case, Source)
SUBSETS = ("train", "validation", "test")
SPLITS = Path(__file__).resolve().parents[1] / "splits"
# What follows the patient in a case name: a date, a week, a visit or a session, and the rest.
DATES = (
    r"_(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])",
    r"[-_](19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
)
SESSION = re.compile(
    rf"(({'|'.join(DATES)})(T\d+)?|[-_]w(ee)?k[-_]?\d+(-\d+)?|_ses-[^_]+|"
    r"[-_](time_?point|tp|visit|session|scan|follow_?up)[-_]?\d+)([-_].*)?$",
    re.I,
)
SUBJECT = re.compile(r"(?<![^_])sub-[^_]+")  # of a BIDS file
TCGA = re.compile(r"(?<![^_])TCGA[-_](\w\w)[-_](\w{4})(?![^-_])", re.I)
LAST_NUMBER = re.compile(r"[-_. ]\d+$")
COHORT = re.compile(  # in each, the patient's number comes before the scan's
    r"(?<![^_])(BraTS-[A-Z-]+-\d+(?=-\d{1,3}(?!\d))|(?:UPENN-GBM|UCSF-PDGM|UCSD-PTGBM|RHUH(?:-GBM)?)-\d+)"
    r"(?!\d)",
    re.I,
)


def patient_of(case: Case | Source) -> str:
    """Return the patient that a case belongs to: by a --patients file, its headers or its name."""
    return case.patient or patient_named(case.name, case.patient_id)


def patient_named(case: str, patient_id: str = "") -> str:
    """Return the patient by the name of a case, or by the PatientID of its DICOM headers.

    In either, that is `sub-<label>` of a BIDS name, `TCGA_<site>_<patient>`,
    `BraTS-<set>-<patient>`, `UPENN-GBM-<patient>` or `UCSF-PDGM-<patient>` anywhere in it; else
    what comes before `_<yyyymmdd>`, `_<yyyy-mm-dd>`, `_week-<n>` or `_ses-<label>`, or all of it.
    A case name with TCGA, of a patient of the published data set, goes before the PatientID.
    """
    if patient_id and not TCGA.search(case):
        case = patient_id
    subject = SUBJECT.search(case)
    if subject:
        return subject[0]
    tcga = TCGA.search(case)
    if tcga:
        return f"TCGA_{tcga[1]}_{tcga[2]}".upper()
    cohort = COHORT.search(case)
    if cohort:
        return cohort[0]
    return SESSION.sub("", case)


def with_patients(cases: Sequence[Named], path: Path | str | None) -> list[Named]:
    """Give cases the patients, and the subsets if it has any, of a CSV file; None: change none.

    Its columns are case, patient and, if the user splits the cohort himself, subset. Raises OSError
    or ValueError, naming the file and the case, if it is not such a table, lacks one of the cases
    or contradicts itself.
    """
    if not path:
        return list(cases)
    rows = _read_patients(Path(path))
    missing = sorted(case.name for case in cases if case.name not in rows)
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"{path}: lacks the case {missing[0]}{others}; add a line for each")
    placed = []
    for case in cases:
        patient, subset = rows[case.name]
        placed.append(replace(case, patient=patient, subset=subset))
    return placed


def _read_patients(path: Path) -> dict[str, tuple[str, str]]:
    """Read the patient and the subset, or "", of each case."""
    wrong = f"{path}: is not a table with the columns case and patient; write CSV with both"
    lines = read_rows(path, {"case", "patient"}, wrong)
    if not lines:
        raise ValueError(wrong)
    rows: dict[str, tuple[str, str]] = {}
    subsets: dict[str, str] = {}  # of each patient
    for line in lines:
        case, patient = line["case"].strip(), line["patient"].strip()
        if not case or not patient:
            raise ValueError(
                f"{path}: the line of {case or patient or 'no case'} lacks its case or its "
                "patient; complete it"
            )
        subset = line.get("subset", "").strip()
        if "subset" in line and subset not in SUBSETS:
            raise ValueError(f"{path}: the subset of {case} must be one of {', '.join(SUBSETS)}")
        if rows.setdefault(case, (patient, subset))[0] != patient:
            raise ValueError(
                f"{path}: gives {case} the patients {rows[case][0]} and {patient}; keep one of them"
            )
        if subsets.setdefault(patient, subset) != subset:
            raise ValueError(
                f"{path}: has the patient {patient} in {subsets[patient]} and in {subset}; keep "
                "one subset for all cases of a patient"
            )
    if len(subsets) > 1 and len(set(subsets.values())) == 1 and subset:
        raise ValueError(f"{path}: has every patient in {subset}; name two subsets or none")
    return rows


def share_small_cohort(cases: Sequence[Named]) -> list[Named]:
    """Make sure that cases of two patients or more are both for training and for validation.

    By its hash alone, a small cohort may have no patient to validate on: the patients are then
    ranked by it, and the first of them train and the next one validates. Nobody moves whom the
    user or the lists of the LGG data set have placed.
    """
    placed = {subset_of(case) for case in cases if is_placed(case)}
    free = {patient_of(case) for case in cases if not is_placed(case)}
    ranked = sorted(free, key=_place)
    subsets = {patient: subset_of_patient(patient) for patient in ranked}
    if len(ranked) < 2:
        return list(cases)
    if "train" not in placed.union(subsets.values()):
        subsets[ranked[0]] = "train"
    if "validation" not in placed.union(subsets.values()):
        after = [patient for patient in ranked if subsets[patient] == "test"]
        subsets[after[0] if after else ranked[-1]] = "validation"
    shared = []
    for case in cases:
        subset = subsets.get(patient_of(case), case.subset)
        shared.append(case if subset == subset_of(case) else replace(case, subset=subset))
    return shared


def list_cohort(
    images: Path | str,
    sequences: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    patients: Path | str | None = None,
    names: Sequence[str] | None = None,
    other_than: Path | None = None,
    channels: Sequence[int] | None = None,
) -> list[Source]:
    """List the cases in a folder according to --sequences, --labels, --patients, --channels.

    See `list_cases`. Raises OSError or ValueError if any of them is unusable.
    """
    layout = parse_sequences(sequences)
    sources = list_cases(images, names, other_than, layout, Labels(labels), channels)
    return share_small_cohort(with_patients(sources, patients))


def alike_names(cases: Iterable[Case | Source]) -> str:
    """Ask about patients whose names differ in a last number only; empty if there are none.

    They are asked about if the names without it differ: `anna_1`, `anna_2` and `bert_1` may be two
    patients, `case_1` to `case_9` hardly one.
    """
    groups: dict[str, set[str]] = {}
    for case in cases:
        if case.patient:
            continue  # said by the user
        patient = patient_of(case)
        stem = LAST_NUMBER.sub("", patient)
        if stem and stem != patient:
            groups.setdefault(stem, set()).add(patient)
    pairs = sorted(sorted(patients)[:2] for patients in groups.values() if len(patients) > 1)
    if len(groups) < 2 or not pairs:
        return ""
    first, second = pairs[0]
    return (
        f"{first} and {second} are taken for two patients, as are {len(pairs) - 1} other pairs of "
        "names that differ in a last number only; if they are scans of one, say so with --patients"
    )


def patients_by_case(cases: Iterable[Case | Source]) -> dict[str, str]:
    """Return the patients that do not follow from the names of their cases, for the card."""
    patients = {case.name: patient_of(case) for case in cases}
    return {name: patient for name, patient in patients.items() if patient != patient_named(name)}


def patients_of_card(card: Mapping, *subsets: str, cases: Iterable[Case | Source] = ()) -> set[str]:
    """Return the patients of the cases that a weights' card lists in some subsets.

    They are taken from the case names, from the card, which has those of the --patients file of
    the training, and from `cases` of today that have a name in the card.
    """
    listed = card.get("cases") or {}
    names = set()
    for subset in subsets:
        names.update(listed.get(subset, ()))
    patients = {patient_named(name) for name in names}
    for name, patient in (card.get("patients") or {}).items():
        if name in names:
            patients.add(patient)
    for case in cases:
        if case.name in names:
            patients.add(patient_of(case))
    return patients


def count_patients(subsets: Mapping[str, Sequence[Case | Source]]) -> str:
    """Return one line that counts the cases and patients of each subset."""
    parts = []
    for subset, cases in subsets.items():
        patients = {patient_of(case) for case in cases}
        parts.append(
            f"{subset} {counted(len(cases), 'case')} of {counted(len(patients), 'patient')}"
        )
    return ", ".join(parts)


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def by_subset(cases: Iterable[Named]) -> dict[str, list[Named]]:
    """Group cases by subset."""
    groups: dict[str, list[Named]] = {subset: [] for subset in SUBSETS}
    for case in cases:
        groups[subset_of(case)].append(case)
    return groups


def is_lgg(patient: str) -> bool:
    """Tell whether a patient is in the published LGG data set."""
    return patient in _listed()


def subset_of(case: Case | Source) -> str:
    """Return the subset of a case: that of its patient (see `subset_of_patient`), unless placed.

    A case of the LGG data set stays in its subset, whatever a --patients file says of it.
    """
    listed = _listed().get(patient_named(case.name))
    return listed or case.subset or subset_of_patient(patient_of(case))


def is_placed(case: Case | Source) -> bool:
    """Tell whether the user, or a list of the LGG data set, says which subset a case is in."""
    lgg = is_lgg(patient_named(case.name)) or is_lgg(patient_of(case))
    return lgg or bool(case.subset)


def subset_of_patient(patient: str) -> str:
    """Return `train`, `validation` or `test`: from the lists in splits/ for LGG, else by a hash.

    The hash is stable and of the patient's name: adding a case moves no other, and no patient is
    in two subsets. Of 20 patients, about 14 are for train, 2 for validation and 4 for test.
    """
    if patient in _listed():
        return _listed()[patient]
    place = _place(patient)
    if place < 700:
        return "train"
    return "validation" if place < 800 else "test"


def _place(patient: str) -> int:
    """Return the place of a patient among a thousand, by a hash of the name."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % 1000


def select_cases(cases: Sequence[Named], subset: str) -> list[Named]:
    """Select the cases of a subset; ValueError if it is unknown or no case is in it."""
    if subset not in (*SUBSETS, "all"):
        raise ValueError(f"no subset is called {subset!r}; known: all, {', '.join(SUBSETS)}")
    chosen = [case for case in cases if subset in ("all", subset_of(case))]
    if not chosen:
        patients = {patient_of(case) for case in cases}
        raise ValueError(
            f"none of the {len(cases)} cases ({len(patients)} patients by their names) falls into "
            f"the subset {subset!r}; add cases, or use --subset all (train.py: --folds 5 --fold 0)"
        )
    return chosen


def split_folds(
    cases: Sequence[Named],
    folds: int,
    fold: int,
    workers: int | None = None,
    voxels: Callable[[Named], int] | None = None,
) -> tuple[list[Named], list[Named]]:
    """Split cases for cross-validation into those to train on and those that `fold` holds out.

    Folds are by patient, balanced over hospitals (for LGG) and lesion volumes, and the same on
    every machine for the same cases and masks; cases that the user or the LGG lists set aside for
    testing are in none. `voxels` returns the lesion
    volume of a case; by default its mask is read. Raises ValueError as `check_folds` does.
    """
    check_folds(cases, folds, fold)
    pool = outside_test(cases)
    lesion = Counter()  # voxels of each patient
    for case, count in zip(pool, in_order(voxels or _lesion_voxels, pool, workers), strict=True):
        lesion[patient_of(case)] += count
    # Dealt out in this order, the patients of a site, and of a size, go to different folds.
    patients = sorted(lesion, key=lambda patient: (site_of(patient), lesion[patient], patient))
    held_out = set(patients[fold::folds])
    train = [case for case in pool if patient_of(case) not in held_out]
    return train, [case for case in pool if patient_of(case) in held_out]


def outside_test(cases: Iterable[Named]) -> list[Named]:
    """List the cases that neither the user nor the lists of the LGG data set keep for testing."""
    return [case for case in cases if subset_of(case) != "test" or not is_placed(case)]


def check_folds(cases: Iterable[Case | Source], folds: int, fold: int | None) -> None:
    """Raise ValueError unless 0 <= fold < folds and 2 <= folds <= patients outside test."""
    patients = {patient_of(case) for case in outside_test(cases)}
    if len(patients) < 2:
        raise ValueError("cross-validation needs two patients outside the test subset; add cases")
    if not 2 <= folds <= len(patients):
        raise ValueError(
            f"{folds} folds of {len(patients)} patients outside the test subset; "
            f"choose from 2 to {len(patients)}"
        )
    if fold is None or not 0 <= fold < folds:
        raise ValueError(f"fold {fold} of {folds}: --fold runs from 0 to {folds - 1}")


def _lesion_voxels(case: Case) -> int:
    return int(case.read_mask().sum()) if case.masks else 0


def site_of(patient: str) -> str:
    """Return the hospital in the name of an LGG patient (TCGA_<site>_<patient>), else empty."""
    return patient.split("_")[1] if patient.startswith("TCGA_") else ""


@functools.cache
def _listed() -> dict[str, str]:
    """Read the LGG patients and the subset that each is in."""
    texts = {subset: (SPLITS / f"{subset}.txt").read_text() for subset in SUBSETS}
    return {patient_named(name): subset for subset, text in texts.items() for name in text.split()}
