"""Rate a mask without the truth: measure it, predict its DSC, and warn of masks that may be poor.

If the networks of an ensemble are confident and agree, the mask is usually right. `quality`
measures that on one mask, `fit_expected_dsc` learns from scored cases how it predicts the DSC, and
`expected_dsc` makes the prediction. The fit is in the weights' card under "expected_dsc".
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .appearance import fit_looks, unlikeness
from .io.files import RUN, write_json, write_table
from .io.pictures import new_figure, save_figure
from .metrics import values_of
from .volume_errors import conformal_limits, fit_volume_errors
from .weights import read_card

POOR = 0.7  # a mask with a lower DSC needs checking
WARN_BELOW = 0.75  # expected DSC; a fit errs towards the mean, so that of poor masks is higher
LARGEST = 0.25  # share of a scan; of 88 cases of LGG, the largest lesion has 0.05
# What `quality` measures: 1 if a higher value means a better mask, -1 if a worse one.
FEATURES = {"overlap": 1, "confidence": 1, "log_share": 1, "kept": 1, "disagreement": -1}
NOTED = 1.5  # a scan so many times as unlike those of the fit as usual ones at most are
LEAST_CASES = 20  # for a fit
# Options that a fit is for, beside the image size.
FITTED_WITH = ("threshold", "largest_component", "min_volume", "tta")
FIT_OF_ENSEMBLE = "the fit is for an ensemble"  # why one network has no expected DSC
RIDGE, HUBER = 1.0, 0.1  # the ridge weighs as one case; residuals above HUBER count linearly


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
    disagreement: sum(deviation) / sum(p), None for one network. Beside these, voxels: the size of
    the mask; certain: the number of voxels at 0.5 or more.
    """
    inside = everywhere = 0.0  # sums of q
    for part in (probabilities, deviation):
        if part is not None:
            inside += float(np.square(part[mask], dtype=np.float64).sum())
            # Without a copy in float64, which would be the largest array of a run.
            everywhere += float(np.einsum("shw,shw->", part, part, dtype=np.float64))
    weight = float(probabilities[mask].sum(dtype=np.float64))
    voxels, certain = int(mask.sum()), int((probabilities >= 0.5).sum())
    features = {
        "overlap": 2 * inside / max(everywhere + weight, 1e-6),
        "confidence": inside / max(weight, 1e-6),
        "log_share": float(np.log10(voxels / mask.size)) if voxels else 0.0,
        "kept": min(voxels / max(certain, 1), 1.0),
        "disagreement": None,
        "voxels": voxels,
        "certain": certain,
    }
    if deviation is not None:
        total = float(probabilities.sum(dtype=np.float64))
        features["disagreement"] = float(deviation.sum()) / max(total, 1e-6)
    return features


def expected_dsc(features: dict, fit: dict | None) -> tuple[float, float, float] | None:
    """Predict the DSC of a mask from its `quality`: expected value and 80 % interval.

    The interval is wider for a scan that looks unlike those of the fit (`unlikeness`). None without
    a fit, for an empty mask (right only if the scan has no lesion, which is unknown), and if the
    fit needs a feature that is None.
    """
    if not fit or not fit.get("features") or not features["voxels"]:
        return None
    if any(features.get(name) is None for name in fit["features"]):
        return None
    value = _predict(fit, [features[name] for name in fit["features"]])
    low, high = fit["interval"]
    width = _width(value) * unlikeness(features, fit.get("looks"))
    return value, max(value + low * width, 0.0), min(value + high * width, 1.0)


def fit_expected_dsc(
    features: Sequence[dict], dsc: Sequence[float], patients: Sequence[str] | None = None
) -> dict:
    """Fit a linear regression of the DSC on `quality`, for cases that no network has seen.

    No weight may have the wrong sign (non-negative least squares with a ridge): a small sample
    cannot turn a warning into praise. The Huber loss keeps one completely missed lesion from
    bending the rest. The 80 % interval is conformal (`conformal_limits`), of residuals over
    `_width` in predictions by a fit to the other patients (Barber et al. 2021, jackknife). Without
    `patients`, each case is one. Empty masks are left out. Raises ValueError for fewer than 20
    cases.
    """
    masks, y, owners = _with_mask(features, dsc, patients)
    check_cases(len(masks))
    names, columns = [], []
    for name in FEATURES:
        column = [mask.get(name) for mask in masks]
        if None not in column:
            names.append(name)
            columns.append(column)
    x = np.array(columns, dtype=np.float64).T.copy()  # (n, features)
    fit = _regress(names, x, y)
    fit |= {"looks": fit_looks(masks), "empty": len(dsc) - len(y)}
    return _with_interval(fit, masks, leave_one_out(names, x, y, owners), y, owners)


