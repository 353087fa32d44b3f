"""The diameters of a lesion's outline in one slice, as a reader draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Diameters:
    """The longest diameter of a lesion in a slice and the one across it, in mm."""

    longest: float
    across: float
    slice: int

    @property
    def product(self) -> float:
        return self.longest * self.across


def bidimensional(mask: np.ndarray, spacing: tuple[float, float, float]) -> Diameters | None:
    """Measure the bidimensional diameters of a mask (S, H, W) bool; None if it is empty.

    The longest diameter in the slice that has the longest, and across it the extent of the same
    piece of lesion: the product of these maximal perpendicular diameters in one slice is the size
    in RANO-LGG (PMC10584081). Pieces of a slice that do not touch are measured one by one.
    """
    from skimage.measure import label, regionprops  # slow to import

    pixel = spacing[1:]
    pieces = []
    for k in np.flatnonzero(mask.any(axis=(1, 2))):
        for piece in regionprops(label(mask[k], connectivity=2)):
            bound = math.hypot(piece.image.shape[0] * pixel[0], piece.image.shape[1] * pixel[1])
            pieces.append((bound, int(k), piece.image))
    pieces.sort(key=lambda piece: -piece[0])
    best = None
    for bound, k, image in pieces:
        if best and bound <= best.longest:  # no piece from here on can be longer
            break
        longest, across = feret_diameters(image, pixel)
        if not best or longest > best.longest:
            best = Diameters(longest, across, k)
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
