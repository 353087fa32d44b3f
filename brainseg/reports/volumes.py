"""List what was found in each case and which masks to look at first, without true masks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..io.files import RUN, read_table, sentence
from ..io.layouts import Source
from ..io.slices import Case
from ..preprocess import CHANNELS, missing_sequences
from ..quality import WARN_BELOW
from ..splits import patient_of
from .page import Table

LARGEST = 3  # components that have their own columns
PRINTED = 20  # rows; the file has all
EXPECTED = "expected_dsc", "expected_dsc_low", "expected_dsc_high"
COLUMNS = (
    *("case", "patient", "slices", "sequences", "replaced", "lesion_voxels", "lesion_ml"),
    "components",
    *(f"component_{k + 1}_{unit}" for k in range(LARGEST) for unit in ("voxels", "ml")),
    *("slices_touched", *EXPECTED, "warning", "scan_hash", RUN),
)
# Columns of text; the others are numbers.
TEXTS = ("case", "patient", "sequences", "replaced", "warning", "scan_hash", RUN)


def volume_row(
    case: Case,
    volume: np.ndarray,
    mask: np.ndarray,
    expected: tuple[float, float, float] | None = None,
    warnings: Sequence[str] = (),
    run: str = "",
    replaced: Sequence[str] = (),
) -> dict:
    """Make the row of volumes.csv for a case; the server's summary.json holds the same.

    `volume` is (S, H, W, C), `mask` (S, H, W) bool, `expected` the expected DSC of the mask and
    its interval, `warnings` one sentence each. `run` names the weights and settings that made the
    mask (`Segmenter.run`), `replaced` the sequences that FLAIR stands in for by the warnings.
    Unknown values are None: millilitres without a spacing, components that do not exist, a DSC that
    cannot be estimated.
    """
    spacing, sizes = case.spacing, component_sizes(mask)
    names = CHANNELS.get(volume.shape[-1], ())
    copies = [name for name in missing_sequences(volume) if name not in replaced]
    replaced = [name for name in names if name in replaced or name in copies]
    warnings = [*warnings, *edge_warnings(mask)]
    if copies:
        warnings.append(f"FLAIR stands in for {' and '.join(copies)}")

    def ml(voxels: int | None) -> float | None:
        return None if None in (spacing, voxels) else voxels * math.prod(spacing) / 1000

    row = {
        "case": case.name,
        "patient": patient_of(case),
        "slices": len(mask),
        "sequences": ", ".join(name for name in names if name not in replaced),
        "replaced": ", ".join(replaced),
        "lesion_voxels": int(mask.sum()),
        "lesion_ml": ml(int(mask.sum())),
        "components": len(sizes),
    }
    sizes += [None] * LARGEST
    for k, size in enumerate(sizes[:LARGEST], 1):
        row |= {f"component_{k}_voxels": size, f"component_{k}_ml": ml(size)}
    row["slices_touched"] = [case.numbers[k] for k in np.flatnonzero(mask.any(axis=(1, 2)))]
    row |= zip(EXPECTED, expected or [None] * 3, strict=True)
    return row | {"warning": "; ".join(warnings), "scan_hash": scan_hash(volume), RUN: run}


def scan_hash(volume: np.ndarray) -> str:
    """Return 16 digits of the SHA-256 of a volume's voxels, to know it again."""
    about = f"{volume.dtype.str} {volume.shape}".encode()
    return hashlib.sha256(about + np.ascontiguousarray(volume).data).hexdigest()[:16]


def unread_row(case: Case | Source, error: Exception) -> dict:
    """Make the row of a case that could not be read: its name, and why."""
    return dict.fromkeys(COLUMNS) | {
        "case": case.name,
        "patient": patient_of(case),
        "sequences": "",
        "replaced": "",
        "slices_touched": [],
        "warning": sentence(error),
        "scan_hash": "",
        RUN: "",
    }


def component_sizes(mask: np.ndarray) -> list[int]:
    """Count the voxels of each component (26 neighbours) of a mask (S, H, W), largest first."""
    from skimage.measure import label

    if not mask.any():
        return []
    box = tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(mask))
    return sorted(np.bincount(label(mask[box]).ravel())[1:].tolist(), reverse=True)


def edge_warnings(mask: np.ndarray) -> list[str]:
    """Warn if the lesion reaches the first or the last slice, where the scan ends."""
    ends = [name for name, k in (("first", 0), ("last", -1)) if len(mask) > 1 and mask[k].any()]
    return [f"the lesion reaches the {' and the '.join(ends)} slice"] if ends else []


def by_need(rows: Sequence[dict]) -> list[dict]:
    """Sort by need of a look: unread cases, then those with a warning, then by expected DSC."""

    def need(row: dict) -> tuple:
        expected = 1.0 if row["expected_dsc"] is None else row["expected_dsc"]
        return row["slices"] is not None, not row["warning"], expected, row["case"]

    return sorted(rows, key=need)


def read_volumes(path: Path) -> dict[str, dict]:
    """Read the rows of a volumes.csv by case; {} if it is missing, or a number in it is none.

    Raises ValueError if it is another table.
    """
    rows = read_table(path)
    try:
        return {
            name: {column: _value(column, row.get(column, "")) for column in COLUMNS}
            for name, row in rows.items()
        }
    except ValueError:
        return {}


def _value(column: str, text: str) -> object:
    if column == "slices_touched":
        return [int(number) for number in text.split()]
    return text if column in TEXTS else json.loads(text or "null")


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


def volumes_table(rows: Sequence[dict], path: Path) -> Table:
    """Make the short table that a run prints, with at most PRINTED cases; `path` holds all."""
    ordered = by_need(rows)
    warned = sum(bool(row["warning"]) for row in rows)
    notes = []
    if len(ordered) > PRINTED:
        notes.append(f"... and {len(ordered) - PRINTED} more in {path}")
    found = [row for row in rows if row["lesion_voxels"]]
    if found and all(row["expected_dsc"] is None for row in found):
        notes.append("No expected DSC: the card of the weights has no fit for these options.")
    cells = {
        "case": lambda row: row["case"],
        "slices": lambda row: shown_count(row["slices"]),
        "lesion": shown_size,
        "components": lambda row: shown_count(row["components"]),
        "expected DSC": shown_expected,
        "needs a look because": lambda row: row["warning"],
    }
    title = "1 case" if len(rows) == 1 else f"{len(rows)} cases"
    if warned:
        title += f", {warned} to look at"
    return Table(
        title,
        [*cells],
        [[show(row) for show in cells.values()] for row in ordered[:PRINTED]],
        "\n".join(notes),
        left=(0, 5),
    )


def shown_count(number: int | None) -> str:
    return "-" if number is None else str(number)


def shown_size(row: dict) -> str:
    """Format the size of a lesion: in millilitres, or in voxels if the spacing is unknown."""
    voxels, ml = row["lesion_voxels"], row["lesion_ml"]
    if voxels is None:  # the case could not be read
        return "-"
    return f"{voxels} vx" if ml is None else f"{ml:.1f} ml"


def shown_expected(row: dict) -> str:
    """Format the expected DSC with its interval."""
    if row["expected_dsc"] is None:
        return "-"
    low, high = row["expected_dsc_low"], row["expected_dsc_high"]
    return f"{row['expected_dsc']:.2f} ({low:.2f} to {high:.2f})"


def is_poor(row: dict) -> bool:
    """Tell whether the mask is probably poor."""
    return row["expected_dsc"] is not None and row["expected_dsc"] < WARN_BELOW
