"""The output of a segmented case, written and found again: masks, pictures, a row of scores."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..metrics import describe, describe_distances, score
from ..splits import patient_of
from .files import MARK, RUN, has_mark, name_in_errors, read_rows, remove, scratch
from .labels import Labels
from .pictures import outline, save_gif, save_png, to_grey
from .scans import Scan
from .slices import Case, read_slices, save_tiff

KINDS = ("mask", "probability", "disagreement")  # of maps


def map_files(case: Case, kind: str) -> list[Path]:
    """List the files of a kind of map: mask, probability or disagreement."""
    if isinstance(case, Scan):
        return [Path(f"{case.name}_{kind}.nii.gz")]
    return [Path(case.name, f"{case.name}_{number}_{kind}.tif") for number in case.numbers]


def seg_file(case: Case) -> Path:
    """Name the DICOM Segmentation of a case in a folder of predictions."""
    return Path(f"{case.name}_seg.dcm")


def outputs_of(case: Case) -> list[Path]:
    """List every file that a run may write or replace for a case, in a folder of predictions."""
    files = [seg_file(case), Path(f"{case.name}.gif")]
    for kind in KINDS:
        files += map_files(case, kind)
    files += [Path(case.name, f"{case.name}_{number}.png") for number in case.numbers]
    return files


def check_kept(folder: Path, rows: Mapping[str, dict], names: Iterable[str], run: str) -> None:
    """Raise ValueError if `rows` of volumes.csv say that another run made the masks of `names`.

    `run` is that of the weights and settings in use (`Segmenter.run`).
    """
    others = [name for name in names if rows.get(name, {}).get(RUN) not in (None, "", run)]
    if others:
        same_weights = rows[others[0]][RUN].partition("-")[0] == run.partition("-")[0]
        what = "other settings" if same_weights else "other weights"
        raise ValueError(
            f"{folder}: {len(others)} of the masks there were made with {what} ({others[0]}); "
            "leave out --skip-existing, or name another folder with --predictions"
        )


def find_masks(
    folder: Path, case: Case, run: str, others: Sequence[Path] = ()
) -> np.ndarray | None:
    """Read the mask (S, H, W) of a case, or None if it is not whole or not made by `run`.

    Also None if one of the `others`, files in `folder` that are wanted beside it, is missing.
    """
    paths = [folder / file for file in map_files(case, "mask")]
    if not all(path.is_file() for path in [*paths, *(folder / file for file in others)]):
        return None
    if not all(has_mark(path, mark_of(run)) for path in paths):
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
) -> None:
    """Write masks, outlined slices, the GIF and maps, each atomically.

    What belongs to an earlier mask of the case is removed; other files stay. `volume` is
    (S, H, W, C), `mask` and `truth` are (S, H, W), bool. `maps`, (S, H, W) float32 by kind (see
    `map_files`), become float32 files on the source's grid. `run` is noted in every mask.
    """
    maps = maps or {}
    mark = mark_of(run)
    remove_earlier(folder, case)
    pictures = outline(to_grey(volume), mask, truth, side=256)
    save_gif(folder / f"{case.name}.gif", pictures)
    target = folder / case.name
    with name_in_errors(target), scratch(folder) as temporary:
        for number, picture in zip(case.numbers, pictures, strict=True):
            save_png(temporary / f"{case.name}_{number}.png", picture)
        if not isinstance(case, Scan):
            for kind, values in {**maps, "mask": mask * np.uint8(255)}.items():
                for file, slice_values in zip(map_files(case, kind), values, strict=True):
                    save_tiff(temporary / file.name, slice_values, mark)
        target.mkdir(exist_ok=True)
        for path in sorted(temporary.glob(f"{glob.escape(case.name)}_*")):
            path.replace(target / path.name)
    if isinstance(case, Scan):
        for kind, values in {**maps, "mask": mask}.items():
            case.write_map(folder / map_files(case, kind)[0], values, mark)


def remove_earlier(folder: Path, case: Case) -> None:
    """Remove our files of an earlier mask of a case that a new mask and its pictures leave there.

    Maps and a DICOM Segmentation, and slices that the case no longer has: it may have been another
    scan of that name.
    """
    replaced = {folder / file for file in map_files(case, "mask")}
    replaced |= {folder / case.name / f"{case.name}_{number}.png" for number in case.numbers}
    name = re.escape(case.name)
    file_of_a_slice = re.compile(rf"{name}_\d+(\.png|_({'|'.join(KINDS)})\.tif)")
    paths = [folder / seg_file(case)]
    paths += [folder / f"{case.name}_{kind}.nii.gz" for kind in KINDS]
    paths += [
        path
        for path in folder.glob(f"{glob.escape(case.name)}/*")
        if file_of_a_slice.fullmatch(path.name)
    ]
    for path in paths:
        if path not in replaced and has_mark(path):
            remove(path)


def table_row(case: Case, mask: np.ndarray, truth: np.ndarray) -> dict:
    """Make the row of the table: sizes in voxels, and in millilitres if the spacing is known."""
    sizes = {"lesion": int(truth.sum()), "predicted": int(mask.sum())}
    row = {"case": case.name, "slices": len(truth)}
    row |= {f"{name}_voxels": voxels for name, voxels in sizes.items()}
    if case.spacing:
        voxel = math.prod(case.spacing)  # mm^3
        row |= {f"{name}_ml": voxels * voxel / 1000 for name, voxels in sizes.items()}
    return row | score(mask, truth, case.spacing)


def scores_text(rows: Sequence[dict]) -> str:
    """Format the rows of metrics.csv as a table, with a summary of patients not trained on."""
    width = max(len(row["case"]) for row in rows) + 2
    hd95 = "hd95_mm" if all("hd95_mm" in row for row in rows) else "hd95_px"
    lines = [
        f"{'case':{width}}slices   lesion  predicted    DSC    IoU  precision  recall  "
        f"HD95 {hd95[-2:]}"
    ]
    lines += [
        f"{row['case']:{width}}{row['slices']:6d} {row['lesion_voxels']:8d} "
        f"{row['predicted_voxels']:10d} {row['dsc']:6.3f} {row['iou']:6.3f} "
        f"{row['precision']:10.3f} {row['recall']:7.3f} {row[hd95]:8.1f}"
        f"{'  *' if row['trained_on'] else ''}"
        for row in rows
    ]
    unseen = [row for row in rows if not row["trained_on"]]
    if len(unseen) < len(rows):
        lines.append("* of a patient that the weights were trained on: not counted below")
    if unseen:
        patients = [patient_of(row["case"]) for row in unseen]
        lines.append(describe([row["dsc"] for row in unseen], patients))
        lines.append(describe_distances(unseen, hd95))
    return "\n".join(lines)


def read_scores(path: Path, names: Iterable[str]) -> dict[str, dict]:
    """Read `trained_on` (bool), RUN and `names` (float) by case from a metrics.csv of inference.py.

    Raises OSError or ValueError, naming the file, if it is not such a file or lacks a column.
    """
    wrong = f"{path}: is not a metrics.csv that inference.py wrote; run it to make one"
    lines = read_rows(path, {"case", "trained_on"}, wrong)
    if not lines:
        raise ValueError(wrong)
    if lacking := [name for name in names if name not in lines[0]]:
        raise ValueError(f"{path}: has no column {lacking[0]}; run inference.py again to make it")
    scores = {}
    for line in lines:
        if line["case"] in scores:
            raise ValueError(f"{path}: scores {line['case']} twice; keep one row per case")
        try:
            seen = {"0": False, "1": True}[line["trained_on"]]
            row = {"trained_on": seen, RUN: line.get(RUN, "")}
            row |= {name: float(line[name]) for name in names}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: its line of {line['case']} is damaged; run inference.py again"
            ) from error
        scores[line["case"]] = row
    return scores
