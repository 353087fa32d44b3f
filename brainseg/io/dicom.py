"""DICOM series: their files in folders, and the fields in which two of them must agree."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Callable, Iterator, Sequence
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
from .sequences import says_other, sequence_of

# A PatientID that names nobody: files that share it need not be of one patient.
NOBODY = re.compile(r"(anon[a-z]*|de-?id[a-z]*|unknown|none|null|n/?a|removed|no.?id|[0x]+)$", re.I)
MOST_LEVELS = 24  # of folders


@dataclass(frozen=True)
class Series:
    """The files of a DICOM series, and what the header of one of them says of it.

    `path` stands for it in messages: its folder, or a file of it if there are others beside it.
    """

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
        given = text(self.header, "PatientID")
        return "" if NOBODY.match(given) else re.sub(r"[^\w.-]+", "-", given).strip("-._")

    @property
    def words(self) -> str:
        return text(self.header, "SeriesDescription") or text(self.header, "ProtocolName")

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
        return f"{place} = {self.words or 'no description'!r} ({', '.join(facts)})"


Image = tuple[Path, Dataset]  # a file, and the fields in IDENTITY


def is_series(path: Path | Series) -> bool:
    """Tell whether this is a DICOM series, or a path that stands for one: a folder or a file."""
    return isinstance(path, Series) or path.is_dir() or is_dicom(path)


def find_images(
    folder: Path, skip: Callable[[Path], bool] | None = None, deep: bool = True
) -> tuple[list[Image], list[Path]]:
    """Find the DICOM images in a folder and, if `deep`, below it; also list those damaged.

    Reads a part of each header. Files that hold no image, such as reports, are passed over, and
    so are folders for which `skip` is true.
    """
    images, damaged = [], []
    folders = _folders_below(folder, skip) if deep else [folder]
    for here in folders:
        _, paths = _entries(here)
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


def _folders_below(
    folder: Path, skip: Callable[[Path], bool] | None, above: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Yield a folder and those below it, in order; a link back to one of them is not followed."""
    yield folder
    above = (*above, folder.resolve())
    if len(above) > MOST_LEVELS:
        return
    folders, _ = _entries(folder)
    for path in folders:
        is_new = path.name[0] != "_" and path.resolve() not in above
        if is_new and not (skip and skip(path)):
            yield from _folders_below(path, skip, above)


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the folders and the files in a folder, without hidden ones, in order of their names."""
    folders, files = [], []
    with os.scandir(folder) as entries:  # which need not ask for the status of each
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                folders.append(Path(entry.path))
            else:
                files.append(Path(entry.path))
    return folders, files


def group_series(images: Sequence[Image]) -> list[Series]:
    """Group images by the patient, study and series in their headers, by series number.

    Of a file and its copies in one folder, only the first counts. A file that does not state its
    patient or study is of those that the others of its series state.
    """
    stated: dict[tuple[str, str], str] = {}  # by series and field
    for _, header in images:
        for name in IDENTIFIERS:
            if text(header, name):
                stated.setdefault((text(header, "SeriesInstanceUID"), name), text(header, name))
    groups: dict[tuple[str, ...], list[Image]] = {}
    beside: dict[Path, set[tuple[str, ...]]] = {}  # the series of each folder
    instances: dict[tuple[Path, str], Path] = {}
    for path, header in images:
        first = instances.setdefault((path.parent, text(header, "SOPInstanceUID")), path)
        if first != path and filecmp.cmp(first, path, shallow=False):
            continue
        series_uid = text(header, "SeriesInstanceUID")
        if series_uid:
            key = tuple(text(header, n) or stated.get((series_uid, n), "") for n in IDENTIFIERS)
        else:
            key = (*(text(header, n) for n in IDENTIFIERS), str(path.parent))
        groups.setdefault(key, []).append((path, header))
        beside.setdefault(path.parent, set()).add(key)
    series = []
    for group in groups.values():
        files = tuple(path for path, _ in group)
        folders = {path.parent for path in files}
        alone = len(folders) == 1 and len(beside[files[0].parent]) == 1
        headers = [header for _, header in group]
        complete = [header for header in headers if all(text(header, n) for n in IDENTIFIERS)]
        place = files[0].parent if alone else files[0]
        series.append(Series(place, files, (complete or headers)[0]))
    return sorted(series, key=lambda one: (number(one.header, "SeriesNumber", 0), str(one)))


def series_at(path: Path | Series) -> Series:
    """Find the one series in a folder and below it, or the series of a file, in its folder.

    Raises ValueError if there is none, a file of it is damaged, or there are several.
    """
    if isinstance(path, Series):
        return path
    folder = path if path.is_dir() else path.parent
    images, damaged = find_images(folder, deep=path.is_dir())
    if damaged:
        raise ValueError(damaged_text(damaged[0]))
    found = group_series(images)
    if not found:
        raise ValueError(f"{folder}: holds no DICOM series; give the folder of a series")
    if not path.is_dir():
        found = [series for series in found if path in series.files]
    if len(found) > 1:
        listed = "; ".join(series.summary(folder) for series in found)
        raise ValueError(
            f"{folder}: holds {len(found)} DICOM series; give the folder of one, or a file of it: "
            f"{listed}"
        )
    if not found:
        raise ValueError(f"{path}: is not part of a DICOM series; give the folder of a series")
    return found[0]


def series_headers(series: Series | Path) -> list[Dataset]:
    """Read the headers of a DICOM series, or of that at a path, in the order of their positions."""
    series = series_at(series)
    headers = [read_header(path) for path in series.files]
    for path, header in zip(series.files, headers, strict=True):
        if "PixelData" not in header:
            raise ValueError(damaged_text(path))
    return sorted(headers, key=_height)


def _height(header: Dataset) -> float:
    """Return the position of a slice along its normal in mm; 0 if its header does not state it."""
    orientation = numbers(header, "ImageOrientationPatient")
    position = numbers(header, "ImagePositionPatient")
    if len(orientation) != 6 or len(position) != 3:
        return 0.0
    return float(np.cross(orientation[:3], orientation[3:]) @ position)


def check_patient(series: Series | Path, flair: Series | Path) -> None:
    """Raise ValueError if two DICOM series name different patients."""
    one, other = _both(series, flair, "PatientID")
    if one != other:
        raise ValueError(
            f"{series}: PatientID {one!r}, but {flair.name} has {other!r}; give sequences of one "
            "patient"
        )


def other_frame(series: Series | Path, flair: Series | Path) -> bool:
    """Tell whether two DICOM series differ in frame of reference: the patient may have moved."""
    one, other = _both(series, flair, "FrameOfReferenceUID")
    return bool(one and other) and one != other


def _both(one: Series | Path, other: Series | Path, name: str) -> tuple[str, str]:
    """Return a field of two series; two empty texts unless both are series."""
    if not (isinstance(one, Series) and isinstance(other, Series)):
        return "", ""
    return text(one.header, name), text(other.header, name)
