"""Heads without a lesion, written as cases with empty masks: a network learns to leave them empty.

There are two kinds: real scans of people without a tumour, and real cases in which each slice with
lesion is made of its healthy half and the mirror image of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK

from brainseg.io.files import MARK, scratch
from brainseg.io.layouts import find_cases
from brainseg.io.predictions import save_tiff
from brainseg.io.slices import Case

ONE_SIDE = 0.98  # of the lesion's pixels in a slice, for the other half to be healthy
LEAST_SLICES = 8


def without_lesion(volume: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Mirror the healthy half of each slice with lesion: (S, H, W, C); None if too little is left.

    `volume` (S, H, W, C), `mask` (S, H, W) bool. The midline is that of the whole head.
    """
    columns = np.flatnonzero((volume.max(axis=(0, 1, 3))) > 0.1 * np.percentile(volume, 99.9))
    left, right = columns[0], columns[-1] + 1
    middle = (left + right) // 2
    half = min(middle - left, right - middle)
    slices = []
    for image, lesion in zip(volume, mask, strict=True):
        on_left, everywhere = lesion[:, :middle].sum(), lesion.sum()
        image = image.copy()
        if everywhere:
            share = on_left / everywhere
            if max(share, 1 - share) < ONE_SIDE:
                continue
            healthy = image[:, middle - half : middle + half]
            if share > 0.5:
                healthy[:, :half] = healthy[:, half:][:, ::-1]
            else:
                healthy[:, half:] = healthy[:, :half][:, ::-1]
        slices.append(image)
    return np.stack(slices) if len(slices) >= LEAST_SLICES else None


def write_mirrored(cases: Sequence[Case], folder: Path) -> None:
    """Write each published case without its lesion as `<case>_mirrored`, if enough slices can be.

    What is there already is left as it is.
    """
    for case in cases:
        name = f"{case.name}_mirrored"
        if (folder / name).exists():
            continue
        healthy = without_lesion(*case.read_pair())
        if healthy is None:
            continue
        with new_case(folder, name) as new:
            for k, image in enumerate(healthy, start=1):
                save_tiff(new / f"{name}_{k}.tif", image, MARK, photometric="rgb")
                empty = np.zeros(image.shape[:2], np.uint8)
                save_tiff(new / f"{name}_{k}_mask.tif", empty, MARK)


def link_scans(scans: Path, folder: Path, held_back: Sequence[str]) -> None:
    """Link the scans of people without a tumour, and put an empty mask beside each.

    Cases whose name begins as one of `held_back` are left out, so that something can be chosen. The
    name of the folder goes before theirs: a patient01 is in many cohorts.
    """
    for case in find_cases(scans):
        name = f"{scans.resolve().name}_{case.name}"
        if case.name.startswith(tuple(held_back)) or (folder / name).exists():
            continue
        with new_case(folder, name) as new:
            for path in set(case.files):
                (new / path.name).symlink_to(path.resolve())
            empty = SimpleITK.ReadImage(str(case.folder)) * 0  # the FLAIR file
            mask = SimpleITK.Cast(empty, SimpleITK.sitkUInt8)
            SimpleITK.WriteImage(mask, str(new / "mask.nii.gz"))


@contextmanager
def new_case(folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder that becomes the case `name` once it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with scratch(folder) as temporary:
        new = temporary / name
        new.mkdir()
        yield new
        new.rename(folder / name)
