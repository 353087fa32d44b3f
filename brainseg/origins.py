"""What a training starts from: the weights, and whether they have seen who it is validated on."""

from __future__ import annotations

from pathlib import Path

from .quality import mask_settings
from .weights import CARD_DEFAULTS, MODELS, load_state, read_card

UNKNOWN = (
    "its card does not say what it was trained on; if on these patients, the validation DSC is too "
    "high"
)


def settings_of_weights(path: Path) -> dict[str, int]:
    """Return the settings of the network in a weights file and of its input, by their card."""
    unet = MODELS["unet"].settings_of(load_state(path))
    card = CARD_DEFAULTS | read_card(path)
    settings = {name: card[name] for name in CARD_DEFAULTS}
    if unet:
        settings["features"] = unet["init_features"]
    return settings


def origin_of(init_weights: str | None, checkpoint: dict | None) -> dict | None:
    """Return what the card of the start weights says of them; say so if there is none."""
    if checkpoint:
        return checkpoint["initialised_from"]
    if not init_weights:
        return None
    card = read_card(init_weights)
    if not card.get("cases"):
        print(f"{init_weights}: {UNKNOWN}")
    names = ("recipe", "commit", "cases", "patients", "initialised_from")
    return {name: card.get(name) for name in names} | {"mask_settings": mask_settings(card)}


def check_seen(card: dict, allowed: bool) -> None:
    """Raise ValueError, or warn if `allowed`, if the start weights saw validation patients."""
    cases = card.get("validation_seen")
    if not cases:
        return
    text = f"start weights or teachers saw patients of {len(cases)} validation cases ({cases[0]})"
    if not allowed:
        raise ValueError(
            f"{text}, whose DSC would be too high; validate on others (--folds, --fold), or "
            "add --allow-seen, which is noted in the card"
        )
    print(f"{text}: the validation DSC is too high")
