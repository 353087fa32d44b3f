"""Several networks as one, and an estimate of how good a mask is.

An ensemble averages the probabilities of networks that were trained on different patients. If they
are confident and agree, the mask is usually right: `quality` measures that on one mask,
`fit_expected_dsc` learns from scored cases how it predicts the DSC, and `expected_dsc` makes the
prediction. The fit is in the weights' card under "expected_dsc".
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .weights import CARD_DEFAULTS, load_state, model_from_state, read_card

WARN_BELOW = 0.7  # a mask with a lower expected DSC needs checking
# What `quality` measures: 1 if a higher value means a better mask, -1 if a worse one.
FEATURES = {"overlap": 1, "confidence": 1, "log_share": 1, "kept": 1, "disagreement": -1}
LEAST_CASES = 20  # for a fit
RIDGE, HUBER = 1.0, 0.1  # the ridge weighs as one case; residuals above HUBER count linearly


class Ensemble(nn.Module):
    """Networks that are called as one: slices (N, in, H, W) in, probabilities out.

    The output is the average (N, out, H, W); several networks add a channel (see `average`).
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.settings = networks[0].settings
        self.stride = max(network.stride for network in networks)  # powers of 2

    def forward(self, slices: Tensor) -> Tensor:
        return average([net(slices, logits=True).float().sigmoid() for net in self.networks])


def networks_of(model: nn.Module) -> list[nn.Module]:
    """List the networks of an ensemble, or the one network."""
    return list(model.networks) if isinstance(model, Ensemble) else [model]


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Copy a network for inference, its batch norms folded into the convolutions before them.

    Outputs are equal up to rounding: W x + b, then g (. - m) / s + h, is one convolution with
    W g / s and (b - m) g / s + h.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model


def load_ensemble(paths: Sequence[Path]) -> tuple[nn.Module, dict]:
    """Load one network, or several as an `Ensemble`, and their common card.

    The card has the training cases and patients of all members, and drops what differs between
    them, such as the epoch. Raises ValueError, naming the file, if one cannot be used or, of
    several, has no card or was trained for a different input from the first.
    """
    named = [model_from_state(load_state(path), path) for path in paths]
    cards = [read_card(path) for path in paths]
    networks = [network for _, network in named]
    about = {"model": named[0][0], "settings": networks[0].settings}
    if len(paths) == 1:
        return networks[0], cards[0] | about
    check_members(paths, cards, networks)
    common = {k: v for k, v in cards[0].items() if all(card.get(k) == v for card in cards)}
    seen = sorted({case for card in cards for case in card.get("cases", {}).get("train", ())})
    common["cases"] = {"train": seen}
    if patients := {k: v for card in cards for k, v in card.get("patients", {}).items()}:
        common["patients"] = patients
    return Ensemble(networks), common | about


def check_members(
    paths: Sequence[Path], cards: Sequence[dict], networks: Sequence[nn.Module]
) -> None:
    """Raise ValueError, naming the file, unless inputs and outputs match those of the first."""
    wanted: dict[str, object] = {}
    for path, card, network in zip(paths, cards, networks, strict=True):
        if not card:
            raise ValueError(
                f"{path}: has no card (.json) to show that it belongs with {paths[0].name}; "
                "give it by itself, or take it out of the folder"
            )
        has = {k.replace("_", " "): card.get(k, default) for k, default in CARD_DEFAULTS.items()}
        has |= {k: network.settings[k] for k in ("in_channels", "out_channels")}
        wanted = wanted or has
        for name, value in has.items():
            if value != wanted[name]:
                raise ValueError(
                    f"{path}: has {name} {value}, but {paths[0].name} has {wanted[name]}; networks "
                    "that are averaged must agree: name those that belong together"
                )


def average(outputs: Sequence[Tensor]) -> Tensor:
    """Average probabilities (N, K, H, W) of several networks.

    With more than one, a last channel holds the standard deviation of their first channels.
    """
    if len(outputs) == 1:
        return outputs[0]
    stacked = torch.stack(tuple(outputs))  # (networks, N, K, H, W)
    mean = stacked.mean(dim=0)
    deviation = (stacked[:, :, :1] - mean[:, :1]).square().mean(dim=0).sqrt()
    return torch.cat((mean, deviation), dim=1)


