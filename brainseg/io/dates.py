"""The date of a scan: from a table, its DICOM header, the tables of BIDS, or its name."""

import csv
import datetime
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from .dicom import Series, text
from .files import USERS, name_in_errors, read_rows
from .scans import Scan
from .slices import Case

FIRST_YEAR = 1980  # no patient was scanned before
SHIFTED_YEAR = 1925  # BIDS: dates shifted for privacy should lie in this year or before
IN_NAME = re.compile(  # eight digits that no date can have are a number
    r"(?<!\d)((19|20)\d\d-\d\d-\d\d|"
    r"(19|20)\d\d[_.]?(0[1-9]|1[0-2])[_.]?(0[1-9]|[12]\d|3[01]))(?!\d)"
)
LAST_NUMBER = re.compile(r"\d+(?=\D*$)")


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
    number = LAST_NUMBER.search(name.removeprefix(patient))
    return int(number[0]) if number else None
