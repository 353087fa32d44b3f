"""The state of a training: network, optimiser, learning rate, averaged weights."""

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from . import weights
from .devices import half_precision
from .distributed import shard_of_batch, world_size
from .io.files import out_of_memory, sentence

PROGRESS = ("epoch", "step", "loss_sum", "best")
CHECKPOINT = {"args", "model", "ema", "optimizer", "cases", *PROGRESS}


@dataclass(kw_only=True)
class TrainState:
    """A training between two steps: what it was set up with, and what a checkpoint holds."""

    model: weights.Network
    slices: int  # per epoch
    batch_size: int
    epochs: int
    lr: float  # at its peak
    schedule: str = "constant"  # or cosine
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    ema: float = 0.0  # decay of the moving average of the weights; 0: no average
    amp: bool = False
    seed: int = 0
    neighbours: int = 0  # slices seen on either side of each
    loss: Callable[..., Tensor]  # of logits and masks; see loss.py
    augment: Callable[..., tuple[Tensor, Tensor]]  # images and masks; see transform.py
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    loss_sum: float = 0.0  # over the slices of these steps
    best: float = -1.0  # mean DSC; the first epoch is always better, and so kept

    def __post_init__(self) -> None:
        self.network: Callable[..., Tensor] = self.model  # compiled, shared by the ranks
        self.trained = self.model  # the network to validate and to keep: the moving average if any
        if self.ema:
            self.trained = copy.deepcopy(self.model)
        parameters = list(self.model.parameters())
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=self.weight_decay, fused=True)
        scaled = self.amp and half_precision(self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.slices / self.batch_size)

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def learning_rate(self, epochs: int | None = None) -> float:
        """Compute the learning rate of the next step in a training of `epochs` (None: its own).

        It warms up linearly, then stays or follows half a cosine to 0 at the last step.
        """
        rate = self.lr * min(1.0, (self.global_step + 1) / max(self.warmup, 1))
        if self.schedule == "constant":
            return rate
        steps = (epochs or self.epochs) * self.steps_per_epoch
        return rate * 0.5 * (1 + math.cos(math.pi * (self.global_step / steps)))

    def autocast(self) -> torch.autocast:
        """Compute in half precision in a `with` block, if `amp` says so."""
        return torch.autocast(self.device.type, half_precision(self.device), enabled=self.amp)

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the exponential moving average of weights and statistics towards the model's.

        The decay rises to `ema` as (1 + step) / (10 + step), as in TensorFlow's
        ExponentialMovingAverage, so the initial random weights are soon forgotten.
        """
        decay = min(self.ema, (1 + self.global_step) / (10 + self.global_step))
        averages, values = [], []
        pairs = zip(
            self.trained.state_dict().values(), self.model.state_dict().values(), strict=True
        )
        for average, value in pairs:
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:  # how many batches batch norm has seen
                average.copy_(value)
        get_ema_multi_avg_fn(decay)(averages, values, self.global_step)

    def check_finite(self, loss: float) -> None:
        """Raise ValueError if a loss is NaN or infinite, before anything of the epoch is saved."""
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is not finite at epoch {self.epoch + 1}, step {self.step}; nothing "
                "of this epoch was written: start again with a lower --lr, or with --no-amp"
            )

    def save(self, path: Path, more: dict) -> None:
        """Write a checkpoint, with `more` for `load_checkpoint` to return; raises OSError."""
        content = {
            "model": self.model.state_dict(),
            "ema": None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema:
            content["ema"] = self.trained.state_dict()
        for name in PROGRESS:
            content[name] = getattr(self, name)
        weights.save_tensors(path, content | more)

    def load(self, checkpoint: dict, cases: list[str], images: Path | str) -> None:
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
            self.trained.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):  # empty without float16; earlier versions had none
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in PROGRESS:
            setattr(self, name, checkpoint[name])


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint. Raises FileNotFoundError or ValueError, naming it, if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume from; start without --resume")
    try:
        checkpoint = weights.load_tensors(path)
    except ValueError as error:
        fault = "is not a training checkpoint, or is damaged; start without --resume"
        raise ValueError(f"{path}: {fault}") from error
    before_version_2 = "n_averaged" in (checkpoint.get("ema") or ())  # of the preprocessing
    if before_version_2 or not CHECKPOINT <= checkpoint.keys():
        raise ValueError(
            f"{path}: is not a training checkpoint of this version; start without --resume"
        )
    return checkpoint


def compile_ahead(state: TrainState, image_size: int) -> None:
    """Compile the network for the batches of an epoch, weights unchanged; ValueError on failure."""
    start = time.perf_counter()
    model = state.model
    settings: Any = model.settings
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mode = "reduce-overhead" if state.device.type == "cuda" else None  # CUDA graphs
    state.network = torch.compile(model, dynamic=False, mode=mode)
    model.train()
    last = state.slices % state.batch_size or state.batch_size
    for batch_size in (state.batch_size, last):
        part = len(shard_of_batch(range(batch_size)))
        shape = (part, settings["in_channels"], image_size, image_size)
        images = torch.zeros(shape, device=state.device)
        images = images.contiguous(memory_format=torch.channels_last)
        try:
            with state.autocast():
                state.network(images, logits=True).sum().backward()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
            raise ValueError(f"--compile fails here ({reason}); leave it out") from error
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)


def share_gradients(state: TrainState) -> None:
    """Make the ranks, if there are several, end each step with the same gradients."""
    if world_size() == 1:
        return
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    if state.device.type == "cuda":
        options["device_ids"] = [state.device]
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        options["forward_sync_buffers"] = False
    else:  # its name before PyTorch 2.13
        options["broadcast_buffers"] = False
    state.network = DistributedDataParallel(state.network, **options)


def build_network(
    name: str,
    in_channels: int,
    features: int | None = None,
    pretrained: str | bool | None = None,
    seed: int = 0,
    init_weights: Path | None = None,
) -> weights.Network:
    """Build a network with random weights from `seed`, or those of a file where they fit."""
    settings: dict[str, Any] = {"in_channels": in_channels}
    if features:
        settings["init_features"] = features
    if pretrained:
        settings["pretrained"] = pretrained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = weights.build_model(name, **settings)
    if init_weights:
        unused, random = weights.initialise(model, init_weights)
        said = "all weights were taken over"
        if unused or random:
            said = f"not used: {', '.join(unused) or 'nothing'}; "
            said += f"left at random: {', '.join(random) or 'nothing'}"
        print(f"{init_weights}: {said}")
    return model


def on_device(
    model: weights.Network, device: torch.device, sync_bn: bool = False
) -> weights.Network:
    """Move the network to its device; with `sync_bn`, batch norm over the batch of all ranks."""
    if sync_bn:
        if device.type != "cuda":
            raise ValueError(f"--sync-bn is for CUDA devices, not for {device}; leave it out")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its batch norms are replaced in place
    # The stub of `to` lacks memory_format.
    return model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def settings_of_weights(path: Path) -> dict[str, int]:
    """Return the settings of the network in a weights file and of its input, by their card."""
    unet = weights.MODELS["unet"].settings_of(weights.load_state(path))
    card = weights.CARD_DEFAULTS | weights.read_card(path)
    settings = {name: card[name] for name in weights.CARD_DEFAULTS}
    if unet:
        settings["features"] = unet["init_features"]
    return settings


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
