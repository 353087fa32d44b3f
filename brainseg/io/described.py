"""The cases of a data set that comes with a dataset.json, as of nnU-Net or the Decathlon.

nnU-Net (raw): `imagesTr/<case>_0000.nii.gz`, one file per channel; `channel_names` in dataset.json
says which is which (github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md). Decathlon:
`imagesTr/<case>.nii.gz`, one file of four axes; `modality` says which channel is which
(medicaldecathlon.com). In both, the mask is `labelsTr/<case>.nii.gz`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from .formats import mask_of, read_grid, scan_name, volumes_in
from .opening import Source
from .scans import Scan
from .sequences import SEQUENCES, sequence_of

DESCRIPTION = "dataset.json"
IMAGES = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesVal": "labelsVal"}
MOST_CHANNELS = 4  # channels of a scan
ALL = -1  # in place of the number of a channel
CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def described_sources(root: Path, chosen: tuple[int, ...]) -> list[Source] | None:
    """List the cases of the data set in `root`, or in its folder of images; None if it is none.

    The folder of the data set stands for its training cases. `chosen` are the channels that are
    pre-contrast, FLAIR and post-contrast, or FLAIR alone, if the user says so. Raises ValueError,
    naming the file or folder, if it is not known which channel is FLAIR.
    """
    folder = root
    if (root / "imagesTr").is_dir():
        folder = root / "imagesTr"
    if folder.name not in IMAGES:
        _check_no_channels(folder)
        return None
    masks = _masks_in(folder.with_name(IMAGES[folder.name]))
    files = _files_by_channel(folder, masks)
    description = folder.with_name(DESCRIPTION)
    channels = chosen
    if description.is_file() and not chosen:
        names = read_channel_names(description)
        channels = channels_of(names, description)
        _check_numbers(folder, files, max(names))
    elif not description.is_file():
        one_each = all(len(by_channel) == 1 for by_channel in files.values())
        if not files or (one_each and folder == root):
            return None
        if not one_each and not chosen:
            raise ValueError(
                f"{folder}: holds one file per channel, but no {DESCRIPTION} beside it says which "
                "is FLAIR; say with --channels which are pre-contrast, FLAIR and post-contrast"
            )
    _check_present(folder, files, channels)
    sources = []
    for name, by_channel in files.items():
        picked = ()
        paths = list(map(by_channel.get, channels))
        if ALL in by_channel:
            paths, picked = [by_channel[ALL]], channels
        elif not channels:
            paths = list(by_channel.values())  # the only one
        flair = paths[len(paths) // 2]
        opener = partial(_open, root, name, paths, masks.get(name))
        sources.append(Source(name, flair or root, opener, picked=picked))
    return sources


def _open(root: Path, name: str, files: Sequence[Path | None], mask: Path | None) -> Scan:
    if not files[len(files) // 2]:
        raise ValueError(f"{root}: {name} has no FLAIR; add its file")
    return Scan.open(name, files, mask)


def read_channel_names(description: Path) -> dict[int, str]:
    """Read the names of the channels from a dataset.json, by their number."""
    try:
        content = json.loads(description.read_text(encoding="utf-8-sig"))
        names = content.get("channel_names") or content.get("modality") or {}
        if isinstance(names, list):
            names = dict(enumerate(names))
        return {int(number): str(name) for number, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{description}: is not the description of a data set; write channel_names as in "
            '{"0": "FLAIR", "1": "T1"}'
        ) from error


def channels_of(names: Mapping[int, str], description: Path) -> tuple[int, ...]:
    """Return which of the channels are pre-contrast, FLAIR and post-contrast, by their names.

    FLAIR stands in for a missing one. Raises ValueError if none is FLAIR, or two are the same.
    """
    channels: dict[str, int] = {}
    for number, name in sorted(names.items()):
        sequence = sequence_of(name, math.nan, math.nan, "")
        if sequence not in SEQUENCES:
            continue
        if sequence in channels:
            raise ValueError(
                f"{description}: the channels {channels[sequence]} and {number} are both "
                f"{sequence}; choose with --channels"
            )
        channels[sequence] = number
    if "FLAIR" not in channels:
        listed = ", ".join(names.values()) or "none"
        raise ValueError(
            f"{description}: names no FLAIR among its channels ({listed}); correct it, or say "
            "with --channels which are pre-contrast, FLAIR and post-contrast"
        )
    return tuple(channels.get(name, channels["FLAIR"]) for name in SEQUENCES)


def _files_by_channel(folder: Path, masks: Mapping[str, Path]) -> dict[str, dict[int, Path]]:
    """Group the volume files of a folder by case and by the channel in their names, or ALL.

    A number at the end of a name is part of it if there is a mask of the whole name.
    """
    files: dict[str, dict[int, Path]] = {}
    for path in volumes_in(folder, masks=True):
        case, channel = scan_name(path), ALL
        numbered = CHANNEL.match(case)
        if numbered and case not in masks:
            case, channel = numbered["case"], int(numbered["channel"])
        by_channel = files.setdefault(case, {})
        if channel in by_channel:
            raise ValueError(_same_name(by_channel[channel], path))
        by_channel[channel] = path
    return files


def _check_no_channels(folder: Path) -> None:
    """Raise ValueError if files of a folder are numbered, and alike, as the channels of a scan.

    Such are up to four of one name, from 0000 on, of one channel each, on one grid, without masks.
    """
    files: dict[str, dict[int, Path]] = {}
    for path in volumes_in(folder):
        numbered = CHANNEL.match(scan_name(path))
        if numbered:
            files.setdefault(numbered["case"], {})[int(numbered["channel"])] = path
    for case, by_channel in sorted(files.items()):
        count = len(by_channel)
        are_counted = sorted(by_channel) == list(range(count)) and 1 < count <= MOST_CHANNELS
        if are_counted and _are_alike(list(by_channel.values())):
            raise ValueError(
                f"{folder}: {case}_0000 and {case}_0001 seem to be channels of one scan, as "
                "nnU-Net names them; name their folder imagesTs, and say with --channels which "
                "are pre-contrast, FLAIR and post-contrast. If they are cases, rename them "
                "(case_0001a)"
            )


def _are_alike(files: Sequence[Path]) -> bool:
    """Tell whether files have one channel each, one grid and no masks."""
    try:
        first, _ = read_grid(files[0])
        for path in files:
            grid, channels = read_grid(path)
            if channels > 1 or first.difference(grid) or mask_of(path):
                return False
    except (ValueError, OSError):  # whoever opens the case says what is wrong with it
        return False
    return True


def _check_numbers(folder: Path, files: Mapping[str, dict[int, Path]], last: int) -> None:
    """Raise ValueError if a file has a number after that of the last channel: it may be a case."""
    for by_channel in files.values():
        number = max(by_channel)
        if number > last:
            raise ValueError(
                f"{folder}: {by_channel[number].name} is of channel {number} by its name, but "
                f"{DESCRIPTION} has none of this number; name it there or, if the number is of a "
                "case, rename the files (case_0001a)"
            )


def _check_present(
    folder: Path, files: Mapping[str, dict[int, Path]], channels: Sequence[int]
) -> None:
    """Raise ValueError if no case has one of the channels; of a single case, it is missing."""
    present = set(chain.from_iterable(files.values()))
    for channel in channels:
        if ALL not in present and channel not in present:
            raise ValueError(
                f"{folder}: {min(files)} has no channel {channel:04d}, nor has any case; add the "
                "files, or choose others with --channels"
            )


def _masks_in(labels: Path) -> dict[str, Path]:
    """Return the path of the mask of each case in a folder; {} if the folder does not exist."""
    masks: dict[str, Path] = {}
    if not labels.is_dir():
        return masks
    for path in volumes_in(labels, masks=True):
        if masks.setdefault(scan_name(path), path) != path:
            raise ValueError(_same_name(masks[scan_name(path)], path))
    return masks


def _same_name(first: Path, other: Path) -> str:
    return f"{first} and {other.name} have the same case name; remove one"
