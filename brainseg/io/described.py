"""The cases of a data set that comes with a dataset.json, as of nnU-Net or the Decathlon.

nnU-Net (raw): `imagesTr/<case>_0000.nii.gz`, one file per channel; `channel_names` in dataset.json
says which is which (github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md). Decathlon:
`imagesTr/<case>.nii.gz`, one file of four axes; `modality` says which channel is which
(medicaldecathlon.com). In both, the mask is `labelsTr/<case>.nii.gz`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from .formats import is_scan, scan_name
from .sequences import SEQUENCES, sequence_of

DESCRIPTION = "dataset.json"
IMAGES = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesVal": "labelsVal"}
ALL = -1  # in place of the number of a channel
CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class DescribedCase:
    """The files of a case: one per sequence in the order of SEQUENCES, None if it is missing.

    Or one file that holds all of them; `channels` then says which of its channels are used.
    """

    name: str
    files: tuple[Path | None, ...]
    channels: tuple[int, ...]
    mask: Path | None


def described_cases(root: Path, chosen: tuple[int, ...] = ()) -> list[DescribedCase] | None:
    """List the cases of the data set in `root`, or in its folder of images; None if it is none.

    The folder of the data set stands for its training cases. `chosen` are the channels that are
    pre-contrast, FLAIR and post-contrast, or FLAIR alone, if the user says so. Raises ValueError,
    naming the file or folder, if it is not known which channel is FLAIR.
    """
    folder = root
    description = root.parent / DESCRIPTION
    if (root / DESCRIPTION).is_file() and (root / "imagesTr").is_dir():
        folder = root / "imagesTr"
        description = root / DESCRIPTION
    if folder.name not in IMAGES:
        return None
    files = _files_by_channel(folder)
    if not description.is_file():
        if not any(len(by_channel) > 1 for by_channel in files.values()):
            return None
        if not chosen:
            raise ValueError(
                f"{folder}: holds one file per channel, but no {DESCRIPTION} beside it says which "
                "is FLAIR; say with --channels which are pre-contrast, FLAIR and post-contrast"
            )
    channels = chosen or read_channels(description)
    labels = folder.with_name(IMAGES[folder.name])
    cases = []
    for name, by_channel in files.items():
        mask = _mask_in(labels, name)
        if ALL in by_channel:
            cases.append(DescribedCase(name, (by_channel[ALL],), channels, mask))
            continue
        paths = [by_channel.get(channel) for channel in channels]
        if None in paths:
            missing = channels[paths.index(None)]
            raise ValueError(
                f"{folder}: {name} has no channel {missing:04d}; add the file, or choose others "
                "with --channels"
            )
        flair = paths[len(paths) // 2]
        sequences = tuple(None if path == flair else path for path in paths)
        if len(paths) == 3:
            cases.append(DescribedCase(name, (sequences[0], flair, sequences[2]), (), mask))
        else:
            cases.append(DescribedCase(name, (flair,), (), mask))
    return cases


def read_channels(description: Path) -> tuple[int, ...]:
    """Read which channels are pre-contrast, FLAIR and post-contrast from a dataset.json.

    FLAIR stands in for a missing one.
    """
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        names = content.get("channel_names") or content.get("modality") or {}
        if isinstance(names, list):
            names = dict(enumerate(names))
        named = {int(number): str(name) for number, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{description}: is not the description of a data set; write channel_names as in "
            '{"0": "FLAIR", "1": "T1"}'
        ) from error
    channels: dict[str, int] = {}
    for number, name in sorted(named.items()):
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
        listed = ", ".join(named.values()) or "none"
        raise ValueError(
            f"{description}: names no FLAIR among its channels ({listed}); correct it, or say "
            "with --channels which are pre-contrast, FLAIR and post-contrast"
        )
    return tuple(channels.get(name, channels["FLAIR"]) for name in SEQUENCES)


def _files_by_channel(folder: Path) -> dict[str, dict[int, Path]]:
    """Group the volume files of a folder by case and by the channel in their names, or ALL."""
    files: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or not is_scan(path):
            continue
        name = scan_name(path)
        numbered = CHANNEL.match(name)
        if numbered:
            files.setdefault(numbered["case"], {})[int(numbered["channel"])] = path
        else:
            files.setdefault(name, {})[ALL] = path
    return files


def _mask_in(labels: Path, name: str) -> Path | None:
    if not labels.is_dir():
        return None
    for path in sorted(labels.iterdir()):
        if is_scan(path) and scan_name(path) == name:
            return path
    return None
