"""The table metrics.csv: the scores of each case that has a true mask."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ..io.files import RUN, read_rows
from ..io.slices import Case
from ..metrics import count_missed, score, summarise, values_of
from ..patients import patient_named


def table_row(case: Case, mask: np.ndarray, truth: np.ndarray) -> dict:
    """Make the row of the table: sizes in voxels, and in millilitres if the spacing is known."""
    row = {
        "case": case.name,
        "slices": len(truth),
        "lesion_voxels": int(truth.sum()),
        "predicted_voxels": int(mask.sum()),
    }
    if case.spacing:
        voxel = math.prod(case.spacing)  # mm^3
        row["lesion_ml"] = row["lesion_voxels"] * voxel / 1000
        row["predicted_ml"] = row["predicted_voxels"] * voxel / 1000
    return row | score(mask, truth, case.spacing)


def scores_text(rows: Sequence[dict]) -> str:
    """Format the rows of metrics.csv as a table, with a summary of patients not trained on."""
    width = max(len("case"), *(len(row["case"]) for row in rows)) + 2
    hd95 = "hd95_mm" if all("hd95_mm" in row for row in rows) else "hd95_px"
    lines = [
        f"{'case':{width}}slices   lesion  predicted    DSC    IoU  precision  recall  "
        f"HD95 {hd95[-2:]}"
    ]
    for row in rows:
        line = (
            f"{row['case']:{width}}{row['slices']:6d} {row['lesion_voxels']:8d} "
            f"{row['predicted_voxels']:10d} {row['dsc']:6.3f} {row['iou']:6.3f} "
            f"{row['precision']:10.3f} {row['recall']:7.3f} {row[hd95]:8.1f}"
        )
        if row["trained_on"]:
            line += "  *"
        lines.append(line)
    unseen = [row for row in rows if not row["trained_on"]]
    if len(unseen) < len(rows):
        lines.append("* of a patient that the weights were trained on: not counted below")
    if unseen:
        lines += [dsc_text(unseen), distance_text(unseen, hd95)]
    return "\n".join(lines)


def dsc_text(rows: Sequence[dict]) -> str:
    """Format mean, median and n of the DSCs, with the interval, or the range of few patients."""
    summary = summarise(values_of(rows, "dsc"), values_of(rows, "patient"))
    text = f"DSC mean {summary['mean']:.3f}"
    if "low" in summary:
        text += f" (95 % interval {summary['low']:.3f} to {summary['high']:.3f})"
    elif len(rows) > 1:
        text += f" (lowest {summary['min']:.3f}, highest {summary['max']:.3f})"
    return f"{text}, median {summary['median']:.3f}, n = {summary['n']}"


def distance_text(rows: Sequence[dict], name: str) -> str:
    """Format mean and median of a distance, such as `hd95_mm`, and how many are the diagonal."""
    kind, unit = name.split("_")
    summary, missed = summarise(values_of(rows, name)), count_missed(rows)
    text = (
        f"{kind.upper()} mean {summary['mean']:.1f} {unit}, median {summary['median']:.1f}, "
        f"n = {summary['n']}"
    )
    if missed:
        text += f", {missed} of them with one mask empty: the image diagonal"
    return text


def read_scores(path: Path, columns: Collection[str]) -> dict[str, dict]:
    """Read a metrics.csv by case; OSError or ValueError, naming it, if it lacks a column."""
    fault = f"{path}: is not a metrics.csv that inference.py wrote; run it to make one"
    lines = read_rows(path, {"case", "trained_on"}, fault)
    if not lines:
        raise ValueError(fault)
    for column in columns:
        if column not in lines[0]:
            raise ValueError(f"{path}: has no column {column}; run inference.py again to make it")
    scores = {}
    for line in lines:
        case = line["case"]
        if case in scores:
            raise ValueError(f"{path}: scores {case} twice; keep one row per case")
        try:
            row: dict = {"patient": line.get("patient") or patient_named(case)}
            row["trained_on"] = {"0": False, "1": True}[line["trained_on"]]
            row[RUN] = line.get(RUN, "")
            for column in columns:
                row[column] = float(line[column])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: its line of {case} is damaged; run inference.py again"
            ) from error
        scores[case] = row
    return scores
