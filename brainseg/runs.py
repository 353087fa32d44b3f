"""Checks before a training run, and its card, weights, checkpoint and log."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .cache import Prepared
from .distributed import is_main_process, world_size
from .ensemble import weights_files
from .io.files import sentence, with_archives, write_json
from .io.labels import odd_masks
from .io.layouts import Source
from .io.pictures import outline, to_grey
from .io.slices import Case
from .metrics import summarise
from .onnx import card_of
from .patients import (
    alike_names,
    count_patients,
    counted,
    names_of,
    patient_of,
    patients_by_case,
    patients_of_card,
)
from .quality import mask_settings
from .splits import by_subset, is_placed
from .training import TrainState
from .weights import file_hash, read_card, save_weights

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FEW_TO_CHOOSE = 3  # validation patients; with fewer, the best epoch is hardly chosen


@dataclass(frozen=True)
class Validation:
    """Scores of the network after an epoch: loss and DSC of all ranks, masks of this rank."""

    loss: float
    scores: dict[str, float]  # DSC by case
    masks: list[np.ndarray]  # (S, H, W), bool, in the source geometry
    better: bool  # than after any epoch before

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


def report_cases(
    train: Sequence[Prepared], validation: Sequence[Prepared], sources: Sequence[Source]
) -> None:
    """Report oddities and subset sizes; ValueError if no training case has a lesion."""
    both = list(train) + list(validation)
    for volume in both:
        for note in volume.frame.notes:
            print(with_archives(f"{volume.case.folder}: {note}"), file=sys.stderr)
    if not any(volume.mask.any() for volume in train):
        raise ValueError(
            f"{train[0].case.folder}: has no lesion in its mask, and neither has any other of the "
            f"{len(train)} training cases; check how the masks were exported, and --labels"
        )
    for part, volumes in (("training", train), ("validation", validation)):
        shares = {volume.name: volume.mask.mean() for volume in volumes}
        for oddity in odd_masks(shares, (volume.truth for volume in volumes)):
            print(f"{part}: {oddity}", file=sys.stderr)
    used = names_of(both)
    subsets = {
        "train": [volume.case for volume in train],
        "validation": [volume.case for volume in validation],
        "test": [case for case in by_subset(sources)["test"] if case.name not in used],
    }
    print(count_patients(subsets), flush=True)
    patients = set(map(patient_of, subsets["validation"]))
    if len(patients) < FEW_TO_CHOOSE:
        print(
            f"validation has {counted(len(patients), 'patient')}: its DSC says little about "
            "others; cross-validate for a score (--folds, --fold)",
            file=sys.stderr,
        )
        by_hash = {patient_of(case) for case in subsets["test"] if not is_placed(case)}
        if by_hash:
            print(
                f"test: {counted(len(by_hash), 'patient')} set aside by a hash of the name; to "
                "train on all but some of your choice: --validation NAMES",
                file=sys.stderr,
            )
    question = alike_names(sources)
    if question:
        print(question, file=sys.stderr)


def origin_of(init_weights: str | None, checkpoint: dict | None) -> dict | None:
    """Return what the card of the start weights says of them; say so if there is none."""
    if checkpoint:
        return checkpoint["initialised_from"]
    if not init_weights:
        return None
    card = read_card(init_weights)
    if not card.get("cases"):
        unknown = "no card says what it was trained on"
        print(f"{init_weights}: {unknown}; if on these patients, the validation DSC is too high")
    names = ("recipe", "commit", "cases", "patients", "initialised_from")
    return {name: card.get(name) for name in names} | {"mask_settings": mask_settings(card)}


def origin_of_teachers(teachers: str) -> dict:
    """Return the files, training cases and patients of an ensemble that is learnt from."""
    files, cases, patients = {}, set(), {}
    for path in weights_files(teachers):
        card = card_of(path)
        files[path.name] = file_hash(path)
        cases.update((card.get("cases") or {}).get("train", []))
        patients |= card.get("patients") or {}
    return {"files": files, "cases": {"train": sorted(cases)}, "patients": patients}


def make_card(
    state: TrainState,
    recipe: dict,
    train: list[Case],
    validation: list[Case],
    origins: dict[str, dict],
) -> dict[str, Any]:
    """Make the card of a run's weights: data, split, recipe, versions, device; no paths.

    The training cases of the weights that it started from, and of its teachers, count as seen by
    this network too. It makes masks with the settings of those that it started from.
    """
    recipe = dict(recipe)
    for name in ("pretrained", "patients", "teachers"):
        if isinstance(recipe[name], str):
            recipe[name] = Path(recipe[name]).name
    card: dict[str, Any] = {
        "model": recipe["model"],
        "settings": state.model.settings,
        "image_size": recipe["image_size"],
        "neighbours": recipe["neighbours"],
        "preprocessing": recipe["preprocessing"],
        "cases": {"train": names_of(train), "validation": names_of(validation)},
        "recipe": recipe,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": str(state.device),
        "processes": world_size(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if state.device.type == "cuda":
        card["device"] = torch.cuda.get_device_name(state.device)
    patients = patients_by_case(train + validation)
    trained_on: set[str] = set()
    for name, origin in origins.items():
        patients = (origin.get("patients") or {}) | patients
        earlier = (origin.get("cases") or {}).get("train", [])
        card["cases"]["train"] = sorted(set(card["cases"]["train"]) | set(earlier))
        elsewhere = ("cases", "patients", "mask_settings")
        card[name] = {key: origin[key] for key in origin if key not in elsewhere}
        trained_on |= patients_of_card(origin, "train", cases=train + validation)
    if patients:
        card["patients"] = patients
    mask_settings = origins.get("initialised_from", {}).get("mask_settings")
    if mask_settings:
        card["mask_settings"] = mask_settings
    not_new = [case.name for case in validation if patient_of(case) in trained_on]
    if not_new:
        card["validation_seen"] = not_new
    return card


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


def report_changes(checkpoint: dict, state: TrainState, validation: list[str]) -> None:
    """Print what differs in a resumed run."""
    before = checkpoint.get("validation_cases", validation)
    if before != validation:
        new = ", ".join(sorted(set(validation) - set(before))) or "none"
        gone = ", ".join(sorted(set(before) - set(validation))) or "none"
        print(
            f"the validation cases have changed (new: {new}; gone: {gone}); the best DSC so far, "
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
    """Describe network, device and data in one line."""
    device = card["device"]
    if card["processes"] > 1:
        device = f"{card['processes']} x {device}"
    if card["recipe"]["amp"]:
        device += ", half precision"
    return f"{card['model']} on {device}: {slices} slices to train on"


def how_to_resume(state: TrainState, weights: Path, model: str) -> str:
    """Say where a run was stopped, and the command that resumes it."""
    python = "python3" if world_size() == 1 else "torchrun, as before, with:"
    return (
        f"stopped at epoch {state.epoch + 1}, step {state.step}; continue with: "
        f"{python} train.py --resume --weights {weights} --model {model}"
    )


class RunWriter:
    """Writes WEIGHTS/<model>.pt with its card, <model>.ckpt, and TensorBoard events in LOGS.

    `recipe` names the `settings` for the card. Only the main process writes. Raises ValueError if
    the start weights have seen validation patients.
    """

    def __init__(
        self,
        state: TrainState,
        train: list[Case],
        validation: list[Case],
        settings: dict,
        recipe: Sequence[str],
        checkpoint: dict | None,
        commit: str | None,
    ):
        start = origin_of(settings["init_weights"], checkpoint)
        values = {name: settings[name] for name in recipe}
        values |= {"epochs": settings["epochs"], "amp": state.amp}
        origins = {}
        if start:
            origins["initialised_from"] = start
        if settings["teachers"]:
            origins["teachers"] = origin_of_teachers(settings["teachers"])
        self.card = make_card(state, values, train, validation, origins)
        self.card["commit"] = commit
        check_seen(self.card, settings["allow_seen"] or checkpoint is not None)
        best = None  # the card of the weights kept so far
        if checkpoint and checkpoint.get("card"):
            best = checkpoint["card"]
            self.card["started"] = best.get("started")
        self.more = {  # in each checkpoint
            "initialised_from": start,
            "cases": names_of(train),
            "validation_cases": names_of(validation),
            "args": settings | {"amp": state.amp},
            "card": best,
        }
        self.patients = {case.name: patient_of(case) for case in validation}
        self.files = Path(settings["weights"]) / settings["model"]
        self.log: SummaryWriter | None = None
        if is_main_process():
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            logs = Path(settings["logs"])
            write_json(logs / "args.json", self.card | {"args": settings})
            self.log = SummaryWriter(logs, purge_step=state.epoch + 1)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self.log:
            self.log.close()

    def checkpoint(self, state: TrainState) -> None:
        if self.log:
            state.save(self.files.with_suffix(".ckpt"), self.more)

    def weights(self, state: TrainState, scores: dict[str, float]) -> None:
        """Write the weights and their card, with the DSC of each validation case."""
        if not self.log:
            return
        summary = summarise(list(scores.values()), [self.patients[name] for name in scores])
        if "validation_seen" in self.card:
            summary["seen_by_start_weights"] = len(self.card["validation_seen"])
        card = self.card | {"epoch": state.epoch, "validation_dsc": summary}
        path = self.files.with_suffix(".pt")
        save_weights(path, state.trained.state_dict(), card)
        self.more["card"] = read_card(path)

    def curves(
        self, state: TrainState, train_loss: float, speed: float, validation: Validation | None
    ) -> None:
        """Log the values of an epoch, and print them in one line; `speed` is in slices/s."""
        if not self.log:
            return
        rate = state.optimizer.param_groups[0]["lr"]
        values = {"loss/train": train_loss, "images_per_second": speed, "learning_rate": rate}
        line = f"epoch {state.epoch:3d}/{state.epochs}  loss {train_loss:.4f}"
        if validation:
            loss, mean = validation.loss, validation.mean
            values["loss/validation"] = loss
            values["dsc/validation"] = mean
            for name, score in validation.scores.items():
                values[f"dsc_by_case/{name}"] = score
            star = "*" if validation.better else " "
            line += f"  validation loss {loss:.4f}  DSC {mean:.4f} {star}"
        for name, value in values.items():
            self.log.add_scalar(name, value, state.epoch)
        tqdm.write(f"{line}  {speed:.1f} images/s")
        sys.stdout.flush()

    def slices(
        self, volumes: Sequence[Prepared], masks: Sequence[np.ndarray], most: int, epoch: int
    ) -> None:
        """Log up to `most` slices of the cases, outlined; none if their images are gone."""
        if not self.log:
            return
        for volume, mask in zip(volumes, masks, strict=True):
            count = min(len(mask), most)
            most -= count
            if count < 1:
                return
            try:
                grey = to_grey(volume.case.read())[:count]
            except (OSError, ValueError) as error:
                tqdm.write(f"epoch {epoch} has no pictures: {sentence(error)}", file=sys.stderr)
                return
            pictures = outline(grey, mask[:count], volume.truth[:count])
            self.log.add_images(volume.name, pictures, epoch, dataformats="NHWC")
