"""The statistics of a comparison: from one row per model and case to a summary per model."""

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
    "lesion_precision": "components right",
}


def compare(models: dict[str, list[dict]]) -> dict[str, dict]:
    """Summarise the scores of each model; all have rows of the same cases, in order.

    For each model: `scores`, every metric; `missed`, in how many cases one mask alone is empty, so
    that its distances are the image diagonal; `difference`, its DSC case by case from that of the
    first model; `groups`, both by hospital, missing sequence and lesion volume; `settings`, the
    DSC at each threshold, with and without the largest component, and its difference from that
    of `scores`; `chose_epoch`, on how many of the cases its epoch was chosen. Intervals are over
    patients.
    """
    first = next(iter(models.values()))
    known = [m for m in SCORES if all(m in row for rows in models.values() for row in rows)]
    groups, before, patients = _groups(first), _column(first, "dsc"), _column(first, "patient")

    def over_patients(values: np.ndarray, cases: np.ndarray | slice = slice(None)) -> dict:
        return summarise(values[cases], patients[cases])

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
                group: {
                    value: {
                        "dsc": over_patients(dsc, cases),
                        "difference": over_patients(change, cases),
                    }
                    for value, cases in values.items()
                }
                for group, values in groups.items()
            },
        }
        if its is not first:
            counts = {"better": int((change > 0).sum()), "worse": int((change < 0).sum())}
            about["difference"] = over_patients(change) | counts
        if SETTINGS.keys() <= its[0].keys():
            settings = {setting: _column(its, setting) for setting in SETTINGS}
            about["settings"] = {
                setting: {"dsc": over_patients(values), "difference": over_patients(values - dsc)}
                for setting, values in settings.items()
            }
    return summary


def _column(rows: Sequence[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def _groups(rows: Sequence[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Divide the cases by hospital, missing sequence and lesion volume."""
    voxels = _column(rows, "lesion_voxels")
    low, high = np.quantile(voxels, (1 / 3, 2 / 3)).round().astype(int)
    groups = {
        "hospital": {value: _column(rows, "site") == value for value in _values(rows, "site")},
        "missing": {value: _column(rows, "missing") == value for value in _values(rows, "missing")},
        "lesion voxels": {
            f"under {low}": voxels < low,
            f"{low} to {high}": (low <= voxels) & (voxels <= high),
            f"over {high}": voxels > high,
        },
    }
    groups = {k: {v: c for v, c in values.items() if c.any()} for k, values in groups.items()}
    return {k: values for k, values in groups.items() if len(values) > 1}


def _values(rows: Sequence[dict], name: str) -> list[str]:
    return sorted({row[name] for row in rows})
