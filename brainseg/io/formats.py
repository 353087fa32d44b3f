"""Read volume files: NIfTI by nifti.py, NRRD and MetaImage by SimpleITK, by what they state.

A library fills in what a header leaves out; here such a file is refused, or what is taken is said.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .grid import AXES, Grid, check_grid, damaged
from .nifti import is_nifti, nifti_grid, nifti_voxels
from .slices import check_finite

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
CONVERTERS = {  # to .nii.gz, of files that are not read
    ".mgz": "mri_convert",
    ".mgh": "mri_convert",
    ".mnc": "mnc2nii",
    ".hdr": "fslchfiletype NIFTI_GZ",
    ".img": "fslchfiletype NIFTI_GZ",
}
UNITS = {"um": 0.001, "mm": 1.0, "?": 1.0, "cm": 10.0, "m": 1000.0}  # mm, by NRRD and MetaImage
HEADER = 1 << 20  # bytes: no header is longer


def check_format(path: Path) -> None:
    """Raise ValueError, naming a converter, if a file, or one in a folder, cannot be read here."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        program = CONVERTERS.get(file.suffix.lower())
        if program:
            raise ValueError(
                f"{file}: {file.suffix} files are not read; convert it to .nii.gz with {program}"
            )


def file_grid(path: Path) -> tuple[Grid, int]:
    """Read the grid and channel count of a volume file, but no voxels; ValueError if unusable."""
    check_format(path)
    return nifti_grid(path) if is_nifti(path) else _itk_grid(path)


def file_voxels(path: Path) -> np.ndarray:
    """Read the voxels (X, Y, Z, C) of a volume file; ValueError, naming it, if it is damaged."""
    if is_nifti(path):
        voxels = nifti_voxels(path)
    else:
        _check_whole(path)
        voxels = _itk_voxels(path)
    if voxels.dtype.kind == "c":
        raise ValueError(f"{path}: holds complex voxels; export their magnitude")
    check_finite(path, voxels)
    return voxels


def text_header(path: Path) -> tuple[dict[str, str], int]:
    """Read the fields of an NRRD or MetaImage header, and its length in bytes.

    The names of NRRD's fields are in small letters and without spaces.
    """
    with open(path, "rb") as file:
        head = file.read(HEADER)
    is_nrrd = head.startswith(b"NRRD")
    last = rb"\r?\n\r?\n" if is_nrrd else rb"^\s*ElementDataFile[ \t]*[=:].*\n"
    end = re.search(last, head, re.M)
    length = end.end() if end else len(head)
    line = r"^([\w ]+):(?!=)[ \t]*(.*?)\s*$" if is_nrrd else r"^\s*(\w+)[ \t]*[=:][ \t]*(.*?)\s*$"
    field = dict(re.findall(line, os.fsdecode(head[:length]), re.M))
    if is_nrrd:
        field = {name.lower().replace(" ", ""): value for name, value in field.items()}
    return field, length


def voxel_file(path: Path) -> Path | None:
    """Return the separate file that an NRRD or MetaImage header names for its voxels, or None.

    Raises ValueError if it is not there.
    """
    if is_nifti(path):
        return None
    field, _ = text_header(path)
    name = field.get("ElementDataFile") or field.get("datafile") or "LOCAL"
    if name.upper() == "LOCAL" or re.match(r"LIST\b|.*%", name):  # here, or in many files
        return None
    file = path.parent / name
    if not file.is_file():
        raise ValueError(f"{path}: its voxels, {file.name}, are not beside it; copy them there")
    return file


