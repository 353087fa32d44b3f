"""Which cases a folder holds: slices as images, medical volume files, DICOM series."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from .dicom import SEQUENCES, Series, sort_study, study_in
from .scans import Scan, is_scan, scan_name
from .slices import Case

SLICE_NAME = re.compile(r"^(?P<stem>.+)_(?P<number>\d+)(?P<mask>_mask)?\.(?:tiff?|png)$", re.I)
IMAGE_SUFFIXES = {".tif", ".tiff", ".png"}
# Last words of the names of volume files that are not FLAIR.
OTHER_SEQUENCE = re.compile(r"(?:^|[-_. ])(t1\w*|t2w?|pre|post|gd|dwi|adc|seg\w*|label\w*)$", re.I)


def find_cases(root: Path | str, names: Sequence[str] | None = None) -> list[Case]:
    """Every case of `case_paths`; ValueError, naming the file, for one that is not sound."""
    return [find_case(path) for path in case_paths(root, names)]


def case_paths(
    root: Path | str, names: Sequence[str] | None = None, other_than: Path | None = None
) -> list[Path]:
    """The cases in `root`, which holds folders and volume files or is itself a case; by name.

    With `names`, only these; never the folder `other_than`. Raises FileNotFoundError or ValueError
    if there is nothing to read, or two cases have one name.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the cases")
    if not root.is_dir() and not is_scan(root):
        raise ValueError(f"{root}: is no volume file; give one, or the folder of its case")
    whole = is_scan(root) or study_in(root)
    paths = [root.resolve()] if whole else _cases_in(root, other_than)
    if not paths:
        raise ValueError(
            f"{root}: holds no case folder, no volume file and no slice named "
            "<anything>_<number>.tif or .png; give the folder that holds the cases, or one case"
        )
    found = {}
    for path in paths:
        if (first := found.setdefault(case_name(path), path)) != path:
            raise ValueError(f"{first} and {path.name} are cases of one name; rename one of them")
    if names is not None:
        missing = sorted(set(names) - set(found))
        if missing:
            raise ValueError(f"{root}: holds no case {missing[0]!r}; check the name")
        paths = [path for path in paths if case_name(path) in names]
    return paths


def _cases_in(root: Path, other_than: Path | None) -> list[Path]:
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] not in "._"]
    folders = [p for p in folders if not other_than or p.resolve() != other_than.resolve()]
    if volumes := _volumes_in(root):
        return sorted(volumes + [folder for folder in folders if _holds_case(folder)])
    if not any(map(_holds_case, folders)) and _holds_case(root):
        return [root.resolve()]
    return folders


def _holds_case(folder: Path) -> bool:
    return _holds_slices(folder) or is_scan(folder) or bool(_volumes_in(folder))


def _holds_slices(folder: Path) -> bool:
    return any(SLICE_NAME.match(path.name) for path in folder.iterdir())


def _volumes_in(folder: Path) -> list[Path]:
    """The volume files of a folder that are no mask."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and is_scan(path)]
    return [path for path in files if not scan_name(path).lower().endswith("_mask")]


def case_name(path: Path) -> str:
    """The name of the case in a folder or volume file."""
    return scan_name(path) if path.is_file() else path.name


def find_case(path: Path) -> Case:
    """The case in a folder or volume file; ValueError, naming the file, if it is not sound."""
    if path.is_dir() and (study := study_in(path)):
        return _find_study(path, study)
    if is_scan(path):
        return _find_scan(path)
    volumes = _volumes_in(path)
    if not volumes:
        return _find_slices(path)
    if len(volumes) > 1:
        raise ValueError(
            f"{path}: holds {volumes[0].name} and {volumes[1].name}; name its sequences with "
            "--flair, --pre and --post, or give each case one file of three channels"
        )
    if _holds_slices(path):
        raise ValueError(f"{path}: holds slices and {volumes[0].name}; move one of them away")
    return replace(_find_scan(volumes[0]), name=path.name)


def find_sequences(flair: Path, pre: Path | None, post: Path | None) -> Scan:
    """The scan whose sequences lie in files of their own, named after FLAIR and its folder."""
    name = f"{flair.resolve().parent.name}_{case_name(flair)}"
    return Scan.open(name, [pre or flair, flair, post or flair], _mask_of(flair))


def _find_study(folder: Path, found: Sequence[Series]) -> Scan:
    """The scan whose sequences are series of a DICOM study; ValueError if that is in doubt."""
    series, said = sort_study(folder, found)
    flair = series["FLAIR"].path
    files = [series[name].path if name in series else flair for name in SEQUENCES]
    return Scan.open(folder.name, files, _mask_of(folder), chosen=said)


def _find_scan(path: Path) -> Scan:
    scan = Scan.open(case_name(path), [path], _mask_of(path))
    odd = OTHER_SEQUENCE.search(scan.name)
    if scan.channels == 1 and odd:
        raise ValueError(
            f"{path}: one channel is taken for FLAIR, but its name says {odd[1]!r}; name the "
            "sequences with --flair, --pre and --post"
        )
    return scan


def _mask_of(scan: Path) -> Path | None:
    """The file <scan>_mask beside it, in any format."""
    wanted = f"{scan_name(scan)}_mask".lower()
    beside = [path for path in sorted(scan.parent.iterdir()) if path.is_file() and is_scan(path)]
    return next((path for path in beside if scan_name(path).lower() == wanted), None)


def _find_slices(folder: Path) -> Case:
    """The case in a folder of images; raises ValueError for gaps, duplicates or unpaired masks."""
    slices: dict[int, Path] = {}
    masks: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        match = SLICE_NAME.match(path.name)
        if not match:
            raise ValueError(f"{path}: a slice is named <anything>_<number>.tif; rename or move it")
        found = masks if match["mask"] else slices
        number = int(match["number"])
        if number in found:
            raise ValueError(f"{path}: slice {number} is already there as {found[number].name}")
        found[number] = path
    if not slices:
        raise ValueError(f"{folder}: holds no slice named <anything>_<number>.tif or .png")
    numbers = sorted(slices)
    gap = next((k + 1 for k, after in pairwise(numbers) if after != k + 1), None)
    if gap is not None:
        raise ValueError(
            f"{folder}: slice {gap} is missing between {numbers[0]} and {numbers[-1]}; "
            "add it or renumber the slices"
        )
    if masks and (odd := sorted(set(masks) ^ set(numbers))):
        lacks = "slice" if odd[0] in masks else "mask"
        raise ValueError(
            f"{folder}: {lacks} {odd[0]} is missing though others are there; "
            "add it (all zero where there is no lesion) or take all the masks away"
        )
    paths = tuple(slices[n] for n in numbers), tuple(masks[n] for n in sorted(masks))
    return Case(folder.name, tuple(numbers), *paths)
