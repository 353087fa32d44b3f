"""Volume files: which files are scans and which are masks, by their names, and what reads each.

A new format is a line in `READERS`.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .dicom import File, Series, is_dicom, series_or_file
from .grid import Grid
from .itk import itk_grid, itk_voxels
from .nifti import nifti_grid, nifti_voxels
from .series import read_series, series_grid
from .slices import check_finite


class Reader(NamedTuple):
    grid: Callable[[Path], tuple[Grid, int]]  # with the number of channels
    voxels: Callable[[Path], np.ndarray]  # (X, Y, Z, C)


NIFTI = Reader(nifti_grid, nifti_voxels)
ITK = Reader(itk_grid, itk_voxels)
READERS = {
    ".nii.gz": NIFTI,
    ".nii": NIFTI,
    ".mha": ITK,
    ".mhd": ITK,
    ".nrrd": ITK,
    ".nhdr": ITK,
}
SUFFIXES = tuple(READERS)
CONVERTERS = {  # to .nii.gz, of files that are not read
    ".mgz": "mri_convert",
    ".mgh": "mri_convert",
    ".mnc": "mnc2nii",
    ".hdr": "fslchfiletype NIFTI_GZ",
    ".img": "fslchfiletype NIFTI_GZ",
}
OTHER_MASK = re.compile(  # the masks of brain extraction tools, and of tissues
    r"(?:desc|label)-(?:brain|head|skull|gm|wm|csf)|(?:^|_)(?:brain|bet|skull\w*)_?mask", re.I
)
# A mask is named after its scan and these words, or only by them, as Segmentation.seg.
DRAWN = r"(?:masks?|seg(?:m|mentations?)?|label(?:s|map)?|annotations?|roi)"
MASK_WORD = (
    rf"(?:{DRAWN}|(?:manual|tumou?r|wmh|lesion)[-_.]?{DRAWN}|lesions?|gt|(?:ground[-_]?)?truth)"
)
MASK_NAME = re.compile(rf"(?P<scan>.*?)(?:(?:^|[-_. ]+){MASK_WORD})+", re.I)
MASK_START = re.compile(rf"{DRAWN}[-_. ]", re.I)
FLAIR_IN_NAME = re.compile(r"[-_. ]*(?:flair|t2f)[a-z0-9]*$", re.I)


# Names


def absolute(path: Path) -> Path:
    """Return the absolute path; links, whose names may say more than their targets', stay."""
    return Path(os.path.abspath(path))


def suffix_of(path: Path) -> str:
    """Return which of SUFFIXES a file name ends with, in small letters; empty if with none."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    return ""


def scan_name(path: Path) -> str:
    """Return the name of a folder, or of a volume file without its suffix (.nii.gz is one)."""
    if path.is_dir():
        return path.name
    return path.name[: len(path.name) - len(suffix_of(path))]


def is_scan(path: Path) -> bool:
    """Tell whether a path is a volume file, by its suffix, or the folder of a DICOM series."""
    if path.is_dir():
        return any(map(is_dicom, sorted(path.iterdir())))
    return suffix_of(path) != "" and path.name[0] != "."


def check_format(path: Path) -> None:
    """Raise ValueError, naming a converter, if a file, or one in a folder, cannot be read here."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        program = CONVERTERS.get(file.suffix.lower())
        if program:
            raise ValueError(
                f"{file}: {file.suffix} files are not read; convert it to .nii.gz with {program}"
            )


def volumes_in(folder: Path, masks: bool = False) -> list[Path]:
    """List the volume files of a folder, with or without those that are named as masks."""
    volumes = []
    for path in sorted(folder.iterdir()):
        is_volume = path.is_file() and is_scan(path)
        if is_volume and (masks or not MASK_NAME.fullmatch(scan_name(path))):
            volumes.append(path)
    return volumes


def mask_of(scan: Path) -> Path | None:
    """Find <scan>_mask, <scan>-seg or alike beside a scan, in any format; ValueError for two."""
    # Beside the only scan of a folder, its name may be missing.
    names = {scan_name(scan).lower(), _without_flair(scan)}
    if volumes_in(scan.parent) == [scan]:
        names.add("")
    masks = []
    for path in volumes_in(scan.parent, masks=True):
        match = MASK_NAME.fullmatch(scan_name(path))
        if match and match["scan"].lower() in names and not OTHER_MASK.search(scan_name(path)):
            masks.append(path)
    if len(masks) > 1:
        raise ValueError(
            f"{scan}: {masks[0].name} and {masks[1].name} may both be its mask; move one away, or "
            "choose with --sequences"
        )
    return masks[0] if masks else None


def _without_flair(scan: Path) -> str:
    """Return the name of a scan in small letters, up to FLAIR: of x_FLAIR, x_seg is a mask."""
    return FLAIR_IN_NAME.sub("", scan_name(scan)).lower()


def mask_words(name: str) -> str:
    """Return the words by which a file is named as a mask, first or last; empty if it is not."""
    first, last = MASK_START.match(name), MASK_NAME.fullmatch(name)
    if first:
        return first[0].strip("-_. ")
    if last:
        return name[last.end("scan") :].strip("-_. ")
    return ""


def check_not_only_masks(folder: Path) -> None:
    """Raise ValueError, naming one, if there are masks in a folder that holds no case."""
    masks = volumes_in(folder, masks=True) if folder.is_dir() else []
    if masks:
        raise ValueError(f"{masks[0]}: is named as a mask; put its scan beside it, or rename it")


def say_lost_masks(folder: Path, volumes: Sequence[Path]) -> None:
    """Name on stderr what is left out as a mask, but of no volume file here: it may be a scan."""
    if not volumes:
        return
    starts = tuple(map(_without_flair, volumes))
    for path in volumes_in(folder, masks=True):
        name = scan_name(path).lower()
        match = MASK_NAME.fullmatch(name)
        if not match or name.startswith(starts) or (not match["scan"] and len(volumes) == 1):
            continue
        tqdm.write(f"{path}: is named as a mask, of no scan here; left out", file=sys.stderr)


# Contents


def read_grid(path: File) -> tuple[Grid, int]:
    """Read the grid and the channel count of a file or DICOM series; ValueError if unusable."""
    path = series_or_file(path)
    if isinstance(path, Series):
        return series_grid(path), 1
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    check_format(path)
    return READERS.get(suffix_of(path), ITK).grid(path)


def read_voxels(path: File) -> np.ndarray:
    """Read the voxels (X, Y, Z, C) of a file; ValueError, naming it, if they cannot be read."""
    path = series_or_file(path)
    if isinstance(path, Series):
        return read_series(path)[..., None]
    voxels = READERS.get(suffix_of(path), ITK).voxels(path)
    if voxels.dtype.kind == "c":
        raise ValueError(f"{path}: holds complex voxels; export their magnitude")
    check_finite(path, voxels)
    return voxels
