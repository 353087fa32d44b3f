"""Patients, and which subset or fold each of them is in."""

from __future__ import annotations

import csv
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .devices import in_order
from .io.cohorts import parse_sequences
from .io.files import name_in_errors
from .io.labels import Labels
from .io.layouts import Source, list_cases
from .io.slices import Case

Named = TypeVar("Named", Case, Source)
SUBSETS = ("train", "validation", "test")
SPLITS = Path(__file__).resolve().parents[1] / "splits"
# What follows the patient in a case name: a date, a week or a session, and the rest.
DATES = (
    r"_(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])",
    r"[-_](19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
)
SESSION = re.compile(
    rf"(({'|'.join(DATES)})(T\d+)?|[-_][Ww](ee)?k[-_]?\d+(-\d+)?|_ses-[^_]+)(_.*)?$"
)
SUBJECT = re.compile(r"(?<![^_])sub-[^_]+")  # of a BIDS file
TCGA = re.compile(r"(?<![^_])TCGA[-_](\w\w)[-_](\w{4})(?![^-_])")
COHORT = re.compile(  # in each, the patient's number comes before the scan's
    r"(?<![^_])(BraTS-[A-Z-]+-\d+(?=-\d{1,3}(?!\d))|(?:UPENN-GBM|UCSF-PDGM)-\d+)(?!\d)", re.I
)
# The patients of a --patients file, by case. Like the names it replaces, it applies to a whole
# run: every caller that asks for the patient of a case gets the same answer.
_patients: dict[str, str] = {}
_patient_ids: dict[str, str] = {}  # the same from DICOM headers, for cases not in such a file


def patient_of(case: str) -> str:
    """Return the patient that a case belongs to.

    Taken from the file of `use_patients`, else from the PatientID of DICOM headers, else from the
    name: `sub-<label>` of a BIDS name, `TCGA_<site>_<patient>`, `BraTS-<set>-<patient>`,
    `UPENN-GBM-<patient>` or `UCSF-PDGM-<patient>` anywhere in it; else the name up to
    `_<yyyymmdd>`, `_<yyyy-mm-dd>`, `_week-<n>` or `_ses-<label>`, or all of it.
    """
    if case in _patients:
        return _patients[case]
    if not TCGA.search(case):  # which names a patient of the published data set
        case = _patient_ids.get(case, case)
    if subject := SUBJECT.search(case):
        return subject[0]
    if tcga := TCGA.search(case):
        return f"TCGA_{tcga[1]}_{tcga[2]}"
    if cohort := COHORT.search(case):
        return cohort[0]
    return SESSION.sub("", case)


def note_patients(cases: Iterable[Named]) -> None:
    """Take the patients of these cases from the DICOM headers they were listed by, if any."""
    for case in cases:
        if case.patient:
            _patient_ids[case.name] = case.patient
        else:
            _patient_ids.pop(case.name, None)


def use_patients(path: Path | str | None, cases: Iterable[str] = ()) -> None:
    """Take the patients of cases, from now on, from a CSV file with the columns case and patient.

    None: from DICOM headers and names alone. Raises OSError or ValueError, naming the file and the
    line or case, if it is not such a table, gives a case two patients or lacks one of `cases`.
    """
    read = _read_patients(Path(path)) if path else {}
    if path and (missing := sorted(set(cases) - read.keys())):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"{path}: lacks the case {missing[0]}{others}; add a line for each")
    _patients.clear()
    _patients.update(read)
    _listed.cache_clear()  # its patients depend on this table too


def _read_patients(path: Path) -> dict[str, str]:
    wrong = f"{path}: is not a table with the columns case and patient; write CSV with both"
    try:
        with name_in_errors(path), open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (ValueError, csv.Error) as error:
        raise ValueError(wrong) from error
    header = [name.strip().lower() for name in lines[0]] if lines else []
    if not {"case", "patient"} <= set(header):
        raise ValueError(wrong)
    patients: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not any(map(str.strip, line)):
            continue
        row = dict(zip(header, map(str.strip, line), strict=False))
        case, patient = row.get("case"), row.get("patient")
        if not case or not patient:
            raise ValueError(f"{path}: line {number} lacks its case or its patient; complete it")
        if patients.setdefault(case, patient) != patient:
            raise ValueError(
                f"{path}: line {number} gives {case} the patient {patient}, an earlier line "
                f"{patients[case]}; keep one of them"
            )
    return patients


def list_cohort(
    images: Path | str,
    sequences: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    patients: Path | str | None = None,
    names: Sequence[str] | None = None,
    other_than: Path | None = None,
) -> list[Source]:
    """List the cases in a folder according to the options --sequences, --labels and --patients.

    See `list_cases`. Raises OSError or ValueError if any of them is unusable.
    """
    layout = parse_sequences(sequences)
    sources = list_cases(images, names, other_than, layout, Labels(labels))
    note_patients(sources)
    use_patients(patients, [source.name for source in sources])
    return sources


