"""The state of a training: network, optimiser, learning rate, averaged weights."""

import copy
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .devices import half_precision, world_size
from .distributed import shard_of_batch
from .io.files import out_of_memory
from .weights import Network

PROGRESS = ("epoch", "step", "loss_sum", "best")


@dataclass(kw_only=True)
class TrainState:
    """A training between two steps: what it was set up with, and what a checkpoint holds."""

    model: Network
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
        dtype = half_precision(self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=self.amp)
        scaled = self.amp and dtype == torch.float16
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

    def contents(self) -> dict:
        """Return what a checkpoint holds of this state, for `load`."""
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
        return content

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


def make_generator(seed: int, *stream: int) -> torch.Generator:
    """Make a CPU generator for one stream of draws, e.g. `make_generator(seed, epoch)`.

    Streams are independent and can be remade at any time, so an interrupted training continues
    with the draws that it would have made.
    """
    (state,) = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


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
    epochs = checkpoint["args"]["epochs"]
    if state.schedule == "cosine" and epochs != state.epochs and state.epoch < state.epochs:
        print(
            f"the cosine now spans {state.epochs} epochs, not {epochs}: the learning rate jumps "
            f"from {state.learning_rate(epochs):.3g} to {state.learning_rate():.3g}, then falls "
            f"to 0 at epoch {state.epochs}"
        )


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
            with state.autocast:
                state.network(images, logits=True).sum().backward()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
            raise ValueError(f"--compile fails here ({reason}); leave it out") from error
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)


def wrap_network(state: TrainState, compile_for: int | None = None) -> None:
    """Compile the network if `compile_for` says the side of its slices, then wrap it for the ranks.

    If there are several, DistributedDataParallel makes them end each step with the same gradients.
    """
    if compile_for:  # before the ranks wait for each other's gradients
        compile_ahead(state, compile_for)
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


def on_device(model: Network, device: torch.device, sync_bn: bool = False) -> Network:
    """Move the network to its device; with `sync_bn`, batch norm over the batch of all ranks."""
    if sync_bn:
        if device.type != "cuda":
            raise ValueError(f"--sync-bn is for CUDA devices, not for {device}; leave it out")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its batch norms are replaced in place
    # The stub of `to` lacks memory_format.
    return model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