def recentre(
    fit: dict, features: Sequence[dict], dsc: Sequence[float], patients: Sequence[str]
) -> dict:
    """Move a fit to another network, by masks of cases that this network has not seen.

    The regression stays: it takes many masks, poor ones among them. The intercept moves by the mean
    error of these masks, and their errors give the 80 % interval. Empty masks are left out. Raises
    ValueError if fewer than two patients have a mask.
    """
    masks, y, owners = _with_mask(features, dsc, patients)
    if len(set(owners)) < 2:
        raise ValueError("masks of at least two patients are needed to move a fit of the DSC")
    before = []
    for mask in masks:
        before.append(_predict(fit, [mask[name] for name in fit["features"]]))
    errors = y - before
    shifts = [errors[owners != owner].mean() for owner in owners]
    predicted = np.clip(np.add(before, shifts), 0, 1)
    moved = {"intercept": fit["intercept"] + float(errors.mean()), "empty": len(dsc) - len(y)}
    return _with_interval(fit | moved, masks, predicted, y, owners)


def _with_mask(
    features: Sequence[dict], dsc: Sequence[float], patients: Sequence[str] | None
) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Pick features, DSC and patient of the masks that are not empty; each is a patient if None."""
    masks, scores, owners = [], [], []
    for k, (measured, score) in enumerate(zip(features, dsc, strict=True)):
        if measured["voxels"]:
            masks.append(measured)
            scores.append(score)
            owners.append(patients[k] if patients else str(k))
    return masks, np.array(scores, dtype=np.float64), np.array(owners)


def _with_interval(
    fit: dict, masks: Sequence[dict], predicted: np.ndarray, y: np.ndarray, owners: np.ndarray
) -> dict:
    """Add the interval to a fit, and how well DSCs `predicted` without each patient agree."""
    widths = _width(predicted) * np.array([unlikeness(mask, fit["looks"]) for mask in masks])
    residuals = (y - predicted) / widths
    agreement = _agreement(predicted, y)
    agreement["coverage"] = coverage(residuals, owners)
    interval = list(conformal_limits(residuals))
    return fit | {"interval": interval, "cases": len(y), "leave_one_out": agreement}


def check_cases(number: int) -> None:
    """Raise ValueError if a `number` of cases with a mask is too small for a fit."""
    if number < LEAST_CASES:
        raise ValueError(
            f"{number} case(s) with a mask, but {LEAST_CASES} are needed to learn to predict "
            "the DSC; choose more with --subset or --images"
        )


def leave_one_out(
    names: Sequence[str], x: np.ndarray, y: np.ndarray, patients: np.ndarray
) -> np.ndarray:
    """Predict each case (n,) by a regression on those of other patients.

    `x` is (n, features), `y` (n,), `patients` (n,) names.
    """
    predicted = []
    for k in range(len(y)):
        others = patients != patients[k]
        predicted.append(_predict(_regress(names, x[others], y[others]), x[k]))
    return np.array(predicted)


def coverage(residuals: np.ndarray, patients: np.ndarray) -> float:
    """Compute the share of cases within the conformal limits of the other patients' residuals."""
    inside = 0
    for k, residual in enumerate(residuals):
        low, high = conformal_limits(residuals[patients != patients[k]])
        inside += low <= residual <= high
    return inside / len(residuals)


