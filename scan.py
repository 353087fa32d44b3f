"""Scans as hospitals keep them: NIfTI, MetaImage, NRRD and DICOM, read and written by medpy.

The network has learned axial slices whose columns run to the patient's left, whose rows run to
the posterior, and whose numbers run upward. A scan of any other orientation is turned that way by
its header, and its mask is turned back and written on the scan's own grid.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from utils import written_whole
from volume import Case

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a scan lie: its header, and how its axes go to (left, posterior, up)."""

    shape: tuple[int, int, int]  # voxels along the axes of the file
    header: object  # of medpy: spacing, offset, direction, and what else the file says
    axes: tuple[int, int, int]  # the file's axes that run left or right, front or back, up or down
    flips: tuple[bool, bool, bool]  # whether each of them runs the other way

    @classmethod
    def of(cls, shape: Sequence[int], header: object) -> Grid:
        direction = np.asarray(header.direction)[:3, :3]  # columns: the file's axes in LPS
        axes = max(permutations(range(3)), key=lambda p: np.abs(direction[range(3), p]).sum())
        flips = tuple(bool(direction[world, axis] < 0) for world, axis in enumerate(axes))
        return cls(tuple(shape[:3]), header, axes, flips)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from slice to slice, row to row and column to column, after the turn."""
        return tuple(float(self.header.spacing[axis]) for axis in reversed(self.axes))

    def to_axial(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (X, Y, Z, C) of the file as a volume (S, H, W, C)."""
        turned = voxels.transpose(*self.axes, 3)
        turned = np.flip(turned, [axis for axis in range(3) if self.flips[axis]])
        return turned.transpose(2, 1, 0, 3)

    def from_axial(self, mask: np.ndarray) -> np.ndarray:
        """A mask (S, H, W) as voxels (X, Y, Z) of the file."""
        turned = np.flip(mask.transpose(2, 1, 0), [axis for axis in range(3) if self.flips[axis]])
        return turned.transpose(np.argsort(self.axes))


@dataclass(frozen=True)
class Scan(Case):
    """A case of volume files: `slices` is one, or pre-contrast, FLAIR and post-contrast.

    A file of one channel is taken for FLAIR, which also stands in for the sequences that are not
    there. `masks` is empty or one file on the same grid. A DICOM series is its folder.
    """

    grid: Grid

    @classmethod
    def open(cls, name: str, files: Sequence[Path], mask: Path | None = None) -> Scan:
        """The scan in one file, or in pre-contrast, FLAIR, post-contrast; raises ValueError."""
        grid = _load(files[0])[1]
        numbers = range(1, grid.shape[grid.axes[2]] + 1)
        return cls(name, tuple(numbers), tuple(files), (mask,) if mask else (), grid)

    @property
    def folder(self) -> Path:
        return self.slices[0]

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.grid.spacing

    def read(self) -> np.ndarray:
        """The volume (S, H, W, C); raises ValueError, naming the file, if one cannot be used."""
        loaded = {path: self._on_grid(path) for path in dict.fromkeys(self.slices)}
        if len(loaded) > 1:
            for path, voxels in loaded.items():
                if voxels.shape[3] > 1:
                    raise ValueError(
                        f"{path}: {voxels.shape[3]} channels in a file of one sequence"
                    )
        voxels = np.concatenate([loaded[path] for path in self.slices], axis=3)
        if voxels.shape[3] == 1:
            voxels = np.repeat(voxels, 3, axis=3)
        return np.ascontiguousarray(self.grid.to_axial(voxels))

    def read_mask(self) -> np.ndarray:
        """The mask (S, H, W), bool: true wherever the mask file is not 0."""
        return np.ascontiguousarray(self.grid.to_axial(self._on_grid(self.masks[0]))[..., 0] != 0)

    def _on_grid(self, path: Path) -> np.ndarray:
        """Voxels (X, Y, Z, C) of a file; ValueError, naming both, if its grid is another."""
        voxels, grid = _load(path)
        ours, first = self.grid, self.slices[0].name
        if grid.shape != ours.shape:
            raise ValueError(
                f"{path}: {_by(grid.shape)} voxels, but {first} has {_by(ours.shape)}; "
                "resample both to one grid"
            )
        for name in ("spacing", "offset", "direction"):
            here, there = (np.asarray(getattr(g.header, name))[..., :3] for g in (grid, ours))
            if not np.allclose(here[:3], there[:3], atol=1e-3):
                raise ValueError(
                    f"{path}: its {name} is not that of {first}; resample both to one grid"
                )
        return voxels

    def write_mask(self, path: Path, mask: np.ndarray) -> None:
        """Write a mask (S, H, W), 0 or 1, on the grid of the scan, with its affine."""
        from medpy.io import save

        with written_whole(path) as temporary:
            save(self.grid.from_axial(mask).astype(np.uint8), str(temporary), self.grid.header)


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
    if not path.is_file() or path.name[0] == "." or path.suffix.lower() in (".tif", ".png"):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _load(path: Path) -> tuple[np.ndarray, Grid]:
    """Voxels (X, Y, Z, C) and grid of a file; ValueError, naming it, if it cannot be read."""
    import SimpleITK
    from medpy.io import load

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir() and len(SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(path))) != 1:
        raise ValueError(f"{path}: holds more than one DICOM series; give each a folder of its own")
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        voxels, header = load(str(path))
        if path.name.lower().endswith((".nii", ".nii.gz")):
            _check_length(path, voxels.size, header.sitkimage)
    except Exception as error:  # SimpleITK raises RuntimeError, medpy its own
        raise ValueError(f"{path}: not a readable volume, or cut short; export it again") from error
    dimension = header.sitkimage.GetDimension()
    if dimension == 4:  # medpy takes the last axis of such a file for its channels
        voxels = voxels.transpose(3, 0, 1, 2)
    elif voxels.ndim == 3:
        voxels = voxels[..., None]
    if dimension not in (3, 4) or voxels.ndim != 4:
        raise ValueError(f"{path}: {dimension} axes; a volume has 3, and channels at most")
    return voxels, Grid.of(voxels.shape, header)


def _check_length(path: Path, values: int, image: object) -> None:
    """Raise an error if a NIfTI file is cut short: its reader would fill up with zeros."""
    bits, start = (int(float(image.GetMetaData(key))) for key in ("bitpix", "vox_offset"))
    length = path.stat().st_size
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as file:  # to its end, where the checksum is
            length = sum(len(part) for part in iter(lambda: file.read(1 << 20), b""))
    if length < start + values * bits // 8:
        raise EOFError(f"{length} bytes")


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
