"""DICOM: headers, read as far as they are needed, and the series that files in folders make."""

import filecmp
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, uid
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue

from .quiet import quiet
from .sequences import says_other, sequence_of

# A PatientID that names nobody: files that share it need not be of one patient.
NOBODY = re.compile(r"(anon[a-z]*|de-?id[a-z]*|unknown|none|null|n/?a|removed|no.?id|[0x]+)$", re.I)
MOST_LEVELS = 24  # of folders
OTHER_SUFFIXES = (".tif", ".tiff", ".png", ".gz", ".nii", ".nrrd", ".mha", ".mhd")
# The fields that tell patient, study and series of an image, and which sequence it is.
IDENTIFIERS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
IDENTITY = [
    *IDENTIFIERS, "SOPClassUID", "SOPInstanceUID", "Modality", "StudyDate", "SeriesNumber",
    "SeriesDescription", "ProtocolName", "EchoTime", "InversionTime", "ContrastBolusAgent",
    "FrameOfReferenceUID", "Rows",
]  # fmt: skip
UNDEFINED = 0xFFFFFFFF  # length of compressed pixels


# Headers


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
        # The fields of an enhanced image of one frame belong at the top, as in a classic image.
        for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            for group in header.get(groups, [])[:1]:
                for sequence in group:
                    if sequence.VR == "SQ" and sequence.value:
                        header.update(sequence.value[0])
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


# Series


@dataclass(frozen=True)
class Series:
    """A DICOM series: its files, the header of one, and the folder or file that stands for it."""

    path: Path
    files: tuple[Path, ...]
    header: Dataset = field(compare=False, repr=False)  # of the fields in IDENTITY

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def patient(self) -> str:
        """Return the PatientID, fit for the name of a file; empty if it names nobody."""
        patient = text(self.header, "PatientID")
        if NOBODY.match(patient):
            return ""
        return re.sub(r"[^\w.-]+", "-", patient).strip("-._")

    @property
    def words(self) -> str:
        return text(self.header, "SeriesDescription") or text(self.header, "ProtocolName")

    @property
    def quoted(self) -> str:
        return repr(self.words or "no description")

    @cached_property
    def sequence(self) -> str:
        """Return one of SEQUENCES, "other" or "doubtful"; see `sequence_of`."""
        echo, inversion = number(self.header, "EchoTime"), number(self.header, "InversionTime")
        return sequence_of(self.words, echo, inversion, text(self.header, "ContrastBolusAgent"))

    @property
    def may_be_flair(self) -> bool:
        """Tell whether it is FLAIR, or of no known kind."""
        unknown = self.sequence == "other" and not says_other(self.words)
        return self.sequence == "FLAIR" or unknown

    def summary(self, folder: Path) -> str:
        """Describe it: its place in a folder, description, number of images, times and agent."""
        facts = [f"{len(self.files)} images"]
        for name, tag in (("TE", "EchoTime"), ("TI", "InversionTime")):
            if number(self.header, tag) > 0:
                facts.append(f"{name} {number(self.header, tag):g}")
        agent = text(self.header, "ContrastBolusAgent")
        if agent:
            facts.append(f"agent {agent}")
        place = os.path.relpath(self.path, folder) if self.path != folder else self.name
        return f"{place} = {self.quoted} ({', '.join(facts)})"


File = Path | Series  # of a volume
Image = tuple[Path, Dataset]  # a file, and the fields in IDENTITY


def series_or_file(path: File) -> File:
    """Return the series (`series_at`) that a folder or DICOM file stands for; others stay."""
    if isinstance(path, Path) and (path.is_dir() or is_dicom(path)):
        return series_at(path)
    return path


@quiet  # here rather than for each field of many files
def find_images(
    folder: Path, skip: Collection[Path] = (), deep: bool = True
) -> tuple[list[Image], list[Path]]:
    """Find images, and damaged ones, in a folder and, if `deep`, below it, but not in `skip`."""
    images, damaged = [], []
    for paths in _files_by_folder(folder, skip, deep):
        suffixes = set()
        for path in filter(is_dicom, paths):
            try:
                header = read_identity(path)
            except ValueError:
                damaged.append(path)
                continue
            if header is not None:
                images.append((path, header))
                suffixes.add(path.suffix)
        for path in paths:
            if path.suffix in suffixes and _was_image(path):
                damaged.append(path)
    return images, damaged


