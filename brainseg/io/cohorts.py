"""Find the files of a case by the names that known cohorts use: a table of layouts.

A pattern names a file, with or without its suffix, below the folder of its case; capitals do not
matter in the name. `{root}` is the folder that holds the cases, `{case}` the path of the case's
folder below it and `{name}` the last part of that path.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from .formats import is_scan, scan_name
from .truth import OTHER_MASK

Patterns = tuple[str, ...]  # the first that matches any file is used


class Sequences(NamedTuple):
    """The files of a case; None for those that are missing."""

    flair: Path
    pre: Path | None
    post: Path | None
    mask: Path | None


@dataclass(frozen=True)
class Layout:
    """The patterns of each sequence and of the mask; what they do not find is missing."""

    name: str
    flair: Patterns
    pre: Patterns = ()
    post: Patterns = ()
    mask: Patterns = ()
    of_user: bool = False

    def files(self, folder: Path, root: Path) -> dict[str, list[Path]]:
        """Find a case's matching files by sequence, each once; the narrower patterns come first."""
        files: dict[str, list[Path]] = {}
        taken: set[Path] = set()
        for role in ("mask", "post", "flair", "pre"):
            files[role] = []
            for pattern in getattr(self, role):
                for path in _fitting(pattern, folder, root):
                    is_other = role == "mask" and not self.of_user and OTHER_MASK.search(path.name)
                    if path not in taken and not is_other:
                        files[role].append(path)
                if files[role]:
                    break
            taken.update(files[role])
        return files

    def fits(self, folder: Path, root: Path) -> bool:
        """Tell whether a folder holds a sequence of a case."""
        files = self.files(folder, root)
        return any(files[role] for role in ("flair", "pre", "post"))

    def one_of_each(self, folder: Path, matching: dict[str, list[Path]]) -> Sequences:
        """Return the one match of each pattern; ValueError if there are two, or none of FLAIR."""
        files: dict[str, Path | None] = {}
        for role in ROLES:
            paths, patterns = matching[role], getattr(self, role)
            shown = f"{role}={patterns[0]}" if patterns else role
            if not paths and role == "flair":
                remedy = "change --sequences" if self.of_user else "name it with --sequences"
                raise ValueError(f"{folder}: no file matches {shown} ({self.name}); {remedy}")
            if len(paths) > 1:
                first, second = _below(paths[0], folder), _below(paths[1], folder)
                raise ValueError(
                    f"{folder}: {first} and {second} both match {shown} ({self.name}); choose one "
                    "with --sequences"
                )
            files[role] = paths[0] if paths else None
        assert files["flair"] is not None
        return Sequences(files["flair"], files["pre"], files["post"], files["mask"])


# Of lesion masks in BIDS derivatives; OTHER_MASK rules out brain and tissues. *_mask may be of any.
LESION_MASKS = []
for name in ("*lesion*", "*tumo*r*", "*_roi"):
    for place in ("*/{case}/anat", "*/{case}", "{case}/anat", "{case}"):
        LESION_MASKS.append(f"{{root}}/derivatives/{place}/{name}")

# fmt: off
BIDS = Layout("BIDS", ("anat/*_FLAIR",), ("anat/*_T1w",), ("anat/*_ce-*_T1w",),
              tuple(LESION_MASKS))
LAYOUTS = (
    #      cohort            FLAIR          pre-contrast  post-contrast  mask
    Layout("BraTS 2023",     ("*-t2f",),    ("*-t1n",),   ("*-t1c",),    ("*-seg",)),
    Layout("BraTS to 2021",  ("*_flair",),  ("*_t1",),    ("*_t1ce",),   ("*_seg",)),
    Layout("UCSF-PDGM",      ("*_FLAIR",),  ("*_T1",),    ("*_T1c",),    ("*_tumor_segmentation",)),
    Layout("UPENN-GBM",      ("*_FLAIR",),  ("*_T1",),    ("*_T1GD",),
           ("*_segm", "{root}/../images_segm/{name}_segm")),
    Layout("plain names",    ("flair",),     ("t1", "t1w", "t1n", "pre", "t1_pre", "t1pre"),
           ("t1ce", "t1c", "t1gd", "post", "t1_post", "t1post", "ce-t1", "t1-ce"),
           ("mask", "seg", "lesion", "segmentation", "label")),
)
# fmt: on
ROLES = ("flair", "pre", "post", "mask")


def parse_sequences(texts: Sequence[str] | None) -> Layout | None:
    """Return the layout that the texts of --sequences describe; ValueError if they are bad."""
    if texts is None:
        return None
    patterns = {}
    for text in texts:
        role, _, pattern = text.partition("=")
        if role not in ROLES or not pattern or role in patterns:
            raise ValueError(
                f"--sequences {text}: give each of {', '.join(ROLES)} at most once, as in "
                "flair='*_flair.nii.gz'"
            )
        patterns[role] = (pattern,)
    if "flair" not in patterns:
        raise ValueError("--sequences: flair is missing; it is the sequence the lesion is seen on")
    return Layout("--sequences", **patterns, of_user=True)


def sequences_in(folder: Path, root: Path) -> Sequences | None:
    """Find a case's files by the layout in LAYOUTS that finds the most; None without FLAIR."""
    matching = [layout.files(folder, root) for layout in LAYOUTS]
    counts = [sum(map(bool, files.values())) for files in matching]
    most = counts.index(max(counts))
    if not matching[most]["flair"]:
        return None
    return LAYOUTS[most].one_of_each(folder, matching[most])


def absolute(path: Path) -> Path:
    """Return the absolute path; links, whose names may say more than their targets', stay."""
    return Path(os.path.abspath(path))


def _fitting(pattern: str, folder: Path, root: Path) -> list[Path]:
    """List the volume files and DICOM folders that match a pattern, in order."""
    places = {"root": absolute(root), "case": folder.relative_to(root), "name": folder.name}
    for name, place in places.items():
        pattern = pattern.replace(f"{{{name}}}", glob.escape(str(place)))
    where, _, wanted = pattern.rpartition("/")
    wanted = wanted.lower()
    fitting = []
    directories = glob.glob(str(Path(glob.escape(str(folder)), where)))
    for directory in filter(Path.is_dir, map(Path, sorted(directories))):
        for path in sorted(directory.iterdir()):
            fits = fnmatch(path.name.lower(), wanted) or fnmatch(scan_name(path).lower(), wanted)
            if fits and path.name[0] != "." and is_scan(path):
                fitting.append(path)
    return fitting


def _below(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path
