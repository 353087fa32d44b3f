"""A DICOM study sorted into sequences: which of its series is FLAIR, which the T1s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydicom import Dataset

from ..preprocess import SEQUENCES
from .dicom import headers_by_series, is_dicom, number, read_header, series_headers, text

# Words of a SeriesDescription.
FLAIR = re.compile(r"flair|dark.?fluid", re.I)
T1 = re.compile(r"(?<![a-z0-9])t1|mprage|(?<![a-z])(bravo|f?spgr|vibe)", re.I)
T2 = re.compile(r"(?<![a-z0-9])(t2|pd)(?!.*(flair|dark.?fluid))", re.I)
OTHER = re.compile(
    r"(?<![a-z])(loc|scout|survey|dwi|diff|adc|trace|swi|swan|tof|mr[av](?![a-z])|angio|perf|dsc|dce"
    r"|asl|cb[fv]|sub|mip|map|stir|dti|fmri|bold|spectro|report|screen)",
    re.I,
)
AGENT = r"(contrast|gad\w*|gd|km)"
BEFORE = re.compile(
    rf"(?<![a-z])((pre|nativ\w*|without|w/o)[-_ .]*{AGENT}?|non?[-_ .]*{AGENT})", re.I
)
AFTER = re.compile(
    rf"post|{AGENT}|[+&] ?c(?![a-z])|(?<![a-z])(c\+|ce(?![a-z]))|t1.?(ce?)(?![a-z])", re.I
)
LONG_ECHO, NULLS_CSF = 60.0, 1400.0  # minimum echo and inversion time in ms
NO_AGENT = {"", "none", "no", "n", "0", "no contrast", "without"}


@dataclass(frozen=True)
class Series:
    """A DICOM series: its location and the header of its first image."""

    path: Path  # its folder, or its first file if the folder holds other series too
    header: Dataset
    images: int

    @property
    def description(self) -> str:
        words = text(self.header, "SeriesDescription") or text(self.header, "ProtocolName")
        return words or "no description"

    def __str__(self) -> str:
        times = {"TE": self.echo, "TI": self.inversion}
        known = [f"{name} {value:g}" for name, value in times.items() if value > 0]
        agent = [f"agent {text(self.header, 'ContrastBolusAgent')}"] if self.has_agent else []
        about = ", ".join([f"{self.images} images", *known, *agent])
        return f"{self.path.name} = {self.description!r} ({about})"

    @property
    def echo(self) -> float:
        return number(self.header, "EchoTime")  # ms; NaN: not given

    @property
    def inversion(self) -> float:
        return number(self.header, "InversionTime")

    @property
    def has_agent(self) -> bool:
        return text(self.header, "ContrastBolusAgent").lower() not in NO_AGENT

    @cached_property
    def sequence(self) -> str:
        """Return one of SEQUENCES, "other", or "doubtful" if description and times disagree.

        A FLAIR nulls CSF with an inversion time of about 2 s and a long echo; "T1 FLAIR" is a T1
        with an inversion time under a second. Without a description, only the times count.
        """
        words = self.description
        echo, inversion = self.echo, self.inversion
        is_t1 = bool(T1.search(words))
        if OTHER.search(words):
            return "other"
        if FLAIR.search(words) and not is_t1:
            return "doubtful" if echo < LONG_ECHO or 0 < inversion < NULLS_CSF else "FLAIR"
        if is_t1:
            before = bool(BEFORE.search(words))
            after = bool(AFTER.search(BEFORE.sub(" ", words))) or self.has_agent
            if echo >= LONG_ECHO or inversion >= NULLS_CSF or (before and after):
                return "doubtful"
            return "post-contrast" if after else "pre-contrast"
        if echo >= LONG_ECHO and inversion >= NULLS_CSF:
            return "FLAIR"
        if words == "no description" and 0 < echo < LONG_ECHO and not inversion >= NULLS_CSF:
            return "doubtful"  # T1, proton density or susceptibility
        return "other"


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
    """Choose FLAIR and the pre- and post-contrast T1 of a study; also return a text naming them.

    Raises ValueError, listing the series, if there are two of a kind, no FLAIR or a doubtful one.
    """
    kinds = {name: [one for one in found if one.sequence == name] for name in SEQUENCES}
    wrong = [f"{len(kinds[name])} {name} series" for name in SEQUENCES if len(kinds[name]) > 1]
    if not kinds["FLAIR"]:
        wrong.append("no FLAIR series")
    wrong += [f"{one.path.name} is doubtful" for one in found if one.sequence == "doubtful"]
    if wrong:
        listed = "; ".join(map(str, found))
        raise ValueError(
            f"{folder}: {' and '.join(wrong)}; name them with --flair, --pre and --post. "
            f"It holds {listed}"
        )
    chosen = {name: series[0] for name, series in kinds.items() if series}
    said = ", ".join(f"{name} is {series.description!r}" for name, series in chosen.items())
    if left := [repr(one.description) for one in found if one.sequence == "other"]:
        said += f"; left out: {', '.join(left)}"
    return chosen, said


def check_flair(path: Path) -> str:
    """Return a text on the one series that is used as FLAIR.

    Raises ValueError if its header says that it is something else.
    """
    headers = series_headers(path)
    series = Series(path, headers[0], len(headers))
    if (kind := text(series.header, "Modality")) not in ("MR", ""):
        raise ValueError(f"{path}: is a DICOM series of modality {kind}; give FLAIR, an MR series")
    words = series.description
    if series.sequence not in ("FLAIR", "other") or OTHER.search(words) or T2.search(words):
        raise ValueError(
            f"{path}: would be used as FLAIR, but its header says otherwise: {series}; if it is "
            "FLAIR, give it as --flair"
        )
    return "" if words == "no description" else f"FLAIR is {words!r}"
