"""A DICOM study sorted into sequences: which of its series is FLAIR, which the T1s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydicom import Dataset

from ..preprocess import SEQUENCES
from .dicom import headers_by_series, is_dicom, number, read_header, series_headers, text
from .sequences import says_other, sequence_of


@dataclass(frozen=True)
class Series:
    """A DICOM series: its location and the header of its first image."""

    path: Path  # its folder, or its first file if the folder holds other series too
    header: Dataset
    images: int

    @property
    def words(self) -> str:
        return text(self.header, "SeriesDescription") or text(self.header, "ProtocolName")

    @property
    def description(self) -> str:
        return self.words or "no description"

    @property
    def echo(self) -> float:
        return number(self.header, "EchoTime")  # ms; NaN: not given

    @property
    def inversion(self) -> float:
        return number(self.header, "InversionTime")

    @property
    def agent(self) -> str:
        return text(self.header, "ContrastBolusAgent")

    @property
    def about(self) -> str:
        """Describe it in a few words: its description, times and agent."""
        facts = [f"{self.images} images"]
        for name, time in (("TE", self.echo), ("TI", self.inversion)):
            if time > 0:
                facts.append(f"{name} {time:g}")
        if self.agent:
            facts.append(f"agent {self.agent}")
        return f"{self.path.name} = {self.description!r} ({', '.join(facts)})"

    @cached_property
    def sequence(self) -> str:
        """Return one of SEQUENCES, "other" or "doubtful"; see `sequence_of`."""
        return sequence_of(self.words, self.echo, self.inversion, self.agent)


def series_in(folder: Path) -> list[Series]:
    """Find the MR series in a folder, ordered by series number."""
    found = headers_by_series(folder)
    series = []
    for headers in found:
        first = headers[0]
        if text(first, "Modality") in ("MR", ""):
            path = folder if len(found) == 1 else Path(first.filename)
            series.append(Series(path, first, len(headers)))
    return sorted(series, key=lambda one: (number(one.header, "SeriesNumber", 0), str(one.path)))


def study_in(folder: Path) -> list[Series]:
    """List the series of the one study in a folder and its subfolders; empty if it is not a study.

    A study has at least two series. Folders of several studies are separate cases.
    """
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    firsts = [next(filter(is_dicom, sorted(path.iterdir())), None) for path in inner]
    if any(is_dicom(path) for path in folder.iterdir()):
        inner, firsts = [folder], []
    elif sum(map(bool, firsts)) < 2:
        return []
    studies = {text(read_header(first), "StudyInstanceUID") for first in firsts if first}
    if len(studies) > 1:
        return []
    found = [series for path in inner for series in series_in(path)]
    return found if len(found) > 1 else []


def sort_study(folder: Path, found: Sequence[Series]) -> tuple[dict[str, Series], str]:
    """Choose FLAIR and, if there is one of each, the pre- and post-contrast T1 of a study.

    Doubt about the T1s leaves them out. Also return a text that says what is used. Raises
    ValueError, listing the series, unless there is one FLAIR.
    """
    kinds = {name: [one for one in found if one.sequence == name] for name in SEQUENCES}
    if len(kinds["FLAIR"]) != 1:
        listed = "; ".join(one.about for one in found)
        count = len(kinds["FLAIR"]) or "no"
        raise ValueError(
            f"{folder}: {count} FLAIR series; name the right one with --flair SERIES, alone or "
            f"with --pre and --post. It holds {listed}"
        )
    chosen = {name: series[0] for name, series in kinds.items() if len(series) == 1}
    said = ", ".join(f"{name} is {series.description!r}" for name, series in chosen.items())
    left = [one for one in found if one not in chosen.values()]
    if others := [repr(one.description) for one in left if one.sequence == "other"]:
        said += f"; left out: {', '.join(others)}"
    if unclear := [one.about for one in left if one.sequence != "other"]:
        said += (
            f"; left out, as it is not certain which T1 each is: {', '.join(unclear)}: name them "
            "with --flair, --pre and --post"
        )
    return chosen, said


def check_flair(path: Path) -> str:
    """Return a text on the one series that is used as FLAIR.

    Raises ValueError if its header says that it is something else.
    """
    headers = series_headers(path)
    series = Series(path, headers[0], len(headers))
    if (kind := text(series.header, "Modality")) not in ("MR", ""):
        raise ValueError(f"{path}: is a DICOM series of modality {kind}; give FLAIR, an MR series")
    if series.sequence != "FLAIR" and (series.sequence != "other" or says_other(series.words)):
        raise ValueError(
            f"{path}: would be used as FLAIR, but its header says otherwise: {series.about}; if it "
            "is FLAIR, give it as --flair"
        )
    return f"FLAIR is {series.words!r}" if series.words else ""
