"""Read the grid of a volume file, that is the position of its voxels, and check its header."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike

from .files import by

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # errors are raised instead, in one sentence

TO_LPS = np.array([[-1.0], [-1.0], [1.0]])  # NIfTI's coordinates run to the right and to the front
UNITS = {1: 1000.0, 3: 0.001}  # millimetres per metre and per micron, by NIfTI's xyzt_units
SPACINGS = 0.02, 100.0  # millimetres: no scan of a head has finer or coarser voxels
RIGHT_ANGLE = 1e-3  # cosine between two axes that are at right angles
ROUNDED = 0.0175  # the same within a degree: directions that lost digits


@dataclass(frozen=True)
class Grid:
    """The position of the voxels of a file, and the map of its axes to (left, posterior, up)."""

    shape: tuple[int, int, int]  # voxels along the axes of the file
    spacing: tuple[float, float, float]  # millimetres along them
    offset: tuple[float, float, float]  # of the first voxel, in mm to the left, posterior and up
    direction: np.ndarray  # (3, 3): the file's axes as columns, in the same coordinates
    notes: tuple[str, ...] = ()  # oddities of the header, one sentence each

    @cached_property
    def _turn(self) -> tuple[tuple[int, ...], list[int]]:
        """Return the file's axes in the order left, posterior, up, and those that run backward."""
        turn = sitk.DICOMOrientImageFilter()
        turn.SetDesiredCoordinateOrientation("LPS")
        voxel = sitk.Image(1, 1, 1, sitk.sitkUInt8)
        voxel.SetDirection(np.ravel(self.direction).tolist())
        turn.Execute(voxel)
        return turn.GetPermuteOrder(), np.flatnonzero(turn.GetFlipAxes()).tolist()

    @property
    def axes(self) -> tuple[int, ...]:
        """Return the file's axes that are closest to left-right, front-back and up-down."""
        return self._turn[0]

    @classmethod
    def of(cls, image: sitk.Image) -> Grid:
        direction = np.reshape(image.GetDirection(), (3, 3))
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), direction)

    @property
    def axial(self) -> Grid:
        """Return the grid of the axial volume: X runs to the left, Y to the back, Z up."""
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
        """Raise ValueError, naming both files, unless the grids agree to a thousandth."""
        different = self.difference(other)
        said = f"its {different} differs from that of {other_path.name}"
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


def check_grid(
    path: Path, shape: Sequence[int], spacing: ArrayLike, offset: ArrayLike, direction: ArrayLike
) -> Grid:
    """Return the grid that a header states; ValueError, naming the file, if it cannot be right.

    The rule for every format: plausible spacings in mm, and axes (columns of `direction`) of
    length 1 at right angles. Axes that are off by at most a degree were rounded: the nearest
    right angles are taken, and noted.
    """
    spacing = np.asarray(spacing, float)
    offset = np.asarray(offset, float)
    direction = np.asarray(direction, float)
    if not (np.all(spacing >= SPACINGS[0]) and np.all(spacing <= SPACINGS[1])):  # NaN is neither
        lengths = by([f"{length:g}" for length in spacing])
        raise ValueError(f"{path}: its spacing is {lengths} mm; correct its header")
    if not (np.isfinite(offset).all() and np.isfinite(direction).all()):
        raise ValueError(f"{path}: its position is not a number; correct its header")
    error = np.abs(direction.T @ direction - np.eye(3)).max()
    if error > ROUNDED:
        raise ValueError(f"{path}: its axes are not at right angles; resample it")
    notes = ()
    if error > RIGHT_ANGLE:
        left, _, right = np.linalg.svd(direction)
        direction = left @ right  # the nearest orthonormal matrix
        notes = ("its axes are up to a degree off right angles; the nearest ones are used",)
    return Grid(tuple(shape), tuple(spacing.tolist()), tuple(offset.tolist()), direction, notes)


