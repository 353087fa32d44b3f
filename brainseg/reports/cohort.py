"""Show a cohort on one page: what was found, and where to look first, without true masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import volumes
from .page import write_page

BINS = 24  # of the histogram, at most


def save_cohort(
    path: Path, rows: Sequence[dict], pictures: Sequence[bytes | None], about: dict
) -> None:
    """Write the page of a cohort: `rows` of volumes.csv, a JPEG for each, and how it was made.

    A case without a picture could not be read; only the table lists it.
    Raises OSError, naming `path`, if it cannot be written; an existing page is kept.
    """
    thumbnails = {row["case"]: picture for row, picture in zip(rows, pictures, strict=True)}
    rows = [
        row | {"need": k, "size": _size(row), "kind": "look" if row["warning"] else "rest"}
        for k, row in enumerate(volumes.by_need(rows))
    ]
    read = [row for row in rows if thumbnails[row["case"]]]
    known = {row["lesion_ml"] is not None for row in read}
    unit = "ml (voxels without spacing)" if len(known) > 1 else "voxels" if False in known else "ml"
    counts, step = _histogram(
        [row["lesion_voxels" if unit == "voxels" else "lesion_ml"] for row in read]
    )
    write_page(
        path,
        "cohort.html",
        f"brainseg: {len(rows)} case{'s' * (len(rows) != 1)}",
        about,
        tiles=_tiles(rows, read, unit),
        counts=counts,
        step=step,
        unit=unit,
        rows=rows,
        thumbnails=thumbnails,
        volumes=volumes,
    )


def _size(row: dict) -> float | None:
    return row["lesion_voxels"] if row["lesion_ml"] is None else row["lesion_ml"]


def _tiles(rows: Sequence[dict], read: Sequence[dict], unit: str) -> dict[str, object]:
    """Summarise all cases, and those that could be `read`: a value for each title."""
    sizes = [row["size"] for row in read if row["lesion_voxels"]]
    median = f"{np.median(sizes):,.1f}".removesuffix(".0") if sizes else "-"
    expected = [row["expected_dsc"] for row in rows if row["expected_dsc"] is not None]
    return {
        "cases": len(rows),
        "need a look": sum(bool(row["warning"]) for row in rows),
        "without a lesion": sum(not row["lesion_voxels"] for row in read),
        f"median lesion, {unit}": median,
        "median expected DSC": f"{np.median(expected):.2f}" if expected else "-",
    }


def _histogram(sizes: Sequence[float | None]) -> tuple[list[int], float]:
    """Count lesions by size, a case without one as 0; return the counts and the bin width.

    The width is 1, 2 or 5 times a power of ten. Without any lesion the counts are empty.
    """
    known = np.array([size for size in sizes if size is not None])
    largest = known.max(initial=0)
    if largest <= 0:
        return [], 0
    least = largest / min(BINS, max(6, math.ceil(math.sqrt(4 * len(known)))))
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)
    bins = max(1, math.ceil(largest / step + 1e-9))
    counts, _ = np.histogram(known, bins=bins, range=(0, bins * step))
    return counts.tolist(), step
