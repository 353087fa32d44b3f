"""The output of a segmented case, written and found again: masks, maps and pictures."""

import glob
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from .files import MARK, has_mark, name_in_errors, remove, scratch
from .labels import Labels
from .pictures import outline_in_palette, save_gif, save_png, to_grey
from .scans import Scan
from .slices import Case, read_slices

KINDS = ("mask", "probability", "disagreement")  # of maps


def map_files(case: Case, kind: str) -> list[Path]:
    """List the files of a kind of map: mask, probability or disagreement."""
    if isinstance(case, Scan):
        return [Path(f"{case.name}_{kind}.nii.gz")]
    return [Path(case.name, f"{case.name}_{number}_{kind}.tif") for number in case.numbers]


def picture_files(case: Case) -> list[Path]:
    """List the files of the outlined slices."""
    return [Path(case.name, f"{case.name}_{number}.png") for number in case.numbers]


def seg_file(case: Case) -> Path:
    """Name the DICOM Segmentation of a case in a folder of predictions."""
    return Path(f"{case.name}_seg.dcm")


def outputs_of(case: Case) -> list[Path]:
    """List every file that a run may write or replace for a case, in a folder of predictions."""
    files = [seg_file(case), Path(f"{case.name}.gif"), *picture_files(case)]
    for kind in KINDS:
        files += map_files(case, kind)
    return files


def read_mask_of_run(
    folder: Path, case: Case, run: str, others: Sequence[Path] = ()
) -> np.ndarray | None:
    """Read a case's mask (S, H, W); None if it or one of `others` is missing, or not by `run`."""
    paths = list(map(folder.joinpath, map_files(case, "mask")))
    if not all(map(Path.is_file, paths + list(map(folder.joinpath, others)))):
        return None
    mark = mark_of(run)
    if not all(has_mark(path, mark) for path in paths):
        return None
    try:
        if isinstance(case, Scan):
            return replace(case, masks=tuple(paths), labels=Labels()).read_mask()
        return read_slices(paths)[..., 0] > 0
    except (ValueError, FileNotFoundError):  # damaged, or of several sizes: make it again
        return None


def mark_of(run: str) -> str:
    """Return the text that says in a file which weights and settings made it."""
    return f"{MARK} {run}".strip()


def write_case(
    folder: Path,
    case: Case,
    volume: np.ndarray,
    mask: np.ndarray,
    truth: np.ndarray | None,
    maps: Mapping[str, np.ndarray] | None = None,
    run: str = "",
    with_pictures: bool = True,
) -> list[Path]:
    """Write masks and maps, then outlined slices and the GIF, atomically; list them, in `folder`.

    Earlier results of the case are removed. `volume` is (S, H, W, C), masks are (S, H, W) bool,
    `maps` (S, H, W) float32 by kind (see `map_files`). `run` is noted in every mask.
    """
    mark = mark_of(run)
    remove_earlier(folder, case)
    files = []
    with name_in_errors(folder / case.name), scratch(folder) as temporary:
        for kind, values in {"mask": mask, **(maps or {})}.items():
            paths = map_files(case, kind)
            if isinstance(case, Scan):
                case.write_map(folder / paths[0], values, mark)
            else:
                save_slices(temporary, paths, values, mark)
                move(temporary, paths, folder)
            files += paths
        if with_pictures:
            pictures = outline_in_palette(to_grey(volume), mask, truth, side=256)
            gif = Path(f"{case.name}.gif")
            save_gif(folder / gif, pictures)
            paths = picture_files(case)
            for path, picture in zip(paths, pictures, strict=True):
                save_png(temporary / path.name, picture)
            move(temporary, paths, folder)
            files += [gif, *paths]
    return files


def save_slices(folder: Path, paths: Sequence[Path], values: np.ndarray, mark: str) -> None:
    """Write a map (S, H, W), or a bool mask as 0 and 255, as one TIFF a slice, by their names."""
    if values.dtype == bool:
        values = values * np.uint8(255)
    for path, image in zip(paths, values, strict=True):
        save_tiff(folder / path.name, image, mark)


def save_tiff(path: Path, image: np.ndarray, mark: str, **options: Any) -> None:
    """Write an image as a TIFF with our mark; OSError if the disk is full."""
    # NumPy would write the file for tifffile, in C, and lose an error with the last bytes.
    content = io.BytesIO()
    tifffile.imwrite(content, image, software=mark, **options)
    path.write_bytes(content.getbuffer())


def move(temporary: Path, paths: Sequence[Path], folder: Path) -> None:
    """Move finished files of a case to their places in `folder`."""
    (folder / paths[0]).parent.mkdir(exist_ok=True)
    for path in paths:
        (temporary / path.name).replace(folder / path)


def earlier_files(folder: Path, case: Case) -> list[Path]:
    """List the files that earlier runs may have written of a case, and of others of its name."""
    kinds = "|".join(KINDS)
    of_a_slice = re.compile(rf"{re.escape(case.name)}_\d+(\.png|_({kinds})\.tif)")
    paths = [folder / seg_file(case), folder / f"{case.name}.gif"]
    for kind in KINDS:
        paths.append(folder / f"{case.name}_{kind}.nii.gz")
    for path in folder.glob(f"{glob.escape(case.name)}/*"):
        if of_a_slice.fullmatch(path.name):
            paths.append(path)
    return paths


def remove_earlier(folder: Path, case: Case) -> None:
    """Remove earlier files of a case, pictures of an earlier mask too; its masks are replaced."""
    masks = map_files(case, "mask")
    for path in earlier_files(folder, case):
        if path.relative_to(folder) not in masks and has_mark(path):
            remove(path)
