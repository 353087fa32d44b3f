"""The grey levels of one sequence, which version 2 of the preprocessing goes by.

They are part of what trained weights mean, as the steps of `preprocess` are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .metrics import dsc

BRIGHTEST = 4.0  # brighter than so many times the median tissue is clipped
SATURATED = 0.1  # a share of the foreground at one greatest value that no scanner writes
FLAT = 0.25  # a share of the foreground at its median that no tissue has
AROUND = 0.95  # a share of the edge of the slices that is air where the skull is gone
OVERLAP = 0.8  # Dice coefficient of two foregrounds; in 87 of 88 LGG cases it is 0.88 to 0.97


@dataclass(frozen=True)
class MeasuredSequence:
    """One sequence (S, H, W), and the grey levels from which everything in it is measured."""

    voxels: np.ndarray
    background: float
    threshold: float  # above it lies the foreground
    median: float  # of the foreground
    saturated: float  # share of the foreground that has the greatest value
    flat: float  # share of the foreground that has the median's value
    air: float | None = None  # amid the tissue: the background of the file

    @cached_property
    def foreground(self) -> np.ndarray:
        return self.voxels > self.threshold

    def scaled(self) -> np.ndarray:
        """The voxels, float32, with the background at 0 and the median tissue at 1, clipped."""
        scaled = self.voxels.astype(np.float32) - np.float32(self.background)
        scaled /= np.float32(self.median - self.background)
        return np.clip(scaled, 0, BRIGHTEST, out=scaled)


def measure(voxels: np.ndarray) -> MeasuredSequence | None:
    """Measure a sequence (S, H, W); where air lies amid tissue, it is made the darkest.

    Normalised after stripping, a scan has one value all around it, darker tissue and brighter.
    """
    found = _find_levels(voxels)
    if found is None or found.flat <= FLAT:
        return found
    air = voxels == found.median
    around = min(air[:, [0, -1]].mean(), air[:, :, [0, -1]].mean())
    if around < AROUND or found.median == voxels.max():
        return found
    filled = _find_levels(np.where(air, np.percentile(voxels[~air], 0.1), voxels))
    return filled and replace(filled, air=found.median)


def _find_levels(voxels: np.ndarray) -> MeasuredSequence | None:
    """Find the levels of one sequence (S, H, W); None if it is constant but for single voxels.

    The foreground is what lies a tenth of the way up from the background, the 1st percentile, to
    the 99th percentile of all that is brighter than the background.
    """
    background = float(np.percentile(voxels, 1))
    bright = voxels[voxels > background]
    if len(bright) <= 1e-3 * voxels.size:
        return None
    high = float(np.percentile(bright, 99))
    # A little under a tenth, so that no rounding moves a grey level that lies just on it.
    threshold = background + 0.0999 * (high - background)
    foreground = bright[bright > threshold]
    median = float(np.median(foreground))
    saturated = float((foreground == foreground.max()).mean())
    flat = float((foreground == median).mean())
    return MeasuredSequence(voxels, background, threshold, median, saturated, flat)


def oddities(
    name: str, sequence: MeasuredSequence | None, flair: MeasuredSequence, lead: str
) -> Iterator[str]:
    """Say what is odd about a sequence (None: constant), beside FLAIR, which is called `lead`."""
    if sequence is None:
        yield f"FLAIR stands in for {name}, which is constant"
        return
    if sequence.air is not None:
        yield (
            f"{name} was normalised after stripping: {sequence.air:.3g}, amid its tissue, is taken "
            "for background"
        )
    if sequence.saturated > SATURATED:
        yield f"{name} is saturated: {sequence.saturated:.0%} of it has one value"
    if sequence.flat > FLAT:
        yield (
            f"{name} has one value in {sequence.flat:.0%} of its foreground; if it was normalised "
            "after stripping, give the file from before"
        )
    if (overlap := dsc(sequence.foreground, flair.foreground)) < OVERLAP:
        yield f"{name} covers another part than {lead} (Dice {overlap:.2f}); are they registered?"


def missing_sequences(volume: np.ndarray) -> str:
    """Which sequences of a volume (S, H, W, 3) are a copy of FLAIR, put there for a missing one."""
    if volume.shape[-1] != 3:
        return "unknown"
    names = {0: "pre-contrast", 2: "post-contrast"}
    copies = [k for k in names if np.array_equal(volume[..., k], volume[..., 1])]
    return " and ".join(names[k] for k in copies) or "none"
