"""Compute the statistics of a comparison: from one row per model and case, a summary per model."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..metrics import count_missed, summarise, values_of

SETTINGS = {}  # column of the scores: threshold, whether only the largest component is kept
for largest, word in ((True, "largest"), (False, "all")):
    for threshold in (0.3, 0.4, 0.5, 0.6, 0.7):
        SETTINGS[f"dsc_{threshold}_{word}"] = (threshold, largest)
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


def compare(models: Mapping[str, list[dict]]) -> dict[str, dict]:
    """Summarise the scores of each model; all have rows of the same cases, in order.

    `missed` counts the cases where only one mask is empty; `difference` is the DSC minus that of
    the first model, case by case; `groups` are by hospital, missing sequence and lesion volume;
    `settings` by threshold and components; `chose_epoch` counts the cases it was chosen on.
    """
    first = next(iter(models.values()))
    patients, groups = values_of(first, "patient"), _groups(first)
    first_dsc = values_of(first, "dsc")
    columns = set(SCORES)
    for rows in models.values():
        for row in rows:
            columns &= row.keys()
    summary = {}
    for name, rows in models.items():
        dsc = values_of(rows, "dsc")
        change = dsc - first_dsc
        change[np.abs(change) < 1e-5] = 0  # tables hold six digits
        scores = {}
        for metric in SCORES:
            if metric in columns:
                scores[metric] = summarise(values_of(rows, metric), patients)
        summary[name] = {
            "scores": scores,
            "missed": count_missed(rows),
            "chose_epoch": sum(row.get("chose_epoch", 0) for row in rows),
            "groups": {},
        }
        for group, members in groups.items():
            by_value = summary[name]["groups"].setdefault(group, {})
            for value, cases in members.items():
                by_value[value] = _dsc_and_difference(dsc[cases], change[cases], patients[cases])
        if rows is not first:
            difference = summarise(change, patients)
            difference["better"] = int((change > 0).sum())
            difference["worse"] = int((change < 0).sum())
            summary[name]["difference"] = difference
        if SETTINGS.keys() <= rows[0].keys():
            settings = {}
            for setting in SETTINGS:
                values = values_of(rows, setting)
                settings[setting] = _dsc_and_difference(values, values - dsc, patients)
            summary[name]["settings"] = settings
    return summary


def _dsc_and_difference(dsc: np.ndarray, change: np.ndarray, patients: np.ndarray) -> dict:
    return {"dsc": summarise(dsc, patients), "difference": summarise(change, patients)}


def _groups(rows: Sequence[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Divide cases by hospital, missing sequence and lesion volume: a bool mask per value."""
    voxels = values_of(rows, "lesion_voxels")
    low, high = np.quantile(voxels, (1 / 3, 2 / 3)).round().astype(int)
    sizes = {
        f"under {low}": voxels < low,
        f"{low} to {high}": (low <= voxels) & (voxels <= high),
        f"over {high}": voxels > high,
    }
    groups = {
        "hospital": _by_value(values_of(rows, "site")),
        "missing": _by_value(values_of(rows, "missing")),
        "lesion voxels": {size: cases for size, cases in sizes.items() if cases.any()},
    }
    return {group: members for group, members in groups.items() if len(members) > 1}


def _by_value(values: np.ndarray) -> dict[str, np.ndarray]:
    return {str(value): values == value for value in np.unique(values)}
