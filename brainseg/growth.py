"""Measure a lesion's diameters, and how fast it grows over one patient's scans, with intervals.

This is a measurement, never a verdict. The size of a lesion is its mean tumour diameter, in mm, (2
V)^(1/3) of the volume V: in the growth literature, V is half the product of three diameters, whose
geometric mean this is. It is 1.5 % more than the diameter of a sphere of that volume. Its slope
over time is the velocity of diametric expansion (Pallud 2013, PMC3635513; Mandonnet 2003).

All intervals are 80 %. Errors of the volumes of two scans are taken to be independent: errors that
both share, because one network sees one lesion, make intervals of changes too wide.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .volume_errors import scale

LEAST_DAYS = 90  # between the first and last scan of a rate
YEAR = 365.25  # days
SIGMA = 1.2816  # half of an 80 % interval of a normal distribution, in standard deviations
ALIKE = 1.5  # the ratio of pixel sizes or slice thicknesses up to which scans are comparable
WITHIN, BEYOND = "within the error", "beyond the error"
DOUBTFUL = "hard to compare"  # so that neither is said


class Estimate(NamedTuple):
    """A number and its 80 % interval; NaN where it is not known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """Return a rising function of the number, with its interval."""
        return Estimate(function(self.value), function(self.low), function(self.high))


UNKNOWN = Estimate(math.nan)


@dataclass(frozen=True)
class Diameters:
    """The longest diameter of a lesion in a slice and the one across it, in mm."""

    longest: float
    across: float

    @property
    def product(self) -> float:
        return self.longest * self.across


@dataclass(frozen=True)
class Visit:
    """One scan of a patient: when it was made, how, and what was measured."""

    case: str
    patient: str
    date: datetime.date | None
    volume: Estimate  # ml
    diameters: Diameters | None  # None for an empty mask and without a pixel size
    spacing: tuple[float, float, float] | None  # mm: slices, rows, columns
    sequences: str
    replaced: str  # the sequences that FLAIR stands in for
    concern: str  # why its mask needs checking
    apart: tuple[str, ...] = ()  # what registration to the first scan says against a comparison

    @property
    def diameter(self) -> Estimate:
        return self.volume.mapped(mean_diameter)


def mean_diameter(ml: float) -> float:
    """Return the mean tumour diameter, in mm, of a volume in ml."""
    return (2000 * ml) ** (1 / 3)


def estimated_volume(ml: float | None, expected_dsc: float | None, errors: dict | None) -> Estimate:
    """Return a volume with its 80 % interval, by the `errors` of the weights' card.

    The interval is NaN without `errors`, and without an expected DSC: for an empty mask.
    """
    if ml is None:
        return UNKNOWN
    if errors is None or expected_dsc is None:
        return Estimate(ml)
    low, high = errors["interval"]
    width = float(scale(expected_dsc))
    return Estimate(ml, ml * math.exp(low * width), ml * math.exp(high * width))


# Diameters of an outline in one slice, as a reader draws them


def bidimensional(mask: np.ndarray, spacing: tuple[float, float, float]) -> Diameters | None:
    """Measure the bidimensional diameters of a mask (S, H, W) bool; None if it is empty.

    The longest diameter in the slice that has the longest, and across it the extent of the same
    piece of lesion: the product of these maximal perpendicular diameters in one slice is the size
    in RANO-LGG (PMC10584081). Pieces of a slice that do not touch are measured one by one.
    """
    from skimage.measure import label, regionprops  # slow to import

    pixel = spacing[1:]
    pieces = []
    for outline in mask[mask.any(axis=(1, 2))]:
        for piece in regionprops(label(outline, connectivity=2)):
            bound = math.hypot(piece.image.shape[0] * pixel[0], piece.image.shape[1] * pixel[1])
            pieces.append((bound, piece.image))
    pieces.sort(key=lambda piece: -piece[0])
    best = None
    for bound, image in pieces:
        if best and bound <= best.longest:  # no piece from here on can be longer
            break
        longest, across = feret_diameters(image, pixel)
        if not best or longest > best.longest:
            best = Diameters(longest, across)
    return best


