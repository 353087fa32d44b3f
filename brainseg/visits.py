"""The scans of each patient of a run: in order of time, measured, and registered to the first."""

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .alignment import Measured, at_place, components_alone, read_flair
from .devices import in_order
from .growth import Estimate, Visit, bidimensional, estimated_volume, growth_rows, rate_until
from .io.files import RUN, sentence
from .io.layouts import Source
from .io.pictures import to_grey
from .io.predictions import read_mask_of_run
from .io.registration import register
from .io.slices import Case
from .patients import counted, date_of, timepoint
from .reports.volumes import edge_notes, is_poor


@dataclass(frozen=True)
class View:
    """A scan at the place of the first scan's largest lesion slice: arrays (H, W)."""

    label: str  # its date, or the name of its case
    grey: np.ndarray  # uint8
    mask: np.ndarray  # bool
    first: np.ndarray  # bool, the mask of the first scan


@dataclass(frozen=True)
class Patient:
    """A patient's scans in order of time, and pictures of those that could be registered."""

    visits: tuple[Visit, ...]
    views: tuple[View, ...]
    aspect: float  # height of a pixel of the views over its width

    @property
    def name(self) -> str:
        return self.visits[0].patient

    @property
    def rows(self) -> list[dict]:
        return growth_rows(self.visits)

    @property
    def rate(self) -> Estimate:
        """Return the growth rate in mm a year."""
        return rate_until(self.visits)


def follow_all(
    sources: Sequence[Source],
    measured: Sequence[dict],
    folder: Path,
    dates: Mapping[str, datetime.date],
    errors: dict | None,
    with_registration: bool = True,
    workers: int | None = None,
) -> tuple[list[Patient], list[str]]:
    """Measure growth from masks in `folder` and rows of volumes.csv; also return notes."""
    rows = {row["case"]: row for row in measured if row["slices"]}  # of cases that could be read
    cases, notes = _with_several_scans(sources, rows)
    ordered, said = in_order_of_time(cases, dates)
    notes += said
    if dates and not cases:
        notes.append(
            "--dates: each case is of another patient, so there is no growth to measure; say with "
            "--patients which are scans of one"
        )

    def followed(patient: str) -> tuple[Patient | None, list[str]]:
        scans = []
        for case, day in ordered[patient]:
            row = rows[case.name]
            mask = read_mask_of_run(folder, case, row[RUN])
            if mask is None:
                return None, [f"{patient}: the mask of {case.name} is missing; run it again"]
            scans.append((Measured(case, mask, row), day))
        try:
            return follow(scans, errors, with_registration)
        except (ValueError, OSError) as error:
            return None, [f"{patient}: its growth is not measured: {sentence(error)}"]

    patients = []
    for patient, said in in_order(followed, sorted(ordered), workers):
        notes += said
        if patient:
            patients.append(patient)
    return patients, notes


def _with_several_scans(
    sources: Sequence[Source], rows: Mapping[str, dict]
) -> tuple[dict[str, list[Case]], list[str]]:
    """Open the cases of patients with several; also return what cannot be opened, and why."""
    counts = Counter(row["patient"] for row in rows.values())
    cases: dict[str, list[Case]] = {}
    notes = []
    for source in sources:
        row = rows.get(source.name)
        if row is None or counts[row["patient"]] < 2:
            continue
        try:
            cases.setdefault(row["patient"], []).append(source.open())
        except (ValueError, OSError) as error:  # it was there a moment ago
            notes.append(sentence(error))
    return cases, notes


