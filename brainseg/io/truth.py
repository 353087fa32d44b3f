"""Find the true mask of a scan among the files beside it, by their names."""

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