def feret_diameters(piece: np.ndarray, pixel: Sequence[float]) -> tuple[float, float]:
    """Return the longest diameter of a piece (H, W) bool, corners of its pixels included, in mm,
    and its extent perpendicular to that.

    `pixel` is the height and the width of a pixel. Exact: between corners of the convex hull. Of
    equal diameters, the one with the longest extent across is taken.
    """
    from scipy.spatial import ConvexHull  # slow to import

    rows = np.flatnonzero(piece.any(axis=1))
    first = piece[rows].argmax(axis=1)
    last = piece.shape[1] - piece[rows, ::-1].argmax(axis=1)
    y = np.concatenate((rows, rows, rows + 1, rows + 1))
    x = np.concatenate((first, last, first, last))
    points = np.stack((y, x), axis=1) * np.asarray(pixel)
    points = points[ConvexHull(points).vertices]
    between = points[:, None] - points
    lengths = np.hypot(between[..., 0], between[..., 1])
    longest = float(lengths.max())
    across = 0.0
    for one, other in np.argwhere(lengths >= longest * (1 - 1e-9)):
        if one < other:
            along = between[one, other] / longest
            extent = np.ptp(points @ np.array([-along[1], along[0]]))
            across = max(across, float(extent))
    return longest, across


# Changes and rates


def combine(factors: Sequence[float], estimates: Sequence[Estimate]) -> Estimate:
    """Return the sum of independent estimates times factors, with its interval.

    The interval recovers variances from the limits of each, on the side that counts (MOVER, Zou
    and Donner 2008), as the intervals of volumes are not symmetric.
    """
    value, below, above = 0.0, 0.0, 0.0
    for factor, estimate in zip(map(float, factors), estimates, strict=True):
        down = factor * (estimate.value - estimate.low)
        up = factor * (estimate.high - estimate.value)
        if factor < 0:
            down, up = up, down
        value += factor * estimate.value
        below += down**2
        above += up**2
    return Estimate(value, value - math.sqrt(below), value + math.sqrt(above))


def difference(later: Estimate, earlier: Estimate) -> Estimate:
    return combine((1, -1), (later, earlier))


def percent_change(later: Estimate, earlier: Estimate) -> Estimate:
    """Return the change in % of the earlier one; not known if one of them is 0."""
    if not (later.value > 0 and earlier.value > 0):
        return UNKNOWN
    ratio = difference(later.mapped(math.log), earlier.mapped(math.log))
    return ratio.mapped(lambda logarithm: 100 * math.expm1(logarithm))


def growth_rate(days: Sequence[float], diameters: Sequence[Estimate]) -> Estimate:
    """Return the slope of diameters over time, in mm a year; unknown under 90 days.

    Fits a line by least squares, with a weight of 1 / error² for each diameter; the slope of two
    scans is their difference over the time between them. If the scans scatter about the line more
    than their errors allow, the interval is widened by that ratio. Without errors there is no
    interval.
    """
    if len(days) < 2 or max(days) - min(days) < LEAST_DAYS:
        return UNKNOWN
    years = np.asarray(days) / YEAR
    values, lows, highs = np.array(diameters, float).T
    sigmas = (highs - lows) / (2 * SIGMA)
    have_errors = bool(np.isfinite(sigmas).all())
    weights = np.ones(len(days))
    if have_errors:
        weights = 1 / sigmas**2
    times = years - np.average(years, weights=weights)
    rate = combine(weights * times / (weights * times**2).sum(), diameters)
    if len(days) > 2 and have_errors:
        residuals = values - np.average(values, weights=weights) - rate.value * times
        ratio = math.sqrt((weights * residuals**2).sum() / (len(days) - 2))
        wider = max(1.0, ratio)
        rate = Estimate(
            rate.value,
            rate.value - wider * (rate.value - rate.low),
            rate.value + wider * (rate.high - rate.value),
        )
    return rate


