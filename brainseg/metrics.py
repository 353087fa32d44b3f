"""Scores of one predicted volume against the truth, both bool (S, H, W), and of a cohort.

A ratio whose denominator is empty is 1 if both masks are empty and 0 otherwise. If only one of
the two is empty (a lesion missed or made up), every distance is the diagonal of the image, so that
means include the worst cases. A case of one slice has distances in two dimensions.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np


def dsc(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute the Dice coefficient (Dice 1945), 2 |P and T| / (|P| + |T|); 1 if both are empty."""
    both = _count(prediction) + _count(truth)
    if not both:
        return 1.0
    return 2 * _count(prediction & truth) / both


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute intersection over union, |P and T| / |P or T|; 1 if both are empty (Jaccard 1912)."""
    either = _count(prediction | truth)
    if not either:
        return 1.0
    return _count(prediction & truth) / either


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
    if not prediction.any() and not truth.any():
        return {"hd95": 0.0, "assd": 0.0}
    if not prediction.any() or not truth.any():
        diagonal = float(np.linalg.norm(np.multiply(prediction.shape, spacing or 1)))
        return {"hd95": diagonal, "assd": diagonal}
    from medpy.metric import binary

    # Beyond a margin of one voxel both masks are empty and cannot hold a surface.
    box = bounding_box(prediction | truth, margin=1)
    prediction, truth = prediction[box], truth[box]
    return {
        "hd95": float(binary.hd95(prediction, truth, spacing)),
        "assd": float(binary.assd(prediction, truth, spacing)),
    }


def volume_error(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute (|P| - |T|) / |T|: above 0 is too much. 0 if both are empty, NaN if only T is."""
    if not prediction.any() and not truth.any():
        return 0.0
    if not truth.any():
        return math.nan
    return _count(prediction) / _count(truth) - 1


def lesion_recall(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute the share of lesions (26-connected) that are touched; 1 if both masks are empty."""
    if not truth.any() or not prediction.any():
        return float(truth.any() == prediction.any())
    lesions, box = components(truth)
    touched = lesions[prediction[box] & truth[box]]
    return float(len(np.unique(touched)) / lesions.max())


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
FEW = 20  # patients; the interval from fewer covers less than 95 %, see docs/intervals.md


def score(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Compute every metric of one volume; distances in pixels, and in mm if there is a `spacing`.

    Raises ValueError if the two shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, but mask of shape {truth.shape}")
    scores = {name: metric(prediction, truth) for name, metric in METRICS.items()}
    for name, distance in distances(prediction, truth).items():
        scores[f"{name}_px"] = distance
    if spacing:
        for name, distance in distances(prediction, truth, spacing).items():
            scores[f"{name}_mm"] = distance
    return scores


def summarise(
    values: Sequence[float] | np.ndarray, patients: Sequence[str] | np.ndarray | None = None
) -> dict[str, float]:
    """Compute mean, median, min, max and n of a score, without its NaNs.

    For FEW patients or more, `low` and `high` are the 95 % interval of the mean. Without
    `patients`, each value is of another patient. If no value is left, all but n are NaN.
    """
    values = np.asarray(values, dtype=float)
    defined = ~np.isnan(values)
    values = values[defined]
    if not len(values):
        return dict.fromkeys(("mean", "median", "min", "max"), math.nan) | {"n": 0}
    summary = {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "n": len(values),
    }
    patient = np.arange(len(values))
    if patients is not None:
        _, patient = np.unique(np.asarray(patients)[defined], return_inverse=True)
    sums, counts = np.bincount(patient, values), np.bincount(patient)
    if len(sums) >= FEW:
        summary["low"], summary["high"] = mean_interval(sums, counts)
    return summary


def mean_interval(
    sums: np.ndarray, counts: np.ndarray, resamples: int = 10_000
) -> tuple[float, float]:
    """Bootstrap the 95 % interval of a mean over values, from each patient's sum and count.

    Patients are drawn with all of their values (percentile bootstrap, Efron 1979).
    """
    from scipy.stats import bootstrap  # slow to import

    def mean(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    result = bootstrap(
        (sums, counts),
        mean,
        paired=True,
        n_resamples=resamples,
        batch=100,  # resamples in memory at once
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mean_text(summary: Mapping[str, float], sign: str = "") -> str:
    """Format a mean with its interval, `0.876 (0.853 to 0.894)`, or of FEW with the range in [].

    `sign` is "+" for a difference.
    """
    if not summary["n"]:
        return "none"
    text = f"{summary['mean']:{sign}.3f}"
    if "low" in summary:
        text += f" ({summary['low']:{sign}.3f} to {summary['high']:{sign}.3f})"
    elif summary["n"] > 1:
        text += f" [{summary['min']:{sign}.3f} to {summary['max']:{sign}.3f}]"
    return text


def values_of(rows: Sequence[Mapping], name: str) -> np.ndarray:
    """Take one column out of rows of scores."""
    return np.array([row[name] for row in rows])


def count_missed(rows: Sequence[Mapping]) -> int:
    """Count the rows of which exactly one mask is empty: their distances are the diagonal."""
    errors = values_of(rows, "volume_error")
    return int(((errors == -1) | np.isnan(errors)).sum())


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """Return the slices of the smallest box around a mask that is not empty, and its `margin`."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        places = np.flatnonzero(mask.any(axis=others))
        box.append(slice(max(int(places[0]) - margin, 0), int(places[-1]) + 1 + margin))
    return tuple(box)


def components(mask: np.ndarray) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Number the components (26 neighbours) of a mask (S, H, W) that is not empty, from 1 on.

    Returned are the numbers in the mask's bounding box, 0 outside the mask, and the box.
    """
    from scipy import ndimage

    box = bounding_box(mask)
    numbers = np.empty(mask[box].shape, np.int32)
    ndimage.label(mask[box], np.ones((3, 3, 3)), numbers)
    return numbers, box


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))  # plain: a checkpoint holds no number of NumPy
