"""Segment arrays, rate the masks, and measure growth: the class behind torch.hub's `segmenter`."""

import datetime
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .alignment import Measured
from .io.slices import Case
from .patients import parse_date
from .reports.volumes import end_warnings, volume_row
from .segmenter import Segmenter, Spacing, as_volume
from .visits import follow, in_order_of_time

Date = datetime.date | str  # as 2014-03-02 or 20140302


@dataclass(frozen=True)
class Assessment:
    """A mask, how large it is, and how good it probably is."""

    mask: np.ndarray = field(repr=False)  # (S, H, W) bool
    probabilities: np.ndarray = field(repr=False)  # of lesion, (S, H, W) float32
    ml: float | None  # volume of the mask; None without a spacing
    expected_dsc: float | None  # None if the mask is empty or the weights have no fit
    expected_dsc_low: float | None  # the DSC of 80 % of such masks is between this
    expected_dsc_high: float | None  # and this
    warnings: list[str]  # a sentence each; empty if nothing calls for a second look


class NotebookSegmenter(Segmenter):
    """A Segmenter of arrays, without files."""

    def assess(self, volume: np.ndarray, spacing: Spacing = None) -> Assessment:
        """Segment as a call does, and rate the mask; `spacing` is in mm: slices, rows, columns."""
        aspect, lengths = 1.0, None
        if spacing is not None:
            lengths = lengths_of(spacing)
            aspect = lengths[1] / lengths[2]
        images, frame = self.preprocess(as_volume(volume, self.channels), aspect)
        result = self.segmentation_of(self.probabilities(images), frame, lengths)
        ml = None
        if lengths is not None:
            ml = float(result.mask.sum() * math.prod(lengths) / 1000)
        expected, low, high = result.expected or (None, None, None)
        reasons = result.warnings + end_warnings(result.mask)
        return Assessment(result.mask, result.probabilities, ml, expected, low, high, reasons)

    def growth(
        self, scans: Sequence[tuple[Date, np.ndarray, Sequence[float]]], patient: str = "patient"
    ) -> list[dict]:
        """Segment several scans of one patient; return the rows of growth.csv, in order of time.

        Each scan is its date, its volume and its spacing in mm: slices, rows, columns. Arrays state
        no positions, so the scans are not registered. Raises ValueError for fewer than two scans,
        a date that cannot be right and a spacing that is none.
        """
        if len(scans) < 2:
            raise ValueError(f"growth needs two scans or more, not {len(scans)}")
        if not all(len(scan) == 3 for scan in scans):
            raise ValueError("a scan is not (date, volume, spacing); give all three of each")
        dates, measured = {}, {}
        for number, (date, volume, spacing) in enumerate(scans, 1):
            name = f"scan {number}"
            dates[name] = parse_date(str(date))
            measured[name] = self._measure(name, patient, volume, spacing)
        cases = {patient: [scan.case for scan in measured.values()]}
        ordered, notes = in_order_of_time(cases, dates)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        errors = (self.expected_dsc_fit or {}).get("volume_errors")
        in_order = [(measured[case.name], date) for case, date in ordered[patient]]
        followed, _ = follow(in_order, errors, with_registration=False)
        return followed.rows

    def _measure(
        self, name: str, patient: str, array: np.ndarray, spacing: Sequence[float] | None
    ) -> Measured:
        """Segment one scan of a patient, and keep what its growth needs."""
        if spacing is None:
            raise ValueError(f"{name}: has no spacing; give mm from slice to slice, row, column")
        volume = as_volume(array, self.channels)
        numbers = tuple(range(1, len(volume) + 1))
        case = Case(name, numbers, (), (), patient=patient, given_spacing=lengths_of(spacing))
        images, frame = self.preprocess(volume, case.aspect)
        result = self.segmentation_of(self.probabilities(images), frame, case.spacing)
        row = volume_row(
            case, volume, result.mask, result.expected, result.warnings, replaced=result.replaced
        )
        return Measured(case, result.mask, row)


def lengths_of(spacing: Sequence[float]) -> tuple[float, float, float]:
    """Return a spacing as numbers; ValueError unless it is three lengths: slices, rows, columns."""
    fault = (
        f"spacing {spacing}: must be three lengths in mm, in the order of the axes: from slice to "
        "slice, from row to row, from column to column"
    )
    try:
        slices, rows, columns = map(float, spacing)
    except (TypeError, ValueError) as error:
        raise ValueError(fault) from error
    if not all(0 < length < math.inf for length in (slices, rows, columns)):
        raise ValueError(fault)
    return slices, rows, columns
