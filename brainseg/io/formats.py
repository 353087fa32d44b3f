"""The formats of volumes, and what reads each: a new format is a line in `READERS`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .dicom import File, Series, series_or_file
from .grid import Grid
from .headers import is_dicom
from .itk import itk_grid, itk_voxels
from .nifti import nifti_grid, nifti_voxels
from .series import read_series, series_grid
from .slices import check_finite


class Reader(NamedTuple):
    grid: Callable[[Path], tuple[Grid, int]]  # with the number of channels
    voxels: Callable[[Path], np.ndarray]  # (X, Y, Z, C)


NIFTI = Reader(nifti_grid, nifti_voxels)
ITK = Reader(itk_grid, itk_voxels)
READERS = {
    ".nii.gz": NIFTI,
    ".nii": NIFTI,
    ".mha": ITK,
    ".mhd": ITK,
    ".nrrd": ITK,
    ".nhdr": ITK,
}
SUFFIXES = tuple(READERS)
CONVERTERS = {  # to .nii.gz, of files that are not read
    ".mgz": "mri_convert",
    ".mgh": "mri_convert",
    ".mnc": "mnc2nii",
    ".hdr": "fslchfiletype NIFTI_GZ",
    ".img": "fslchfiletype NIFTI_GZ",
}


def suffix_of(path: Path) -> str:
    """Return which of SUFFIXES a file name ends with, in small letters; empty if with none."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    return ""


def scan_name(path: Path) -> str:
    """Return the name of a folder, or of a volume file without its suffix (.nii.gz is one)."""
    if path.is_dir():
        return path.name
    return path.name[: len(path.name) - len(suffix_of(path))]


def is_scan(path: Path) -> bool:
    """Tell whether a path is a volume file, by its suffix, or the folder of a DICOM series."""
    if path.is_dir():
        return any(map(is_dicom, sorted(path.iterdir())))
    return suffix_of(path) != "" and path.name[0] != "."


def check_format(path: Path) -> None:
    """Raise ValueError, naming a converter, if a file, or one in a folder, cannot be read here."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        program = CONVERTERS.get(file.suffix.lower())
        if program:
            raise ValueError(
                f"{file}: {file.suffix} files are not read; convert it to .nii.gz with {program}"
            )


def read_grid(path: File) -> tuple[Grid, int]:
    """Read the grid and the channel count of a file or DICOM series; ValueError if unusable."""
    path = series_or_file(path)
    if isinstance(path, Series):
        return series_grid(path), 1
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    check_format(path)
    return READERS.get(suffix_of(path), ITK).grid(path)


def read_voxels(path: File) -> np.ndarray:
    """Read the voxels (X, Y, Z, C) of a file; ValueError, naming it, if they cannot be read."""
    path = series_or_file(path)
    if isinstance(path, Series):
        return read_series(path)[..., None]
    voxels = READERS.get(suffix_of(path), ITK).voxels(path)
    if voxels.dtype.kind == "c":
        raise ValueError(f"{path}: holds complex voxels; export their magnitude")
    check_finite(path, voxels)
    return voxels
