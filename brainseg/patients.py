"""Find the patient of a case, and its date: said by the user, in DICOM headers or in its name."""

import csv
import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .io.dicom import Series, text
from .io.files import USERS, name_in_errors, read_rows
from .io.layouts import Source
from .io.scans import Scan
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

FIRST_YEAR = 1980  # no patient was scanned before
SHIFTED_YEAR = 1925  # BIDS: dates shifted for privacy should lie in this year or before
IN_NAME = re.compile(  # eight digits that no date can have are a number
    r"(?<!\d)((19|20)\d\d-\d\d-\d\d|"
    r"(19|20)\d\d[_.]?(0[1-9]|1[0-2])[_.]?(0[1-9]|[12]\d|3[01]))(?!\d)"
)
TIMEPOINT = re.compile(r"\d+(?=\D*$)")


# Patients


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
        patient = patient_of(case)
        if case.patient or TCGA.search(patient) or COHORT.search(patient):
            continue  # said by the user, or the name of a public data set
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


# Dates


def read_dates(path: Path, cases: Collection[str]) -> dict[str, datetime.date]:
    """Read dates by case from a CSV file; ValueError for a bad one, or for none of `cases`."""
    wrong = f"{path}: is not a table with the columns case and date; write CSV with both"
    dates: dict[str, datetime.date] = {}
    for row in read_rows(path, {"case", "date"}, wrong, USERS):
        case = row["case"].strip()
        try:
            day = parse_date(row["date"])
        except ValueError as error:
            raise ValueError(f"{path}: {case}: {error}; correct it") from error
        if dates.setdefault(case, day) != day:
            raise ValueError(f"{path}: gives {case} two dates, {dates[case]} and {day}; keep one")
    if dates and not dates.keys() & set(cases):
        raise ValueError(
            f"{path}: none of its names, such as {min(dates)}, is a case of this run, such as "
            f"{min(cases)}; write the names of the cases"
        )
    return dates


def parse_date(written: str, may_be_shifted: bool = False) -> datetime.date:
    """Read a date such as 2014-03-02 or 20140302T1200; ValueError if no scan can be of that day."""
    digits = re.fullmatch(r"(\d{4})-?(\d\d)-?(\d\d)([T ].*)?", written.strip())
    if not digits:
        raise ValueError(f"the date {written.strip()!r} is not written as 2014-03-02 or 20140302")
    try:
        day = datetime.date(int(digits[1]), int(digits[2]), int(digits[3]))
    except ValueError as error:
        raise ValueError(f"the date {written.strip()!r} is not in the calendar") from error
    if day > datetime.date.today():
        raise ValueError(f"the date {day} is in the future")
    if day.year < FIRST_YEAR and not (may_be_shifted and day.year <= SHIFTED_YEAR):
        raise ValueError(f"the date {day} is before {FIRST_YEAR}")
    return day


def date_of(
    case: Case, dates: Mapping[str, datetime.date], patient: str = ""
) -> tuple[datetime.date | None, list[str]]:
    """Return the date of a scan, None if nothing says it, and sentences on what was wrong.

    `dates`, of a table, goes before the header, that before the tables of BIDS, and those before
    the name after that of its `patient`. A date that cannot be right is left out and said, and so
    is a contradiction.
    """
    written, notes = _written(case, patient)
    stated: dict[str, datetime.date] = {}  # by what states it, in order of trust
    if case.name in dates:
        stated["--dates"] = dates[case.name]
    for place, text_of_date in written.items():
        try:
            stated[place] = parse_date(text_of_date, may_be_shifted=place.endswith(".tsv"))
        except ValueError as error:
            notes.append(f"{case.name}: {error} ({place}); correct it with --dates")
    if not stated:
        return None, notes
    trusted, day = next(iter(stated.items()))
    for place, other in stated.items():
        if other != day:
            notes.append(f"{case.name}: {day} by {trusted}, but {other} by {place}; {day} is used")
    return day, notes


def _written(case: Case, patient: str) -> tuple[dict[str, str], list[str]]:
    """Return the dates that header, BIDS table and name state, by their place.

    Also returns a sentence on a table that cannot be read.
    """
    places, notes = {}, []
    flair = case.flair if isinstance(case, Scan) else None
    if isinstance(flair, Series):
        study_date = text(flair.header, "StudyDate")
        if study_date:
            places["its DICOM header"] = study_date
    elif flair is not None and flair.parent.name == "anat":
        try:
            table, written = _bids_date(flair)
        except (ValueError, csv.Error):
            table, written = "", ""
            notes.append(f"{case.name}: its scans.tsv or sessions.tsv is not a table; mend it")
        if written:
            places[table] = written
    in_name = list(IN_NAME.finditer(case.name.removeprefix(patient)))
    if in_name:
        places["its name"] = re.sub("[_.]", "", in_name[-1][0])
    return places, notes


def _bids_date(flair: Path) -> tuple[str, str]:
    """Find a FLAIR file's acq_time in scans.tsv or sessions.tsv: (table, date), or empty."""
    session = flair.parent.parent
    tables = []
    for path in session.glob("*_scans.tsv"):
        tables.append((path, "filename", f"anat/{flair.name}"))
    for path in session.parent.glob("*_sessions.tsv"):
        tables.append((path, "session_id", session.name))
    for path, key, value in tables:
        with name_in_errors(path), open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                written = row.get("acq_time") or "n/a"
                if row.get(key) == value and written != "n/a":
                    return path.name, written
    return "", ""


def timepoint(name: str, patient: str) -> int | None:
    """Return the last number in the name of a case after that of its patient: it gives an order."""
    number = TIMEPOINT.search(name.removeprefix(patient))
    return int(number[0]) if number else None
