"""The files of a training: whose those in its folders are, its card, weights, checkpoint, log."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .cache import Prepared
from .devices import world_size
from .distributed import is_main_process, main_process_locks
from .io.files import check_ours, sentence, write_json
from .io.pictures import outline, to_grey
from .io.slices import Case
from .metrics import summarise
from .origins import check_seen, origin_of
from .patients import names_of, patient_of, patients_by_case, patients_of_card
from .teachers import Teachers
from .training import TrainState
from .weights import (
    file_hash,
    has_card,
    is_card,
    load_checkpoint,
    read_card,
    save_tensors,
    save_weights,
    shipped_files,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Validation:
    """Scores of the network after an epoch, on the cases of all ranks."""

    loss: float
    scores: dict[str, float]  # DSC by case
    masks: list[np.ndarray]  # (S, H, W), bool, in the source geometry; none unless they are drawn
    better: bool  # than after any epoch before

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


@contextmanager
def claimed(weights: Path, logs: Path, resume: bool) -> Iterator[dict | None]:
    """Keep other runs from the files of `weights` (.pt) and LOGS; yield the checkpoint to resume.

    A checkpoint is mended if a killed run left newer weights or a missing card. Raises OSError if a
    folder cannot be written, ValueError if it holds shipped weights, if another run writes there,
    files in the way are not of a run, or the weights are not those of the checkpoint.
    """
    for shipped in shipped_files():
        if shipped.parent == weights.parent.resolve():
            raise ValueError(
                f"{weights.parent}: holds weights that come with the project, which {weights.name} "
                "would join; name another folder with --weights"
            )
    path, checkpoint = weights.with_suffix(".ckpt"), None
    places = (weights.parent, "--weights", weights.stem), (logs, "--logs", "logs")
    with main_process_locks(*places):
        if resume:  # a run that held the locks until now may have written it
            checkpoint = load_checkpoint(path)
        if is_main_process():
            check_ours(logs / "args.json", is_card)
            if not checkpoint or checkpoint["best"] < 0:  # no epoch was kept yet
                check_ours(path, _is_checkpoint)
                check_ours(weights.with_suffix(".json"), is_card)
                check_ours(weights, _is_of_a_run)
            if path.exists() and not resume:
                after = "it and its weights are overwritten after the first epoch"
                print(f"{path}: is from an earlier run; {after}")
        if checkpoint and checkpoint["best"] >= 0:
            checkpoint = _with_weights(checkpoint, weights)
        yield checkpoint


def _with_weights(checkpoint: dict, weights: Path) -> dict:
    """Return a checkpoint with the card of its best weights, mending what a killed run left."""
    if not weights.is_file():
        raise ValueError(
            f"{weights}: is missing, with the best epoch of the checkpoint beside it; copy it "
            "there, with its card, or start without --resume"
        )
    card = checkpoint.get("card")  # checkpoints of earlier versions have none
    if not card or card.get("sha256") != file_hash(weights):
        newer = read_card(weights)
        of_this_run = bool(newer)
        if card:
            next_epoch = newer.get("epoch", 0) > checkpoint["epoch"]
            of_this_run = next_epoch and newer.get("started") == card.get("started")
        if not of_this_run:
            raise ValueError(
                f"{weights}: is not of the same training as the checkpoint beside it; copy its "
                "weights and their card there, or start without --resume"
            )
        best = newer.get("validation_dsc", {}).get("mean", -1)
        return checkpoint | {"card": newer, "best": max(best, checkpoint["best"])}
    if is_main_process() and not has_card(weights):
        write_json(weights.with_suffix(".json"), card)
    return checkpoint


def _is_checkpoint(path: Path) -> bool:
    try:
        return bool(load_checkpoint(path))
    except ValueError:
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


class RunWriter:
    """Writes WEIGHTS/<model>.pt with its card, <model>.ckpt, and TensorBoard events in LOGS.

    `recipe` names the `settings` for the card. Only the main process writes. Raises ValueError if
    the start weights have seen validation patients.
    """

    def __init__(
        self,
        state: TrainState,
        train: list[Case],
        validation: Sequence[Prepared],
        settings: dict,
        recipe: Sequence[str],
        teachers: Teachers | None,
        checkpoint: dict | None,
        commit: str | None,
    ):
        self.settings, self.validation = settings, validation
        cases = [volume.case for volume in validation]
        start = origin_of(settings["init_weights"], checkpoint)
        values = {name: settings[name] for name in recipe}
        values |= {"epochs": settings["epochs"], "amp": state.amp}
        origins = {}
        if start:
            origins["initialised_from"] = start
        if teachers:
            origins["teachers"] = teachers.origin()
        self.card = make_card(state, values, train, cases, origins)
        self.card["commit"] = commit
        check_seen(self.card, settings["allow_seen"] or checkpoint is not None)
        best = None  # the card of the weights kept so far
        if checkpoint and checkpoint.get("card"):
            best = checkpoint["card"]
            self.card["started"] = best.get("started")
        self.more = {  # in each checkpoint
            "initialised_from": start,
            "cases": names_of(train),
            "validation_cases": names_of(cases),
            "args": settings | {"amp": state.amp},
            "teachers": teachers.hashes if teachers else None,
            "card": best,
        }
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

    def headline(self, slices: int) -> str:
        """Describe network, device and data in one line."""
        device = self.card["device"]
        if self.card["processes"] > 1:
            device = f"{self.card['processes']} x {device}"
        if self.card["recipe"]["amp"]:
            device += ", half precision"
        return f"{self.card['model']} on {device}: {slices} slices to train on"

    def save(self, state: TrainState, validation: Validation | None = None) -> None:
        """Write a state: its weights and their card, if they are to be kept, and the checkpoint."""
        if not self.log:
            return
        contents = state.contents()
        if validation and (validation.better or self.settings["keep"] == "last"):
            patients = [patient_of(volume.case) for volume in self.validation]
            summary = summarise(list(validation.scores.values()), patients)
            if "validation_seen" in self.card:
                summary["seen_by_start_weights"] = len(self.card["validation_seen"])
            card = self.card | {"epoch": contents["epoch"], "validation_dsc": summary}
            path = self.files.with_suffix(".pt")
            save_weights(path, contents["ema"] or contents["model"], card)
            self.more["card"] = read_card(path)
        save_tensors(self.files.with_suffix(".ckpt"), contents | self.more)

    def report(
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
            self._draw(self.log, validation.masks, state.epoch)
        for name, value in values.items():
            self.log.add_scalar(name, value, state.epoch)
        tqdm.write(f"{line}  {speed:.1f} images/s")
        sys.stdout.flush()

    def _draw(self, log: SummaryWriter, masks: Sequence[np.ndarray], epoch: int) -> None:
        """Log some slices of the cases, outlined; none if their images are gone."""
        left = self.settings["vis_images"]
        for volume, mask in zip(self.validation, masks, strict=False):
            count = min(len(mask), left)
            left -= count
            if count < 1:
                return
            try:
                grey = to_grey(volume.case.read())[:count]
            except (OSError, ValueError) as error:
                tqdm.write(f"epoch {epoch} has no pictures: {sentence(error)}", file=sys.stderr)
                return
            pictures = outline(grey, mask[:count], volume.truth[:count])
            log.add_images(volume.name, pictures, epoch, dataformats="NHWC")
