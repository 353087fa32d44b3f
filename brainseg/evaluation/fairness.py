"""Compare networks at equal settings: say which differ, and give all those of the first."""

from collections.abc import Mapping, Sequence

from ..quality import FITTED_WITH
from ..reports.page import Table
from .scoring import Model, TableModel, networks_among

WORDS = {
    "image_size": "image size",
    "threshold": "threshold",
    "largest_component": "only the largest component",
    "min_volume": "minimum volume, voxels",
    "tta": "mirroring",
}
OWN, TO_COMPARE = "each its own", "used for all"


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


def use_settings_of_first(models: Sequence[Model]) -> None:
    """Give all networks the first one's settings, except the image size; drop other fits."""
    first, *others = networks_among(models)
    for model in others:
        for setting in FITTED_WITH:
            value = getattr(first.segmenter, setting)
            if getattr(model.segmenter, setting) != value:
                setattr(model.segmenter, setting, value)
                model.segmenter.expected_dsc_fit = None
                model.segmenter.reasons[setting] = f"that of {first.name}"


def settings_table(
    differing: Mapping[str, Mapping[str, object]], models: Sequence[Model], separate: bool
) -> Table:
    """List the settings that differ, and which are used; `separate`: each network has its own."""
    networks = networks_among(models)
    table = Table("Settings that differ between the models", ["setting"])
    table.header += [model.name for model in networks] + [TO_COMPARE]
    for setting, values in differing.items():
        row = [WORDS[setting]] + list(map(_word, values.values()))
        if separate or setting == "image_size":
            row.append(OWN)
        else:
            row.append(_word(values[networks[0].name]))
        table.rows.append(row)
    notes = []
    if separate:
        notes.append("A difference in DSC may come from them: leave out --own-settings to see.")
    elif differing.keys() & set(FITTED_WITH):
        notes.append(f"Compared at those of {networks[0].name}, unless with --own-settings.")
    table.note = "\n".join(notes)
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
