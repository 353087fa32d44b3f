"""Scans as hospitals keep them: NIfTI, MetaImage, NRRD and DICOM, read and written by medpy.

The network has learned axial slices whose columns run to the patient's left, whose rows run to
the posterior, and whose numbers run upward. A scan of any other orientation is turned that way by
its header, and its mask is turned back and written on the scan's own grid.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import numpy as np

from utils import written_whole
from volume import Case

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


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
                f"{path}: {_by(self.shape)} voxels, but {other_path.name} has {_by(other.shape)}; "
                "resample both to one grid"
            )
        for name in ("spacing", "offset", "direction"):
            if not np.allclose(getattr(self, name), getattr(other, name), atol=1e-3):
                raise ValueError(
                    f"{path}: its {name} is not that of {other_path.name}; "
                    "resample both to one grid"
                )


@dataclass(frozen=True)
class Scan(Case):
    """A case of volume files: `slices` is one, or pre-contrast, FLAIR and post-contrast.

    A file of one channel is taken for FLAIR, which also stands in for the sequences that are not
    there. `masks` is empty or one file on the same grid. A DICOM series is its folder.
    """

    mask_name: ClassVar[str] = "<scan>_mask.nii.gz"
    grid: Grid
    channels: int  # of the first file

    @classmethod
    def open(cls, name: str, files: Sequence[Path], mask: Path | None = None) -> Scan:
        """The scan in one file, or in pre-contrast, FLAIR, post-contrast; raises ValueError."""
        grid, channels = read_grid(files[0])
        numbers = tuple(range(1, grid.shape[grid.axes[2]] + 1))
        return cls(name, numbers, tuple(files), (mask,) if mask else (), grid, channels)

    @property
    def folder(self) -> Path:
        return self.slices[0]

    @property
    def files(self) -> list[Path]:
        found = []
        for path in self.slices + self.masks:
            found += sorted(path.iterdir()) if path.is_dir() else [path]
            if path.suffix.lower() == ".mhd":  # its voxels are in another file
                found += [p for s in (".raw", ".zraw") if (p := path.with_suffix(s)).exists()]
        return found

    @property
    def spacing(self) -> tuple[float, float, float]:
        return tuple(self.grid.spacing[axis] for axis in reversed(self.grid.axes))

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.channels == 1:
            pre, flair, post = self.slices if len(self.slices) == 3 else self.slices * 3
            missing = ["pre-contrast"] * (pre == flair) + ["post-contrast"] * (post == flair)
            if missing:
                notes.append(f"FLAIR stands in for {' and '.join(missing)}")
        rows, columns = self.spacing[1:]
        if max(rows, columns) > 1.5 * min(rows, columns):
            notes.append(
                f"its axial pixels are {rows:.1f} x {columns:.1f} mm, so that the head is squashed "
                "and the mask will be poor; resample it to square pixels"
            )
        return [f"{self.name}: {note}" for note in notes]

    def read(self) -> np.ndarray:
        """The volume (S, H, W, C); raises ValueError, naming the file, if one cannot be used."""
        loaded = {path: self._on_grid(path) for path in dict.fromkeys(self.slices)}
        for path, voxels in loaded.items():
            if len(self.slices) > 1 and voxels.shape[3] > 1:
                raise ValueError(f"{path}: {voxels.shape[3]} channels; give it with --images alone")
        voxels = np.concatenate([loaded[path] for path in self.slices], axis=3)
        if voxels.shape[3] == 1:
            voxels = np.repeat(voxels, 3, axis=3)
        return np.ascontiguousarray(self.grid.to_axial(voxels))

    def read_mask(self) -> np.ndarray:
        """The mask (S, H, W), bool: true wherever the mask file is above 0."""
        (path,) = self.masks
        voxels = self._on_grid(path)
        if voxels.shape[3] > 1 or voxels.min() < 0:
            raise ValueError(f"{path}: is no mask of 0 and 1; give one channel, 0 for background")
        return np.ascontiguousarray(self.grid.to_axial(voxels)[..., 0] > 0)

    def _on_grid(self, path: Path) -> np.ndarray:
        """Voxels (X, Y, Z, C) of a file; ValueError, naming both, if its grid is another."""
        read_grid(path)[0].check_same(path, self.grid, self.slices[0])
        return read_voxels(path)

    def write_mask(self, path: Path, mask: np.ndarray) -> None:
        """Write a mask (S, H, W), 0 or 1, on the grid of the scan, whole or not at all."""
        from medpy.io import Header, save

        header = Header(spacing=self.grid.spacing, offset=self.grid.offset)
        header.direction = self.grid.direction  # given above, medpy 0.5.2 would fail on it
        voxels = self.grid.from_axial(mask).astype(np.uint8)
        with written_whole(path) as temporary:
            try:
                save(voxels, str(temporary), header)
                whole = np.array_equal(read_voxels(temporary)[..., 0], voxels)
            except (RuntimeError, ValueError):
                whole = False
            if not whole:  # the writer of NIfTI says nothing of a full disk
                raise OSError(f"{path}: not written; is the disk full? What was there is kept")


def scan_name(path: Path) -> str:
    """The name of a volume file without its suffix, of which .nii.gz is one."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def is_scan(path: Path) -> bool:
    """Whether a path is a volume file that can be read, or the folder of a DICOM series."""
    if path.is_dir():
        return any(map(_is_dicom, sorted(path.iterdir())))
    return path.name.lower().endswith(SUFFIXES) and path.name[0] != "."


