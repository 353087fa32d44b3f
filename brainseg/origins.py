"""The start weights and the teachers of a training: what they are, and whether they may be used."""

from __future__ import annotations

from pathlib import Path

from .ensemble import common_card, weights_files
from .quality import mask_settings
from .weights import CARD_DEFAULTS, MODELS, file_hash, load_state, read_card

UNKNOWN = (
    "no card says what it was trained on; if on these patients, the validation DSC is too high"
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


def origin_of_teachers(teachers: Path | str) -> dict:
    """Return the files, training cases and patients of teachers; say so if one names no cases."""
    cards = list(map(read_card, weights_files(teachers)))
    if not all(card.get("cases") for card in cards):
        print(f"{teachers}: {UNKNOWN}")
    card = common_card(cards)
    files = hashes_of_teachers(teachers)
    return {"files": files, "cases": card["cases"], "patients": card.get("patients", {})}


def hashes_of_teachers(teachers: Path | str) -> dict[str, str]:
    """Return the SHA-256 of each file of an ensemble, by its name."""
    return {path.name: file_hash(path) for path in weights_files(teachers)}


def check_not_replaced(teachers: Path, weights: Path) -> None:
    """Raise ValueError if weights written to a folder would replace, or join, the teachers."""
    for path in weights_files(teachers):
        if path.resolve().parent == weights.resolve():
            raise ValueError(f"{path}: is a teacher; name another folder with --weights")


def check_teachers(teachers: Path, checkpoint: dict) -> None:
    """Raise ValueError unless the checkpoint, if it names its teachers, has learned from these."""
    files = checkpoint.get("teachers")  # checkpoints of earlier versions have none
    if files and hashes_of_teachers(teachers) != files:
        raise ValueError(
            f"{teachers}: holds other networks than when the checkpoint was started; put "
            f"{', '.join(files)} there, or start a new run in another --weights folder"
        )


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
