"""The state of a training: network, optimiser, learning-rate schedule, averaged weights."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .devices import half_precision
from .distributed import shard_of_batch, world_size
from .io.files import out_of_memory, sentence
from .preprocess import VERSION
from .weights import (
    CARD_DEFAULTS,
    MODELS,
    build_model,
    initialise,
    load_state,
    load_tensors,
    read_card,
    save_tensors,
)

PROGRESS = ("epoch", "step", "loss_sum", "best")
CHECKPOINT = {"args", "model", "ema", "optimizer", "cases", *PROGRESS}

# The values published in 2019, for --recipe classic; the defaults are those of the shipped weights.
CLASSIC = {
    "lr": 1e-4, "schedule": "constant", "warmup": 0, "ema": 0.0, "loss": "dice", "background": 0.1,
    "aug_scale": 0.05, "aug_intensity": 0, "drop_sequences": 0,
}  # fmt: skip


@dataclass
class TrainState:
    """A training between two steps: what it was set up with, and what a checkpoint holds."""

    model: nn.Module
    slices: int  # per epoch
    batch_size: int
    epochs: int
    rate: Callable[[int, int], float]  # the learning rate, by step and number of all steps
    weight_decay: float = 0.0
    decay: float = 0.0  # of the moving average of the weights; 0: no average
    amp: bool = False
    seed: int = 0
    neighbours: int = 0  # slices seen on either side of each
    loss: Callable[..., Tensor] | None = None  # of logits and masks; see loss.py
    augment: Callable[..., tuple[Tensor, Tensor]] | None = None  # of images and masks, at random
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    loss_sum: float = 0.0  # over the slices of these steps
    best: float = -1.0  # mean DSC; the first epoch is always better, and so kept

    def __post_init__(self) -> None:
        self.network = self.model  # as called by a step: compiled, and shared by the ranks
        self.ema = copy.deepcopy(self.model) if self.decay else None
        parameters = list(self.model.parameters())
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=self.weight_decay, fused=True)
        scaled = self.amp and half_precision(self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    @property
    def trained(self) -> nn.Module:
        """The network to validate and to keep: the moving average if there is one."""
        return self.ema or self.model

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.slices / self.batch_size)

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def learning_rate(self, epochs: int | None = None) -> float:
        """Compute the learning rate of the next step in a training of `epochs` (None: its own)."""
        return self.rate(self.global_step, (epochs or self.epochs) * self.steps_per_epoch)

    def save(self, path: Path, **about: object) -> None:
        """Write a checkpoint, with `about` for `load_checkpoint` to return; raises OSError."""
        content = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in PROGRESS},
        }
        save_tensors(path, content | about)

    def load(self, checkpoint: dict, cases: list[str], images: Path) -> None:
        """Continue from a checkpoint; ValueError if its training cases or channels differ."""
        if checkpoint["cases"] != cases:
            raise ValueError(
                f"{images}: does not have the training cases of the checkpoint; give its --images"
            )
        try:
            self.model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            raise ValueError(
                f"{images}: has other channels than the checkpoint; give its --images"
            ) from error
        if self.ema:
            self.ema.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler := checkpoint.get("scaler"):
            self.scaler.load_state_dict(scaler)
        for name in PROGRESS:
            setattr(self, name, checkpoint[name])


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint. Raises FileNotFoundError or ValueError, naming it, if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume from; start without --resume")
    try:
        checkpoint = load_tensors(path)
    except ValueError as error:
        fault = "is not a training checkpoint, or is damaged; start without --resume"
        raise ValueError(f"{path}: {fault}") from error
    before_version_2 = "n_averaged" in (checkpoint.get("ema") or ())  # of the preprocessing
    if before_version_2 or not CHECKPOINT <= checkpoint.keys():
        raise ValueError(
            f"{path}: is not a training checkpoint of this version; start without --resume"
        )
    return checkpoint


def learning_rate(peak: float, schedule: str, warmup: int, step: int, steps: int) -> float:
    """Warm up linearly, then stay at `peak` or follow half a cosine to 0 at the last of `steps`."""
    warm = min(1.0, (step + 1) / max(warmup, 1))
    if schedule == "constant":
        return peak * warm
    return peak * warm * 0.5 * (1 + math.cos(math.pi * (step / steps)))


@torch.no_grad()
def update_average(state: TrainState) -> None:
    """Move the exponential moving average of weights and statistics towards the model's.

    The decay rises to `state.decay` as (1 + step) / (10 + step), as in TensorFlow's
    ExponentialMovingAverage, so the initial random weights are soon forgotten.
    """
    step = state.global_step
    decay = min(state.decay, (1 + step) / (10 + step))
    average, model = state.ema.state_dict(), state.model.state_dict()
    pairs = list(zip(average.values(), model.values(), strict=True))
    averages, values = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)
    for mean, value in pairs:
        if not mean.is_floating_point():  # how many batches batch norm has seen
            mean.copy_(value)


def compile_ahead(state: TrainState, image_size: int) -> None:
    """Compile the network for the batches of an epoch, so that no step waits for it.

    The model's weights and statistics stay as they are. Raises ValueError if it cannot be compiled.
    """
    start = time.perf_counter()
    model, device = state.model, state.device
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs
    state.network = torch.compile(model, dynamic=False, mode=mode)
    model.train()
    for size in (state.batch_size, state.slices % state.batch_size or state.batch_size):
        own = len(shard_of_batch(range(size)))
        images = torch.zeros((own, model.settings["in_channels"], image_size, image_size))
        images = images.to(device, memory_format=torch.channels_last)
        try:
            with torch.autocast(device.type, half_precision(device), enabled=state.amp):
                state.network(images, logits=True).sum().backward()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
            raise ValueError(f"--compile fails here ({reason}); leave it out") from error
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)


def parallel(state: TrainState) -> None:
    """Make the ranks, if there are several, end each step with the same gradients."""
    if world_size() == 1:
        return
    known = inspect.signature(DistributedDataParallel).parameters
    newer = "forward_sync_buffers"  # the name of broadcast_buffers in later versions of PyTorch
    state.network = DistributedDataParallel(
        state.network,
        device_ids=[state.device] if state.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{newer if newer in known else "broadcast_buffers": False},
    )


def build_network(name: str, seed: int, init_weights: Path | None, **settings) -> nn.Module:
    """Build a network with random weights from `seed`, or those of a file where they fit.

    Settings that are None are left at the network's default.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(name, **settings)
    if init_weights:
        unused, random = (", ".join(part) for part in initialise(model, init_weights))
        fault = f"not used: {unused or 'nothing'}; left at random: {random or 'nothing'}"
        print(f"{init_weights}: {fault if unused or random else 'all weights were taken over'}")
    return model


