"""Scans as hospitals keep them: NIfTI, MetaImage, NRRD and DICOM.

The network was trained on axial slices whose columns run to the patient's left, whose rows run to
the posterior, and whose numbers run upward. The header tells how to turn a scan of any other
orientation that way. Sequences on other grids are resampled to FLAIR's; the mask is on FLAIR's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..preprocess import SEQUENCES
from .dicom import Series, check_patient, is_series, other_frame, series_at
from .files import MARK, by
from .formats import SUFFIXES, file_grid, file_voxels, voxel_file
from .grid import Grid
from .headers import is_dicom
from .nifti import write_nifti
from .registration import Movement, move, register
from .series import read_series, series_grid
from .slices import Case

MOST_ASPECT = 10.0  # of pixels: more is a damaged header
LEAST_COVERED = 0.5  # of FLAIR's field of view; less is another head, or another space


@dataclass(frozen=True)
class Scan(Case):
    """A case of volume files: `slices` is one, or pre-contrast, FLAIR and post-contrast.

    A single-channel file is FLAIR, which also stands in for missing sequences. `masks` is empty or
    one file on FLAIR's grid. A DICOM series is given as its folder or one of its files. With
    `register`, the other sequences are moved to where they fit FLAIR best.
    """

    mask_name: ClassVar[str] = "<scan>_mask.nii.gz"
    grid: Grid  # FLAIR's
    channels: int  # of FLAIR's file
    register: bool = False
    chosen: str = ""  # which series of a study are used

    @classmethod
    def open(
        cls,
        name: str,
        files: Sequence[Path | Series | None],
        mask: Path | None = None,
        chosen: str = "",
    ) -> Scan:
        """Open the scan in one file, or in pre-contrast, FLAIR, post-contrast; reads no voxels.

        FLAIR stands in for None. Raises ValueError, naming the file, for an implausible header or
        a different patient.
        """
        files = [series_at(path) if path and is_series(path) else path for path in files]
        flair = files[len(files) // 2]
        grid, channels = read_grid(flair)
        numbers = tuple(range(1, grid.shape[grid.axes[2]] + 1))
        files, masks = tuple(file or flair for file in files), (mask,) if mask else ()
        scan = cls(name, numbers, files, masks, grid, channels, chosen=chosen)
        if not 1 / MOST_ASPECT <= scan.aspect <= MOST_ASPECT:
            raise ValueError(f"{flair}: its axial pixels are {scan._pixels}; correct its header")
        for path in scan._others.values():
            check_patient(path, flair)
        return scan

    @property
    def flair(self) -> Path | Series:
        return self.slices[len(self.slices) // 2]

    @property
    def folder(self) -> Path:
        return self.flair.path if isinstance(self.flair, Series) else self.flair

    @property
    def patient_id(self) -> str:
        return self.flair.patient if isinstance(self.flair, Series) else ""

    @property
    def files(self) -> list[Path]:
        found = []
        for path in self.slices + self.masks:
            if isinstance(path, Series):
                found += path.files
            else:
                found += filter(None, (path, voxel_file(path)))
        return found

    @property
    def spacing(self) -> tuple[float, float, float]:
        return tuple(self.grid.spacing[axis] for axis in reversed(self.grid.axes))

    @property
    def _pixels(self) -> str:
        return "{:.1f} x {:.1f} mm".format(*self.spacing[1:])

    @property
    def _others(self) -> dict[str, Path]:
        """Return the files of the sequences other than FLAIR, by sequence name."""
        if len(self.slices) == 1:
            return {}
        pairs = zip(SEQUENCES, self.slices, strict=True)
        return {name: path for name, path in pairs if path != self.flair}

    @property
    def replaced(self) -> list[str]:
        if self.channels > 1:
            return []
        return [name for name in SEQUENCES if name not in ("FLAIR", *self._others)]

    @cached_property
    def notes(self) -> list[str]:
        notes = [self.chosen] if self.chosen else []
        if self.replaced:
            notes.append(f"FLAIR stands in for {' and '.join(self.replaced)}")
        notes += self.grid.notes
        if self.aspect != 1:
            notes.append(
                f"its axial pixels are {self._pixels}; they are resampled to square ones for the "
                "network, and the mask back to FLAIR's grid"
            )
        for name, path in self._others.items():
            grid, _ = read_grid(path)
            notes += [f"{name}: {note}" for note in grid.notes]
            if self.register:
                notes.append(f"{name} was registered to FLAIR: {self.movements[path]}")
                continue
            if other_frame(path, self.flair):
                notes.append(
                    f"{name} has a different FrameOfReferenceUID from FLAIR: if the head moved "
                    "between them, use --register"
                )
            if grid.difference(self.grid):
                spacing = " x ".join(f"{length:.2g}" for length in grid.spacing)
                notes.append(
                    f"{name} is on a different grid from FLAIR ({by(grid.shape)} voxels of "
                    f"{spacing} mm); it is resampled to FLAIR's"
                )
        return notes

    @cached_property
    def movements(self) -> dict[Path, Movement]:
        """Register each other sequence to FLAIR; raises ValueError if one does not fit."""
        fixed = self.grid.image(self._channel(self.flair))
        return {
            path: register(read_grid(path)[0].image(self._channel(path)), fixed, path)
            for path in self._others.values()
        }

    def read(self) -> np.ndarray:
        """Read the volume (S, H, W, C); raises ValueError, naming the file, if one is unusable."""
        if len(self.slices) == 1:
            voxels = read_voxels(self.flair)
            voxels = np.repeat(voxels, 3, axis=3) if voxels.shape[3] == 1 else voxels
        else:
            loaded = {path: self._sequence(path) for path in dict.fromkeys(self.slices)}
            voxels = np.stack([loaded[path] for path in self.slices], axis=3)
        return np.ascontiguousarray(self.grid.to_axial(voxels))

    def _sequence(self, path: Path) -> np.ndarray:
        """Read voxels (X, Y, Z) of a sequence, on FLAIR's grid."""
        voxels = self._channel(path)
        if path == self.flair:
            return voxels
        grid, _ = read_grid(path)
        if self.register:
            return move(grid.image(voxels), self.grid, self.movements[path].transform)
        if not grid.difference(self.grid):
            return voxels
        if (covered := self.grid.coverage(grid)) < LEAST_COVERED:
            raise ValueError(
                f"{path}: covers {covered:.0%} of {self.flair.name} by its header; if it is of "
                "another session, use --register"
            )
        return move(grid.image(voxels), self.grid)

    @staticmethod
    def _channel(path: Path) -> np.ndarray:
        """Read voxels (X, Y, Z) of a file of one channel; raises ValueError for more."""
        voxels = read_voxels(path)
        if voxels.shape[3] > 1:
            raise ValueError(f"{path}: {voxels.shape[3]} channels; give it alone, with --images")
        return voxels[..., 0]

    def read_mask(self) -> np.ndarray:
        """Read the mask (S, H, W), bool: true wherever the mask file holds a lesion label."""
        (path,) = self.masks
        grid, _ = read_grid(path)
        grid.axial.check_same(path, self.grid.axial, self.flair)  # its axes may be in another order
        voxels = read_voxels(path)
        # A cubic resize swings a little below 0.
        if voxels.shape[3] > 1 or voxels.min() < -0.2 * voxels.max():
            raise ValueError(f"{path}: is not a mask; give one channel, 0 outside the lesion")
        mask = grid.to_axial(voxels)[..., 0]
        return np.ascontiguousarray(self.labels.lesion(mask, self.name, path))

    def write_map(self, path: Path, values: np.ndarray, mark: str = MARK) -> None:
        """Write values (S, H, W) on the scan's grid, whole or not at all; bool as 0 and 1.

        `mark` says in the header what made them.
        """
        values = values.view(np.uint8) if values.dtype == bool else values
        voxels = np.ascontiguousarray(self.grid.from_axial(values))
        write_nifti(path, voxels, self.grid, self.flair, mark)