def _read_information(path: Path) -> sitk.ImageFileReader:
    """Return SimpleITK's reader of a file, with the header read; ValueError if it is damaged."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(damaged(path)) from error
    return reader


def _itk_grid(path: Path) -> tuple[Grid, int]:
    voxel_file(path)
    info = _read_information(path)
    dimension, size = info.GetDimension(), info.GetSize()
    if dimension not in (3, 4):
        raise ValueError(AXES.format(path, dimension))
    if dimension == 4 and info.GetNumberOfComponents() > 1:
        raise ValueError(f"{path}: has 4 axes of vectors; give a volume of 3, with channels")
    channels = size[3] if dimension == 4 else info.GetNumberOfComponents()
    unit, notes = _check_stated(path, info)
    direction = np.reshape(info.GetDirection(), (dimension, dimension))[:3, :3]
    spacing = np.array(info.GetSpacing()[:3]) * unit
    offset = np.array(info.GetOrigin()[:3]) * unit
    grid = check_grid(path, size[:3], spacing, offset, direction)
    return replace(grid, notes=(*grid.notes, *notes)), channels


def _check_stated(path: Path, info: sitk.ImageFileReader) -> tuple[float, list[str]]:
    """Return millimetres per unit of length, and a note if the position is a default.

    Raises ValueError if the spacing or the orientation is one: the reader makes them 1 and LPS.
    """
    field, _ = text_header(path)
    if "sizes" in field:  # NRRD, whose reader turns the spaces that it knows to LPS
        wanted = "space and space directions"
        space = info.GetMetaData("NRRD_space") if info.HasMetaDataKey("NRRD_space") else ""
        vectors = re.findall(r"\(.*?\)", field.get("spacedirections", ""))
        is_stated = space.startswith("left-posterior") and len(vectors) == info.GetDimension()
        places = [field.get("spaceorigin", "")]
        units = re.findall(r'"(.*?)"', field.get("spaceunits", ""))[:3]
    else:
        wanted = "ElementSpacing and TransformMatrix"
        is_turned = not field.keys().isdisjoint(("TransformMatrix", "Rotation", "Orientation"))
        is_stated = "ElementSpacing" in field and is_turned
        places = [field.get(name, "") for name in ("Offset", "Position", "Origin")]
        units = [field.get("DistanceUnits", "mm")]
    if not is_stated:
        raise ValueError(
            f"{path}: its header gives no orientation, or no spacing; add its {wanted}, or export "
            "it as .nii.gz"
        )
    unit = " and ".join(sorted(set(units) - {""})).lower() or "mm"
    if unit not in UNITS:
        raise ValueError(f"{path}: its unit of length is {unit}; save it in mm")
    notes = []
    if not any(re.fullmatch(r"[-+.,()\de\s]+", place, re.I) for place in places):  # or NaN
        notes.append("its header gives no position; its first voxel is put at 0, 0, 0")
    return UNITS[unit], notes


def _itk_voxels(path: Path) -> np.ndarray:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(damaged(path)) from error
    array = sitk.GetArrayFromImage(image)  # (Z, Y, X), or (Z, Y, X, C), or (C, Z, Y, X)
    several = image.GetNumberOfComponentsPerPixel() > 1
    voxels = array.transpose(2, 1, 0, 3) if several and array.ndim == 4 else array.T
    return voxels[..., None] if voxels.ndim == 3 else voxels


def _check_whole(path: Path) -> None:
    """Raise ValueError if voxels are cut short, before the reader of MetaImage prints its lines."""
    file, start = voxel_file(path), 0
    field, length = text_header(path)
    is_text = field.get("BinaryData", "True").lower() == "false"
    is_here = field.get("ElementDataFile", "").upper() == "LOCAL"
    if "sizes" in field or is_text or not (file or is_here):
        return  # NRRD, whose reader notices; text; many files
    if not file:
        file, start = path, length
    info = _read_information(path)
    voxel = sitk.GetArrayViewFromImage(sitk.Image(1, 1, info.GetPixelID()))
    needed = math.prod(info.GetSize()) * info.GetNumberOfComponents() * voxel.itemsize
    held = file.stat().st_size - start
    if field.get("CompressedData", "False").lower() == "true":
        stated = field.get("CompressedDataSize", "")  # the reader takes no more than that
        size = int(stated) if stated.isdecimal() else 0
        if is_here and not size:
            raise ValueError(f"{path}: has no CompressedDataSize; save it without compression")
        if not _unpacks(file, start, size or held, needed):
            raise ValueError(damaged(path))
    elif held < needed:
        raise ValueError(damaged(path))


def _unpacks(file: Path, start: int, size: int, length: int) -> bool:
    """Tell whether a compressed part of a file is whole, and unpacks to this many bytes."""
    with open(file, "rb") as stream:
        stream.seek(start)
        data = stream.read(size)
    try:
        unpacked = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, length + 1)
    except zlib.error:
        return False
    return len(unpacked) == length