def _is_dicom(path: Path) -> bool:
    """Whether it is a DICOM image; the table of contents of a CD is none."""
    if not path.is_file() or path.name[0] == "." or path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in (".tif", ".tiff", ".png"):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


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
    if _is_nifti(path):
        _check_orientation(path, _fields(info), grid)
    return grid, channels


def _is_nifti(path: Path) -> bool:
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
        raise ValueError(_damaged(path)) from error
    return reader


def _damaged(path: Path) -> str:
    return f"{path}: not a readable volume, or cut short; export it again"


def _fields(info: object) -> dict[str, str]:
    return {key: info.GetMetaData(key) for key in info.GetMetaDataKeys()}


def _check_orientation(path: Path, field: dict[str, str], grid: Grid) -> None:
    """Raise ValueError if the header of a NIfTI file has no orientation, or two."""
    if field["qform_code"] == field["sform_code"] == "0":
        raise ValueError(f"{path}: its header gives no orientation; set its sform or qform")
    if field["sform_code"] != "0":
        sform = np.array([field[f"srow_{row}"].split() for row in "xyz"], dtype=float)
        ours = np.column_stack((grid.direction * grid.spacing, grid.offset))
        ours[:2] *= -1  # NIfTI counts to the right and to the front
        if not np.allclose(sform, ours, atol=1e-2):
            raise ValueError(
                f"{path}: its qform and sform disagree; copy the right one to the other"
            )


def _check_length(path: Path, field: dict[str, str]) -> None:
    """Raise ValueError if a NIfTI file is cut short: its reader would fill up with zeros."""
    sizes = [int(field[f"dim[{k}]"]) for k in range(1, 1 + int(field["dim[0]"]))]
    needed = int(float(field["vox_offset"])) + math.prod(sizes) * int(field["bitpix"]) // 8
    length = path.stat().st_size
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as file:  # to its end, where the checksum is
                length = sum(len(part) for part in iter(lambda: file.read(1 << 20), b""))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(_damaged(path)) from error
    if length < needed:
        raise ValueError(_damaged(path))


def _series_grid(folder: Path) -> Grid:
    """The grid of a DICOM series; ValueError unless its slices are one regular stack."""
    files = _series_files(folder)
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


def _series_files(folder: Path) -> Sequence[str]:
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


def read_voxels(path: Path) -> np.ndarray:
    """The voxels (X, Y, Z, C) of a file; ValueError, naming it, if it cannot be read."""
    from medpy.io import load

    if _is_nifti(path):
        _check_length(path, _fields(_information(path)))
    try:
        voxels, header = load(str(path))
    except Exception as error:  # SimpleITK raises RuntimeError, medpy its own
        raise ValueError(_damaged(path)) from error
    if header.sitkimage.GetDimension() == 4:  # medpy takes the last of four axes for its channels
        voxels = voxels.transpose(3, 0, 1, 2)
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError(f"{path}: holds NaN or infinite voxels; export it again")
    return voxels


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
