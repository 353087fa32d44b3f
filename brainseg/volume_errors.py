"""Fit the interval of a lesion's true volume on scored cases that no network was trained on."""

import math
from collections.abc import Sequence

import numpy as np

COVERAGE = 0.8  # of the interval
POWER = 1.5  # of the scale: the errors of good masks spread far less than those of poor ones
BEST = 1.05  # the scale at an expected DSC of 1 is above 0
GROUPS = 3  # of lesions, by size


def scale(expected_dsc: np.ndarray | float) -> np.ndarray | float:
    """Compute the scale of log(true volume / volume of the mask) at an expected DSC."""
    return (BEST - expected_dsc) ** POWER


def fit_volume_errors(
    expected_dsc: Sequence[float], predicted: Sequence[int], true: Sequence[int]
) -> dict:
    """Fit the interval of a lesion's volume, and tabulate the errors by size, for a card.

    The DSCs must be expected by a fit to the other cases; volumes are in voxels, and empty masks
    must be left out. `interval` holds two residuals, log(true / predicted) over `scale`: as many
    cases lie outside as a conformal interval of the coverage allows, half of them at each end.
    """
    drawn = np.maximum(np.asarray(true, float), 1.0)  # a head without a lesion has a logarithm, too
    measured = np.asarray(predicted, float)
    residuals = np.log(drawn / measured) / scale(np.asarray(expected_dsc, float))
    return {
        "interval": list(conformal_limits(residuals)),
        "cases": len(residuals),
        "by_size": limits_of_agreement(measured, drawn),
    }


def conformal_limits(residuals: np.ndarray) -> tuple[float, float]:
    """Return the limits between which the residual of a new case lies, with the COVERAGE.

    The finite-sample ranks of split conformal prediction: the k-th smallest and k-th largest
    with k = floor((n + 1) (1 - COVERAGE) / 2), at least 1.
    """
    ranked = np.sort(residuals)
    rank = max(1, math.floor((len(ranked) + 1) * (1 - COVERAGE) / 2 + 1e-9))
    return float(ranked[rank - 1]), float(ranked[-rank])


def limits_of_agreement(predicted: np.ndarray, true: np.ndarray) -> list[dict]:
    """Tabulate bias and 95 % limits of agreement by size of the true lesion, in thirds.

    Differences are in % of the mean of both volumes, the mask's minus the true one; limits are
    mean -/+ 1.96 standard deviations (Bland and Altman 1986).
    """
    difference = 200 * (predicted - true) / (predicted + true)
    rows = []
    for group in np.array_split(np.argsort(true, kind="stable"), GROUPS):
        bias = float(difference[group].mean())
        spread = 1.96 * float(difference[group].std(ddof=1))
        rows.append(
            {
                "from_voxels": int(true[group[0]]),
                "to_voxels": int(true[group[-1]]),
                "cases": len(group),
                "bias_percent": round(bias, 1),
                "low_percent": round(bias - spread, 1),
                "high_percent": round(bias + spread, 1),
            }
        )
    return rows
