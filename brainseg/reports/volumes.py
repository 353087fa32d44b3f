"""List what was found in each case and which masks to look at first, without true masks."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..io.files import RUN, by, read_table, sentence
from ..io.layouts import Source
from ..io.slices import Case
from ..metrics import components
from ..patients import counted, patient_of
from ..preprocess import CHANNELS, missing_sequences
from ..quality import FIT_OF_ENSEMBLE, WARN_BELOW
from .page import Table

PRINTED = 20  # rows; the file has all
TYPICAL = 2 / 3  # of the cases: what so many have is typical of the run
SPACING_RATIO = 1.5  # of a spacing to that of most cases, from which on it is another
UNLIKE = "unlike most cases of this run: "  # in a warning
EXPECTED = ("expected_dsc", "expected_dsc_low", "expected_dsc_high")
COLUMNS = """case patient slices sequences replaced lesion_voxels lesion_ml components
    component_1_voxels component_1_ml component_2_voxels component_2_ml component_3_voxels
    component_3_ml slices_touched expected_dsc expected_dsc_low expected_dsc_high notes
    warning scan_hash""".split()
COLUMNS.append(RUN)
TEXTS = ("case", "patient", "sequences", "replaced", "notes", "warning", "scan_hash", RUN)
NUMBERS = set(COLUMNS) - {*TEXTS, "slices_touched"}


def volume_row(
    case: Case,
    volume: np.ndarray,
    mask: np.ndarray,
    expected: tuple[float, float, float] | None = None,
    warnings: Sequence[str] = (),
    run: str = "",
    replaced: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> dict:
    """Make the row of volumes.csv for a case; the server's summary.json holds the same.

    `volume` is (S, H, W, C), `mask` (S, H, W) bool, `expected` its expected DSC with interval.
    `notes` and `warnings` are sentences, `replaced` the sequences that FLAIR stands in for by the
    notes. What is unknown is None.
    """
    names = CHANNELS.get(volume.shape[-1], ())
    copies = [name for name in missing_sequences(volume) if name not in replaced]
    present, absent = [], []
    for name in names:
        if name in replaced or name in copies:
            absent.append(name)
        else:
            present.append(name)
    notes, warnings = list(notes), list(warnings)
    if copies:
        notes.append(f"FLAIR stands in for {' and '.join(copies)}")
    at_end = end_warnings(mask)
    warnings += at_end
    if not at_end:
        notes += edge_notes(mask)
    sizes = component_sizes(mask)
    row: dict = dict.fromkeys(COLUMNS)
    row |= {
        "case": case.name,
        "patient": patient_of(case),
        "slices": len(mask),
        "sequences": ", ".join(present),
        "replaced": ", ".join(absent),
        "components": len(sizes),
        "slices_touched": [case.numbers[k] for k in np.flatnonzero(mask.any(axis=(1, 2)))],
        "notes": "; ".join(notes),
        "warning": "; ".join(warnings),
        "scan_hash": scan_hash(volume, case.given_spacing),
        RUN: run,
    }
    row |= _columns_of_sizes(sizes, case.spacing)
    if expected:
        row |= zip(EXPECTED, expected, strict=True)
    return row


def _columns_of_sizes(sizes: Sequence[int], spacing: Sequence[float] | None) -> dict:
    """Return the columns of the lesion and its largest components: voxels and, if known, ml."""
    voxels_of = {"lesion": sum(sizes)}
    for k, size in enumerate(sizes[:3], 1):
        voxels_of[f"component_{k}"] = size
    columns = {}
    for name, voxels in voxels_of.items():
        columns[f"{name}_voxels"] = voxels
        if spacing:
            columns[f"{name}_ml"] = voxels * math.prod(spacing) / 1000
    return columns


def scan_hash(volume: np.ndarray, spacing: Sequence[float] | None = None) -> str:
    """Return 16 digits of the SHA-256 of a volume's voxels, and of a given spacing, if any."""
    kind = f"{volume.dtype.str} {volume.shape}"
    if spacing:
        kind += f" {spacing}"
    digest = hashlib.sha256(kind.encode())
    for voxels in volume:  # slice by slice: a copy of the whole would be of some size
        digest.update(np.ascontiguousarray(voxels).data)
    return digest.hexdigest()[:16]


def unread_row(case: Case | Source, error: Exception) -> dict:
    """Make the row of a case that could not be read: its name, and why."""
    row = dict.fromkeys(COLUMNS) | dict.fromkeys(TEXTS, "")
    row |= {"case": case.name, "patient": patient_of(case), "slices_touched": []}
    return row | {"warning": sentence(error)}


def component_sizes(mask: np.ndarray) -> list[int]:
    """Count the voxels of each component (26 neighbours) of a mask (S, H, W), largest first."""
    if not mask.any():
        return []
    numbers, _ = components(mask)
    return sorted(np.bincount(numbers.ravel())[1:].tolist(), reverse=True)


