"""The grid of a volume: the position of its voxels, and the one rule for what headers state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike

from .files import by

AXES = "{}: has {} axes; give a volume of 3, or of 4 with channels"
SPACINGS = 0.02, 100.0  # millimetres: no scan of a head has finer or coarser voxels
RIGHT_ANGLE = 1e-3  # cosine between two axes that are at right angles
ROUNDED = 0.0175  # the same within a degree: directions that lost digits
TO_LPS = np.array([[-1.0], [-1.0], [1.0]])  # NIfTI's coordinates run to the right and to the front


@dataclass(frozen=True)
class Grid:
    """The position of the voxels of a file, and the map of its axes to (left, posterior, up)."""

    shape: tuple[int, int, int]  # voxels along the axes of the file
    spacing: tuple[float, float, float]  # millimetres along them
    offset: tuple[float, float, float]  # of the first voxel, in mm to the left, posterior and up
    direction: np.ndarray  # (3, 3): the file's axes as columns, in the same coordinates
    notes: tuple[str, ...] = ()  # oddities of the header, one sentence each

    @cached_property
    def _turn(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the file's axes in the order left, posterior, up, and those that run backward."""
        turn = sitk.DICOMOrientImageFilter()
        turn.SetDesiredCoordinateOrientation("LPS")
        voxel = sitk.Image(1, 1, 1, sitk.sitkUInt8)
        voxel.SetDirection(np.ravel(self.direction).tolist())
        turn.Execute(voxel)
        return turn.GetPermuteOrder(), tuple(np.flatnonzero(turn.GetFlipAxes()).tolist())

    @property
    def axes(self) -> tuple[int, ...]:
        """Return the file's axes that are closest to left-right, front-back and up-down."""
        return self._turn[0]

    @classmethod
    def of(cls, image: sitk.Image) -> Grid:
        direction = np.reshape(image.GetDirection(), (3, 3))
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), direction)

    @property
    def affine(self) -> np.ndarray:
        """Return the matrix (4, 4) of NIfTI: from voxels to mm to the right, front and up."""
        affine = np.eye(4)
        affine[:3, :3] = TO_LPS * self.direction * self.spacing
        affine[:3, 3] = TO_LPS[:, 0] * self.offset
        return affine

    @property
    def axial(self) -> Grid:
        """Return the grid of the axial volume: X runs to the left, Y to the back, Z up."""
        return Grid.of(sitk.DICOMOrient(self.blank, "LPS"))

    def to_axial(self, voxels: np.ndarray) -> np.ndarray:
        """Turn voxels (X, Y, Z, C) of the file into a volume (S, H, W, C)."""
        axes, backward = self._turn
        return np.flip(voxels.transpose((*axes, 3)), backward).transpose(2, 1, 0, 3)

    def to_file_axes(self, mask: np.ndarray) -> np.ndarray:
        """Turn a mask (S, H, W) into voxels (X, Y, Z) of the file."""
        axes, backward = self._turn
        return np.flip(mask.transpose(2, 1, 0), backward).transpose(np.argsort(axes))

    @property
    def blank(self) -> sitk.Image:
        return self.image(np.zeros(self.shape, np.uint8))

    def image(self, voxels: np.ndarray) -> sitk.Image:
        """Make a SimpleITK image of voxels (X, Y, Z) of the file."""
        image = sitk.GetImageFromArray(voxels.T)
        image.SetSpacing(list(map(float, self.spacing)))
        image.SetOrigin(list(map(float, self.offset)))
        image.SetDirection(np.ravel(self.direction).tolist())
        return image

    def difference(self, other: Grid) -> str:
        """Name what differs from another grid by more than a thousandth; empty if nothing does."""
        if self.shape != other.shape:
            return "shape"
        for name in ("spacing", "offset", "direction"):
            if not np.allclose(getattr(self, name), getattr(other, name), atol=1e-3):
                return name
        return ""

    def check_same(self, path: Path, other: Grid, other_path: Path) -> None:
        """Raise ValueError, naming both files, unless the grids agree to a thousandth."""
        different = self.difference(other)
        if not different:
            return
        fault = f"its {different} differs from that of {other_path.name}"
        if different == "shape":
            fault = f"{by(self.shape)} voxels, but {other_path.name} has {by(other.shape)}"
        raise ValueError(f"{path}: {fault}; resample both to one grid")

    def coverage(self, other: Grid) -> float:
        """Return the share (0 to 1) of this grid's field of view that `other` covers as well."""
        x, y, z = (np.linspace(-0.5, length - 0.5, 24) for length in self.shape)
        index = np.stack(np.meshgrid(x, y, z, indexing="ij"), axis=-1).reshape(-1, 3)
        points = index * self.spacing @ np.transpose(self.direction) + self.offset
        inside = (points - other.offset) @ other.direction / other.spacing
        return float((np.abs(inside * 2 + 1 - other.shape) <= other.shape).all(axis=1).mean())


def grid_of_header(
    path: Path,
    shape: tuple[int, int, int],
    spacing: ArrayLike,
    offset: ArrayLike,
    direction: ArrayLike,
) -> Grid:
    """Return the grid that a header states; ValueError, naming the file, if it cannot be right.

    For every format: plausible spacings in mm, and axes (columns of `direction`) of length 1 at
    right angles. Those off by at most a degree are corrected, and noted.
    """
    spacing = np.asarray(spacing, float)
    offset = np.asarray(offset, float)
    direction = np.asarray(direction, float)
    if not (np.all(spacing >= SPACINGS[0]) and np.all(spacing <= SPACINGS[1])):  # NaN is neither
        lengths = by(f"{length:g}" for length in spacing)
        raise ValueError(f"{path}: its spacing is {lengths} mm; correct its header")
    if not (np.isfinite(offset).all() and np.isfinite(direction).all()):
        raise ValueError(f"{path}: its position or orientation is not a number; correct its header")
    error = np.abs(direction.T @ direction - np.eye(3)).max()
    if error > ROUNDED:
        raise ValueError(f"{path}: its axes are not at right angles; resample it")
    notes = ()
    if error > RIGHT_ANGLE:
        left, _, right = np.linalg.svd(direction)
        direction = left @ right  # the nearest orthonormal matrix
        notes = ("its axes are up to a degree off right angles; the nearest ones are used",)
    x, y, z = map(int, shape)  # of some readers, numbers of NumPy
    return Grid((x, y, z), tuple(spacing.tolist()), tuple(offset.tolist()), direction, notes)


def damaged(path: Path | str) -> str:
    return f"{path}: not a readable volume, or cut short; export it again"
