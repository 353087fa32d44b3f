"""Where the voxels of a volume file or DICOM series lie, and how its axes run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .files import by


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie, and how its axes go to (left, posterior, up)."""

    shape: tuple[int, int, int]  # voxels along the axes of the file
    spacing: tuple[float, float, float]  # millimetres along them
    offset: tuple[float, float, float]  # of the first voxel, in mm to the left, posterior and up
    direction: np.ndarray  # (3, 3): the file's axes as columns, in the same coordinates
    notes: tuple[str, ...] = ()  # what is odd about the header, a sentence each

    @cached_property
    def _turn(self) -> tuple[tuple[int, ...], list[int]]:
        """The file's axes in the order left, posterior, up, and which of these run backward."""
        turn = sitk.DICOMOrientImageFilter()
        turn.SetDesiredCoordinateOrientation("LPS")
        voxel = sitk.Image(1, 1, 1, sitk.sitkUInt8)
        voxel.SetDirection(np.ravel(self.direction).tolist())
        turn.Execute(voxel)
        return turn.GetPermuteOrder(), np.flatnonzero(turn.GetFlipAxes()).tolist()

    @property
    def axes(self) -> tuple[int, ...]:
        """The file's axes that run most nearly left or right, front or back, up or down."""
        return self._turn[0]

    @classmethod
    def of(cls, image: sitk.Image) -> Grid:
        direction = np.reshape(image.GetDirection(), (3, 3))
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), direction)

    @property
    def axial(self) -> Grid:
        """The grid of the axial volume: X runs to the left, Y to the back, Z up."""
        return Grid.of(sitk.DICOMOrient(self.image(np.zeros(self.shape, np.uint8)), "LPS"))

    def to_axial(self, voxels: np.ndarray) -> np.ndarray:
        """Turn voxels (X, Y, Z, C) of the file into a volume (S, H, W, C)."""
        axes, backward = self._turn
        return np.flip(voxels.transpose(*axes, 3), backward).transpose(2, 1, 0, 3)

    def from_axial(self, mask: np.ndarray) -> np.ndarray:
        """Turn a mask (S, H, W) into voxels (X, Y, Z) of the file."""
        axes, backward = self._turn
        return np.flip(mask.transpose(2, 1, 0), backward).transpose(np.argsort(axes))

    def image(self, voxels: np.ndarray) -> sitk.Image:
        """Make a SimpleITK image of voxels (X, Y, Z) of the file."""
        image = sitk.GetImageFromArray(voxels.T)
        image.SetSpacing([float(length) for length in self.spacing])
        image.SetOrigin([float(place) for place in self.offset])
        image.SetDirection(np.ravel(self.direction).tolist())
        return image

    def difference(self, other: Grid) -> str:
        """Name what differs from another grid by more than a thousandth; empty if nothing does."""
        if self.shape != other.shape:
            return "shape"
        names = ("spacing", "offset", "direction")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return next((name for name, a, b in pairs if not np.allclose(a, b, atol=1e-3)), "")

    def check_same(self, path: Path, other: Grid, other_path: Path) -> None:
        """Raise ValueError, naming both files, unless both are the same to a thousandth."""
        different = self.difference(other)
        said = f"its {different} is not that of {other_path.name}"
        if different == "shape":
            said = f"{by(self.shape)} voxels, but {other_path.name} has {by(other.shape)}"
        if different:
            raise ValueError(f"{path}: {said}; resample both to one grid")

    def coverage(self, other: Grid) -> float:
        """Return the share (0 to 1) of this grid's field of view that `other` covers as well."""
        ends = [np.linspace(-0.5, length - 0.5, 24) for length in self.shape]
        index = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
        points = index * self.spacing @ np.transpose(self.direction) + self.offset
        inside = (points - other.offset) @ other.direction / other.spacing
        return float((np.abs(inside * 2 + 1 - other.shape) <= other.shape).all(axis=1).mean())
