"""Scans as hospitals keep them: NIfTI, MetaImage, NRRD and DICOM, read and written by SimpleITK.

The network was trained on axial slices whose columns run to the patient's left, whose rows run to
the posterior, and whose numbers run upward. The header tells how to turn a scan of any other
orientation that way. Sequences on other grids are resampled to FLAIR's; the mask is on FLAIR's.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import SimpleITK as sitk

from ..preprocess import SEQUENCES
from .dicom import check_patient, is_dicom, is_series, other_frame, series_files
from .files import by
from .grid import (
    Grid,
    byte_order,
    damaged,
    file_grid,
    is_nifti,
    open_nifti,
    read_fields,
    read_information,
)
from .nifti import write_nifti
from .registration import Movement, move, register
from .series import read_series, series_grid
from .slices import Case, check_finite

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
FLOATS = {"16": "f4", "64": "f8"}  # by NIfTI data type
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
        cls, name: str, files: Sequence[Path | None], mask: Path | None = None, chosen: str = ""
    ) -> Scan:
        """Open the scan in one file, or in pre-contrast, FLAIR, post-contrast; reads no voxels.

        FLAIR stands in for None. Raises ValueError, naming the file, for an implausible header or
        a different patient.
        """
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
    def flair(self) -> Path:
        return self.slices[len(self.slices) // 2]

    @property
    def folder(self) -> Path:
        return self.flair

    @property
    def files(self) -> list[Path]:
        found = []
        for path in self.slices + self.masks:
            if is_series(path):
                found += series_files(path)
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

    @cached_property
    def notes(self) -> list[str]:
        notes = [self.chosen] if self.chosen else []
        missing = [name for name in SEQUENCES if name not in ("FLAIR", *self._others)]
        if self.channels == 1 and missing:
            notes.append(f"FLAIR stands in for {' and '.join(missing)}")
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
        read_grid(path)[0].check_same(path, self.grid, self.flair)
        voxels = read_voxels(path)
        if voxels.shape[3] > 1 or voxels.min() < 0:
            raise ValueError(f"{path}: is not a mask; give one channel, 0 outside the lesion")
        mask = self.grid.to_axial(voxels)[..., 0]
        return np.ascontiguousarray(self.labels.lesion(mask, self.name))

    def write_map(self, path: Path, values: np.ndarray) -> None:
        """Write values (S, H, W) on the scan's grid, whole or not at all; bool as 0 and 1."""
        values = values.view(np.uint8) if values.dtype == bool else values
        voxels = np.ascontiguousarray(self.grid.from_axial(values))
        write_nifti(path, voxels, self.grid, self.flair)


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


def voxel_file(path: Path) -> Path | None:
    """Find the file with the voxels of a MetaImage or NRRD header, if it is a separate one."""
    keys = {".mhd": rb"ElementDataFile[ \t]*=", ".nrrd": rb"data ?file:"}
    if not (key := keys.get(suffix := path.suffix.lower())):
        return None
    with open(path, "rb") as file:
        header = file.read(1 << 16)
    if suffix == ".nrrd":  # the voxels may follow the first blank line
        header, *_ = re.split(rb"\r?\n\r?\n", header)
    named = re.search(rb"^" + key + rb"[ \t]*(.+?)[ \t]*\r?$", header, re.M | re.I)
    file = path.parent / os.fsdecode(named[1]) if named else path
    return file if file != path and file.is_file() else None


def read_grid(path: Path) -> tuple[Grid, int]:
    """Read the grid and channel count of a file, but no voxels; ValueError if unusable.

    A folder, or a DICOM file without a volume suffix, stands for a DICOM series.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return (series_grid(path), 1) if is_series(path) else file_grid(path)


def read_voxels(path: Path) -> np.ndarray:
    """Read the voxels (X, Y, Z, C) of a file; ValueError, naming it, if they cannot be read."""
    if is_series(path):
        return read_series(path)[..., None]
    if is_nifti(path):
        _check_nifti(path, read_fields(path))
    if path.name.lower().endswith((".mha", ".mhd")):
        _check_metaimage(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(damaged(path)) from error
    array = sitk.GetArrayFromImage(image)  # (Z, Y, X), or (Z, Y, X, C), or (C, Z, Y, X)
    several = image.GetNumberOfComponentsPerPixel() > 1
    voxels = array.transpose(2, 1, 0, 3) if several and array.ndim == 4 else array.T
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    check_finite(path, voxels)
    return voxels


def _check_nifti(path: Path, field: dict[str, str]) -> None:
    """Raise ValueError if voxels are cut short, NaN or infinite: the reader would make them 0."""
    offset, kind = int(float(field["vox_offset"])), FLOATS.get(field["datatype"])
    sizes = [int(field[f"dim[{k}]"]) for k in range(1, 1 + int(field["dim[0]"]))]
    left = math.prod(sizes) * int(field["bitpix"]) // 8  # bytes of voxels to come
    try:
        with open_nifti(path) as file:
            order = byte_order(file.read(offset))
            while part := file.read(1 << 20):  # to the end, where the checksum of a .gz is
                part = part[:left]  # anything may follow the voxels
                left -= len(part)
                if kind:
                    count = len(part) // int(kind[1])
                    check_finite(path, np.frombuffer(part, order + kind, count))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(damaged(path)) from error
    if left:
        raise ValueError(damaged(path))


def _check_metaimage(path: Path) -> None:
    """Raise ValueError if voxels are cut short, before the reader prints its own lines."""
    info = read_information(path)
    with open(path, "rb") as file:
        header = file.read(1 << 16)
    end = re.search(rb"^ElementDataFile *= *(.*?) *\r?\n", header, re.M)
    header = header[: end.end()] if end else b""
    field = dict(re.findall(r"^(\w+) *= *(.*?)\s*$", header.decode("latin-1"), re.M))
    name = field.get("ElementDataFile", "LIST")
    if field.get("BinaryData", "True").lower() == "false" or re.match(r"LIST\b|.*%", name):
        return  # text, or many files
    voxels, start = (path, len(header)) if name.upper() == "LOCAL" else (path.parent / name, 0)
    if not voxels.is_file():
        raise ValueError(f"{path}: its voxels, {voxels.name}, are not beside it; copy them there")
    if field.get("CompressedData", "False").lower() == "true":
        needed = int(field.get("CompressedDataSize", 0))  # 0: not known
    else:
        voxel = sitk.GetArrayViewFromImage(sitk.Image(1, 1, info.GetPixelID()))
        needed = math.prod(info.GetSize()) * info.GetNumberOfComponents() * voxel.itemsize
    if voxels.stat().st_size - start < needed:
        raise ValueError(damaged(path))
