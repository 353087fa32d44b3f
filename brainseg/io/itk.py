"""Read NRRD and MetaImage by SimpleITK; what a header leaves out is refused, or noted."""

import math
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .grid import AXES, Grid, damaged, grid_of_header

UNITS = {"um": 0.001, "mm": 1.0, "?": 1.0, "cm": 10.0, "m": 1000.0}  # in mm
HEADER = 1 << 20  # bytes: no header is longer
# A field of the header: its name and its value.
NRRD_FIELD = re.compile(r"^([\w ]+):(?!=)[ \t]*(.*?)\s*$", re.M)
META_FIELD = re.compile(r"^\s*(\w+)[ \t]*[=:][ \t]*(.*?)\s*$", re.M)
NRRD_END = re.compile(rb"\r?\n\r?\n")
META_END = re.compile(rb"^\s*ElementDataFile[ \t]*[=:].*\n", re.M)


def itk_grid(path: Path) -> tuple[Grid, int]:
    """Read the grid and channel count of a file; ValueError, naming it, if it is unusable."""
    voxel_file(path)
    info = _read_information(path)
    axes, size, channels = info.GetDimension(), info.GetSize(), info.GetNumberOfComponents()
    if axes not in (3, 4):
        raise ValueError(AXES.format(path, axes))
    if axes == 4:
        if channels > 1:
            raise ValueError(f"{path}: has 4 axes of vectors; give a volume of 3, with channels")
        channels = size[3]
    unit, notes = _check_stated(path, info)
    direction = np.reshape(info.GetDirection(), (axes, axes))[:3, :3]
    spacing = np.array(info.GetSpacing()[:3]) * unit
    offset = np.array(info.GetOrigin()[:3]) * unit
    grid = grid_of_header(path, size[:3], spacing, offset, direction)
    return replace(grid, notes=grid.notes + notes), channels


def itk_voxels(path: Path) -> np.ndarray:
    """Read the voxels (X, Y, Z, C) of a file; ValueError, naming it, if it is damaged."""
    _check_complete(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(damaged(path)) from error
    array = sitk.GetArrayFromImage(image)  # (Z, Y, X), or (Z, Y, X, C), or (C, Z, Y, X)
    if image.GetNumberOfComponentsPerPixel() > 1:
        return array.transpose(2, 1, 0, 3)
    if array.ndim == 3:
        return array.T[..., None]
    return array.T


def voxel_file(path: Path) -> Path | None:
    """Return the separate file that a header names for its voxels; ValueError if it is lost."""
    field, _ = _text_header(path)
    name = field.get("ElementDataFile") or field.get("datafile") or "LOCAL"
    if name.upper() == "LOCAL" or re.match(r"LIST\b|.*%", name):  # here, or in many files
        return None
    file = path.parent / name
    if not file.is_file():
        raise ValueError(f"{path}: its voxels, {file.name}, are not beside it; copy them there")
    return file


def _text_header(path: Path) -> tuple[dict[str, str], int]:
    """Read the fields of a header (NRRD's names in small letters, without spaces), and its size."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
    is_nrrd = head.startswith(b"NRRD")
    end = (NRRD_END if is_nrrd else META_END).search(head)
    length = end.end() if end else len(head)
    text = os.fsdecode(head[:length])
    if not is_nrrd:
        return dict(META_FIELD.findall(text)), length
    fields = {}
    for name, value in NRRD_FIELD.findall(text):
        fields[name.lower().replace(" ", "")] = value
    return fields, length


def _read_information(path: Path) -> sitk.ImageFileReader:
    """Return SimpleITK's reader of a file, with the header read; ValueError if it is damaged."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(damaged(path)) from error
    return reader


def _check_stated(path: Path, info: sitk.ImageFileReader) -> tuple[float, tuple[str, ...]]:
    """Return mm per unit of length, and notes; ValueError without a spacing or an orientation."""
    field, _ = _text_header(path)
    if "sizes" in field:  # NRRD, whose reader turns the spaces that it knows to LPS
        wanted = "space and space directions"
        space = info.GetMetaData("NRRD_space") if info.HasMetaDataKey("NRRD_space") else ""
        vectors = re.findall(r"\(.*?\)", field.get("spacedirections", ""))
        is_stated = space.startswith("left-posterior") and len(vectors) == info.GetDimension()
        position = field.get("spaceorigin", "")
        units = re.findall(r'"(.*?)"', field.get("spaceunits", ""))[:3]
    else:
        wanted = "ElementSpacing and TransformMatrix"
        is_turned = not field.keys().isdisjoint(("TransformMatrix", "Rotation", "Orientation"))
        is_stated = "ElementSpacing" in field and is_turned
        position = field.get("Offset") or field.get("Position") or field.get("Origin", "")
        units = [field.get("DistanceUnits", "mm")]
    if not is_stated:
        raise ValueError(
            f"{path}: its header gives no orientation, or no spacing; add its {wanted}, or export "
            "it as .nii.gz"
        )
    unit = " and ".join(sorted(set(units) - {""})).lower() or "mm"
    if unit not in UNITS:
        raise ValueError(f"{path}: its unit of length is {unit}; save it in mm")
    if re.fullmatch(r"[-+.,()\de\s]+", position, re.I):  # numbers, but not NaN
        return UNITS[unit], ()
    return UNITS[unit], ("its header gives no position; its first voxel is put at 0, 0, 0",)


def _check_complete(path: Path) -> None:
    """Raise ValueError if voxels are cut short, before the reader of MetaImage prints its lines."""
    field, start = _text_header(path)
    file = voxel_file(path)
    is_text = field.get("BinaryData", "True").lower() == "false"
    is_here = field.get("ElementDataFile", "").upper() == "LOCAL"
    if "sizes" in field or is_text or not (file or is_here):
        return  # NRRD, whose reader notices; text; many files
    if file:
        start = 0
    else:
        file = path
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
    """Tell whether a compressed part of a file is complete, and unpacks to this many bytes."""
    with open(file, "rb") as stream:
        stream.seek(start)
        data = stream.read(size)
    try:
        unpacked = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, length + 1)
    except zlib.error:
        return False
    return len(unpacked) == length