def file_grid(path: Path) -> tuple[Grid, int]:
    """Read the grid and channel count of a volume file, but no voxels; ValueError if unusable."""
    info = read_information(path)
    dimension = info.GetDimension()
    if dimension not in (3, 4):
        raise ValueError(f"{path}: has {dimension} axes; give a volume of 3, or of 4 with channels")
    size = info.GetSize()
    if dimension == 4 and info.GetNumberOfComponents() > 1:
        raise ValueError(f"{path}: has 4 axes of vectors; give a volume of 3, with channels")
    channels = size[3] if dimension == 4 else info.GetNumberOfComponents()
    direction = np.reshape(info.GetDirection(), (dimension, dimension))[:3, :3]
    grid = check_grid(path, size[:3], info.GetSpacing()[:3], info.GetOrigin()[:3], direction)
    return (_nifti_grid(path, fields(info), grid) if is_nifti(path) else grid), channels


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_information(path: Path | str) -> sitk.ImageFileReader:
    """Return SimpleITK's reader of a file, with the header read; ValueError if it is damaged."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise ValueError(f"{path}: its axes are not at right angles; resample it") from error
        raise ValueError(damaged(path)) from error
    return reader


def damaged(path: Path | str) -> str:
    return f"{path}: not a readable volume, or cut short; export it again"


def read_fields(path: Path | str) -> dict[str, str]:
    """Read the header of a file as values by name; raises ValueError if it is damaged."""
    return fields(read_information(path))


def fields(info: sitk.ImageFileReader) -> dict[str, str]:
    return {key: info.GetMetaData(key).strip(" \0") for key in info.GetMetaDataKeys()}


def _nifti_grid(path: Path, field: dict[str, str], grid: Grid) -> Grid:
    """Return the grid of the sform if there is one, as nibabel does, else that of the qform.

    ITK chooses between them by their codes. Raises ValueError if there is neither, or the sform
    is damaged or its axes are not at right angles.
    """
    codes = {name: field.get(f"{name}_code", "0") for name in ("sform", "qform")}
    if set(codes.values()) == {"0"}:
        raise ValueError(f"{path}: its header gives no orientation; set its sform or qform")
    if codes["sform"] == "0":
        return grid
    sform = np.array([field[f"srow_{row}"].split() for row in "xyz"], dtype=float)  # (3, 4)
    to_lps = TO_LPS * UNITS.get(int(field.get("xyzt_units", 2)) & 7, 1.0)
    sform *= to_lps
    given = np.column_stack((grid.direction * grid.spacing, grid.offset))
    far = [*grid.shape, 1]  # a small difference of a step is a large one at the far corner

    def agree(other: np.ndarray, within: float) -> bool:
        return np.allclose(sform * far, other * far, rtol=0, atol=within)

    if not agree(given, 1e-2):
        spacing = np.linalg.norm(sform[:, :3], axis=0)
        if not (np.isfinite(sform).all() and (spacing > 0).all()):
            raise ValueError(f"{path}: its sform is damaged; copy its qform to it")
        grid = check_grid(path, grid.shape, spacing, sform[:, 3], sform[:, :3] / spacing)
    if codes["qform"] != "0" and not agree(_qform(path, field) * to_lps, 0.5):
        grid = replace(grid, notes=(*grid.notes, "its sform and qform disagree; the sform is used"))
    return grid


def _qform(path: Path, field: dict[str, str]) -> np.ndarray:
    """Return the matrix (3, 4) of a NIfTI header's quaternion.

    https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h, method 2.
    """
    b, c, d = (float(field[f"quatern_{name}"]) for name in "bcd")
    a = max(0.0, 1 - b * b - c * c - d * d) ** 0.5
    cross = np.array([[0, -d, c], [d, 0, -b], [-c, b, 0]])
    turn = np.eye(3) + 2 * (a * cross + cross @ cross)  # Rodrigues' formula for a quaternion
    turn *= [float(field[f"pixdim[{k}]"]) for k in (1, 2, 3)]
    turn[:, 2] *= -1 if _handedness(path) < 0 else 1
    return np.column_stack((turn, [float(field[f"qoffset_{name}"]) for name in "xyz"]))


def _handedness(path: Path) -> float:
    """Read pixdim[0] of a NIfTI file, which the reader of the other fields leaves out."""
    with open_nifti(path) as file:
        head = file.read(112)
    order = byte_order(head)
    kind, place = ("f", 76) if struct.unpack(order + "i", head[:4]) == (348,) else ("d", 104)
    return struct.unpack_from(order + kind, head, place)[0]


def open_nifti(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"  # ITK goes by the content too, not by the name
    return gzip.open(path) if compressed else open(path, "rb")


def byte_order(head: bytes) -> str:
    """Return the byte order of a NIfTI file, in NumPy's notation, from its header's length."""
    return "<" if head[:2] in (b"\x5c\x01", b"\x1c\x02") else ">"  # 348 or 540: NIfTI-1 or -2