def end_warnings(mask: np.ndarray) -> list[str]:
    """Return a sentence if a mask (S, H, W) is confined to a tenth of the slices at one end."""
    (places,) = np.nonzero(mask.any(axis=(1, 2)))
    tenth = max(1, len(mask) // 10)
    if not len(places) or len(mask) < 3:
        return []
    if places[-1] < tenth:
        return ["the mask is confined to the first slices of the scan; look at it"]
    if places[0] >= len(mask) - tenth:
        return ["the mask is confined to the last slices of the scan; look at it"]
    return []


def warn_of_unlike(rows: Sequence[dict], spacings: Mapping[str, Sequence[float] | None]) -> None:
    """Add a warning to each row whose input is unlike that of most cases of a run.

    That is, it lacks a sequence or has another spacing than two thirds of the cases; `spacings`
    (mm: slices, rows, columns) are by case.
    """
    read = [row for row in rows if row["slices"] is not None]
    counts = Counter()
    for row in read:
        counts.update(row["sequences"].split(", "))
    typical = _typical_spacing([spacings[row["case"]] for row in read])
    for row in read:
        reasons = []
        for name in filter(None, row["replaced"].split(", ")):
            if counts[name] >= TYPICAL * len(read):
                reasons.append(f"it has no {name}")
        spacing = spacings[row["case"]]
        if spacing and typical and _ratio(spacing, typical) > SPACING_RATIO:
            reasons.append(f"its voxels are {_in_mm(spacing)}, theirs {_in_mm(typical)}")
        if reasons:
            warnings = [row["warning"], UNLIKE + " and ".join(reasons)]
            row["warning"] = "; ".join(filter(None, warnings))


def _typical_spacing(spacings: Sequence[Sequence[float] | None]) -> Sequence[float] | None:
    """Return the median spacing; None if less than two thirds of the cases are near it."""
    stated = [spacing for spacing in spacings if spacing]
    if len(stated) < 3:
        return None
    typical = np.median(stated, axis=0).tolist()
    near = sum(_ratio(spacing, typical) <= SPACING_RATIO for spacing in stated)
    if near < TYPICAL * len(spacings):
        return None
    return typical


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the greatest ratio, of one to the other or the reverse, of two spacings."""
    ratios = np.divide(one, other)
    return float(np.maximum(ratios, 1 / ratios).max())


def _in_mm(spacing: Sequence[float]) -> str:
    return by(f"{length:.2g}" for length in spacing) + " mm"


def edge_notes(mask: np.ndarray) -> list[str]:
    """Say if the lesion reaches the first or the last slice, where the scan ends."""
    ends = []
    if mask[0].any():
        ends.append("the first")
    if mask[-1].any():
        ends.append("the last")
    if len(mask) == 1 or not ends:
        return []
    return [f"the lesion reaches {' and '.join(ends)} slice"]


def by_need(rows: Sequence[dict]) -> list[dict]:
    """Sort by need of a look: unread cases, then those with a warning, then by expected DSC."""

    def need(row: dict) -> tuple:
        expected = 1.0 if row["expected_dsc"] is None else row["expected_dsc"]
        return row["slices"] is not None, not row["warning"], expected, row["case"]

    return sorted(rows, key=need)


def read_volumes(path: Path) -> dict[str, dict]:
    """Read the rows of a volumes.csv, {} if a number is damaged; ValueError for another table."""
    rows = {}
    for name, texts in read_table(path).items():
        row: dict = {}
        for column in COLUMNS:
            row[column] = texts.get(column, "")
        try:
            for column in NUMBERS:
                row[column] = json.loads(row[column] or "null")
            row["slices_touched"] = list(map(int, row["slices_touched"].split()))
        except ValueError:
            return {}
        rows[name] = row
    return rows


def volumes_table(rows: Sequence[dict], path: Path, no_expected_dsc: str = "") -> Table:
    """Make the short table that a run prints; `no_expected_dsc` is the segmenter's reason."""
    header = ["case", "slices", "lesion", "components", "expected DSC", "needs a look because"]
    table = Table(counted(len(rows), "case"), header, left=(0, 5))
    warned = sum(bool(row["warning"]) for row in rows)
    if warned:
        table.title += f", {warned} to look at"
    for row in by_need(rows)[:PRINTED]:
        line = [row["case"], shown_count(row["slices"]), shown_size(row)]
        line += [shown_count(row["components"]), shown_expected(row), row["warning"]]
        table.rows.append(line)
    notes = []
    if len(rows) > PRINTED:
        notes.append(f"... and {len(rows) - PRINTED} more in {path}")
    lesions = [row for row in rows if row["lesion_voxels"]]
    if lesions and all(row["expected_dsc"] is None for row in lesions):
        notes.append(f"No expected DSC: {no_expected_dsc or FIT_OF_ENSEMBLE}.")
    table.note = "\n".join(notes)
    return table


def shown_count(number: int | None) -> str:
    if number is None:
        return "-"
    return str(number)


def shown_size(row: dict) -> str:
    """Format the size of a lesion: in millilitres, or in voxels if the spacing is unknown."""
    if row["lesion_voxels"] is None:  # the case could not be read
        return "-"
    if row["lesion_ml"] is None:
        return f"{row['lesion_voxels']} vx"
    return f"{row['lesion_ml']:.1f} ml"


def shown_expected(row: dict) -> str:
    """Format the expected DSC with its interval."""
    if row["expected_dsc"] is None:
        return "-"
    low, high = row["expected_dsc_low"], row["expected_dsc_high"]
    return f"{row['expected_dsc']:.2f} ({low:.2f} to {high:.2f})"


def is_poor(row: dict) -> bool:
    """Tell whether the mask is probably poor."""
    return row["expected_dsc"] is not None and row["expected_dsc"] < WARN_BELOW