def _was_image(path: Path) -> bool:
    """Tell whether a file beside images, named like one, is a broken link or has no content."""
    if not path.exists():
        return True
    return path.is_file() and path.stat().st_size <= 128 and not any(path.read_bytes())


def _files_by_folder(top: Path, skip: Collection[Path], deep: bool) -> Iterator[list[Path]]:
    """Yield the files of a folder and, if `deep`, of those below it, by name; none is hidden."""

    def fail(error: OSError) -> None:
        raise error

    for name, folders, files in os.walk(top, onerror=fail, followlinks=True):
        folder = Path(name)
        yield [folder / file for file in sorted(files) if file[0] != "."]
        levels = len(folder.relative_to(top).parts) + 1
        above = {path.resolve() for path in [folder, *folder.parents][:levels]}
        candidates = sorted(folders) if deep and levels <= MOST_LEVELS else []
        folders.clear()  # os.walk enters what is left in it
        for each in candidates:
            path = folder / each
            if each[0] not in "._" and path not in skip and path.resolve() not in above:
                folders.append(each)


@quiet
def group_series(images: Sequence[Image]) -> list[Series]:
    """Group images by patient, study and series; copies of a file do not count."""
    # An image that does not state its patient or study is of those that its series states.
    patients: dict[str, str] = {}  # by series
    studies: dict[str, str] = {}
    for _, header in images:
        patient, study, series_uid = _identifiers(header)
        patients[series_uid] = patients.get(series_uid) or patient
        studies[series_uid] = studies.get(series_uid) or study
    groups: dict[tuple[str, ...], list[Image]] = defaultdict(list)
    beside: dict[Path, set[tuple[str, ...]]] = defaultdict(set)  # the series of each folder
    instances: dict[tuple[Path, str], Path] = {}
    for path, header in images:
        first = instances.setdefault((path.parent, text(header, "SOPInstanceUID")), path)
        if first != path and filecmp.cmp(first, path, shallow=False):
            continue
        patient, study, series_uid = _identifiers(header)
        key = (patient, study, str(path.parent))
        if series_uid:
            key = (patient or patients[series_uid], study or studies[series_uid], series_uid)
        groups[key].append((path, header))
        beside[path.parent].add(key)
    series = []
    for group in groups.values():
        files = tuple(path for path, _ in group)
        folder = files[0].parent
        is_alone = {path.parent for path in files} == {folder} and len(beside[folder]) == 1
        header = group[0][1]
        for _, other in reversed(group):  # the first that states all
            if all(_identifiers(other)):
                header = other
        path = folder if is_alone else files[0]
        series.append(Series(path, files, header))
    return sorted(series, key=lambda one: (number(one.header, "SeriesNumber", 0), str(one)))


def _identifiers(header: Dataset) -> tuple[str, str, str]:
    """Return the patient, the study and the series of an image; empty where it states none."""
    patient, study, series = IDENTIFIERS
    return text(header, patient), text(header, study), text(header, series)


def series_at(path: Path) -> Series:
    """Find the one series in and below a folder, or of a file; ValueError if that is impossible."""
    folder = path if path.is_dir() else path.parent
    images, damaged = find_images(folder, deep=path.is_dir())
    if damaged:
        raise ValueError(damaged_text(damaged[0]))
    series = group_series(images)
    if not series:
        raise ValueError(f"{folder}: holds no DICOM series; give the folder of a series")
    if not path.is_dir():
        series = [one for one in series if path in one.files]
    if len(series) > 1:
        listed = "; ".join(one.summary(folder) for one in series)
        raise ValueError(
            f"{folder}: holds {len(series)} DICOM series; give the folder of one, or a file of it: "
            f"{listed}"
        )
    if not series:
        raise ValueError(f"{path}: is not part of a DICOM series; give the folder of a series")
    return series[0]
