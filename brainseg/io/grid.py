"""Where the voxels of a volume file or DICOM series lie, and whether its header can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from .files import by


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie, and how its axes go to (left, posterior, up)."""

    shape: tuple[int, int, int]  # voxels along the axes of the file
    spacing: tuple[float, float, float]  # millimetres along them
    offset: tuple[float, float, float]  # of the first voxel, in mm to the left, posterior and up
    direction: np.ndarray  # (3, 3): the file's axes as columns, in the same coordinates

    @property
    def axes(self) -> tuple[int, int, int]:
        """The file's axes that run most nearly left or right, front or back, up or down."""
        return max(permutations(range(3)), key=lambda p: np.abs(self.direction[range(3), p]).sum())

    @property
    def backward(self) -> list[int]:
        """Which of the turned axes the file has the other way round."""
        return [world for world, axis in enumerate(self.axes) if self.direction[world, axis] < 0]

    def to_axial(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (X, Y, Z, C) of the file as a volume (S, H, W, C)."""
        return np.flip(voxels.transpose(*self.axes, 3), self.backward).transpose(2, 1, 0, 3)

    def from_axial(self, mask: np.ndarray) -> np.ndarray:
        """A mask (S, H, W) as voxels (X, Y, Z) of the file."""
        return np.flip(mask.transpose(2, 1, 0), self.backward).transpose(np.argsort(self.axes))

    def check_same(self, path: Path, other: Grid, other_path: Path) -> None:
        """Raise ValueError, naming both files, unless both are the same to a thousandth."""
        if self.shape != other.shape:
            raise ValueError(
                f"{path}: {by(self.shape)} voxels, but {other_path.name} has {by(other.shape)}; "
                "resample both to one grid"
            )
        for name in ("spacing", "offset", "direction"):
            if not np.allclose(getattr(self, name), getattr(other, name), atol=1e-3):
                raise ValueError(
                    f"{path}: its {name} is not that of {other_path.name}; "
                    "resample both to one grid"
                )


def read_grid(path: Path) -> tuple[Grid, int]:
    """Grid and number of channels of a file, whose voxels stay unread; ValueError if unusable."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        return _series_grid(path), 1
    info = _information(path)
    dimension = info.GetDimension()
    if dimension not in (3, 4):
        raise ValueError(f"{path}: {dimension} axes; a volume has 3, and channels at most")
    size = info.GetSize()
    channels = size[3] if dimension == 4 else info.GetNumberOfComponents()
    direction = np.reshape(info.GetDirection(), (dimension, dimension))[:3, :3]
    grid = Grid(size[:3], info.GetSpacing()[:3], info.GetOrigin()[:3], direction)
    if is_nifti(path):
        _check_orientation(path, _fields(info), grid)
    return grid, channels


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _information(path: Path) -> object:
    """SimpleITK's reader of a file, its header read."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise ValueError(f"{path}: its axes are not at right angles; resample it") from error
        raise ValueError(damaged(path)) from error
    return reader


def damaged(path: Path) -> str:
    return f"{path}: not a readable volume, or cut short; export it again"


def read_fields(path: Path) -> dict[str, str]:
    """What the header of a file says, by name; raises ValueError."""
    return _fields(_information(path))


def _fields(info: object) -> dict[str, str]:
    return {key: info.GetMetaData(key) for key in info.GetMetaDataKeys()}


def _check_orientation(path: Path, field: dict[str, str], grid: Grid) -> None:
    """Raise ValueError if the header of a NIfTI file has no orientation, or two."""
    if field.get("qform_code", "0") == field.get("sform_code", "0") == "0":
        raise ValueError(f"{path}: its header gives no orientation; set its sform or qform")
    if field.get("sform_code", "0") != "0":
        sform = np.array([field[f"srow_{row}"].split() for row in "xyz"], dtype=float)
        ours = np.column_stack((grid.direction * grid.spacing, grid.offset))
        ours[:2] *= -1  # NIfTI counts to the right and to the front
        if not np.allclose(sform, ours, atol=1e-2):
            raise ValueError(
                f"{path}: its qform and sform disagree; copy the right one to the other"
            )


def _series_grid(folder: Path) -> Grid:
    """The grid of a DICOM series; ValueError unless its slices are one regular stack."""
    files = series_files(folder)
    stack = [_information(file) for file in files]
    first = stack[0]
    normal = np.reshape(first.GetDirection(), (3, 3))[:, 2]
    heights = [float(normal @ info.GetOrigin()) for info in stack]
    steps = np.diff(heights)
    for k, info in enumerate(stack):
        name = Path(files[k]).name
        if "MOSAIC" in _fields(info).get("0008|0008", ""):
            raise ValueError(f"{folder}: {name} is a mosaic of slices; convert it with dcm2niix")
        same = np.allclose(info.GetDirection(), first.GetDirection(), atol=1e-3)
        if not same or info.GetSize() != first.GetSize():
            raise ValueError(f"{folder}: {name} lies in another plane than the other slices")
        if k and abs(steps[k - 1] - np.median(steps)) > 0.01 * abs(np.median(steps)) + 1e-3:
            raise ValueError(
                f"{folder}: {name} is {steps[k - 1]:.2f} mm from its neighbour, others "
                f"{np.median(steps):.2f}; a slice is missing, or there twice: export it again"
            )
    thickness = float(np.median(steps)) if len(steps) else first.GetSpacing()[2]
    if thickness <= 0:
        raise ValueError(f"{folder}: its slices lie at one place; give each image a folder")
    shape = (*first.GetSize()[:2], len(files))
    spacing = (*first.GetSpacing()[:2], thickness)
    return Grid(shape, spacing, first.GetOrigin(), np.reshape(first.GetDirection(), (3, 3)))


def series_files(folder: Path) -> Sequence[str]:
    """The files of the one DICOM series in a folder, in the order of their positions."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    found = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not found:
        raise ValueError(f"{folder}: holds no DICOM series; give the folder of one")
    if len(found) > 1:
        raise ValueError(
            f"{folder}: holds {len(found)} DICOM series; give each a folder of its own"
        )
    return SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), found[0])
