"""The table metrics.csv: the scores of each case that has a true mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..io.files import RUN, read_rows
from ..io.slices import Case
from ..metrics import describe, describe_distances, score
from ..splits import patient_named


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
        patients = [row["patient"] for row in unseen]
        lines.append(describe([row["dsc"] for row in unseen], patients))
        lines.append(describe_distances(unseen, hd95))
    return "\n".join(lines)


def read_scores(path: Path, names: Iterable[str]) -> dict[str, dict]:
    """Read `patient`, `trained_on` (bool), RUN and `names` (float) of each case in a metrics.csv.

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
            patient = line.get("patient") or patient_named(line["case"])
            row = {"patient": patient, "trained_on": seen, RUN: line.get(RUN, "")}
            row |= {name: float(line[name]) for name in names}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: its line of {line['case']} is damaged; run inference.py again"
            ) from error
        scores[line["case"]] = row
    return scores