def network_defaults(name: str, classic: bool, init_weights: Path | None) -> dict[str, int | None]:
    """Return the defaults for settings of the network `name` and of its input.

    They are those of the weights to start from, by their card; otherwise those of the shipped
    weights, or of the published ones if `classic`.
    """
    if classic:
        values = {"features": 32, **CARD_DEFAULTS}
    else:
        values = {"features": 16, "image_size": 192, "neighbours": 0, "preprocessing": VERSION}
    if init_weights:
        unet, card = MODELS["unet"].settings_of(load_state(init_weights)), read_card(init_weights)
        values |= {key: card.get(key, value) for key, value in CARD_DEFAULTS.items()}
        values["features"] = unet["init_features"] if unet else values["features"]
    return values if name == "unet" else values | {"features": None}


def on_device(model: nn.Module, device: torch.device, sync_bn: bool = False) -> nn.Module:
    """Move the network to its device; with `sync_bn`, batch norm over the batch of all ranks."""
    if sync_bn:
        if device.type != "cuda":
            raise ValueError(f"--sync-bn is for CUDA devices, not for {device}; leave it out")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)


def check_finite(loss: float, state: TrainState) -> None:
    """Raise ValueError if a loss is NaN or infinite, before anything of the epoch is saved."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is not finite at epoch {state.epoch + 1}, step {state.step}; nothing "
            "of this epoch was written: start again with a lower --lr, or with --no-amp"
        )


@contextmanager
def batch_advice(batch_size: int) -> Iterator[None]:
    """Refuse a batch without a slice for each rank; turn "out of memory" into what to lower."""
    if batch_size < world_size():
        raise ValueError(
            f"--batch-size {batch_size} is less than one slice for each of {world_size()} "
            "processes; raise it, or start fewer processes"
        )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory at --batch-size {batch_size}; start again with a smaller one, or with "
            f"a smaller --image-size or --features ({sentence(error)})"
        ) from error
