"""Checks before a training run; its card, weights, checkpoint and log."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .cache import Prepared, prune
from .distributed import is_main_process, world_size
from .io.files import check_writable, write_json
from .io.layouts import Source
from .io.pictures import outline, to_grey
from .metrics import summarise
from .splits import (
    by_subset,
    count_patients,
    named_patients,
    patient_of,
    patients_of_card,
)
from .training import TrainState
from .weights import load_state, read_card, save_weights


def check_inputs(folders: Sequence[Path], init_weights: Path | None, batch_size: int) -> None:
    """Check files, folders and the batch size before the long work."""
    for folder in folders:
        check_writable(folder)
    if init_weights:
        load_state(init_weights)
    if batch_size < world_size():
        raise ValueError(
            f"--batch-size {batch_size} is less than a slice for each of {world_size()} "
            "processes; raise it, or start fewer"
        )


def prune_cache(cache: Path | None) -> None:
    """Delete preprocessed volumes whose sources are gone, and say how many."""
    if not is_main_process():
        return
    count, freed = prune(cache)
    print(f"cache: {count} volumes without a source deleted ({freed / 2**30:.1f} GiB)")


def report_subsets(
    train: Sequence[str], validation: Sequence[str], sources: Sequence[Source]
) -> None:
    """Print the number of cases and patients of each subset."""
    test = by_subset(source.name for source in sources)["test"]
    print(count_patients({"train": train, "validation": validation, "test": test}), flush=True)


def read_start(path: Path) -> dict:
    """Read where the weights to start from came from off their card."""
    card = read_card(path)
    kept = ("recipe", "commit", "cases", "patients", "initialised_from")
    return {key: card.get(key) for key in kept if key in card or key != "patients"}


def check_seen(card: dict, allowed: bool) -> None:
    """Raise ValueError, or say so, if the start weights have seen validation patients."""
    if seen := card.get("validation_seen"):
        text = f"--init-weights was trained on patients of {len(seen)} validation cases ({seen[0]})"
        if not allowed:
            raise ValueError(
                f"{text}, whose DSC would be too high; validate on others (--folds, --fold), or "
                "add --allow-seen, which the card will say"
            )
        print(f"{text}: the validation DSC is too high")


def describe_run(
    model: nn.Module,
    recipe: dict,
    train: Sequence[str],
    validation: Sequence[str],
    start: dict | None,
    device: torch.device,
) -> dict:
    """Make the card of a run's weights: data, split, recipe, versions, device; no paths.

    The training cases of the weights that it started from count as seen by this network too.
    """
    paths = [name for name in ("pretrained", "patients") if isinstance(recipe.get(name), str)]
    recipe = recipe | {name: Path(recipe[name]).name for name in paths}
    cuda = device.type == "cuda"
    about = {
        "model": recipe["model"],
        "settings": model.settings,
        **{name: recipe[name] for name in ("image_size", "neighbours", "preprocessing")},
        "cases": {"train": list(train), "validation": list(validation)},
        "recipe": recipe,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "processes": world_size(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    earlier = (start or {}).get("patients") or {}
    if patients := earlier | named_patients([*train, *validation]):
        about["patients"] = patients
    if start:
        about["cases"]["train"] = sorted({*train, *(start.get("cases") or {}).get("train", ())})
        about["initialised_from"] = {
            k: v for k, v in start.items() if k not in ("cases", "patients")
        }
        patients = patients_of_card(start, "train")
        if seen := [name for name in validation if patient_of(name) in patients]:
            about["validation_seen"] = seen
    return about


def report_changes(
    checkpoint: dict, state: TrainState, validation: list[str], rate: Callable, epochs: int
) -> None:
    """Print what differs in a resumed run."""
    before = checkpoint.get("validation_cases", validation)
    if before != validation:
        new, gone = sorted({*validation} - {*before}), sorted({*before} - {*validation})
        changes = f"new: {', '.join(new) or 'none'}; gone: {', '.join(gone) or 'none'}"
        print(
            f"the validation cases have changed ({changes}); the best DSC so far, "
            f"{state.best:.3f}, was of the earlier ones"
        )
    settings = checkpoint["args"]
    if settings["schedule"] == "cosine" and settings["epochs"] != epochs and state.epoch < epochs:
        step = state.global_step
        earlier = rate(step, steps=settings["epochs"] * state.steps_per_epoch)
        print(
            f"the cosine is now of {epochs} epochs, not {settings['epochs']}: the learning rate "
            f"jumps from {earlier:.3g} to {rate(step):.3g}, then falls to 0 at epoch {epochs}"
        )


def headline(card: dict, names: Sequence[Sequence[str]], slices: int) -> str:
    """Describe network, device and data: the first line of a run."""
    ranks = f"{card['processes']} x " if card["processes"] > 1 else ""
    train, validation = map(len, names)
    return (
        f"{card['model']} on {ranks}{card['device']}{', half precision' * card['recipe']['amp']}: "
        f"{slices} slices of {train} cases to train on, {validation} cases to validate on"
    )


def how_to_resume(state: TrainState, weights: Path, model: str) -> str:
    """Say where a run was stopped, and the command that resumes it."""
    python = "python3" if world_size() == 1 else "torchrun, as before, with:"
    return (
        f"stopped at epoch {state.epoch + 1}, step {state.step}; go on with: "
        f"{python} train.py --resume --weights {weights} --model {model}"
    )


def report_notes(volumes: Sequence[Prepared]) -> None:
    """Say on stderr what is odd about the sequences of a case."""
    for volume in volumes:
        for note in volume.frame.notes:
            print(f"{volume.case.folder}: {note}", file=sys.stderr)


class RunWriter:
    """Writes WEIGHTS/<model>.pt with its card, <model>.ckpt, and TensorBoard events in LOGS.

    Only the main rank writes.
    """

    def __init__(
        self, weights: Path, logs: Path, card: dict, kept: dict, args: dict, epochs_done: int = 0
    ):
        self.files, self.logs, self.card, self.kept = weights / card["model"], logs, card, kept
        self.args, self.epochs_done, self.log = args, epochs_done, None

    def __enter__(self) -> RunWriter:
        if is_main_process():
            from torch.utils.tensorboard import SummaryWriter  # slow: nobody waits for --help

            write_json(self.logs / "args.json", self.card | {"args": self.args})
            self.log = SummaryWriter(self.logs, purge_step=self.epochs_done + 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.log:
            self.log.close()

    def checkpoint(self, state: TrainState) -> None:
        if is_main_process():
            state.save(self.files.with_suffix(".ckpt"), **self.kept)

    def weights(self, state: TrainState, scores: dict[str, float]) -> None:
        """Write the weights and their card, with the DSC of each validation case."""
        if is_main_process():
            patients = [patient_of(name) for name in scores]
            summary = summarise(list(scores.values()), patients)
            if seen := self.card.get("validation_seen"):
                summary["seen_by_start_weights"] = len(seen)
            card = self.card | {"epoch": state.epoch, "validation_dsc": summary}
            save_weights(self.files.with_suffix(".pt"), state.trained.state_dict(), card)

    def curves(self, epoch: int, epochs: int, values: dict[str, float], better: bool) -> None:
        """Log the values of an epoch, and print them in one line."""
        if not is_main_process():
            return
        for name, value in values.items():
            self.log.add_scalar(name, value, epoch)
        line = f"epoch {epoch:3d}/{epochs}  loss {values['loss/train']:.4f}"
        if "dsc/validation" in values:
            line += f"  validation loss {values['loss/validation']:.4f}"
            line += f"  DSC {values['dsc/validation']:.4f}{' *' if better else '  '}"
        tqdm.write(f"{line}  {values['images_per_second']:.1f} images/s")
        sys.stdout.flush()

    def slices(
        self, volumes: Sequence[Prepared], most: int, epoch: int, masks: Sequence[np.ndarray]
    ) -> None:
        """Log up to `most` slices of the cases, outlined, in the source geometry."""
        for volume, mask in zip(volumes, masks, strict=True):
            count = min(len(mask), most)
            if count < 1 or not is_main_process():
                return
            most -= count
            grey = to_grey(volume.case.read())[:count]
            pictures = outline(grey, mask[:count], volume.truth[:count])
            self.log.add_images(volume.name, pictures, epoch, dataformats="NHWC")
