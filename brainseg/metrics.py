"""Scores of one predicted volume against the truth, both bool (S, H, W), and of a cohort.

A ratio whose denominator is empty is 1 if both masks are empty and 0 otherwise. If only one of
the two is empty (a lesion missed or made up), every distance is the diagonal of the image, so that
means include the worst cases. A case of one slice has distances in two dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def dsc(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute the Dice coefficient (Dice 1945), 2 |P and T| / (|P| + |T|); 1 if both are empty."""
    both = _count(prediction) + _count(truth)
    return 2 * _count(prediction & truth) / both if both else 1.0


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute intersection over union, |P and T| / |P or T|; 1 if both are empty (Jaccard 1912)."""
    either = _count(prediction | truth)
    return _count(prediction & truth) / either if either else 1.0


def precision(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute the share of predicted voxels that are lesion; 1 if both masks are empty."""
    if not prediction.any():
        return float(not truth.any())
    return _count(prediction & truth) / _count(prediction)


def recall(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute the share of lesion voxels that are predicted; 1 if both masks are empty."""
    return precision(truth, prediction)


def distances(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Measure surface distances both ways, in pixels or in the units of `spacing`.

    hd95 is their 95th percentile, assd the average. 0 if both masks are empty; the diagonal of
    the image if one is.
    """
    if len(prediction) == 1:  # in three dimensions all of its voxels would be surface
        prediction, truth, spacing = prediction[0], truth[0], spacing and spacing[1:]
    if not prediction.any() or not truth.any():
        diagonal = float(np.linalg.norm(np.multiply(prediction.shape, spacing or 1)))
        return dict.fromkeys(DISTANCES, diagonal if prediction.any() or truth.any() else 0.0)
    from medpy.metric import binary

    # Beyond a margin of one voxel both masks are empty and cannot hold a surface.
    union = np.nonzero(prediction | truth)
    box = tuple(slice(max(w.min() - 1, 0), w.max() + 2) for w in union)
    masks = prediction[box], truth[box]
    return {name: float(getattr(binary, name)(*masks, spacing)) for name in DISTANCES}


def volume_error(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute (|P| - |T|) / |T|: above 0 is too much. 0 if both are empty, NaN if only T is."""
    if not truth.any():
        return float("nan") if prediction.any() else 0.0
    return _count(prediction) / _count(truth) - 1


def lesion_recall(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute the share of lesions (26-connected) that are touched; 1 if both masks are empty."""
    if not truth.any() or not prediction.any():
        return float(truth.any() == prediction.any())
    from skimage.measure import label

    lesions = label(truth)
    return float(len(np.unique(lesions[prediction & truth])) / lesions.max())


def lesion_precision(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute the share of predicted components that touch a lesion; 1 if both masks are empty."""
    return lesion_recall(truth, prediction)


METRICS = {
    "dsc": dsc,
    "iou": iou,
    "precision": precision,
    "recall": recall,
    "volume_error": volume_error,
    "lesion_recall": lesion_recall,
    "lesion_precision": lesion_precision,
}
DISTANCES = "hd95", "assd"
FEW = 5  # cases; with fewer, an interval would claim too much


def score(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Compute every metric of one volume; distances in pixels, and in mm if there is a `spacing`.

    Raises ValueError if the two shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, but mask of shape {truth.shape}")
    scores = {name: metric(prediction, truth) for name, metric in METRICS.items()}
    for unit, sides in {"px": None, "mm": spacing}.items():
        if unit == "px" or sides:
            found = distances(prediction, truth, sides)
            scores |= {f"{name}_{unit}": value for name, value in found.items()}
    return scores


def summarise(
    values: Sequence[float],
    patients: Sequence[str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """Compute mean, median, n and a 95 % bootstrap interval of the mean, over patients.

    Patients are drawn with all of their values (percentile bootstrap, Efron 1979); without
    `patients`, values are drawn. NaNs are left out; if no value is left, all but n are NaN.
    """
    values = np.asarray(values, dtype=float)
    known = ~np.isnan(values)
    values = values[known]
    if not len(values):
        return dict.fromkeys(("mean", "median", "low", "high"), np.nan) | {"n": 0}
    owner = np.arange(len(values))
    if patients is not None:
        _, owner = np.unique(np.asarray(patients)[known], return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    draws = np.random.default_rng(seed).choice(len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), (2.5, 97.5))
    found = {"mean": values.mean(), "median": np.median(values), "low": low, "high": high}
    return {name: float(value) for name, value in found.items()} | {"n": len(values)}


def by_rule(row: Mapping[str, float]) -> bool:
    """Tell whether exactly one mask of a row of scores is empty: its distances are the diagonal."""
    return row["volume_error"] == -1 or math.isnan(row["volume_error"])


def describe_distances(rows: Sequence[Mapping[str, float]], name: str) -> str:
    """Format mean and median of a distance, such as `hd95_mm`, and how many are the diagonal."""
    kind, unit = name.split("_")
    known = [row for row in rows if not math.isnan(row[name])]
    s, missed = summarise([row[name] for row in known]), sum(map(by_rule, known))
    line = f"{kind.upper()} mean {s['mean']:.1f} {unit}, median {s['median']:.1f}, n = {s['n']}"
    if missed:
        line += f", {missed} of them with one mask empty: the image diagonal"
    return line


def describe(values: Sequence[float], patients: Sequence[str] | None = None) -> str:
    """Format mean, median and n of the DSCs in one line, with the interval from FEW cases on."""
    s = summarise(values, patients)
    interval = f" (95 % interval {s['low']:.3f} to {s['high']:.3f})" if s["n"] >= FEW else ""
    return f"DSC mean {s['mean']:.3f}{interval}, median {s['median']:.3f}, n = {s['n']}"


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))
