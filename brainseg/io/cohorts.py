"""Find the files of a case by the names that known cohorts use: a table of layouts.

A pattern names a file, with or without its suffix, below the folder of its case; capitals do not
matter in the name. `{root}` is the folder that holds the cases, `{case}` the path of the case's
folder below it and `{name}` the last part of that path.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .formats import is_scan, scan_name
from .truth import OTHER_MASK

Patterns = tuple[str, ...]  # the first that matches any file is used


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
        """Find the matching files of a case, by sequence; each file counts once.

        The mask and the contrast-enhanced T1 have narrower patterns, so they come first.
        """
        found: dict[str, list[Path]] = {}
        for role in ("mask", "post", "flair", "pre"):
            taken = [path for paths in found.values() for path in paths]
            fitting = (_fitting(pattern, folder, root) for pattern in getattr(self, role))
            left = ([path for path in paths if path not in taken] for paths in fitting)
            if role == "mask" and not self.of_user:
                left = ([p for p in paths if not OTHER_MASK.search(p.name)] for paths in left)
            found[role] = next(filter(None, left), [])
        return found


def _brain_lesion(*places: str) -> Patterns:
    """List patterns of lesion masks in BIDS derivatives; OTHER_MASK rules out brain and tissues."""
    names = ("*lesion*", "*tumo*r*", "*_roi")  # *_mask may be of anything
    return tuple(f"{{root}}/derivatives/{place}/{name}" for name in names for place in places)


# fmt: off
BIDS = Layout("BIDS", ("anat/*_FLAIR",), ("anat/*_T1w",), ("anat/*_ce-*_T1w",),
              _brain_lesion("*/{case}/anat", "*/{case}", "{case}/anat", "{case}"))
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
    """Return the layout that `--sequences flair=PATTERN pre=... post=... mask=...` describes.

    None stays None. Raises ValueError if an item is not such a pair or FLAIR is missing.
    """
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


def sequences_in(
    folder: Path, root: Path, layout: Layout | None = None
) -> dict[str, Path | None] | None:
    """Find the file of each sequence of a case and of its mask, None for those that are missing.

    Without a `layout`, uses the one in LAYOUTS that finds the most; None if no FLAIR is found.
    Raises ValueError, naming the files, if two match one sequence or a given layout finds no FLAIR.
    """
    tried = [(chosen, chosen.files(folder, root)) for chosen in ([layout] if layout else LAYOUTS)]
    chosen, files = max(tried, key=lambda item: sum(map(bool, item[1].values())))
    if not layout and not files["flair"]:
        return None
    for role in ROLES:
        patterns = getattr(chosen, role)
        shown = f"{role}={patterns[0]}" if patterns else role
        if not files[role] and role == "flair":
            remedy = "change --sequences" if chosen.of_user else "name it with --sequences"
            raise ValueError(f"{folder}: no file matches {shown} ({chosen.name}); {remedy}")
        if len(files[role]) > 1:
            first, second = (_below(path, folder) for path in files[role][:2])
            raise ValueError(
                f"{folder}: {first} and {second} both match {shown} ({chosen.name}); choose one "
                "with --sequences"
            )
    return {role: paths[0] if paths else None for role, paths in files.items()}


def absolute(path: Path) -> Path:
    """Return the absolute path; links, whose names may say more than their targets', stay."""
    return Path(os.path.abspath(path))


def _fitting(pattern: str, folder: Path, root: Path) -> list[Path]:
    """List the volume files and DICOM folders that match a pattern, in order."""
    places = {"root": absolute(root), "case": folder.relative_to(root), "name": folder.name}
    for name, place in places.items():
        pattern = pattern.replace(f"{{{name}}}", glob.escape(str(place)))
    where, _, wanted = pattern.rpartition("/")
    found = []
    for directory in sorted(glob.glob(str(Path(glob.escape(str(folder)), where)))):
        for path in sorted(Path(directory).iterdir()) if Path(directory).is_dir() else ():
            names = {path.name.lower(), scan_name(path).lower()}
            fits = any(fnmatch(name, wanted.lower()) for name in names)
            if fits and path.name[0] != "." and is_scan(path):
                found.append(path)
    return found


def _below(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path
