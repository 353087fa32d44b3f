"""Find the patient of a case: said by the user, in DICOM headers or in its name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .io.layouts import Source
from .io.slices import Case

Named = TypeVar("Named", Case, Source)
SUBSETS = ("train", "validation", "test")
# What follows the patient in a case name: a date, a week, a visit or a session, and the rest.
DATES = (
    r"_(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])",
    r"[-_](19|20)\d\d[-_.](0[1-9]|1[0-2])[-_.](0[1-9]|[12]\d|3[01])",
)
SESSION = re.compile(
    rf"(({'|'.join(DATES)})(T\d+)?|[-_]w(ee)?k[-_]?\d+(-\d+)?|_ses-[^_]+|"
    r"[-_](time_?point|tp|visit|session|scan|follow_?up)[-_]?\d+)([-_].*)?$"
    # These words may be of a data set, too: with a number after them, as in ms_study2_patient7.
    r"|[-_]((time|study|exam|month|day)[-_]?\d+|baseline|follow[-_]?up)([-_]\D*)?$",
    re.I,
)
SUBJECT = re.compile(r"(?<![^_])sub-[^_]+")  # of a BIDS file
TCGA = re.compile(r"(?<![^_])TCGA[-_](\w\w)[-_](\w{4})(?![^-_])", re.I)
LAST_NUMBER = re.compile(r"[-_. ]\d+$")
COHORT = re.compile(  # in each, the patient's number comes before the scan's
    r"(?<![^_])(BraTS-[A-Z-]+-\d+(?=-\d{1,3}(?!\d))|"
    r"(?:UPENN-GBM|UCSF-PDGM|UCSD-PTGBM|RHUH(?:-GBM)?)-\d+)(?!\d)",
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
    others = ""
    if len(pairs) > 1:
        others = f" ({counted(len(pairs) - 1, 'other pair')} likewise)"
    return (
        f"{' and '.join(pairs[0])} are taken for two patients{others}: their names differ in a "
        "last number only; if they are scans of one patient, say so with --patients"
    )


def patients_by_case(cases: Iterable[Case | Source]) -> dict[str, str]:
    """Return the patients that do not follow from the names of their cases, for the card."""
    patients = {}
    for case in cases:
        patient = patient_of(case)
        if patient != patient_named(case.name):
            patients[case.name] = patient
    return patients


def names_of(cases: Iterable[Any]) -> list[str]:
    return [case.name for case in cases]


def patients_of_card(card: Mapping, *subsets: str, cases: Iterable[Case | Source] = ()) -> set[str]:
    """Return the patients of the cases that a weights' card lists in some subsets.

    They are taken from the case names, from the card, which has those of the --patients file of
    the training, and from `cases` of today that have a name in the card.
    """
    listed = card.get("cases") or {}
    names = set()
    for subset in subsets:
        names.update(listed.get(subset, ()))
    patients = set(map(patient_named, names))
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
        patients = counted(len(set(map(patient_of, cases))), "patient")
        parts.append(f"{subset} {counted(len(cases), 'case')} of {patients}")
    return ", ".join(parts)


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def site_of(patient: str) -> str:
    """Return the hospital in the name of an LGG patient (TCGA_<site>_<patient>), else empty."""
    return patient.split("_")[1] if patient.startswith("TCGA_") else ""
