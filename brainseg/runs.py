"""Checks before a training run, and its card, weights, checkpoint and log."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .cache import Prepared, prune
from .distributed import is_main_process, world_size
from .io.files import sentence, write_json
from .io.labels import odd_masks
from .io.layouts import Source
from .io.pictures import outline, to_grey
from .io.slices import Case
from .metrics import summarise
from .splits import (
    alike_names,
    by_subset,
    count_patients,
    patient_of,
    patients_by_case,
    patients_of_card,
)
from .training import TrainState
from .weights import read_card, save_weights


def prune_cache(cache: Path | None) -> None:
    """Delete preprocessed volumes whose sources are gone, and say how many."""
    if is_main_process():
        count, freed = prune(cache)
        print(f"cache: deleted {count} volumes whose sources are gone ({freed / 2**30:.1f} GiB)")


def report_cases(
    train: Sequence[Prepared], validation: Sequence[Prepared], sources: Sequence[Source]
) -> None:
    """Say on stderr what is odd about sequences and masks; print the size of each subset.

    Raises ValueError if no training case has a lesion.
    """
    for volume in (*train, *validation):
        for note in volume.frame.notes:
            print(f"{volume.case.folder}: {note}", file=sys.stderr)
    if not any(volume.mask.any() for volume in train):
        raise ValueError(
            f"{train[0].case.folder}: has no lesion in its mask, and neither has any other of the "
            f"{len(train)} training cases; check how the masks were exported, and --labels"
        )
    for part, volumes in (("training", train), ("validation", validation)):
        shares = {volume.name: volume.mask.mean() for volume in volumes}
        for oddity in odd_masks(shares, (volume.truth for volume in volumes)):
            print(f"{part}: {oddity}", file=sys.stderr)
    used = {volume.name for volume in (*train, *validation)}
    subsets = {
        "train": [volume.case for volume in train],
        "validation": [volume.case for volume in validation],
        "test": [case for case in by_subset(sources)["test"] if case.name not in used],
    }
    print(count_patients(subsets), flush=True)
    question = alike_names(sources)
    if question:
        print(question, file=sys.stderr)


def start_run(
    state: TrainState,
    train: list[Case],
    validation: list[Case],
    settings: dict,
    recipe: Sequence[str],
    checkpoint: dict | None,
    commit: str | None,
) -> RunWriter:
    """Load the checkpoint, if there is one, and make the card of the run and its writer.

    `settings` are those of the command line; `recipe` names those that go into the card.
    """
    train_names = [case.name for case in train]
    validation_names = [case.name for case in validation]
    if checkpoint:
        state.load(checkpoint, train_names, settings["images"])
        report_changes(checkpoint, state, validation_names)
        start = checkpoint["initialised_from"]
    else:
        start = read_start(first) if (first := settings["init_weights"]) else None
        if start and not start["cases"]:
            unknown = "no card says what it was trained on"
            print(f"{first}: {unknown}; if on these patients, the validation DSC is too high")
    chosen = {name: settings[name] for name in (*recipe, "epochs")} | {"amp": state.amp}
    card = describe_run(state, chosen, train, validation, start) | {"commit": commit}
    check_seen(card, settings["allow_seen"] or checkpoint is not None)
    kept = {"initialised_from": start, "cases": train_names, "validation_cases": validation_names}
    kept["args"] = settings | {"amp": state.amp}
    kept["card"] = checkpoint.get("card") if checkpoint else None
    if kept["card"]:
        card["started"] = kept["card"].get("started")
    patients = {case.name: patient_of(case) for case in validation}
    return RunWriter(card, settings, kept, patients, state.epoch)


def read_start(path: Path | str) -> dict:
    """Read from their card where the start weights come from."""
    card = read_card(path)
    kept = ("recipe", "commit", "cases", "patients", "initialised_from")
    return {key: card.get(key) for key in kept}


def check_seen(card: dict, allowed: bool) -> None:
    """Raise ValueError, or warn if `allowed`, if the start weights saw validation patients."""
    if seen := card.get("validation_seen"):
        text = f"--init-weights was trained on patients of {len(seen)} validation cases ({seen[0]})"
        if not allowed:
            raise ValueError(
                f"{text}, whose DSC would be too high; validate on others (--folds, --fold), or "
                "add --allow-seen, which is noted in the card"
            )
        print(f"{text}: the validation DSC is too high")


def describe_run(
    state: TrainState, recipe: dict, train: list[Case], validation: list[Case], start: dict | None
) -> dict:
    """Make the card of a run's weights: data, split, recipe, versions, device; no paths.

    The training cases of the weights that it started from count as seen by this network too.
    """
    paths = [name for name in ("pretrained", "patients") if isinstance(recipe.get(name), str)]
    recipe = recipe | {name: Path(recipe[name]).name for name in paths}
    device = (
        torch.cuda.get_device_name(state.device)
        if state.device.type == "cuda"
        else str(state.device)
    )
    about = {
        "model": recipe["model"],
        "settings": state.model.settings,
        **{name: recipe[name] for name in ("image_size", "neighbours", "preprocessing")},
        "cases": {
            "train": [case.name for case in train],
            "validation": [case.name for case in validation],
        },
        "recipe": recipe,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device,
        "processes": world_size(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    earlier = (start or {}).get("patients") or {}
    patients = earlier | patients_by_case(train + validation)
    if patients:
        about["patients"] = patients
    if start:
        earlier_cases = (start.get("cases") or {}).get("train", ())
        about["cases"]["train"] = sorted({*about["cases"]["train"], *earlier_cases})
        others = start.keys() - {"cases", "patients"}
        about["initialised_from"] = {key: value for key, value in start.items() if key in others}
        patients = patients_of_card(start, "train", cases=train + validation)
        seen = [case.name for case in validation if patient_of(case) in patients]
        if seen:
            about["validation_seen"] = seen
    return about


def report_changes(checkpoint: dict, state: TrainState, validation: list[str]) -> None:
    """Print what differs in a resumed run."""
    before = checkpoint.get("validation_cases", validation)
    if before != validation:
        new, gone = sorted({*validation} - {*before}), sorted({*before} - {*validation})
        changes = f"new: {', '.join(new) or 'none'}; gone: {', '.join(gone) or 'none'}"
        print(
            f"the validation cases have changed ({changes}); the best DSC so far, "
            f"{state.best:.3f}, is that of the earlier ones"
        )
    schedule, epochs = checkpoint["args"]["schedule"], checkpoint["args"]["epochs"]
    if schedule == "cosine" and epochs != state.epochs and state.epoch < state.epochs:
        print(
            f"the cosine now spans {state.epochs} epochs, not {epochs}: the learning rate jumps "
            f"from {state.learning_rate(epochs):.3g} to {state.learning_rate():.3g}, then falls "
            f"to 0 at epoch {state.epochs}"
        )


def headline(card: dict, slices: int) -> str:
    """Describe network, device and data: the first line of a run."""
    ranks = f"{card['processes']} x " if card["processes"] > 1 else ""
    return (
        f"{card['model']} on {ranks}{card['device']}{', half precision' * card['recipe']['amp']}: "
        f"{slices} slices to train on"
    )


def how_to_resume(state: TrainState, weights: Path, model: str) -> str:
    """Say where a run was stopped, and the command that resumes it."""
    python = "python3" if world_size() == 1 else "torchrun, as before, with:"
    return (
        f"stopped at epoch {state.epoch + 1}, step {state.step}; continue with: "
        f"{python} train.py --resume --weights {weights} --model {model}"
    )


class RunWriter:
    """Writes WEIGHTS/<model>.pt with its card, <model>.ckpt, and TensorBoard events in LOGS.

    Only the main process writes.
    """

    def __init__(
        self, card: dict, settings: dict, kept: dict, patients: dict[str, str], epochs_done: int
    ):
        self.card, self.settings, self.kept, self.epochs_done = card, settings, kept, epochs_done
        self.patients = patients  # of the validation cases, by name
        self.files = Path(settings["weights"]) / card["model"]
        self.logs, self.log = Path(settings["logs"]), None

    def __enter__(self) -> RunWriter:
        if is_main_process():
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            write_json(self.logs / "args.json", self.card | {"args": self.settings})
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
            patients = [self.patients[name] for name in scores]
            summary = summarise(list(scores.values()), patients)
            if seen := self.card.get("validation_seen"):
                summary["seen_by_start_weights"] = len(seen)
            card = self.card | {"epoch": state.epoch, "validation_dsc": summary}
            path = self.files.with_suffix(".pt")
            save_weights(path, state.trained.state_dict(), card)
            self.kept["card"] = read_card(path)

    def curves(
        self,
        state: TrainState,
        speed: float,
        train_loss: float,
        loss: float | None,
        scores: dict[str, float],
        better: bool,
    ) -> None:
        """Log the values of an epoch, and print them in one line; `loss` is None without scores."""
        if not is_main_process():
            return
        rate = state.optimizer.param_groups[0]["lr"]
        values = {"loss/train": train_loss, "images_per_second": speed, "learning_rate": rate}
        line = f"epoch {state.epoch:3d}/{state.epochs}  loss {train_loss:.4f}"
        if scores:
            mean = sum(scores.values()) / len(scores)
            values |= {"loss/validation": loss, "dsc/validation": mean}
            values |= {f"dsc_by_case/{name}": score for name, score in scores.items()}
            line += f"  validation loss {loss:.4f}  DSC {mean:.4f}{' *' if better else '  '}"
        for name, value in values.items():
            self.log.add_scalar(name, value, state.epoch)
        tqdm.write(f"{line}  {speed:.1f} images/s")
        sys.stdout.flush()

    def slices(
        self, volumes: Sequence[Prepared], most: int, epoch: int, masks: Sequence[np.ndarray]
    ) -> None:
        """Log up to `most` slices of the cases, outlined, in the source geometry.

        The images are read again, and may be gone: then there are no pictures.
        """
        for volume, mask in zip(volumes, masks, strict=True):
            count = min(len(mask), most)
            if count < 1 or not is_main_process():
                return
            most -= count
            try:
                grey = to_grey(volume.case.read())[:count]
            except (OSError, ValueError) as error:
                tqdm.write(f"epoch {epoch} has no pictures: {sentence(error)}", file=sys.stderr)
                return
            pictures = outline(grey, mask[:count], volume.truth[:count])
            self.log.add_images(volume.name, pictures, epoch, dataformats="NHWC")
