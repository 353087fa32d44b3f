"""DICOM studies: those in a tree of folders, and which of their series is FLAIR, which the T1s."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydicom import uid

from .dicom import Series, damaged_text, find_images, group_series, text
from .quiet import quiet
from .sequences import SEQUENCES


@dataclass(frozen=True)
class Study:
    """The series of one patient's study."""

    name: str  # of the case
    folder: Path  # that holds all its files
    patient: str  # its PatientID, fit for a file name; empty if it names nobody
    series: tuple[Series, ...]
    damaged: tuple[Path, ...] = ()  # files in its folders that should be images

    @property
    def folders(self) -> set[Path]:
        """Return the folders with files of its series."""
        folders = set()
        for series in self.series:
            folders.update(path.parent for path in series.files)
        return folders


# Which studies there are


@quiet
def find_studies(root: Path, skip: Collection[Path] = ()) -> list[Study]:
    """Find the studies in an absolute folder and below it, but not in the folders to `skip`.

    A study is named after its folder in `root`, or one that has the PatientID as its name, if no
    other study is in that folder; else after the PatientID and the date. Damaged files that belong
    to no study make one of no series.
    """
    images, damaged = find_images(root, skip)
    groups: dict[tuple[str, str], list[Series]] = defaultdict(list)
    for series in group_series(images):
        header = series.header
        study = text(header, "StudyInstanceUID") or str(_top(root, series.files[0].parent))
        groups[text(header, "PatientID"), study].append(series)
    studies = []
    for group in groups.values():
        study = Study("", root, group[0].patient, tuple(group))
        studies.append(replace(study, folder=Path(os.path.commonpath(study.folders))))
    studies = _named(root, _without_others(root, studies))
    for path in damaged:
        _add_damaged(root, studies, path)
    return sorted(studies, key=lambda study: (study.folder, study.name))


def _top(root: Path, folder: Path) -> Path:
    """Return the folder in `root` that holds another one, or `root`, if it is that one."""
    parts = folder.relative_to(root).parts
    return root / parts[0] if parts else root


def _without_others(root: Path, studies: list[Study]) -> list[Study]:
    """Leave out studies without MR, such as CT, beside MR studies."""
    with_mr = [study for study in studies if mr_series(study)]
    tops = {_top(root, study.folder) for study in with_mr}
    if root in tops:
        return with_mr
    return with_mr + [study for study in studies if _top(root, study.folder) not in tops]


def mr_series(study: Study) -> list[Series]:
    """List the MR series; screenshots, which may say MR too, only if there is nothing else."""
    series, screenshots = [], []
    for one in study.series:
        if text(one.header, "Modality") not in ("MR", ""):
            continue
        if "Secondary Capture" in uid.UID(text(one.header, "SOPClassUID")).name:
            screenshots.append(one)
        else:
            series.append(one)
    return series or screenshots


def _named(root: Path, studies: list[Study]) -> list[Study]:
    """Name the studies; each name is of one study."""
    counts: Counter[Path] = Counter()  # the studies in each folder
    for study in studies:
        folders = set(study.folders)
        for folder in study.folders:
            folders.update(above for above in folder.parents if above.is_relative_to(root))
        counts.update(folders)
    is_flat = any(study.folder == root for study in studies)
    is_cd = any(path.name.upper() == "DICOMDIR" for path in root.iterdir())
    named = []
    for study in studies:
        folder = _top(root, study.folder)
        is_one_series = len(study.series) == 1 and study.folder == folder
        if is_flat or (is_cd and not is_one_series):
            folder = root
        for above in (study.folder, *study.folder.parents):
            if above.name == study.patient and counts[above] == 1:
                folder = above
        if counts[folder] == 1:
            named.append(replace(study, name=folder.name, folder=folder))
        else:
            named.append(_dated(study))
    names = Counter(study.name for study in named)
    return [study if names[study.name] == 1 else _dated(study, True) for study in named]


def _dated(study: Study, with_digest: bool = False) -> Study:
    """Name a study after its patient, or folder, and its date, or a digest of its UIDs."""
    header = study.series[0].header
    patient = study.patient or study.folder.name
    words = [patient]
    date = text(header, "StudyDate")
    if re.fullmatch(r"\d{8}", date):
        words.append(date)
    if with_digest or len(words) == 1:
        uids = text(header, "PatientID"), text(header, "StudyInstanceUID"), study.series[0].name
        words.append(f"ses-{hashlib.sha256(repr(uids).encode()).hexdigest()[:8]}")
    return replace(study, name="_".join(words), patient=patient)


def _add_damaged(root: Path, studies: list[Study], path: Path) -> None:
    """Add a damaged file to the studies in the folder nearest to it, in place."""
    for folder in path.parents:
        near = [study for study in studies if study.folder.is_relative_to(folder)]
        if folder == root and folder != path.parent:  # others are in other folders
            near = [study for study in near if study.folder == root]
        if near or folder == root:
            break
    for study in near:
        studies.remove(study)
        studies.append(replace(study, damaged=(*study.damaged, path)))
    if not near:
        folder = _top(root, path.parent)
        studies.append(Study(folder.name, folder, "", (), (path,)))


# Which series of a study is which sequence


@quiet
def sort_study(study: Study) -> tuple[dict[str, Series], str]:
    """Choose FLAIR and, if there is one of each, the pre- and post-contrast T1 of a study.

    Doubt about the T1s leaves them out; a lone series is FLAIR unless its header says otherwise.
    Also return a text that says what is used. Raises ValueError, listing the series, unless there
    is one FLAIR, or naming a damaged file.
    """
    if study.damaged:
        raise ValueError(damaged_text(study.damaged[0]))
    series = mr_series(study)
    if not series:
        kinds = {text(one.header, "Modality") for one in study.series}
        raise ValueError(
            f"{study.folder}: is a DICOM series of modality {' and '.join(sorted(kinds))}; give "
            "FLAIR, an MR series"
        )
    if len(series) == 1:
        flair = series[0]
        if not flair.may_be_flair:
            raise ValueError(
                f"{flair}: would be used as FLAIR, but its header says otherwise: "
                f"{flair.summary(study.folder)}; if it is FLAIR, give it as --flair"
            )
        choice = f"FLAIR is {flair.words!r}" if flair.words else ""
        return {"FLAIR": flair}, choice
    chosen = {}
    for name in SEQUENCES:
        fitting = [one for one in series if one.sequence == name]
        if len(fitting) == 1:
            chosen[name] = fitting[0]
        elif name == "FLAIR":
            listed = "; ".join(one.summary(study.folder) for one in series)
            raise ValueError(
                f"{study.folder}: {len(fitting) or 'no'} FLAIR series; name the right one with "
                f"--flair SERIES, alone or with --pre and --post. It holds {listed}"
            )
    return chosen, _choice_text(study, series, chosen)


def _choice_text(study: Study, series: Sequence[Series], chosen: dict[str, Series]) -> str:
    """Say which series are used as which sequence, and which are not, and why."""
    choice = ", ".join(f"{name} is {one.quoted}" for name, one in chosen.items())
    others, unclear = [], []
    for one in series:
        if one in chosen.values():
            continue
        if one.sequence == "other":
            others.append(one.quoted)
        else:
            unclear.append(one.summary(study.folder))
    if others:
        choice += f"; left out: {', '.join(others)}"
    if unclear:
        choice += (
            f"; left out, as it is not certain which T1 each is: {', '.join(unclear)}: name them "
            "with --flair, --pre and --post"
        )
    return choice
