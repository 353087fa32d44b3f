"""The files of a DICOM series as one volume: its grid and its voxels.

No file speaks for the others: each must state its geometry, agree with the rest, and hold its
pixels whole.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import Dataset, uid

from .dicom import UNDEFINED, Series, number, numbers, pixel_data, read_header, text
from .files import by
from .grid import ROUNDED, Grid, grid_of_header
from .quiet import quiet

GEOMETRY = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")  # of every file
# Sequences that share a SeriesInstanceUID, or have none, differ in one of these.
SEQUENCE_NAMES = ("SeriesNumber", "SeriesDescription")
SEQUENCE_TIMES = ("EchoTime", "InversionTime")
SIZE = ("Rows", "Columns", "BitsAllocated")
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")  # best first
OFF_LINE = 0.5  # mm: a slice further from its place in a regular stack was moved
ROUNDED_PLACE = 0.1  # mm: one closer to it was rounded
UNEVEN = 0.25  # of the usual distance of slices: more is a gap
SAME_PLACE = 1e-3  # mm
CONVERT = "convert it with dcm2niix"
EXPORT = "export it again with its geometry"

Notes = tuple[str, ...]


def series_headers(series: Series) -> list[Dataset]:
    """Read the headers of a DICOM series, by position; ValueError, naming a damaged file."""
    return sorted(map(read_header, series.files), key=_height)


def _height(header: Dataset) -> float:
    """Return the position of a slice along its normal in mm; 0 if its header does not state it."""
    orientation = numbers(header, "ImageOrientationPatient")
    position = numbers(header, "ImagePositionPatient")
    if len(orientation) != 6 or len(position) != 3:
        return 0.0
    return float(np.cross(orientation[:3], orientation[3:]) @ position)


@quiet
def series_grid(series: Series) -> Grid:
    """Read the grid of a series; ValueError, naming file and tag, unless its files make a stack."""
    headers = series_headers(series)
    first = headers[0]
    for header in headers:
        _check_image(series, header)
    _check_alike(series, headers)
    row_step, column_step, notes = _pixel_spacing(series, first)
    row, column = _stated(series, first, "ImageOrientationPatient", 6).reshape(2, 3)
    normal = np.cross(row, column)
    direction = np.column_stack((row, column, normal / (np.linalg.norm(normal) or 1)))
    places = np.array([_stated(series, header, "ImagePositionPatient", 3) for header in headers])
    shape = int(first.Columns), int(first.Rows), len(headers)
    # First what each file states.
    grid_of_header(series.path, shape, (column_step, row_step, 1.0), places[0], direction)
    corrections = ()
    if len(headers) == 1:
        step, more = _thickness(series, first)
        notes += more
    else:
        step = _step(series, headers, places @ direction[:, 2])
        notes += _missing(first, step)
        direction, corrections = _straighten(series, headers, places, direction)
    grid = grid_of_header(series.path, shape, (column_step, row_step, step), places[0], direction)
    return replace(grid, notes=notes + (corrections or grid.notes))


@quiet
def read_series(series: Series) -> np.ndarray:
    """Read the voxels (X, Y, Z) of a DICOM series; files of several types give one that fits all.

    PixelPaddingValue becomes the darkest value of the rest, unless it is darker still: `fill` finds
    that. Raises ValueError, naming the file, if one cannot be read.
    """
    slices, padding = [], []
    for header in series_headers(series):
        try:
            pixels = _pixels(header)
        except RuntimeError as error:
            raise ValueError(f"{header.filename}: its pixels cannot be read; {CONVERT}") from error
        if pixels.shape != (header.Rows, header.Columns):
            raise ValueError(
                f"{header.filename}: has {by(pixels.shape)} pixels, but Rows and Columns are "
                f"{header.Rows} and {header.Columns}; export it again"
            )
        _check_bits(header)
        slices.append(pixels)
        padding.append(_padding(header, pixels))
    voxels, padded = np.stack(slices), np.stack(padding)
    if padded.any() and not padded.all():
        darkest = voxels[~padded].min()
        voxels[padded & (voxels > darkest)] = darkest
    return voxels.T


def _padding(header: Dataset, pixels: np.ndarray) -> np.ndarray:
    """Tell which pixels have PixelPaddingValue, or lie between it and PixelPaddingRangeLimit."""
    first = number(header, "PixelPaddingValue")
    if not math.isfinite(first):
        return np.zeros(pixels.shape, bool)
    last = number(header, "PixelPaddingRangeLimit", first)
    ends = np.array([first, last])
    if number(header, "PixelRepresentation", 0) == 0:  # some write a negative one all the same
        ends[ends < 0] += 2 ** number(header, "BitsAllocated", 16)
    slope = number(header, "RescaleSlope", 1)
    ends = np.sort(ends * slope + number(header, "RescaleIntercept", 0))
    near = abs(slope) / 4  # less than a step of the stored values
    return (pixels >= ends[0] - near) & (pixels <= ends[1] + near)


def _check_bits(header: Dataset) -> None:
    """Raise ValueError if pixels need more bits than BitsStored: the reader would cut these off."""
    bits, allocated = number(header, "BitsStored"), number(header, "BitsAllocated")
    is_signed = number(header, "PixelRepresentation", 0)
    is_compressed = pixel_data(header).length == UNDEFINED
    if is_compressed or is_signed or not bits < allocated or allocated not in (8, 16, 32):
        return
    if any(header.get((group, 0x0102)) for group in range(0x6000, 0x6020, 2)):
        return  # overlays, which belong to no pixel, are in the bits above
    file = pydicom.dcmread(header.filename, force=True)
    is_big = text(file.file_meta, "TransferSyntaxUID") == uid.ExplicitVRBigEndian
    kind = f"{'>' if is_big else '<'}u{int(allocated) // 8}"
    if np.frombuffer(file.PixelData, kind, header.Rows * header.Columns).max() >= 2**bits:
        raise ValueError(
            f"{header.filename}: has pixels of more than {bits:g} bits, its BitsStored; {CONVERT}"
        )


def _pixels(header: Dataset) -> np.ndarray:
    """Read the pixels (rows, columns) of a file, on the scale that its header gives."""
    if abs(number(header, "SpacingBetweenSlices", 1)) > 0:
        image = sitk.ReadImage(header.filename, imageIO="GDCMImageIO")
    else:  # ITK refuses a spacing of 0, but where the slices lie is known from their positions
        with tempfile.TemporaryDirectory() as folder:
            copy = pydicom.dcmread(header.filename, force=True)
            del copy.SpacingBetweenSlices
            copy.save_as(Path(folder, "copy"))
            image = sitk.ReadImage(str(Path(folder, "copy")), imageIO="GDCMImageIO")
    return sitk.GetArrayFromImage(image)[0]


def _name(header: Dataset) -> str:
    return Path(header.filename).name


def _check_image(series: Series, header: Dataset) -> None:
    """Raise ValueError unless a file holds one greyscale slice, complete, on a valid scale."""
    fault = _fault_in(header)
    if not fault:
        rows, columns, bits = (_stated(series, header, tag, 1)[0] for tag in SIZE)
        fault = _fault_in_pixels(header, math.ceil(rows * columns * bits / 8))
    if fault:
        raise ValueError(f"{series}: {_name(header)} {fault}")


def _fault_in(header: Dataset) -> str:
    """Say what is wrong with the content of a file, after its name; empty if nothing is."""
    if "MOSAIC" in text(header, "ImageType"):
        return f"is a mosaic of slices; {CONVERT}"
    if number(header, "NumberOfFrames", 1) > 1:
        return f"holds several frames; {CONVERT}"
    colours = text(header, "PhotometricInterpretation")
    if not colours.startswith("MONOCHROME"):
        return f"has PhotometricInterpretation {colours!r}; give a greyscale series"
    for tag in ("RescaleSlope", "RescaleIntercept"):
        value = number(header, tag, 1)
        if not math.isfinite(value) or (value == 0 and tag == "RescaleSlope"):
            return f"has {tag} {text(header, tag)!r}; export it again"
    if "ModalityLUTSequence" in header:
        return f"has a ModalityLUTSequence; {CONVERT}"
    if abs(number(header, "HighBit") + 1 - number(header, "BitsStored")) > 0:
        return f"has HighBit {text(header, 'HighBit')!r}; {CONVERT}"
    return ""


def _fault_in_pixels(header: Dataset, needed: int) -> str:
    """Say after its name if a file has not the bytes needed, and after them one or zeros."""
    pixels = pixel_data(header)
    if pixels.length == UNDEFINED:  # compressed: the decoder checks it
        return ""
    padding = b""
    if pixels.length > needed + 1:
        with open(header.filename, "rb") as file:
            file.seek(pixels.value_tell + needed)
            padding = file.read(pixels.length - needed)
    if 0 < needed <= pixels.length and not any(padding):
        return ""
    return (
        f"has {pixels.length} bytes of PixelData, but Rows, Columns and BitsAllocated make "
        f"{needed}; export it again"
    )


def _check_alike(series: Series, headers: Sequence[Dataset]) -> None:
    """Raise ValueError if two files differ in size, spacing or orientation, or in sequence."""
    for tag in (*GEOMETRY, *SEQUENCE_TIMES):
        first = headers[0]
        for header in headers:
            here, there = numbers(header, tag), numbers(first, tag)
            tolerance = 0.01 * np.abs(there) if tag in SEQUENCE_TIMES else 1e-3
            if here.shape != there.shape or np.any(np.abs(here - there) > tolerance):
                raise ValueError(_unlike(series, tag, header, first))
    for tag in SEQUENCE_NAMES:
        stating = [header for header in headers if text(header, tag)]  # others may be anonymised
        for header in stating:
            if text(header, tag) != text(stating[0], tag):
                raise ValueError(_unlike(series, tag, header, stating[0]))


def _unlike(series: Series, tag: str, header: Dataset, first: Dataset) -> str:
    return (
        f"{series}: {_name(header)} has {tag} {text(header, tag)!r}, but {_name(first)} "
        f"{text(first, tag)!r}; give each image a folder"
    )


def _stated(series: Series, header: Dataset, tag: str, count: int) -> np.ndarray:
    """Return the `count` numbers of a tag; ValueError, naming it, if a file does not state them."""
    values = numbers(header, tag)
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{series}: {_name(header)} has {tag} {text(header, tag)!r}; {EXPORT}")
    return values


def _pixel_spacing(series: Series, header: Dataset) -> tuple[float, float, Notes]:
    """Return the distance of rows and that of columns in mm, and a note if not by PixelSpacing."""
    for tag in SPACINGS:
        spacing = numbers(header, tag)
        if len(spacing) == 2 and (spacing > 0).all():
            rows, columns = spacing
            if tag == "PixelSpacing":
                return rows, columns, ()
            note = f"it has no PixelSpacing; {tag} is used, {rows:g} x {columns:g} mm"
            return rows, columns, (note,)
    given = text(header, "PixelSpacing")
    raise ValueError(f"{series}: {_name(header)} has PixelSpacing {given!r}; {EXPORT}")


def _thickness(series: Series, header: Dataset) -> tuple[float, Notes]:
    """Return the thickness of a lone slice in mm, and a note if it may lack the gap."""
    spacing = number(header, "SpacingBetweenSlices")
    thickness = number(header, "SliceThickness")
    if spacing > 0:
        return spacing, ()
    if thickness > 0:
        return thickness, (f"it is one slice, taken to be SliceThickness, {thickness:g} mm, thick",)
    raise ValueError(
        f"{series}: {_name(header)} is one slice without SliceThickness and SpacingBetweenSlices; "
        f"{EXPORT}"
    )


def _step(series: Series, headers: Sequence[Dataset], heights: np.ndarray) -> float:
    """Return the mean distance of the slices in mm; ValueError, naming a file, at a gap."""
    steps = np.diff(heights)
    usual = float(np.median(steps))
    if steps.max() < SAME_PLACE:
        raise ValueError(f"{series}: its slices are all at one position; give each image a folder")
    for k, step in enumerate(steps):
        one, other = _name(headers[k]), _name(headers[k + 1])
        if step < SAME_PLACE:
            raise ValueError(
                f"{series}: {one} and {other} have one ImagePositionPatient; give each image a "
                "folder, and leave out duplicates"
            )
        if abs(step - usual) > UNEVEN * usual:
            raise ValueError(
                f"{series}: {other} is {step:.2f} mm from its neighbour, others {usual:.2f} mm; a "
                "slice is missing or duplicated: export it again"
            )
    return float(steps.mean())


def _missing(header: Dataset, step: float) -> Notes:
    """Note that a whole number of slices seems to be missing between any two.

    Some scanners state the gap between slices as SpacingBetweenSlices: then it is the thinner.
    """
    spacing, thickness = number(header, "SpacingBetweenSlices"), number(header, "SliceThickness")
    if not 0 < thickness <= spacing:
        return ()
    times = round(step / spacing)
    if times < 2 or abs(step - times * spacing) > 0.02 * step:
        return ()
    return (
        f"its slices are {step:g} mm apart, but SpacingBetweenSlices is {spacing:g} mm: only "
        f"one in {times} seems to be here",
    )


def _straighten(
    series: Series, headers: Sequence[Dataset], places: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, Notes]:
    """Return the direction of a stack, and a note if it was corrected.

    Positions (N, 3) keep more digits than an orientation of two or three decimals: then the line
    of the slices, within a degree, is their normal. Raises ValueError, naming a file, if the
    slices are sheared, or not on one line at regular distances.
    """
    steps = places - places[0]
    off, notes = _off_line(steps, direction[:, 2]), ()
    line = steps[-1] / np.linalg.norm(steps[-1])
    axes = direction[:, :2]
    few_decimals = np.allclose(axes, axes.round(3), rtol=0, atol=1e-9)
    along_patient = np.allclose(axes, axes.round(), rtol=0, atol=1e-9)
    is_rounded = few_decimals and not along_patient and np.abs(line @ axes).max() <= ROUNDED
    if off.max() > ROUNDED_PLACE and is_rounded:
        row, column = axes.T
        direction = np.column_stack((np.cross(column, line), np.cross(line, row), line))
        off = _off_line(steps, line)
        notes = ("its ImageOrientationPatient is rounded; the positions of its slices correct it",)
    if off.max() > OFF_LINE:
        worst = int(off.argmax())
        raise ValueError(
            f"{series}: {_name(headers[worst])} lies {off[worst]:.1f} mm off the line of the "
            f"slices (ImagePositionPatient), as in a tilted or sheared stack; {CONVERT}"
        )
    if off.max() > ROUNDED_PLACE:
        notes += (f"its slices are up to {off.max():.1f} mm off a regular stack, which is used",)
    return direction, notes


def _off_line(steps: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Return how far slices, at steps (N, 3) from the first, are off a regular stack, in mm."""
    regular = np.linspace(0, steps[-1] @ along, len(steps))
    return np.linalg.norm(steps - np.outer(regular, along), axis=1)
