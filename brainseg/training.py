"""What a training carries from step to step and leaves behind: state, schedule, card, files."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .cache import Prepared
from .distributed import is_main_process, shard_of_batch, world_size
from .io.files import write_json
from .io.pictures import outline, to_grey
from .metrics import summarise
from .splits import patient_of
from .weights import load_tensors, read_card, save_tensors, save_weights

CHECKPOINT = set("args model ema optimizer epoch step loss_sum best cases".split())
PROGRESS = ("epoch", "step", "loss_sum", "best")


@dataclass
class TrainState:
    """What changes during training; a checkpoint holds all of it."""

    model: nn.Module
    ema: nn.Module | None  # exponential moving average of the model
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    loss_sum: float = 0.0  # over the slices of these steps
    best: float = -1.0  # mean DSC; any first epoch is better, so that something is always kept

    @property
    def trained(self) -> nn.Module:
        """The network to validate and to keep: the moving average if there is one."""
        return self.ema or self.model

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def next_epoch(self) -> None:
        self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0

    def save(self, path: Path, **about: object) -> None:
        """Write a checkpoint, with what else `load_checkpoint` shall give; raises OSError."""
        content = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in PROGRESS},
        }
        save_tensors(path, content | about)

    def load(self, checkpoint: dict, cases: list[str], images: Path) -> None:
        """Go on from a checkpoint; ValueError if it is of other training cases or channels."""
        if checkpoint["cases"] != cases:
            raise ValueError(f"{images}: not the training cases of the checkpoint")
        try:
            self.model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            raise ValueError(f"{images}: slices of other channels than before") from error
        if self.ema:
            average = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items()}
            average.pop("n_averaged", None)  # of checkpoints before version 2 of preprocessing
            self.ema.load_state_dict(average)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for name in PROGRESS:
            setattr(self, name, checkpoint[name])


def load_checkpoint(path: Path) -> dict:
    """The content of a checkpoint; FileNotFoundError or ValueError, naming it, if it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume from; start without --resume")
    checkpoint = load_tensors(path)
    if not CHECKPOINT <= checkpoint.keys():
        raise ValueError(f"{path}: is not a training checkpoint of this version")
    return checkpoint


