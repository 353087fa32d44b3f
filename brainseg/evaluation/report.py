"""Report a comparison in tables, a figure and a gallery; say which settings differ."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from ..io.pictures import new_figure, save_figure
from ..metrics import FEW, mean_text, values_of
from ..quality import FITTED_WITH
from ..reports.page import Table
from .scoring import Model, TableModel, networks_among
from .statistics import SCORES, SETTINGS

WORDS = {
    "image_size": "image size",
    "threshold": "threshold",
    "largest_component": "only the largest component",
    "min_volume": "minimum volume, voxels",
    "tta": "mirroring",
}


def differing_settings(models: Sequence[Model]) -> dict[str, dict[str, object]]:
    """Return the settings that differ between the networks, each with its value by model."""
    differing = {}
    for setting in WORDS:
        values = {}
        for model in networks_among(models):
            values[model.name] = getattr(model.segmenter, setting)
        if len(set(values.values())) > 1:
            differing[setting] = values
    return differing


def differences_table(
    differing: Mapping[str, Mapping[str, object]], models: Sequence[Model], separate: bool
) -> Table:
    """List the settings that differ, and which are used; `separate`: each network has its own."""
    names = [model.name for model in networks_among(models)]
    header = ["setting"] + names + ["used for all"]
    table = Table("Settings that differ between the models", header)
    for setting, values in differing.items():
        row = [WORDS[setting]] + list(map(_word, values.values()))
        if separate or setting == "image_size":
            row.append("each its own")
        else:
            row.append(row[1])
        table.rows.append(row)
    if separate:
        table.note = "A difference in DSC may come from them: leave out --own-settings to see."
    elif differing.keys() & set(FITTED_WITH):
        table.note = f"Compared at those of {names[0]}, unless with --own-settings."
    return table


def notes_on_tables(models: Sequence[Model]) -> list[str]:
    """Say in a comparison which scores were not made at its settings: those read from a table."""
    notes = []
    for model in models:
        if isinstance(model, TableModel) and len(models) > 1:
            notes.append(
                f"{model.name}: scores of an earlier run, at the settings of that run; a "
                "difference in DSC may come from them."
            )
    return notes


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def tables(summary: Mapping[str, dict]) -> list[Table]:
    """Turn the summary of `compare` into tables."""
    tables = [_score_table(summary)]
    if len(summary) > 1:
        tables.append(_difference_table(summary))
    if next(iter(summary.values()))["groups"]:
        tables.append(_group_table(summary))
    with_settings = {name: model for name, model in summary.items() if "settings" in model}
    if with_settings:
        tables.append(_settings_table(with_settings))
    return tables


def _score_table(summary: Mapping[str, dict]) -> Table:
    table = Table("Scores", ["model", "n", "mean DSC", "median"])
    notes = [
        "Means over cases, each scored in the geometry of its source. After the DSC, its 95 % "
        f"interval in (), by bootstrap over patients, or under {FEW} patients its range in []. "
        "(k): mean over the k cases where the score is defined."
    ]
    others = list(next(iter(summary.values()))["scores"])[1:]
    table.header += [SCORES[metric] for metric in others]
    for name, model in summary.items():
        dsc = model["scores"]["dsc"]
        row = [name, str(dsc["n"]), mean_text(dsc), f"{dsc['median']:.3f}"]
        row += [_mean(model["scores"][metric], dsc["n"]) for metric in others]
        table.rows.append(row)
        if model["missed"]:
            notes.append(
                f"{name}: in {model['missed']} of the cases only one of the masks is empty; there, "
                "HD95 and ASSD are the diagonal of the image."
            )
        if model["chose_epoch"]:
            notes.append(
                f"{name}: the epoch of its weights was chosen on {model['chose_epoch']} of these "
                "cases, which makes its score too good; train with --keep last to avoid this."
            )
    table.note = "\n".join(notes)
    return table


def _mean(score: Mapping[str, float], cases: int) -> str:
    if not score["n"]:
        return "none"
    if score["n"] < cases:
        return f"{score['mean']:.3f} ({score['n']})"
    return f"{score['mean']:.3f}"


def _difference_table(summary: Mapping[str, dict]) -> Table:
    first = next(iter(summary))
    note = "If the interval contains 0, these cases do not show a difference."
    if "low" not in summary[first]["scores"]["dsc"]:
        note = f"Under {FEW} patients there is no interval: so few say little about other patients."
    table = Table(
        f"Difference in DSC from {first}, case by case",
        ["model", "mean", "median", "better in", "worse in"],
        note=note,
    )
    for name in list(summary)[1:]:
        difference = summary[name]["difference"]
        row = [name, mean_text(difference, "+"), f"{difference['median']:+.3f}"]
        row += [str(difference["better"]), str(difference["worse"])]
        table.rows.append(row)
    return table


def _group_table(summary: Mapping[str, dict]) -> Table:
    first, others = next(iter(summary)), list(summary)[1:]
    note = f"Exploratory: many groups, few cases in each. No interval below {FEW} patients."
    table = Table("DSC by group", ["group", "n", first], note=note)
    for name in others:
        table.header += [name, f"vs {first}"]
    for group, values in summary[first]["groups"].items():
        for value, scores in values.items():
            row = [f"{group}: {value or 'other'}", str(scores["dsc"]["n"])]
            row.append(mean_text(scores["dsc"]))
            for name in others:
                scores = summary[name]["groups"][group][value]
                row += [mean_text(scores["dsc"]), mean_text(scores["difference"], "+")]
            table.rows.append(row)
    return table


def _settings_table(summary: Mapping[str, dict]) -> Table:
    note = "Choose a setting on validation cases only, then score it on other cases."
    table = Table("Effect of the threshold and the largest component", ["setting"], note=note)
    for name in summary:
        table.header += [f"{name}: DSC", "vs the setting used"]
    for setting, (threshold, largest) in SETTINGS.items():
        components = "largest component" if largest else "every component"
        row = [f"{threshold}, {components}"]
        for model in summary.values():
            scores = model["settings"][setting]
            row += [f"{scores['dsc']['mean']:.3f}", mean_text(scores["difference"], "+")]
        table.rows.append(row)
    return table


def case_table(models: Mapping[str, list[dict]]) -> Table:
    """List the DSC of every case, sorted from the worst of the first model."""
    table = Table("Every case", ["case", "slices", "lesion voxels", "missing"])
    table.header += [f"{name}: DSC" for name in models]
    first = next(iter(models.values()))
    for k in values_of(first, "dsc").argsort(kind="stable"):
        line = [str(first[k][name]) for name in ("case", "slices", "lesion_voxels", "missing")]
        line += [f"{rows[k]['dsc']:.3f}" for rows in models.values()]
        table.rows.append(line)
    return table


def save_scores(path: Path, models: Mapping[str, list[dict]]) -> None:
    """Draw a box plot of the DSCs of each model, with a point per case."""
    figure = new_figure(figsize=(2.2 + 1.3 * len(models), 4.2))
    axes = figure.add_subplot()
    scores = [values_of(rows, "dsc") for rows in models.values()]
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
    path: Path, models: Mapping[str, list[dict]], pictures: Mapping[tuple[str, str], np.ndarray]
) -> None:
    """Draw the worst, median and best case of each model; pictures (H, W, 3) by (model, case)."""
    drawn = {name: rows for name, rows in models.items() if (name, rows[0]["case"]) in pictures}
    figure = new_figure(figsize=(9.6, 3.9 * len(drawn)))
    grid = figure.subplots(len(drawn), 3, squeeze=False)
    for line, (name, rows) in zip(grid, drawn.items(), strict=True):
        for axes, (place, row) in zip(line, pick(rows).items(), strict=True):
            axes.imshow(pictures[name, row["case"]])
            title = f"{name}, {place}\n{row['case']}: DSC {row['dsc']:.3f}"
            axes.set_title(title, fontsize=8, parse_math=False)
            axes.axis("off")
    save_figure(path, figure, dpi=110)


def pick(rows: Sequence[dict]) -> dict[str, dict]:
    """Pick the rows of the worst, median and best DSC."""
    rows = sorted(rows, key=itemgetter("dsc"))
    return {"worst": rows[0], "median": rows[len(rows) // 2], "best": rows[-1]}
