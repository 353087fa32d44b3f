"""The report of a comparison: tables, a figure, a gallery, and a page with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..io.pictures import new_figure, save_figure
from ..metrics import FEW
from ..reports.page import Table, write_page
from .statistics import SCORES, SETTINGS


def tables(summary: dict[str, dict]) -> list[Table]:
    """Turn the summary of `compare` into tables."""
    tried = {name: about for name, about in summary.items() if "settings" in about}
    divided = next(iter(summary.values()))["groups"]
    return [
        _score_table(summary),
        *([_difference_table(summary)] if len(summary) > 1 else []),
        *([_group_table(summary)] if divided else []),
        *([_settings_table(tried)] if tried else []),
    ]


def _score_table(summary: dict[str, dict]) -> Table:
    rows = []
    notes = [
        "Means over cases, each scored in the geometry of its source. Intervals: bootstrap over "
        f"patients, for {FEW} cases or more. (k): mean over the k cases where the score is defined."
    ]
    for name, about in summary.items():
        dsc, *others = about["scores"].values()
        means = (_mean(other, dsc["n"]) for other in others)
        rows.append([name, str(dsc["n"]), _interval(dsc), f"{dsc['median']:.3f}", *means])
        if about.get("missed"):
            notes.append(
                f"{name}: in {about['missed']} of the cases only one of the masks is empty; there, "
                "HD95 and ASSD are the diagonal of the image."
            )
        if about["chose_epoch"]:
            notes.append(
                f"{name}: the epoch of its weights was chosen on {about['chose_epoch']} of these "
                "cases, which makes its score too good; train with --keep last to avoid this."
            )
    _, *others = next(iter(summary.values()))["scores"]
    return Table(
        "Scores",
        ["model", "n", "DSC (95 % interval)", "median", *(SCORES[name] for name in others)],
        rows,
        "\n".join(notes),
    )


def _mean(s: dict[str, float], cases: int) -> str:
    if not s["n"]:
        return "none"
    return f"{s['mean']:.3f}" + (f" ({s['n']})" if s["n"] < cases else "")


def _difference_table(summary: dict[str, dict]) -> Table:
    first, *others = summary
    differences = {name: summary[name]["difference"] for name in others}
    rows = [
        [name, _interval(d, "+"), f"{d['median']:+.3f}", str(d["better"]), str(d["worse"])]
        for name, d in differences.items()
    ]
    return Table(
        f"Difference in DSC from {first}, case by case",
        ["model", "mean (95 % interval)", "median", "better in", "worse in"],
        rows,
        "If the interval contains 0, these cases do not show a difference.",
    )


def _group_table(summary: dict[str, dict]) -> Table:
    first, *others = summary
    rows = []
    for group, values in summary[first]["groups"].items():
        for value, about in values.items():
            row = [f"{group}: {value or 'other'}", str(about["dsc"]["n"]), _interval(about["dsc"])]
            for name in others:
                other = summary[name]["groups"][group][value]
                row += [_interval(other["dsc"]), _interval(other["difference"], "+")]
            rows.append(row)
    header = [part for name in others for part in (name, f"vs {first}")]
    return Table(
        "DSC by group",
        ["group", "n", first, *header],
        rows,
        f"Exploratory: many groups, few cases in each. No interval below {FEW} cases.",
    )


def _settings_table(summary: dict[str, dict]) -> Table:
    rows = []
    for setting, (threshold, largest) in SETTINGS.items():
        row = [f"{threshold}, {'largest component' if largest else 'every component'}"]
        for about in summary.values():
            tried = about["settings"][setting]
            row += [f"{tried['dsc']['mean']:.3f}", _interval(tried["difference"], "+")]
        rows.append(row)
    header = [part for name in summary for part in (f"{name}: DSC", "vs the setting used")]
    return Table(
        "Effect of the threshold and the largest component",
        ["setting", *header],
        rows,
        "Choose a setting on validation cases only, then score it on other cases.",
    )


def _interval(s: dict[str, float], sign: str = "") -> str:
    if not s["n"]:
        return "none"
    if s["n"] < FEW:
        return f"{s['mean']:{sign}.3f}"
    return f"{s['mean']:{sign}.3f} ({s['low']:{sign}.3f} to {s['high']:{sign}.3f})"


def case_table(models: dict[str, list[dict]]) -> Table:
    """List the DSC of every case, sorted from the worst of the first model."""
    lines = sorted(zip(*models.values(), strict=True), key=lambda line: line[0]["dsc"])
    about = ("case", "slices", "lesion_voxels", "missing")
    return Table(
        "Every case",
        ["case", "slices", "lesion voxels", "missing", *(f"{name}: DSC" for name in models)],
        [
            [*(str(line[0][name]) for name in about), *(f"{row['dsc']:.3f}" for row in line)]
            for line in lines
        ],
    )


def save_scores(path: Path, models: dict[str, list[dict]]) -> None:
    """Draw a box plot of the DSCs of each model, with a point per case."""
    figure = new_figure(figsize=(2.2 + 1.3 * len(models), 4.2))
    axes = figure.add_subplot()
    scores = [[row["dsc"] for row in rows] for rows in models.values()]
    axes.boxplot(scores, widths=0.5, showfliers=False, medianprops={"color": "#e4572e"})
    for k, values in enumerate(scores, 1):
        spread = np.random.default_rng(k).uniform(-0.16, 0.16, len(values))
        axes.plot(k + spread, values, "o", ms=4, mew=0, alpha=0.6, color="#4c78a8")
    axes.set(ylim=(-0.02, 1.02), ylabel="DSC per volume")
    names = [name.replace("$", r"\$") for name in models]  # a bare $ would start a formula
    axes.set_xticks(range(1, len(models) + 1), names, rotation=15, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure, dpi=150)


def save_gallery(
    path: Path, models: dict[str, list[dict]], pictures: dict[tuple[str, str], np.ndarray]
) -> None:
    """Draw the worst, median and best case of each model; pictures (H, W, 3) by (model, case)."""
    drawn = {name: rows for name, rows in models.items() if (name, rows[0]["case"]) in pictures}
    figure = new_figure(figsize=(9.6, 3.9 * len(drawn)))
    grid = figure.subplots(len(drawn), 3, squeeze=False)
    for line, (name, rows) in zip(grid, drawn.items(), strict=True):
        for axes, (which, row) in zip(line, pick(rows).items(), strict=True):
            axes.imshow(pictures[name, row["case"]])
            title = f"{name}, {which}\n{row['case']}: DSC {row['dsc']:.3f}"
            axes.set_title(title, fontsize=8, parse_math=False)
            axes.axis("off")
    save_figure(path, figure, dpi=110)


def pick(rows: Sequence[dict]) -> dict[str, dict]:
    """Pick the rows of the worst, median and best DSC."""
    rows = sorted(rows, key=lambda row: row["dsc"])
    return {"worst": rows[0], "median": rows[len(rows) // 2], "best": rows[-1]}


def save_page(
    path: Path, title: str, tables: Sequence[Table], pictures: dict[str, Path], about: dict
) -> None:
    """Write tables and pictures to one HTML page that needs no network."""
    shown = {name: file.read_bytes() for name, file in pictures.items()}
    write_page(path, "comparison.html", title, about, tables=tables, pictures=shown)
