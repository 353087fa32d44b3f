"""The scans of each patient of a run: in order of time, measured, and registered to the first."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .devices import in_order
from .diameters import bidimensional
from .growth import Visit, estimated_volume, growth_rows
from .io.dates import date_of, timepoint
from .io.files import RUN, sentence
from .io.formats import read_voxels
from .io.grid import Grid
from .io.layouts import Source
from .io.pictures import to_grey
from .io.predictions import find_masks
from .io.registration import register
from .io.scans import Scan
from .io.slices import Case
from .quality import WARN_BELOW
from .reports.volumes import edge_warnings

NEAR = 5.0  # mm: a component has a partner if the other mask comes as near to its box
LEAST_ML = 0.2  # of a component that needs a partner


@dataclass(frozen=True)
class Measured:
    """A case that was segmented: its mask (S, H, W) and its row of volumes.csv."""

    case: Case
    mask: np.ndarray
    row: dict
    flair: np.ndarray | None = None  # (S, H, W); None: in the case's file


@dataclass(frozen=True)
class View:
    """A scan at the place of the first scan's largest lesion slice: arrays (H, W)."""

    case: str
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


def follow_all(
    sources: Sequence[Source | Case],
    measured: Sequence[dict],
    folder: Path,
    dates: Mapping[str, datetime.date],
    errors: dict | None,
    with_registration: bool = True,
    workers: int | None = None,
) -> tuple[list[Patient], list[str]]:
    """Measure the growth of every patient with two or more scans, from the masks in `folder`.

    `measured` are the rows of volumes.csv of the cases that could be read. Also returns sentences
    on what was left out. For `dates` and `errors`, see `in_order_of_time` and
    `follow`.
    """
    cases: dict[str, list[Case]] = {}
    rows = {row["case"]: row for row in measured}
    counts = Counter(row["patient"] for row in measured)
    unreadable = []
    for source in sources:
        patient = rows[source.name]["patient"] if source.name in rows else ""
        if counts[patient] < 2:
            continue
        try:
            case = source.open() if isinstance(source, Source) else source
            cases.setdefault(patient, []).append(case)
        except (ValueError, OSError) as error:  # it was there a moment ago
            unreadable.append(sentence(error))
    ordered, notes = in_order_of_time(cases, dates)
    notes = unreadable + notes

    def followed(patient: str) -> tuple[Patient | None, list[str]]:
        scans = []
        for case, day in ordered[patient]:
            row = rows[case.name]
            mask = find_masks(folder, case, row[RUN])
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
            days[case.name], said = date_of(case, dates)
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
        notes += _oddities(patient, days, dated)
    if without:
        notes.append(
            f"{len(without)} patient(s) with several scans, such as {without[0]}, but without two "
            "dates: give them with --dates to have their growth"
        )
    return ordered, notes


def _by_timepoint(patient: str, scans: Sequence[Case]) -> list[Case]:
    """Order scans by the timepoint numbers in their names; [] unless each has one of its own."""
    by_number: dict[int, Case] = {}
    for case in scans:
        number = timepoint(case.name, patient)
        if number is None or number in by_number:
            return []
        by_number[number] = case
    return [by_number[number] for number in sorted(by_number)]


def _oddities(
    patient: str, days: Mapping[str, datetime.date | None], dated: Sequence[tuple]
) -> list[str]:
    """Say which scans have no date, and which are of one day."""
    notes = []
    for name, day in days.items():
        if day is None:
            notes.append(f"{name}: has no date, and no part in the growth of {patient}")
    for (day, name), (next_day, next_name) in zip(dated, dated[1:], strict=False):
        if day == next_day:
            notes.append(f"{patient}: {name} and {next_name} are both of {day}; check their dates")
    return notes


def follow(
    scans: Sequence[tuple[Measured, datetime.date | None]],
    errors: dict | None,
    with_registration: bool = True,
) -> tuple[Patient, list[str]]:
    """Measure the scans of one patient, which are in order of time, and register them.

    `errors` is the fit of volume errors in the weights' card. Also returns sentences on scans that
    cannot be registered.
    """
    visits, notes = [], []
    for measured, day in scans:
        visits.append(_visit(measured, day, errors))
    first = scans[0][0]
    fixed = _flair(first) if with_registration else None
    if fixed is None:
        return Patient(tuple(visits), (), 1.0), notes
    areas = first.mask.sum(axis=(1, 2))
    place = int(areas.argmax()) if areas.any() else len(areas) // 2
    own = first.mask[place]
    views = [View(first.case.name, _window(sitk.GetArrayFromImage(fixed))[place], own, own)]
    for k, (measured, _) in enumerate(scans[1:], 1):
        moving = _flair(measured)
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
        apart = _components_alone(first, measured, moving, transform)
        visits[k] = replace(visits[k], apart=tuple(apart))
        views.append(_view(measured, moving, fixed, transform, place, own))
    _, height, width = fixed.GetSpacing()[::-1]
    return Patient(tuple(visits), tuple(views), height / width), notes


