"""Arrays of somebody's program: as a volume for the network, and what is learnt of its mask."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .io.files import by

SHAPES = "(slices, rows, columns) of FLAIR, or (slices, rows, columns, channels)"


@dataclass(frozen=True)
class Assessment:
    """A mask, how large it is, and how good it probably is."""

    mask: np.ndarray  # (S, H, W) bool
    probabilities: np.ndarray  # of lesion, (S, H, W) float32
    ml: float | None  # volume of the mask; None without a spacing
    expected_dsc: float | None  # None if the mask is empty or the weights have no fit
    expected_dsc_low: float | None  # the DSC of 80 % of such masks is between this
    expected_dsc_high: float | None  # and this
    warnings: list[str]  # a sentence each; empty if nothing calls for a second look


def as_volume(array: np.ndarray, channels: int) -> np.ndarray:
    """Return an array (S, H, W), (S, H, W, 1) or (S, H, W, C) as a volume with `channels`.

    One channel is FLAIR, which stands in for the other two of three. Raises ValueError, with a
    remedy, for axes in another number or order.
    """
    volume = np.asarray(array)
    shape = volume.shape
    if volume.ndim not in (3, 4):
        raise ValueError(
            f"a volume is {SHAPES}, not {shape}; give one whole scan (slice[None] is one slice)"
        )
    if volume.ndim == 3 and shape[2] in (1, 3):
        raise ValueError(
            f"an array {shape} looks like one slice with its channels; a volume is {SHAPES}: give "
            "the whole scan, or slice[None]"
        )
    if volume.ndim == 4 and channels in shape[:2] and shape[3] not in (1, channels):
        raise ValueError(
            f"the channels of an array {shape} seem to come first; move them to the end, as in "
            f"numpy.moveaxis(volume, {shape.index(channels)}, -1)"
        )
    sides = shape[1:3]
    if max(sides) > 4 * min(sides):
        raise ValueError(
            f"slices of {by(sides)} pixels are too narrow for a volume (slices, rows, "
            "columns, channels); move the axis of the slices to the front"
        )
    if volume.ndim == 3:
        volume = volume[..., None]
    if volume.shape[3] == 1 and channels == 3:
        volume = np.repeat(volume, 3, axis=3)
    return volume


def aspect_of(spacing: Sequence[float] | None) -> float:
    """Return the height of a pixel over its width; 1 without a spacing.

    Raises ValueError unless a spacing is three lengths in mm: of slices, rows and columns.
    """
    if spacing is None:
        return 1.0
    if np.shape(spacing) != (3,) or not all(
        math.isfinite(length) and length > 0 for length in spacing
    ):
        raise ValueError(
            f"spacing {spacing}: must be three lengths in mm, in the order of the axes: from slice "
            "to slice, from row to row, from column to column"
        )
    return spacing[1] / spacing[2]


def volume_of(mask: np.ndarray, spacing: Sequence[float] | None) -> float | None:
    """Return the volume of a mask in ml, or None without a spacing in mm."""
    if spacing is None:
        return None
    return float(mask.sum() * math.prod(spacing) / 1000)