def named_patients(cases: Iterable[str]) -> dict[str, str]:
    """Return the patients of cases that do not follow from their names; a card has to keep these.

    They are from a --patients file or DICOM headers.
    """
    return {case: patient_of(case) for case in cases if case in _patients or case in _patient_ids}


def patients_of_card(card: Mapping, *subsets: str) -> set[str]:
    """Return the patients of the cases that a weights' card lists in some subsets.

    Taken both from the case names and from the --patients file that the weights were trained with.
    """
    cases, known = card.get("cases") or {}, card.get("patients") or {}
    names = {name for subset in subsets for name in cases.get(subset, ())}
    return {*map(patient_of, names), *(known[name] for name in names if name in known)}


def count_patients(subsets: Mapping[str, Collection[str]]) -> str:
    """Return one line that counts cases and patients of each subset, given its cases' names."""
    parts = []
    for subset, names in subsets.items():
        patients = set(map(patient_of, names))
        counts = ((len(names), "case"), (len(patients), "patient"))
        parts.append(
            f"{subset} " + " of ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts)
        )
    return ", ".join(parts)


def by_subset(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of cases by subset."""
    placed = [(name, subset_of(name)) for name in names]
    return {subset: [name for name, at in placed if at == subset] for subset in SUBSETS}


def is_lgg(case: str) -> bool:
    """Tell whether a case is of a patient in the published LGG data set."""
    return patient_of(case) in _listed()


def subset_of(case: str) -> str:
    """Return `train`, `validation` or `test`: from the lists in splits/ for LGG, else by a hash.

    The hash is stable and of the patient's name: adding a case moves no other, and no patient is
    in two subsets. Of 20 patients, about 14 are for train, 2 for validation and 4 for test.
    """
    patient = patient_of(case)
    if patient in _listed():
        return _listed()[patient]
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % 1000
    return "train" if place < 700 else "validation" if place < 800 else "test"


def select_cases(cases: Sequence[Named], subset: str) -> list[Named]:
    """Select the cases of a subset, by name; ValueError if it is unknown or no case is in it."""
    note_patients(cases)
    if subset not in (*SUBSETS, "all"):
        raise ValueError(f"no subset is called {subset!r}; known: all, {', '.join(SUBSETS)}")
    chosen = [case for case in cases if subset in ("all", subset_of(case.name))]
    if not chosen:
        raise ValueError(
            f"none of the {len(cases)} cases ({len({patient_of(case.name) for case in cases})} "
            f"patients by their names) falls into the subset {subset!r}; "
            "add cases, or use --subset all (train.py: --folds 5 --fold 0)"
        )
    return chosen


def split_folds(
    cases: Sequence[Named],
    folds: int,
    fold: int | None,
    workers: int | None = None,
    voxels: Callable[[Named], int] | None = None,
) -> tuple[list[Named], list[Named]]:
    """Split cases for cross-validation into those to train on and those that `fold` holds out.

    Folds are by patient, balanced over hospitals (for LGG) and lesion volumes, and the same on
    every machine for the same cases and masks; test cases are in none. `voxels` returns the lesion
    volume of a case; by default its mask is read. Raises ValueError as `check_folds` does.
    """
    check_folds([case.name for case in cases], folds, fold)
    pool = [case for case in cases if subset_of(case.name) != "test"]
    lesion = Counter()  # voxels of each patient
    for case, count in zip(pool, in_order(voxels or _lesion_voxels, pool, workers), strict=True):
        lesion[patient_of(case.name)] += count
    # Dealt out in this order, the patients of a site, and of a size, go to different folds.
    patients = sorted(lesion, key=lambda patient: (site_of(patient), lesion[patient], patient))
    held_out = set(patients[fold::folds])
    train = [case for case in pool if patient_of(case.name) not in held_out]
    return train, [case for case in pool if patient_of(case.name) in held_out]


def check_folds(names: Iterable[str], folds: int, fold: int | None) -> None:
    """Raise ValueError unless 0 <= fold < folds and 2 <= folds <= patients outside test."""
    patients = {patient_of(name) for name in names if subset_of(name) != "test"}
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


def site_of(case: str) -> str:
    """Return the hospital in an LGG name (TCGA_<site>_<patient>); empty for all others."""
    patient = patient_of(case)
    return patient.split("_")[1] if patient.startswith("TCGA_") else ""


@functools.cache
def _listed() -> dict[str, str]:
    """Read the LGG patients and the subset that each is in."""
    texts = {subset: (SPLITS / f"{subset}.txt").read_text() for subset in SUBSETS}
    return {patient_of(name): subset for subset, text in texts.items() for name in text.split()}
