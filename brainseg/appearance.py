"""Measure how a scan looks to the network, and how far that is from the scans of a fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

AIR = -1.6  # of preprocessing 2, whose air is -2 and whose median tissue is 0
MOST_VOXELS = 1_000_000  # to measure on
USUAL = 0.9  # of the scans of the fit look at most as unlike as its limit
# What is measured: three quantiles of FLAIR in the head, its share of the slices, their number.
LOOKS = ("flair_dark", "flair_bright", "flair_brightest", "head_share", "log_slices")


def looks(images: Tensor, flair: int) -> tuple[float, ...]:
    """Measure the network's input (S, C, N, N); `flair` is the number of FLAIR's channel.

    flair_dark, flair_bright and flair_brightest are the 10th, 90th and 99th percentile of FLAIR in
    the head (a bare brain lacks the bright scalp), head_share is the head's share of all pixels,
    log_slices the decimal logarithm of the number of slices.
    """
    every = max(1, images[:, flair].numel() // MOST_VOXELS)
    voxels = images[:, flair].flatten()[::every].cpu().numpy()
    head = voxels[voxels > AIR]
    if not head.size:
        return ()
    quantiles = np.percentile(head, (10, 90, 99)).tolist()
    return (*quantiles, head.size / voxels.size, float(np.log10(len(images))))


def fit_looks(scans: Sequence[dict]) -> dict | None:
    """Learn what is usual from the `LOOKS` of scans, for a card; None if they were not measured."""
    rows = []
    for scan in scans:
        rows.append(list(map(scan.get, LOOKS)))
        if None in rows[-1]:
            return None
    values = np.array(rows, dtype=np.float64)
    mean, deviation = values.mean(axis=0), np.maximum(values.std(axis=0), 1e-6)
    distances = _distances(values, mean, deviation)
    return {
        "names": list(LOOKS),
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "usual": float(np.quantile(distances, USUAL)),
    }


def unlikeness(scan: dict, fit: dict | None) -> float:
    """Say how many times as far from the mean a scan looks as usual ones at most do; at least 1.

    `scan` holds its `LOOKS`; without these, or without a fit, it is 1.
    """
    if not fit:
        return 1.0
    values = list(map(scan.get, fit["names"]))
    if None in values:
        return 1.0
    distance = _distances(
        np.array(values, np.float64), np.array(fit["mean"]), np.array(fit["deviation"])
    )
    return max(1.0, float(distance) / fit["usual"])


def _distances(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Compute root mean square z-scores over the last axis."""
    return np.sqrt(np.mean(np.square((values - mean) / deviation), axis=-1))
