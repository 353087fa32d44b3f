"""DICOM series: their files in folders, and the fields in which two of them must agree."""

import filecmp
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from pydicom import Dataset

from .headers import (
    IDENTIFIERS,
    damaged_text,
    is_dicom,
    number,
    numbers,
    read_header,
    read_identity,
    text,
)
from .quiet import quiet
from .sequences import says_other, sequence_of

# A PatientID that names nobody: files that share it need not be of one patient.
NOBODY = re.compile(r"(anon[a-z]*|de-?id[a-z]*|unknown|none|null|n/?a|removed|no.?id|[0x]+)$", re.I)
MOST_LEVELS = 24  # of folders


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


def check_patient(series: File, flair: File) -> None:
    """Raise ValueError if two DICOM series name different patients."""
    one, other = _both(series, flair, "PatientID")
    if one != other:
        raise ValueError(
            f"{series}: PatientID {one!r}, but {flair.name} has {other!r}; give sequences of one "
            "patient"
        )


def other_frame(series: File, flair: File) -> bool:
    """Tell whether two DICOM series differ in frame of reference: the patient may have moved."""
    one, other = _both(series, flair, "FrameOfReferenceUID")
    return bool(one and other) and one != other


def _both(one: File, other: File, name: str) -> tuple[str, str]:
    """Return a field of two series; two empty texts unless both are series."""
    if not (isinstance(one, Series) and isinstance(other, Series)):
        return "", ""
    return text(one.header, name), text(other.header, name)
