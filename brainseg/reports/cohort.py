"""Show a cohort on one page: what was found, and where to look first, without true masks."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..patients import counted
from . import volumes
from .page import write_page

BINS = 24  # of the histogram, at most


def save_cohort(
    path: Path,
    rows: Sequence[dict],
    pictures: Sequence[bytes | None],
    details: dict,
    patients: Sequence[dict] = (),
    scores: Sequence[dict] = (),
) -> None:
    """Write the page of a cohort: rows of volumes.csv, their JPEGs, patients' growth, scores."""
    thumbnails = {row["case"]: picture for row, picture in zip(rows, pictures, strict=True)}
    true_dsc, trained_on = {}, set()
    for row in scores:
        true_dsc[row["case"]] = row["dsc"]
        if row["trained_on"]:
            trained_on.add(row["case"])
    lines = []
    for place, row in enumerate(volumes.by_need(rows)):
        size = row["lesion_voxels"] if row["lesion_ml"] is None else row["lesion_ml"]
        lines.append(row | {"need": place, "size": size, "dsc": true_dsc.get(row["case"])})
    read = [line for line in lines if thumbnails[line["case"]]]
    sizes = [line["lesion_ml"] for line in read if line["lesion_ml"] is not None]
    if len(sizes) == len(read):
        unit = "ml"
    elif sizes:
        unit = "ml (voxels without spacing)"
    else:
        unit, sizes = "voxels", [line["lesion_voxels"] for line in read]
    counts, step = _histogram(sizes)
    write_page(
        path,
        "cohort.html",
        f"brainseg: {counted(len(rows), 'case')}",
        details,
        tiles=_tiles(lines, read, unit, scores),
        counts=counts,
        step=step,
        unit=unit,
        rows=lines,
        thumbnails=thumbnails,
        volumes=volumes,
        patients=patients,
        trained_on=trained_on,
    )


def _tiles(
    rows: Sequence[dict], read: Sequence[dict], unit: str, scores: Sequence[dict]
) -> dict[str, object]:
    """Summarise all cases, those `read`, and scores of patients not trained on, by title."""
    lesions = [row for row in read if row["lesion_voxels"]]
    sizes = []
    for row in lesions:
        if row["lesion_ml"] is not None or unit == "voxels":
            sizes.append(row["size"])
    if unit != "voxels":
        unit = "ml"  # lesions of scans without spacing are left out
    expected = [row["expected_dsc"] for row in rows if row["expected_dsc"] is not None]
    median_size, median_expected = "-", "-"
    if sizes:
        median_size = f"{np.median(sizes):,.1f}".removesuffix(".0")
    if expected:
        median_expected = f"{np.median(expected):.2f}"
    tiles: dict[str, object] = {
        "cases": len(rows),
        "need a look": sum(bool(row["warning"]) for row in rows),
        "without a lesion": len(read) - len(lesions),
        f"median lesion, {unit}": median_size,
        "median expected DSC": median_expected,
    }
    unseen = [row["dsc"] for row in scores if not row["trained_on"]]
    if unseen:
        tiles[f"median DSC, n = {len(unseen)}"] = f"{np.median(unseen):.2f}"
    return tiles


def _histogram(sizes: Sequence[float]) -> tuple[list[int], float]:
    """Count lesions by size; return the counts and the bin width: 1, 2 or 5 times a power of 10."""
    largest = max(sizes, default=0)
    if largest <= 0:
        return [], 0
    least = largest / min(BINS, max(6, math.ceil(math.sqrt(4 * len(sizes)))))
    power = 10.0 ** math.floor(math.log10(least))
    step = 10 * power
    for factor in (5, 2, 1):
        if factor * power >= least * 0.999:
            step = factor * power
    bins = max(1, math.ceil(largest / step + 1e-9))
    counts, _ = np.histogram(sizes, bins=bins, range=(0, bins * step))
    return counts.tolist(), step
