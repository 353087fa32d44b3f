"""Compute the statistics of a comparison: from one row per model and case, a summary per model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..metrics import by_rule, summarise

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
SETTINGS = {  # column of the scores: threshold, whether only the largest component is kept
    f"dsc_{threshold}_{'largest' if largest else 'all'}": (threshold, largest)
    for largest in (True, False)
    for threshold in THRESHOLDS
}
SCORES = {
    "dsc": "DSC",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "hd95_px": "HD95 px",
    "assd_px": "ASSD px",
    "hd95_mm": "HD95 mm",
    "assd_mm": "ASSD mm",
    "volume_error": "volume error, signed",
    "lesion_recall": "lesions found",
    "lesion_precision": "components correct",
}


def compare(models: dict[str, list[dict]]) -> dict[str, dict]:
    """Summarise the scores of each model; all have rows of the same cases, in order.

    For each model: `scores`, every metric; `missed`, the number of cases where only one mask is
    empty and the distances are the image diagonal; `difference`, its DSC minus that of the first
    model, case by case; `groups`, both by hospital, missing sequence and lesion volume; `settings`,
    the DSC at each threshold, for the largest and for all components, and its difference from that
    in `scores`; `chose_epoch`, the number of cases that its epoch was chosen on. Intervals are
    over patients.
    """
    first = next(iter(models.values()))
    known = [m for m in SCORES if all(m in row for rows in models.values() for row in rows)]
    groups, before, patients = _groups(first), _column(first, "dsc"), _column(first, "patient")

    def over_patients(values: np.ndarray, cases: np.ndarray | slice = slice(None)) -> dict:
        return summarise(values[cases], patients[cases])

    def both(values: np.ndarray, change: np.ndarray, cases: np.ndarray | slice = slice(None)):
        return {"dsc": over_patients(values, cases), "difference": over_patients(change, cases)}

    summary = {}
    for name, its in models.items():
        dsc = _column(its, "dsc")
        change = dsc - before
        change[np.abs(change) < 1e-5] = 0  # tables hold six digits
        summary[name] = about = {
            "scores": {metric: over_patients(_column(its, metric)) for metric in known},
            "missed": sum(map(by_rule, its)),
            "chose_epoch": sum(row.get("chose_epoch", 0) for row in its),
            "groups": {
                group: {value: both(dsc, change, cases) for value, cases in values.items()}
                for group, values in groups.items()
            },
        }
        if its is not first:
            counts = {"better": int((change > 0).sum()), "worse": int((change < 0).sum())}
            about["difference"] = over_patients(change) | counts
        if SETTINGS.keys() <= its[0].keys():
            tried = {setting: _column(its, setting) for setting in SETTINGS}
            about["settings"] = {k: both(values, values - dsc) for k, values in tried.items()}
    return summary


def _column(rows: Sequence[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def _groups(rows: Sequence[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Divide the cases by hospital, missing sequence and lesion volume."""
    voxels = _column(rows, "lesion_voxels")
    low, high = np.quantile(voxels, (1 / 3, 2 / 3)).round().astype(int)
    sizes = {
        f"under {low}": voxels < low,
        f"{low} to {high}": (low <= voxels) & (voxels <= high),
        f"over {high}": voxels > high,
    }
    groups = {"hospital": _by_value(_column(rows, "site"))}
    groups["missing"] = _by_value(_column(rows, "missing"))
    groups["lesion voxels"] = {name: cases for name, cases in sizes.items() if cases.any()}
    return {name: values for name, values in groups.items() if len(values) > 1}


def _by_value(column: np.ndarray) -> dict[str, np.ndarray]:
    return {str(value): column == value for value in np.unique(column)}