def registered(case: Case) -> Scan:
    """Return the case with its sequences registered to FLAIR; ValueError if they share files."""
    if not isinstance(case, Scan) or case.channels > 1:
        raise ValueError(
            f"{case.folder}: holds every sequence and cannot be registered; give one volume file "
            "per sequence, or do not ask to register"
        )
    return replace(case, register=True)


def scan_name(path: Path) -> str:
    """Return the name of a folder, or of a volume file without its suffix (.nii.gz is one)."""
    suffixes = () if path.is_dir() else SUFFIXES
    suffix = next((s for s in suffixes if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def is_scan(path: Path) -> bool:
    """Tell whether a path is a volume file, by its suffix, or the folder of a DICOM series."""
    if path.is_dir():
        return any(map(is_dicom, sorted(path.iterdir())))
    return path.name.lower().endswith(SUFFIXES) and path.name[0] != "."


def read_grid(path: Path | Series) -> tuple[Grid, int]:
    """Read the grid and channel count of a file, but no voxels; ValueError if unusable.

    A folder, or a DICOM file without a volume suffix, stands for a DICOM series.
    """
    if is_series(path):
        return series_grid(path), 1
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return file_grid(path)


def read_voxels(path: Path) -> np.ndarray:
    """Read the voxels (X, Y, Z, C) of a file; ValueError, naming it, if they cannot be read."""
    return read_series(path)[..., None] if is_series(path) else file_voxels(path)
