"""Whose the files in the output folders of a training are, and whether they belong together."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .distributed import is_main_process, main_process_locks
from .io.files import check_ours, write_json
from .training import load_checkpoint
from .weights import file_hash, read_card


@contextmanager
def claimed(weights: Path, logs: Path, model: str, resume: bool) -> Iterator[dict | None]:
    """Keep other runs from WEIGHTS/<model>.* and LOGS; yield the checkpoint if it is resumed.

    Raises OSError if a folder cannot be written, ValueError if another run writes there, files in
    the way are not of a run, or there is nothing to resume.
    """
    path = weights / f"{model}.pt"
    with main_process_locks((weights, "--weights", model), (logs, "--logs", "logs")):
        if is_main_process():
            check_ours(logs / "args.json", is_card)
        if resume:
            yield checkpoint_of(path)
            return
        if is_main_process():
            checkpoint = path.with_suffix(".ckpt")
            check_ours(checkpoint, _is_checkpoint)
            check_ours(path.with_suffix(".json"), is_card)
            check_ours(path, _is_of_a_run)
            if checkpoint.exists():
                after = "it and its weights are overwritten after the first epoch"
                print(f"{checkpoint}: is from an earlier run; {after}")
        yield None


def checkpoint_of(weights: Path) -> dict:
    """Load the checkpoint beside weights, mending what a killed run left, or raise ValueError."""
    checkpoint = load_checkpoint(weights.with_suffix(".ckpt"))
    if checkpoint["best"] < 0:  # no epoch was kept yet
        check_ours(weights.with_suffix(".json"), is_card)
        check_ours(weights, _is_of_a_run)
        return checkpoint
    if not weights.is_file():
        raise ValueError(
            f"{weights}: is missing, with the best epoch of the checkpoint beside it; copy it "
            "there, with its card, or start without --resume"
        )
    card = checkpoint.get("card")  # checkpoints of earlier versions have none
    if card and card.get("sha256") == file_hash(weights):
        if is_main_process() and not fits(weights):
            write_json(weights.with_suffix(".json"), card)
        return checkpoint
    newer = read_card(weights)
    if card:
        next_epoch = newer.get("epoch", 0) > checkpoint["epoch"]
        of_this_run = next_epoch and newer.get("started") == card["started"]
    else:
        of_this_run = bool(newer)
    if not of_this_run:
        raise ValueError(
            f"{weights}: is not of the same training as the checkpoint beside it; copy its weights "
            "and their card there, or start without --resume"
        )
    best = newer.get("validation_dsc", {}).get("mean", -1)
    return checkpoint | {"card": newer, "best": max(best, checkpoint["best"])}


def fits(weights: Path) -> bool:
    """Tell whether weights have a card that belongs to them."""
    try:
        return bool(read_card(weights))
    except ValueError:
        return False


def _is_checkpoint(path: Path) -> bool:
    try:
        return bool(load_checkpoint(path))
    except ValueError:
        return False


def is_card(path: Path) -> bool:
    """Tell whether a JSON file is what `make_card` makes."""
    try:
        return {"model", "settings", "cases", "recipe"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _is_of_a_run(weights: Path) -> bool:
    """Tell whether card or checkpoint beside weights have their hash, or are from before it."""
    hashes = set()
    card, checkpoint = weights.with_suffix(".json"), weights.with_suffix(".ckpt")
    if card.exists():
        hashes.add(json.loads(card.read_text()).get("sha256"))
    if checkpoint.exists():
        best = load_checkpoint(checkpoint).get("card", {})
        if best is not None:  # else no epoch was kept yet
            hashes.add(best.get("sha256"))
    return hashes == {None} or file_hash(weights) in hashes