def quality(
    probabilities: np.ndarray, mask: np.ndarray, deviation: np.ndarray | None = None
) -> dict[str, float | None]:
    """Measure, without the truth, what indicates a good mask; 0 for an empty one.

    The `probabilities` p, the `mask` made from them and, for an ensemble, the `deviation` of its
    networks (see `average`) are (S, H, W); q = p² + deviation² is the networks' mean square.
    overlap: 2 sum(q in mask) / (sum(q) + sum(p in mask)). confidence: sum(q in mask) / sum(p in
    mask). For one network, these are the Dice of map and mask and the mean probability in the mask,
    both weighted by p; for an ensemble, their values over its networks, however much these differ,
    so a fit to single networks holds for their average. log_share: decimal logarithm of the mask's
    share of the volume. kept: its size over the number of voxels at 0.5 or more, at most 1.
    disagreement: sum(deviation) / sum(p), None for one network.
    """
    square = np.square(probabilities, dtype=np.float64)
    if deviation is not None:
        square += np.square(deviation, dtype=np.float64)
    total, inside = float(probabilities.sum(dtype=np.float64)), float(square[mask].sum())
    weight, voxels = float(probabilities[mask].sum(dtype=np.float64)), int(mask.sum())
    return {
        "overlap": 2 * inside / max(float(square.sum()) + weight, 1e-6),
        "confidence": inside / max(weight, 1e-6),
        "log_share": float(np.log10(voxels / mask.size)) if voxels else 0.0,
        "kept": min(voxels / max(int((probabilities >= 0.5).sum()), 1), 1.0),
        "disagreement": None if deviation is None else float(deviation.sum()) / max(total, 1e-6),
        "voxels": voxels,
    }


def expected_dsc(features: dict, fit: dict | None) -> tuple[float, float, float] | None:
    """Predict the DSC of a mask from its `quality`: expected value and 80 % interval.

    None without a fit, for an empty mask (right only if the scan has no lesion, which is unknown),
    and if the fit needs a feature that is None.
    """
    if not (fit or {}).get("features") or not features["voxels"]:
        return None
    values = [features.get(name) for name in fit["features"]]
    if any(value is None for value in values):
        return None
    value = _predict(fit, values)
    low, high = (value + q * _width(value) for q in fit["interval"])
    return value, max(low, 0.0), min(high, 1.0)


def fit_expected_dsc(features: Sequence[dict], dsc: Sequence[float]) -> dict:
    """Fit a linear regression of the DSC on `quality`, for cases that no network has seen.

    No weight may have the wrong sign (non-negative least squares with a ridge): a small sample
    cannot turn a warning into praise. The Huber loss keeps one completely missed lesion from
    bending the rest. The 80 % interval holds quantiles of the leave-one-out residuals over
    `_width`. Empty masks are left out. Raises ValueError for fewer than 20 cases.
    """
    pairs = [(f, d) for f, d in zip(features, dsc, strict=True) if f["voxels"]]
    if len(pairs) < LEAST_CASES:
        raise ValueError(
            f"{len(pairs)} case(s) with a mask, but {LEAST_CASES} are needed to learn to predict "
            "the DSC; choose more with --subset or --images"
        )
    names = [n for n in FEATURES if all(f.get(n) is not None for f, _ in pairs)]
    x = np.array([[f[name] for name in names] for f, _ in pairs], dtype=np.float64)
    y = np.array([d for _, d in pairs], dtype=np.float64)
    predicted = leave_one_out(names, x, y)
    interval = np.quantile((y - predicted) / _width(predicted), (0.1, 0.9)).tolist()
    about = {"interval": interval, "cases": len(y), "empty": len(dsc) - len(y)}
    return _regress(names, x, y) | about | {"leave_one_out": _agreement(predicted, y)}


