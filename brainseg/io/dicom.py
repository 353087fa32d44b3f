"""DICOM: headers of files, the files of a series, and the fields two series must agree on."""

from __future__ import annotations

import logging
import math
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, uid
from pydicom.multival import MultiValue

# Silence the reader on odd fields: those that matter are checked here, and refused by name.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="pydicom")

OTHER_SUFFIXES = (".tif", ".tiff", ".png", ".gz", ".nii", ".nrrd", ".mha", ".mhd")
UNDEFINED = 0xFFFFFFFF  # length of compressed pixels
# Objects of these classes have pixels: without them, the file is cut short.
IMAGES = (
    uid.MRImageStorage,
    uid.EnhancedMRImageStorage,
    uid.EnhancedMRColorImageStorage,
    uid.CTImageStorage,
    uid.EnhancedCTImageStorage,
)


# Headers


def is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM; the index of a CD, DICOMDIR, does not count."""
    if path.name[0] == "." or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.name.lower().endswith(OTHER_SUFFIXES):
        return False
    with open(path, "rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or _has_no_preamble(path, head)


def _has_no_preamble(path: Path, head: bytes) -> bool:
    """Tell whether a file begins with its first fields, of group 2 or 8."""
    if head[:2] not in (b"\2\0", b"\x08\0", b"\0\x08"):
        return False
    try:
        start = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        return str(start.get("SOPClassUID")).startswith("1.2.840.10008.")
    except Exception:  # of many kinds: it is another binary file
        return False


def read_header(path: Path | str) -> Dataset:
    """Read a DICOM file without its pixels; ValueError, naming it, if it is damaged.

    Read fields with `text` and `numbers`, which do not fail on a field that is odd.
    """
    path = Path(path)
    status = path.stat()
    return _read_header(path, status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2048)  # the files of a few studies: some 50 kB each
def _read_header(path: Path, inode: int, changed: int, size: int) -> Dataset:
    try:
        header = pydicom.dcmread(path, defer_size=1024, force=True)
        _flatten(header)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of many kinds
        raise ValueError(_damaged(path)) from error
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    pixels = header.get_item("PixelData", keep_deferred=True)
    if pixels is None:
        if kind is None or kind in IMAGES:
            raise ValueError(_damaged(path))
        return header
    deflated = header.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian
    if pixels.length != UNDEFINED and not deflated:
        if pixels.value_tell + pixels.length > size:
            raise ValueError(_damaged(path))
    return header


def _flatten(header: Dataset) -> None:
    """Bring the fields of an enhanced image of one frame to the top, as in a classic image."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in header.get(groups, [])[:1]:
            for sequence in group:
                if sequence.VR == "SQ" and sequence.value:
                    header.update(sequence.value[0])


def _damaged(path: Path) -> str:
    return f"{path}: not a readable DICOM image, or cut short; export it again"


def text(header: Dataset, name: str) -> str:
    """Return a field as one line of printable text; empty if it is not given.

    It is decoded by the file's SpecificCharacterSet; bytes that this does not explain become "?".
    """
    try:
        value = header.get(name)
    except (ValueError, TypeError, OverflowError, NotImplementedError):  # a damaged number
        value = header.get_item(name).value.decode("latin-1")
    if isinstance(value, MultiValue):
        value = "\\".join(map(str, value))
    line = "" if value is None else str(value).replace("\ufffd", "?")
    return "".join(letter if letter.isprintable() else " " for letter in line).strip()


def numbers(header: Dataset, name: str) -> np.ndarray:
    """Return the numbers of a field; none if it is empty or not given, NaN if it is damaged."""
    try:
        value = header.get(name)
        if value is None or value == "":
            return np.empty(0)
        return np.array(value, dtype=float).reshape(-1)
    except (ValueError, TypeError, OverflowError, NotImplementedError):
        return np.full(1, math.nan)


def number(header: Dataset, name: str, default: float = math.nan) -> float:
    """Return the first number of a field, or the default."""
    found = numbers(header, name)
    return float(found[0]) if len(found) else default


# The files of a series


def is_series(path: Path) -> bool:
    """Tell whether a path stands for a DICOM series: its folder, or one of its files."""
    return path.is_dir() or is_dicom(path)


def headers_by_series(folder: Path) -> list[list[Dataset]]:
    """Read the headers of each DICOM series in a folder, in the order of their positions.

    Files that hold no image are passed over; ValueError for a damaged image.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    series = {}
    for path in filter(is_dicom, paths):
        header = read_header(path)
        if "PixelData" in header:
            series.setdefault(text(header, "SeriesInstanceUID"), []).append(header)
    suffixes = {Path(header.filename).suffix for headers in series.values() for header in headers}
    for path in paths:
        if path.suffix in suffixes and path.stat().st_size <= 128 and not any(path.read_bytes()):
            raise ValueError(_damaged(path))
    return [sorted(headers, key=_height) for headers in series.values()]


def _height(header: Dataset) -> float:
    """Return the position of a slice along its normal in mm; 0 if its header does not state it."""
    orientation = numbers(header, "ImageOrientationPatient")
    position = numbers(header, "ImagePositionPatient")
    if len(orientation) != 6 or len(position) != 3:
        return 0.0
    return float(np.cross(orientation[:3], orientation[3:]) @ position)


def series_headers(path: Path) -> list[Dataset]:
    """Read the headers of a DICOM series in the order of their positions.

    `path` is the folder of a single series, or one of its files; otherwise raises ValueError.
    """
    folder = path if path.is_dir() else path.parent
    found = headers_by_series(folder)
    if not found:
        raise ValueError(f"{folder}: holds no DICOM series; give the folder of a series")
    if path.is_dir() and len(found) > 1:
        raise ValueError(
            f"{folder}: holds {len(found)} DICOM series; name a file of the right one, or give "
            "each its own folder"
        )
    for headers in found:
        if path.is_dir() or path in [Path(header.filename) for header in headers]:
            return headers
    raise ValueError(f"{path}: is not part of a DICOM series; give the folder of a series")


def series_files(path: Path) -> list[Path]:
    """List the files of a DICOM series in the order of their positions; see `series_headers`."""
    return [Path(header.filename) for header in series_headers(path)]


def series_field(path: Path, name: str) -> str | None:
    """Read a field of the first image of a DICOM series; None if the path is not a series."""
    return text(series_headers(path)[0], name) if is_series(path) else None


def check_patient(path: Path, flair: Path) -> None:
    """Raise ValueError if two DICOM series name different patients."""
    one, other = (series_field(series, "PatientID") for series in (path, flair))
    if one != other and None not in (one, other):
        raise ValueError(
            f"{path}: PatientID {one!r}, but {flair.name} has {other!r}; give sequences of one "
            "patient"
        )


def other_frame(path: Path, flair: Path) -> bool:
    """Tell whether two DICOM series differ in frame of reference: the patient may have moved."""
    frames = {series_field(series, "FrameOfReferenceUID") for series in (path, flair)}
    return len(frames - {None, ""}) == 2
