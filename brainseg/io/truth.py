"""Find the true mask of a scan among the files beside it, by their names."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .formats import is_scan, scan_name

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


def volumes_in(folder: Path, masks: bool = False) -> list[Path]:
    """List the volume files of a folder, with or without those that are named as masks."""
    volumes = []
    for path in sorted(folder.iterdir()):
        is_volume = path.is_file() and is_scan(path)
        if is_volume and (masks or not MASK_NAME.fullmatch(scan_name(path))):
            volumes.append(path)
    return volumes


def mask_of(scan: Path) -> Path | None:
    """Find the mask beside a scan, in any format: <scan>_mask, <scan>-seg or alike.

    Beside the only scan of a folder, Segmentation or alike is one too. Raises ValueError, naming
    both, if there are two.
    """
    beside = volumes_in(scan.parent, masks=True)
    scans = [path for path in beside if not MASK_NAME.fullmatch(scan_name(path))]
    names = [scan_name(scan)]
    if scans == [scan]:
        names.append("")
    found = []
    for path in beside:
        if any(_may_be_mask(scan_name(path), name) for name in names):
            found.append(path)
    if len(found) > 1:
        raise ValueError(
            f"{scan}: {found[0].name} and {found[1].name} may both be its mask; move one away, or "
            "choose with --sequences"
        )
    return found[0] if found else None


def mask_words(name: str) -> str:
    """Return the words by which a file is named as a mask, first or last; empty if it is not."""
    first, last = MASK_START.match(name), MASK_NAME.fullmatch(name)
    words = first[0] if first else name[last.end("scan") :] if last else ""
    return words.strip("-_. ")


def _may_be_mask(mask: str, scan: str) -> bool:
    """Tell whether a mask is one of this scan, by their names: x_seg of x, or of x_FLAIR."""
    match = MASK_NAME.fullmatch(mask)
    names = {scan.lower(), FLAIR_IN_NAME.sub("", scan).lower()}
    return bool(match) and not OTHER_MASK.search(mask) and match["scan"].lower() in names


def check_not_only_masks(folder: Path) -> None:
    """Raise ValueError, naming one, if there are masks in a folder that holds no case."""
    masks = volumes_in(folder, masks=True) if folder.is_dir() else ()
    if masks:
        raise ValueError(f"{masks[0]}: is named as a mask; put its scan beside it, or rename it")


def say_lost_masks(folder: Path, volumes: Sequence[Path]) -> None:
    """Name on stderr what is left out as a mask, but of no volume file here: it may be a scan."""
    starts = tuple(FLAIR_IN_NAME.sub("", scan_name(path)).lower() for path in volumes)
    for path in volumes_in(folder, masks=True) if volumes else ():
        name = scan_name(path).lower()
        match = MASK_NAME.fullmatch(name)
        if not match or name.startswith(starts) or (not match["scan"] and len(volumes) == 1):
            continue
        tqdm.write(f"{path}: is named as a mask, of no scan here; left out", file=sys.stderr)
