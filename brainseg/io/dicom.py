"""DICOM: the files of a series, its grid, and the fields that two series must agree on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .grid import Grid, fields, read_fields, read_information

IMAGE = re.compile(rb"DICM.*1\.2\.840\.10008\.5\.1\.4\.1\.1\.[24](\.[13])?[^.\d]", re.S)  # CT, MR
OTHER_SUFFIXES = (".tif", ".tiff", ".png", ".gz", ".nii", ".nrrd", ".mha", ".mhd")


def is_dicom(path: Path) -> bool:
    """Tell whether a file is a DICOM image; the index of a CD, DICOMDIR, is not."""
    if path.name[0] == "." or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.name.lower().endswith(OTHER_SUFFIXES):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_series(path: Path) -> bool:
    """Tell whether a path stands for a DICOM series: its folder, or one of its files."""
    return path.is_dir() or is_dicom(path)


def check_patient(path: Path, flair: Path) -> None:
    """Raise ValueError if two DICOM series name different patients."""
    one, other = (series_field(series, "0010|0020") for series in (path, flair))
    if one != other and None not in (one, other):
        raise ValueError(
            f"{path}: PatientID {one!r}, but {flair.name} has {other!r}; give sequences of one "
            "patient"
        )


def other_frame(path: Path, flair: Path) -> bool:
    """Tell whether two DICOM series differ in frame of reference: the patient may have moved."""
    return len({series_field(series, "0020|0052") for series in (path, flair)} - {None, ""}) == 2


def series_field(path: Path, tag: str) -> str | None:
    """Read a field of the first image of a DICOM series; None if the path is not a series."""
    if not is_series(path):
        return None
    return read_fields(series_files(path)[0]).get(tag, "")


def series_grid(path: Path) -> Grid:
    """Read the grid of a DICOM series; ValueError unless its slices are one regular stack."""
    files = series_files(path)
    stack = [read_information(file) for file in files]
    first = stack[0]
    direction = np.reshape(first.GetDirection(), (3, 3))
    steps = np.diff([float(direction[:, 2] @ info.GetOrigin()) for info in stack])
    usual = float(np.median(steps)) if len(steps) else first.GetSpacing()[2]
    for k, info in enumerate(stack):
        name = Path(files[k]).name
        if "MOSAIC" in fields(info).get("0008|0008", ""):
            raise ValueError(f"{path}: {name} is a mosaic of slices; convert it with dcm2niix")
        if info.GetDimension() > 2 and info.GetSize()[2] > 1:
            raise ValueError(f"{path}: {name} holds several frames; convert it with dcm2niix")
        same = np.allclose(info.GetDirection(), first.GetDirection(), atol=1e-3)
        if not same or info.GetSize() != first.GetSize():
            raise ValueError(f"{path}: {name} differs in orientation or size from other slices")
        if k and abs(steps[k - 1] - usual) > 0.01 * abs(usual) + 1e-3:
            raise ValueError(
                f"{path}: {name} is {steps[k - 1]:.2f} mm from its neighbour, others "
                f"{usual:.2f} mm; a slice is missing or duplicated: export it again"
            )
    if usual <= 0:
        raise ValueError(f"{path}: its slices are all at one position; give each image a folder")
    shape, spacing = (*first.GetSize()[:2], len(files)), (*first.GetSpacing()[:2], usual)
    return Grid(shape, spacing, first.GetOrigin(), direction)


def series_files(path: Path) -> Sequence[str]:
    """List the files of a DICOM series in the order of their positions.

    `path` is the folder of a single series, or one of its files; otherwise raises ValueError.
    """
    folder = path if path.is_dir() else path.parent
    found = files_by_series(folder)
    if not found:
        raise ValueError(f"{folder}: holds no DICOM series; give the folder of a series")
    if path.is_dir() and len(found) > 1:
        raise ValueError(
            f"{folder}: holds {len(found)} DICOM series; name a file of the right one, or give "
            "each its own folder"
        )
    for files in found:
        if path.is_dir() or path in map(Path, files):
            return files
    raise ValueError(f"{path}: is not part of a DICOM series; give the folder of a series")


def files_by_series(folder: Path) -> list[Sequence[str]]:
    """List the files of each DICOM series in a folder, in the order of their positions.

    Raises ValueError for a damaged file: the reader would leave it out.
    """
    reader, name = sitk.ImageSeriesReader, str(folder)
    found = [reader.GetGDCMSeriesFileNames(name, key) for key in reader.GetGDCMSeriesIDs(name)]
    read = {Path(file).name for files in found for file in files}
    suffixes = {Path(name).suffix for name in read}
    for path in folder.iterdir() if read else ():
        if path.name in read or path.name[0] == "." or not path.is_file():
            continue
        with open(path, "rb") as file:
            head = file.read(1024)
        if IMAGE.search(head) if head else path.suffix in suffixes:
            raise ValueError(f"{path}: not a readable DICOM image, or cut short; export it again")
    return [files for files in found if files]