def _regress(names: Sequence[str], x: np.ndarray, y: np.ndarray) -> dict:
    from scipy.optimize import nnls  # slow to import

    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    signs = np.array([FEATURES[name] for name in names])
    z = (x - mean) / deviation * signs
    ridge, zeros = np.sqrt(RIDGE) * np.eye(len(names)), np.zeros(len(names))
    weights, intercept, trust = zeros, 0.0, np.ones(len(y))
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

    spearman = None
    if np.ptp(predicted) > 0 and np.ptp(dsc) > 0:
        spearman = float(spearmanr(predicted, dsc).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    poor, warned = dsc < POOR, predicted < WARN_BELOW
    return {
        "spearman": spearman,
        "mean_error": float(np.abs(predicted - dsc).mean()),
        "poor": int(poor.sum()),
        "warned": int((poor & warned).sum()),
        "false_alarms": int((~poor & warned).sum()),
        "predicted": predicted.round(4).tolist(),
        "dsc": dsc.round(4).tolist(),
    }


def mask_settings(card: dict) -> dict:
    """Return the settings of masks in a card: of its fit or, without one, of the start weights."""
    stated = card.get("expected_dsc") or card.get("mask_settings") or {}
    return {name: stated[name] for name in FITTED_WITH if name in stated}


def quality_warnings(
    features: dict, expected: tuple[float, float, float] | None, doubts: Sequence[str] = ()
) -> list[str]:
    """List in words what calls for a second look; `doubts` are those of the `Frame`."""
    warnings = [f"unusual input: {doubt}" for doubt in doubts]
    if not features["voxels"] and features["certain"]:
        warnings.append(
            f"the mask is empty: components of {features['certain']} voxels in all are smaller "
            "than the minimum volume and were dropped (--min-volume); look at it"
        )
    elif not features["voxels"]:
        warnings.append(
            "the mask is empty: there may be no tumour in this scan, or it was missed; look at it"
        )
    elif expected and expected[0] < WARN_BELOW:
        value, low, high = expected
        warnings.append(
            f"the mask is probably poor: expected DSC {value:.2f} ({low:.2f} to {high:.2f}); "
            "or there may be no tumour in this scan: check it against the scan"
        )
    if features["voxels"] and features["log_share"] > np.log10(LARGEST):
        share = 10 ** features["log_share"]
        warnings.append(f"the mask fills {share:.0%} of the scan, more than a lesion can")
    return warnings


def unlikeness_notes(features: dict, fit: dict | None) -> list[str]:
    """Note that a scan looks unlike those of the fit of the expected DSC, if it does."""
    wider = unlikeness(features, (fit or {}).get("looks"))
    if wider <= NOTED:
        return []
    return [
        "the scan looks unlike those that the expected DSC was fitted on: its interval is "
        f"{wider:.1f} times as wide as theirs"
    ]


def fit_and_save(files: Sequence[Path], options: dict, rows: Sequence[dict], folder: Path) -> str:
    """Fit on the rows of scores.csv, write the fit into the cards of `files`; return a summary.

    `options` are those that the masks were made with; the cards record them. Writes the scatter
    plot expected_dsc.png and volume_errors.csv, of which the cards hold the summary, to `folder`.
    Raises ValueError for too few cases.
    """
    features = [row | {"voxels": row["predicted_voxels"]} for row in rows]
    patients = values_of(rows, "patient").tolist()
    fit = fit_expected_dsc(features, values_of(rows, "dsc").tolist(), patients)
    scores = fit["leave_one_out"]
    predicted, true = scores.pop("predicted"), scores.pop("dsc")
    save_scatter(folder / "expected_dsc.png", predicted, true)
    volumes = volume_rows(rows, predicted, fit["looks"])
    write_table(folder / "volume_errors.csv", volumes)
    sizes, true_sizes = values_of(volumes, "predicted_voxels"), values_of(volumes, "lesion_voxels")
    fit["volume_errors"] = fit_volume_errors(predicted, sizes.tolist(), true_sizes.tolist())
    fit |= options
    for file in files:
        write_json(file.with_suffix(".json"), read_card(file) | {"expected_dsc": fit})
    rank = "undefined"
    if scores["spearman"] is not None:
        rank = f"{scores['spearman']:.2f}"
    empty = ""
    if fit["empty"]:
        empty = f", {fit['empty']} empty mask(s) left out"
    return (
        f"expected DSC, fitted on {fit['cases']} cases{empty}; leave-one-out: rank "
        f"correlation (Spearman) {rank}, mean error {scores['mean_error']:.3f}, "
        f"{scores['warned']} of {scores['poor']} masks under {POOR} get a warning, with "
        f"{scores['false_alarms']} false alarms, the 80 % interval covers "
        f"{scores['coverage']:.2f}; saved in the card of {len(files)} file(s)"
    )


def volume_rows(rows: Sequence[dict], predicted: Sequence[float], usual: dict | None) -> list[dict]:
    """List volumes, DSC and the DSC expected by a fit to the others, of masks that are not empty.

    `rows` are those of scores.csv, `predicted` holds the expected DSC of each mask that is not
    empty, `usual` is what `fit_looks` learnt.
    """
    drawn = [row for row in rows if row["predicted_voxels"]]
    columns = ("case", "patient", "predicted_voxels", "lesion_voxels", RUN, "dsc")
    table = []
    for row, expected in zip(drawn, predicted, strict=True):
        forecast = {"expected_dsc": expected, "unlikeness": unlikeness(row, usual)}
        table.append({name: row[name] for name in columns} | forecast)
    return table


def save_scatter(path: Path, expected: Sequence[float], true: Sequence[float]) -> None:
    """Plot the true DSC of every case against the expected one."""
    figure = new_figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.8", zorder=0)
    axes.axvline(WARN_BELOW, color="0.8", linestyle="--", zorder=0)
    axes.axhline(POOR, color="0.8", linestyle="--", zorder=0)
    axes.scatter(expected, true, s=16)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="expected DSC, fitted on the other cases", ylabel="DSC")
    save_figure(path, figure, dpi=120)
