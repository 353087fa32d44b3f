"""Learn from scored cases what DSC to expect of a mask, and save it in the cards of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..ensemble import FEATURES, WARN_BELOW, fit_expected_dsc
from ..io.files import write_json
from ..io.pictures import new_figure, save_figure
from ..segmenter import FITTED_WITH
from ..weights import read_card
from .scoring import Model


def check_can_fit(models: Sequence[Model]) -> None:
    """Raise ValueError unless there is one model, with weights whose cards can hold a fit."""
    if len(models) > 1:
        raise ValueError("--fit-expected-dsc is for one model; give --weights a single one")
    (model,) = models
    if model.scores or any(file.suffix != ".pt" for file in model.seen):
        raise ValueError(
            f"{model.path}: --fit-expected-dsc needs .pt weights; fit those, then export them"
        )
    for file, patients in model.seen.items():
        if not patients:
            raise ValueError(
                f"{file}: no card says what it was trained on, and the expected DSC can "
                "only be learnt from other cases; put the card that train.py wrote next to it"
            )
        size, trained = model.segmenter.image_size, read_card(file).get("image_size")
        if size != trained:
            raise ValueError(
                f"{file}: was trained on slices of {trained} x {trained}, for which the fit must "
                "be made; leave out --image-size"
            )


def fit_and_save(model: Model, rows: Sequence[dict], figure: Path) -> str:
    """Fit on the rows of scores.csv, write the cards and the figure, and return a summary.

    The cards also record the options that the masks were made with. Raises ValueError for too few
    cases.
    """
    features = [
        {name: row[name] for name in FEATURES} | {"voxels": row["predicted_voxels"]} for row in rows
    ]
    fit = fit_expected_dsc(features, [row["dsc"] for row in rows])
    scores = fit["leave_one_out"]
    predicted, true = scores.pop("predicted"), scores.pop("dsc")
    save_scatter(figure, predicted, true)
    fit |= {name: getattr(model.segmenter, name) for name in FITTED_WITH}
    for file in model.seen:
        write_json(file.with_suffix(".json"), read_card(file) | {"expected_dsc": fit})
    rank = "undefined" if scores["spearman"] is None else f"{scores['spearman']:.2f}"
    empty = f", {fit['empty']} empty mask(s) left out" if fit["empty"] else ""
    return (
        f"expected DSC, fitted on {fit['cases']} cases{empty}; leave-one-out: rank "
        f"correlation (Spearman) {rank}, mean error {scores['mean_error']:.3f}, "
        f"{scores['warned']} of {scores['poor']} masks under {WARN_BELOW} get a warning, with "
        f"{scores['false_alarms']} false alarms; saved in the card of {len(model.seen)} file(s)"
    )


def save_scatter(path: Path, expected: Sequence[float], true: Sequence[float]) -> None:
    """Plot the true DSC of every case against the expected one."""
    figure = new_figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.8", zorder=0)
    for line in (axes.axvline, axes.axhline):
        line(WARN_BELOW, color="0.8", linestyle="--", zorder=0)
    axes.scatter(expected, true, s=16)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="expected DSC, fitted on the other cases", ylabel="DSC")
    save_figure(path, figure, dpi=120)