def _visit(measured: Measured, day: datetime.date | None, errors: dict | None) -> Visit:
    case, mask, row = measured.case, measured.mask, measured.row
    concerns = edge_warnings(mask)
    expected = row["expected_dsc"]
    if not mask.any():
        concerns.append("the mask is empty")
    elif expected is not None and expected < WARN_BELOW:
        concerns.append("the mask is probably poor")
    return Visit(
        case.name,
        row["patient"],
        day,
        estimated_volume(row["lesion_ml"], expected, errors),
        bidimensional(mask, case.spacing) if case.spacing else None,
        case.spacing,
        row["sequences"],
        row["replaced"],
        " and ".join(concerns),
    )


# Registration, in the axial frame of each scan


def _flair(measured: Measured) -> sitk.Image | None:
    """Read FLAIR as an axial image; None if the files of the case state no positions."""
    case = measured.case
    if not isinstance(case, Scan):
        return None
    flair = measured.flair
    if flair is None:
        voxels = case.grid.to_axial(read_voxels(case.flair))
        flair = np.ascontiguousarray(voxels[..., voxels.shape[-1] // 2])
    return case.grid.axial.image(flair.T)


def _view(
    measured: Measured,
    moving: sitk.Image,
    fixed: sitk.Image,
    transform: sitk.Transform,
    place: int,
    first: np.ndarray,
) -> View:
    """Show a scan in the slice `place` of the first one."""
    whole = Grid.of(fixed)
    step = np.asarray(whole.direction)[:, 2] * whole.spacing[2] * place
    offset = tuple((np.asarray(whole.offset) + step).tolist())
    grid = replace(whole, shape=(*whole.shape[:2], 1), offset=offset)
    grey = _resampled(_window(sitk.GetArrayFromImage(moving)), moving, grid, transform)
    mask = _resampled(measured.mask, moving, grid, transform) > 0.5
    return View(measured.case.name, grey[0].astype(np.uint8), mask[0], first)


def _window(flair: np.ndarray) -> np.ndarray:
    return to_grey(flair[..., None])


def _resampled(
    voxels: np.ndarray, moving: sitk.Image, grid: Grid, transform: sitk.Transform
) -> np.ndarray:
    """Resample voxels (S, H, W) on the grid of `moving` linearly to another grid; 0 outside."""
    image = sitk.GetImageFromArray(voxels.astype(np.float32))
    image.CopyInformation(moving)
    moved = sitk.Resample(
        image,
        list(grid.shape),
        transform,
        sitk.sitkLinear,
        [float(place) for place in grid.offset],
        [float(length) for length in grid.spacing],
        np.ravel(grid.direction).tolist(),
    )
    return sitk.GetArrayFromImage(moved)


def _components_alone(
    first: Measured, later: Measured, moving: sitk.Image, transform: sitk.Transform
) -> list[str]:
    """Say which components of one mask have no partner in the other, in the first scan's frame."""
    assert isinstance(first.case, Scan)
    grid = first.case.grid.axial
    moved = _resampled(later.mask, moving, grid, transform) > 0.5
    spacing = np.array(grid.spacing[::-1])
    alone = [(later.case.name, ml) for ml in _without_partner(moved, first.mask, spacing)]
    alone += [(first.case.name, ml) for ml in _without_partner(first.mask, moved, spacing)]
    return [f"{name}: a component of {ml:.1f} ml without a partner" for name, ml in alone]


def _without_partner(mask: np.ndarray, other: np.ndarray, spacing: np.ndarray) -> list[float]:
    """Return the volumes, in ml, of the components of a mask that are far from another mask."""
    from skimage.measure import label, regionprops  # slow to import

    margin = np.ceil(NEAR / spacing).astype(int)
    volumes = []
    for component in regionprops(np.asarray(label(mask))):
        start = np.maximum(np.array(component.bbox[:3]) - margin, 0)
        end = np.array(component.bbox[3:]) + margin
        near = other[start[0] : end[0], start[1] : end[1], start[2] : end[2]].any()
        ml = float(component.area * spacing.prod() / 1000)
        if not near and ml >= LEAST_ML:
            volumes.append(ml)
    return volumes