def leave_one_out(names: Sequence[str], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Predict each case (n,) by a regression on the others; `x` is (n, features), `y` (n,)."""
    others = ~np.eye(len(y), dtype=bool)
    fits = [_regress(names, x[keep], y[keep]) for keep in others]
    return np.array([_predict(fit, row) for fit, row in zip(fits, x, strict=True)])


def _regress(names: Sequence[str], x: np.ndarray, y: np.ndarray) -> dict:
    from scipy.optimize import nnls  # slow to import

    mean, deviation, signs = x.mean(axis=0), x.std(axis=0), np.array([FEATURES[n] for n in names])
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    z = (x - mean) / deviation * signs
    ridge, zeros = np.sqrt(RIDGE) * np.eye(len(names)), np.zeros(len(names))
    weights, trust = zeros, np.ones(len(y))
    for _ in range(20):  # iteratively reweighted least squares
        intercept = np.average(y - z @ weights, weights=trust)
        root = np.sqrt(trust)
        target = np.append(root * (y - intercept), zeros)
        weights, _ = nnls(np.vstack((root[:, None] * z, ridge)), target)
        trust = HUBER / np.maximum(np.abs(y - intercept - z @ weights), HUBER)
    return {
        "features": list(names),
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "weights": (weights * signs).tolist(),
        "intercept": float(intercept),
    }


def _predict(fit: dict, values: Sequence[float]) -> float:
    z = (np.asarray(values) - fit["mean"]) / fit["deviation"]
    return float(np.clip(fit["intercept"] + z @ np.array(fit["weights"]), 0, 1))


def _width(value: np.ndarray | float) -> np.ndarray | float:
    """Compute the scale of residuals: the DSC of a probably good mask varies less."""
    return 1.05 - value


def _agreement(predicted: np.ndarray, dsc: np.ndarray) -> dict:
    """Measure how well DSCs predicted with each case left out agree with the true ones."""
    from scipy.stats import spearmanr  # slow to import

    constant = np.ptp(predicted) == 0 or np.ptp(dsc) == 0
    poor, warned = dsc < WARN_BELOW, predicted < WARN_BELOW
    return {
        "spearman": None if constant else float(spearmanr(predicted, dsc).statistic),
        "mean_error": float(np.abs(predicted - dsc).mean()),
        "poor": int(poor.sum()),
        "warned": int((poor & warned).sum()),
        "false_alarms": int((~poor & warned).sum()),
        "predicted": [round(float(value), 4) for value in predicted],
        "dsc": [round(float(value), 4) for value in dsc],
    }


def quality_warnings(
    features: dict,
    expected: tuple[float, float, float] | None,
    notes: Sequence[str] = (),
    dropped: int = 0,
) -> list[str]:
    """List in words what calls for a second look; `notes` are those of the `Frame`.

    `dropped` is the number of voxels at 0.5 or more that an empty mask does not have.
    """
    warnings = [f"unusual input: {note}" for note in notes]
    if dropped:
        warnings.append(
            f"the mask is empty: components of {dropped} voxels in all are smaller than the "
            "minimum volume (--min-volume); look at it"
        )
    elif not features["voxels"]:
        warnings.append("the mask is empty: the scan has no lesion, or it was missed; look at it")
    elif expected and expected[0] < WARN_BELOW:
        value, low, high = expected
        warnings.append(
            f"the mask is probably poor: expected DSC {value:.2f} ({low:.2f} to {high:.2f}); "
            "check it against the scan"
        )
    return warnings


def assess(
    probabilities: np.ndarray,
    mask: np.ndarray,
    deviation: np.ndarray | None,
    fit: dict | None,
    notes: Sequence[str] = (),
) -> tuple[dict, tuple[float, float, float] | None, list[str]]:
    """Measure the `quality` of a mask; return it, the expected DSC, and any warnings.

    `fit` is that of the card, `notes` are those of the `Frame`.
    """
    features = quality(probabilities, mask, deviation)
    expected = expected_dsc(features, fit)
    dropped = 0 if mask.any() else int((probabilities >= 0.5).sum())
    return features, expected, quality_warnings(features, expected, notes, dropped)
