"""DICOM headers: read as far as they are needed, and their fields as text or numbers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, uid
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue

from .quiet import quiet

OTHER_SUFFIXES = (".tif", ".tiff", ".png", ".gz", ".nii", ".nrrd", ".mha", ".mhd")
# The fields that tell patient, study and series of an image, and which sequence it is.
IDENTIFIERS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
IDENTITY = [
    *IDENTIFIERS, "SOPClassUID", "SOPInstanceUID", "Modality", "StudyDate", "SeriesNumber",
    "SeriesDescription", "ProtocolName", "EchoTime", "InversionTime", "ContrastBolusAgent",
    "FrameOfReferenceUID", "Rows",
]  # fmt: skip
UNDEFINED = 0xFFFFFFFF  # length of compressed pixels


def is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM; the index of a CD, DICOMDIR, does not count."""
    if path.name[0] == "." or path.name.upper() == "DICOMDIR":
        return False
    if path.name.lower().endswith(OTHER_SUFFIXES) or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        return True
    if head[:2] not in (b"\2\0", b"\x08\0", b"\0\x08"):  # the first fields, of group 2 or 8
        return False
    try:
        with quiet:
            start = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            return str(start.get("SOPClassUID")).startswith("1.2.840.10008.")
    except Exception:  # of many kinds: it is another binary file
        return False


def read_header(path: Path) -> Dataset:
    """Read the header of a DICOM image, for `text` and `numbers`; ValueError if it is damaged."""
    status = path.stat()
    return _read_header(path, status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2048)  # the files of a few studies: some 50 kB each
def _read_header(path: Path, inode: int, changed: int, size: int) -> Dataset:
    with _errors_say_damaged(path):
        header = pydicom.dcmread(path, defer_size=1024, force=True)
        _flatten(header)
    if "PixelData" not in header:
        raise ValueError(damaged_text(path))
    pixels = pixel_data(header)
    is_deflated = text(header.file_meta, "TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian
    is_stored = pixels.length != UNDEFINED and not is_deflated
    if is_stored and pixels.value_tell + pixels.length > size:
        raise ValueError(damaged_text(path))
    return header


def pixel_data(header: Dataset) -> RawDataElement:
    """Return the element of the pixels of a header that has one; they are not read."""
    element = header.get_item("PixelData", keep_deferred=True)
    assert isinstance(element, RawDataElement)
    return element


def _flatten(header: Dataset) -> None:
    """Bring the fields of an enhanced image of one frame to the top, as in a classic image."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in header.get(groups, [])[:1]:
            for sequence in group:
                if sequence.VR == "SQ" and sequence.value:
                    header.update(sequence.value[0])


def read_identity(path: Path) -> Dataset | None:
    """Read the fields in IDENTITY; None without an image, ValueError if it is damaged."""
    with _errors_say_damaged(path):
        header = pydicom.dcmread(
            path, stop_before_pixels=True, specific_tags=list(IDENTITY), force=True
        )
    kind = text(header, "SOPClassUID") or text(header.file_meta, "MediaStorageSOPClassUID")
    name = uid.UID(kind).name  # the UID itself if it is private, or cut short
    is_private = name == kind and "SOPInstanceUID" in header
    if is_private and "Rows" not in header:
        return None
    if name != kind and "Image Storage" not in name:
        return None
    if "Rows" not in header:
        raise ValueError(damaged_text(path))
    return header


@contextmanager
def _errors_say_damaged(path: Path) -> Iterator[None]:
    """Raise errors of the reader, which are of many kinds, as a ValueError that names the file."""
    try:
        with quiet:
            yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(damaged_text(path)) from error


def damaged_text(path: Path) -> str:
    return f"{path}: not a readable DICOM image, or cut short; export it again"


@quiet  # on odd fields: those that matter are checked
def text(header: Dataset, name: str) -> str:
    """Return a field as one line of printable text, "?" for odd bytes; empty if it is not given."""
    try:
        value = header.get(name)
    except (ValueError, TypeError, OverflowError, NotImplementedError):  # a damaged number
        value = header.get_item(name).value.decode("latin-1")
    if isinstance(value, MultiValue):
        value = "\\".join(map(str, value))
    line = "" if value is None else str(value).replace("\ufffd", "?")
    return "".join(letter if letter.isprintable() else " " for letter in line).strip()


@quiet
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
    values = numbers(header, name)
    return float(values[0]) if len(values) else default