def in_order_of_time(
    cases: Mapping[str, Sequence[Case]], dates: Mapping[str, datetime.date]
) -> tuple[dict[str, list[tuple[Case, datetime.date | None]]], list[str]]:
    """Order the cases of each patient by date, or by the timepoint numbers in their names.

    Patients with one such scan are left out, and so are scans without a date beside dated ones.
    Also returns sentences on what is left out or contradicts itself.
    """
    ordered, notes, without = {}, [], []
    for patient, scans in cases.items():
        identities = {case.patient_id for case in scans if case.patient_id}
        if len(identities) > 1:
            names = " and ".join(sorted(identities))
            notes.append(
                f"{patient}: its scans are of the patients {names} by their headers; no growth "
                "is measured: tell them apart with --patients"
            )
            continue
        days = {}
        for case in scans:
            days[case.name], said = date_of(case, dates, patient)
            notes += said
        dated = sorted((day, name) for name, day in days.items() if day)
        if len(dated) < 2:
            ranked = _by_timepoint(patient, scans)
            if len(ranked) > 1:
                ordered[patient] = [(case, None) for case in ranked]
                notes.append(f"{patient}: timepoints without dates: their order, but no rate")
            elif len(scans) > 1:
                without.append(patient)
            continue
        by_name = {case.name: case for case in scans}
        ordered[patient] = [(by_name[name], day) for day, name in dated]
        for name, day in days.items():
            if day is None:
                notes.append(f"{name}: has no date, and no part in the growth of {patient}")
        for (day, name), (next_day, other) in pairwise(dated):
            if day == next_day:
                notes.append(f"{patient}: {name} and {other} are both of {day}; check their dates")
    if without:
        notes.append(
            f"{counted(len(without), 'patient')} with several scans, such as {without[0]}, but "
            "without two dates: give them with --dates to have their growth"
        )
    return ordered, notes


def _by_timepoint(patient: str, scans: Sequence[Case]) -> list[Case]:
    """Sort scans by the timepoint numbers in their names; [] if one is missing or repeated."""
    by_number: dict[int, Case] = {}
    for case in scans:
        number = timepoint(case.name, patient)
        if number is None or number in by_number:
            return []
        by_number[number] = case
    return [by_number[number] for number in sorted(by_number)]


def follow(
    scans: Sequence[tuple[Measured, datetime.date | None]],
    errors: dict | None,
    with_registration: bool = True,
) -> tuple[Patient, list[str]]:
    """Measure one patient's scans, in order of time, and register them; say which cannot be."""
    notes = []
    visits = [_visit(measured, day, errors) for measured, day in scans]
    labels = [str(day or measured.case.name) for measured, day in scans]
    first = scans[0][0]
    fixed = read_flair(first) if with_registration else None
    if fixed is None:
        return Patient(tuple(visits), (), 1.0), notes
    areas = first.mask.sum(axis=(1, 2))
    place = int(areas.argmax()) if areas.any() else len(areas) // 2
    outline = first.mask[place]
    grey = to_grey(sitk.GetArrayFromImage(fixed)[..., None])[place]
    views = [View(labels[0], grey, outline, outline)]
    for k, (measured, _) in enumerate(scans[1:], 1):
        moving = read_flair(measured)
        if moving is None:
            continue
        try:
            transform = register(moving, fixed, measured.case.folder).transform
        except ValueError:
            visits[k] = replace(visits[k], apart=("no common frame",))
            notes.append(
                f"{measured.case.name}: cannot be registered to {first.case.name}; its volume "
                "stays, its picture is left out"
            )
            continue
        apart = components_alone(first, measured, moving, transform)
        visits[k] = replace(visits[k], apart=tuple(apart))
        grey, mask = at_place(measured, moving, fixed, transform, place)
        views.append(View(labels[k], grey, mask, outline))
    _, height, width = fixed.GetSpacing()[::-1]
    return Patient(tuple(visits), tuple(views), height / width), notes


def _visit(measured: Measured, day: datetime.date | None, errors: dict | None) -> Visit:
    case, mask, row = measured.case, measured.mask, measured.row
    concerns = edge_notes(mask)
    if not mask.any():
        concerns.append("the mask is empty")
    elif is_poor(row):
        concerns.append("the mask is probably poor")
    return Visit(
        case.name,
        row["patient"],
        day,
        estimated_volume(_as_written(row["lesion_ml"]), _as_written(row["expected_dsc"]), errors),
        bidimensional(mask, case.spacing) if case.spacing else None,
        case.spacing,
        row["sequences"],
        row["replaced"],
        " and ".join(concerns),
    )


def _as_written(number: float | None) -> float | None:
    """Return a number as tables hold it: masks that are kept have the growth they had before."""
    return None if number is None else float(f"{number:.6g}")