# The table


def differences(visit: Visit, other: Visit) -> list[str]:
    """List what makes the scan of `visit` hard to compare with another one of the patient."""
    reasons = []
    if visit.spacing is None or other.spacing is None:
        reasons.append("no pixel size")
    else:
        sizes = ("slices", visit.spacing[0], other.spacing[0]), (
            "pixels", max(visit.spacing[1:]), max(other.spacing[1:]),
        )  # fmt: skip
        for what, size, other_size in sizes:
            if max(size, other_size) > ALIKE * min(size, other_size):
                reasons.append(f"{what} of {size:.2g} mm, and of {other_size:.2g} mm")
    if visit.sequences != other.sequences:
        reasons.append(f"sequences {visit.sequences}, and {other.sequences}")
    for one in (visit, other):
        if one.replaced:
            reasons.append(f"{one.case}: FLAIR stands in for {one.replaced}")
        if one.concern:
            reasons.append(f"{one.case}: {one.concern}")
    return reasons


def growth_rows(visits: Sequence[Visit]) -> list[dict]:
    """Make the rows of growth.csv for a patient's scans in order of time; rates are up to each."""
    rows = []
    for k, visit in enumerate(visits):
        row: dict = {"patient": visit.patient, "case": visit.case, "date": visit.date}
        row["days"] = None
        if visit.date and visits[0].date:
            row["days"] = (visit.date - visits[0].date).days
        row |= _columns("lesion_ml", visit.volume) | _columns("diameter_mm", visit.diameter)
        earlier = {}
        if k:
            earlier = {"previous": visits[k - 1], "first": visits[0]}
        for name in ("previous", "first"):
            row |= _change(name, visit, earlier.get(name))
        row |= _columns("mm_per_year", rate_until(visits[: k + 1]))
        row["bidimensional_mm2"] = None
        if visit.diameters:
            row["bidimensional_mm2"] = visit.diameters.product
        for name in ("previous", "first"):
            row[f"bidimensional_percent_since_{name}"] = _product_change(visit, earlier.get(name))
        reasons = []
        for name, other in earlier.items():
            against = differences(visit, other) + list(visit.apart)
            if against and row[f"since_{name}"]:
                row[f"since_{name}"] = DOUBTFUL
            reasons += against
        row["comparable"] = ""
        if reasons:
            row["comparable"] = "no"
        elif k:
            row["comparable"] = "yes"
        row["why_not"] = "; ".join(dict.fromkeys(reasons))
        rows.append(row)
    return rows


def rate_until(visits: Sequence[Visit]) -> Estimate:
    """Return the growth rate over the dated scans whose mask is not empty, in mm a year."""
    days, diameters = [], []
    for visit in visits:
        if visit.date and visit.volume.value > 0:
            days.append(visit.date.toordinal())
            diameters.append(visit.diameter)
    return growth_rate(days, diameters)


def _change(name: str, visit: Visit, earlier: Visit | None) -> dict:
    """Make the columns of the change of volume since an earlier scan."""
    ml, percent, said = UNKNOWN, UNKNOWN, ""
    if earlier:
        ml = difference(visit.volume, earlier.volume)
        percent = percent_change(visit.volume, earlier.volume)
        if not math.isnan(percent.low):
            said = WITHIN if ml.holds_zero or percent.holds_zero else BEYOND
    columns = _columns(f"ml_since_{name}", ml) | _columns(f"percent_since_{name}", percent)
    return columns | {f"since_{name}": said}


def _product_change(visit: Visit, earlier: Visit | None) -> float | None:
    if not (earlier and earlier.diameters and visit.diameters):
        return None
    return 100 * (visit.diameters.product / earlier.diameters.product - 1)


def _columns(name: str, estimate: Estimate) -> dict:
    """Make the columns of an estimate: empty where it is not known."""
    columns = {}
    for end, value in zip(("", "_low", "_high"), estimate, strict=True):
        columns[name + end] = None if math.isnan(value) else value
    return columns