def what_changed(
    checkpoint: dict, state: TrainState, validation: list[str], rate: Callable, epochs: int
) -> list[str]:
    """What a resumed run does otherwise than the one before: one sentence for each."""
    notes, before = [], checkpoint.get("validation_cases", validation)
    if before != validation:
        new, gone = sorted({*validation} - {*before}), sorted({*before} - {*validation})
        changes = f"new: {', '.join(new) or 'none'}; gone: {', '.join(gone) or 'none'}"
        notes.append(
            f"the validation cases have changed ({changes}); the best DSC so far, "
            f"{state.best:.3f}, was of the earlier ones"
        )
    settings = checkpoint["args"]
    if settings["schedule"] == "cosine" and settings["epochs"] != epochs and state.epoch < epochs:
        step = state.global_step
        earlier = rate(step, steps=settings["epochs"] * state.steps_per_epoch)
        notes.append(
            f"the cosine is now of {epochs} epochs, not {settings['epochs']}: the learning rate "
            f"jumps from {earlier:.3g} to {rate(step):.3g}, then falls to 0 at epoch {epochs}"
        )
    return notes


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 0 at the last of all `steps`."""
    warm = min(1.0, (step + 1) / max(warmup, 1))
    if schedule == "constant":
        return peak * warm
    return peak * warm * 0.5 * (1 + math.cos(math.pi * (step / steps)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the exponential moving average of a model's weights and statistics towards it.

    The decay rises to `decay` as (1 + step) / (10 + step), as in TensorFlow's
    ExponentialMovingAverage, so that the random weights of the start are soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    averages, values = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)
    for mean, value in pairs:
        if not mean.is_floating_point():  # how many batches batch norm has seen
            mean.copy_(value)


def compile_ahead(
    model: nn.Module,
    slices: int,
    batch_size: int,
    image_size: int,
    amp: bool,
    device: torch.device,
) -> nn.Module:
    """The network compiled for the batches of an epoch of `slices`, so that no step waits for it.

    The model's weights and statistics stay as they are. Raises ValueError if it cannot be compiled.
    """
    start = time.perf_counter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = torch.compile(model, dynamic=False)
    model.train()
    for size in (batch_size, slices % batch_size or batch_size):
        own = len(shard_of_batch(range(size)))
        images = torch.zeros((own, model.settings["in_channels"], image_size, image_size))
        images = images.to(device, memory_format=torch.channels_last)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                network(images, logits=True).sum().backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
            raise ValueError(f"--compile fails here ({reason}); leave it out") from error
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
    return network


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """Have the ranks, if there are several, end each step with the same gradients."""
    if world_size() == 1:
        return network
    own = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        network, device_ids=own, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def describe_run(
    model: nn.Module,
    recipe: dict,
    cases: dict[str, list[str]],
    start: dict | None,
    device: torch.device,
) -> dict:
    """The card of a run's weights: data, split, recipe, versions, device. It names no paths.

    The training cases of the weights that it started from count as seen by this network too.
    """
    if isinstance(recipe["pretrained"], str):
        recipe = recipe | {"pretrained": Path(recipe["pretrained"]).name}
    cuda = device.type == "cuda"
    about = {
        "model": recipe["model"],
        "settings": model.settings,
        **{name: recipe[name] for name in ("image_size", "neighbours", "preprocessing")},
        "cases": dict(cases),
        "recipe": recipe,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "processes": world_size(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if start:
        about["cases"]["train"] = sorted({*cases["train"], *trained_cases(start)})
        about["initialised_from"] = {k: v for k, v in start.items() if k != "cases"}
        if seen := seen_cases(start, cases["validation"]):
            about["validation_seen"] = seen
    return about


def read_start(path: Path) -> dict:
    """What the card of weights to start from says of their origin."""
    card = read_card(path)
    return {key: card.get(key) for key in ("recipe", "commit", "cases", "initialised_from")}


def trained_cases(start: dict | None) -> list[str]:
    """The cases that weights to start from were trained on, as far as their card names them."""
    return list(((start or {}).get("cases") or {}).get("train", ()))


def seen_cases(start: dict | None, validation: Sequence[str]) -> list[str]:
    """The validation cases of patients that weights to start from were trained on."""
    patients = set(map(patient_of, trained_cases(start)))
    return [name for name in validation if patient_of(name) in patients]


class RunWriter:
    """Writes what a run leaves behind; on all ranks but the main one, nothing.

    That is WEIGHTS/<model>.pt with its card, WEIGHTS/<model>.ckpt, and TensorBoard events in LOGS.
    """

    def __init__(self, weights: Path, logs: Path, card: dict, kept: dict, args: dict):
        self.files, self.logs, self.card, self.kept = weights / card["model"], logs, card, kept
        self.log = None
        if is_main_process():
            write_json(logs / "args.json", card | {"args": args})

    def __enter__(self) -> RunWriter:
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

    def curves(self, epoch: int, values: dict[str, float]) -> None:
        if is_main_process():
            if self.log is None:
                from torch.utils.tensorboard import SummaryWriter  # slow

                self.log = SummaryWriter(self.logs, purge_step=epoch)
            for name, value in values.items():
                self.log.add_scalar(name, value, epoch)

    def slices(self, epoch: int, volumes: list[Prepared], masks: list[np.ndarray], most: int):
        """Log up to `most` slices of the cases, outlined, in the source geometry."""
        for volume, mask in zip(volumes, masks, strict=True):
            count = min(len(mask), most)
            if count < 1 or not is_main_process():
                return
            most -= count
            grey = to_grey(volume.case.read())[:count]
            pictures = outline(grey, mask[:count], volume.truth[:count])
            self.log.add_images(volume.name, pictures, epoch, dataformats="NHWC")
