"""One training run: its steps, schedule and validation, and what is written down of it."""

from __future__ import annotations

import argparse
import copy
import math
import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from brainseg.cache import Prepared
from brainseg.devices import has_bfloat16, in_groups, pick_device, to_device
from brainseg.distributed import (
    copy_buffers,
    gather,
    largest,
    processes,
    share,
    share_of_batch,
    together,
    total,
)
from brainseg.metrics import dsc
from brainseg.segmenter import Segmenter
from brainseg.splits import named_patients
from brainseg.weights import build_model, initialise, read_card
from dataset import BrainSegmentationDataset, Feed
from loss import LOSSES
from transform import augment, drop_sequences, vary_intensity
from utils import Interruption, git_commit, make_generator, plain

# Settings that change the numbers of a run: a resumed run keeps those it was started with.
RECIPE = (
    "model features pretrained preprocessing image_size neighbours loss batch_size lr "
    "weight_decay schedule warmup ema background aug_scale aug_angle aug_intensity "
    "drop_sequences seed folds fold amp keep sync_bn sequences labels patients"
).split()
SYNC = 20  # steps between two looks at the loss, for which host and device wait for each other
AT_ONCE = 256  # slices whose probabilities a GPU holds in validation


class Trainer:
    """Everything that changes during training, and what a checkpoint and a card hold of it."""

    def __init__(self, args: argparse.Namespace, train_set: BrainSegmentationDataset):
        self.args = args
        self.device = pick_device(args.device)
        self.amp = has_bfloat16(self.device) if args.amp is None else args.amp
        torch.backends.cudnn.deterministic = True  # same seed, same device, same result
        self.sequences = train_set.in_channels
        if args.drop_sequences and self.sequences != 3:
            raise ValueError(f"--drop-sequences is for 3 sequences a slice, not {self.sequences}")
        settings = {"in_channels": self.sequences * (2 * args.neighbours + 1)}
        if args.features:
            settings["init_features"] = args.features
        if args.pretrained and not args.resume:
            settings["pretrained"] = args.pretrained
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            model = build_model(args.model, **settings)
        self.initialised_from = None
        if args.init_weights and not args.resume:
            unused, untouched = initialise(model, args.init_weights)
            print(
                f"{args.init_weights}: not used: {', '.join(unused) or 'nothing'}; "
                f"left at random: {', '.join(untouched) or 'nothing'}"
            )
            card = read_card(args.init_weights)
            kept = ("recipe", "commit", "cases", "patients", "initialised_from")
            self.initialised_from = {key: card.get(key) for key in kept}
        if args.sync_bn:
            if self.device.type != "cuda":
                raise ValueError(f"--sync-bn is for CUDA devices, and this is {self.device}")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.network = self.model  # as it is called in a training step
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        self.ema = None
        if args.ema:
            self.ema = copy.deepcopy(self.model)
        self.feed = Feed(train_set, self.device, args.neighbours, args.workers)
        self.cases = [volume.name for volume in train_set.volumes]
        self.steps_per_epoch = math.ceil(len(train_set) / args.batch_size)
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self.loss_sum = 0.0  # over the slices of these steps
        self.best = -1.0  # any first epoch is better, so that something is always kept

    @property
    def trained(self) -> nn.Module:
        """The network to validate and to keep: the moving average if there is one."""
        return self.ema or self.model

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def learning_rate(self) -> float:
        """Linear warm-up, then constant or half a cosine down to 0 at the last step."""
        warm = min(1.0, (self.global_step + 1) / max(self.args.warmup, 1))
        if self.args.schedule == "constant":
            return self.args.lr * warm
        progress = self.global_step / (self.args.epochs * self.steps_per_epoch)
        return self.args.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))

    def parallelise(self) -> None:
        """Have the processes, if there are several, end each step with the same gradients."""
        if processes() > 1:
            own = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids=own)

    def compile(self) -> float:
        """Compile the network for the batches of an epoch, so that no step waits; the seconds.

        Raises ValueError if that cannot be done here.
        """
        start, args = time.perf_counter(), self.args
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.network = torch.compile(self.model, dynamic=False)
        self.model.train()
        last = len(self.feed) % args.batch_size or args.batch_size
        for whole in (args.batch_size, last):
            own = len(share_of_batch(range(whole)))
            try:
                self.logits(self.blank(own)).sum().backward()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
                raise ValueError(f"--compile fails here ({reason}); leave it out") from error
        self.optimizer.zero_grad(set_to_none=True)
        self.model.load_state_dict(before)  # the statistics of batch norm have changed
        return time.perf_counter() - start

    def train_step(self, images: Tensor, masks: Tensor, whole: int | None = None) -> Tensor:
        """One optimiser step on a batch as stored; the loss of the batch, still on the device.

        Of a `whole` batch that is divided over processes, this one's part is given.
        """
        whole = whole or len(images)
        images, masks = (to_device(part, self.device).float() for part in (images, masks))
        images, masks = self.augmented(images, masks, whole)
        self.model.train()
        logits = self.logits(images)
        if not share(range(whole)):  # a stand-in: it takes part in the step but does not count
            logits, masks = logits[:0], masks[:0]
        loss = LOSSES[self.args.loss](logits, masks, total=total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.ema:
            update_average(self.ema, self.model, self.args.ema, self.global_step)
        return loss.detach()

    def step_in_memory(self, images: Tensor, masks: Tensor, whole: int) -> Tensor:
        """`train_step`; ValueError, naming a batch that fits, for one that does not."""
        try:
            return self.train_step(images, masks, whole)
        except torch.OutOfMemoryError:
            pass  # what the failed step has left is free only once this block is left
        if processes() > 1:  # the others take part in every step, so that none can be tried alone
            advice = f"start anew with {whole // 2}, or with more processes"
        elif fits := self.batch_that_fits(len(images)):
            advice = f"--batch-size {fits} has just gone through: start anew with that"
        else:
            advice = "not even one slice fits: start anew with a smaller --image-size or network"
        raise ValueError(f"{self.device} is out of memory at --batch-size {whole}; {advice}")

    def batch_that_fits(self, size: int) -> int:
        """The largest of a half, a quarter ... of `size` that a step goes through with, 0 if none.

        The weights are of no use afterwards.
        """
        self.network = self.model.eval()  # not compiled for each of these sizes
        while size := size // 2:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                logits = self.logits(self.blank(size))
                LOSSES[self.args.loss](logits, torch.zeros_like(logits)).backward()
                self.optimizer.step()
                return size
            except torch.OutOfMemoryError:
                pass
        return 0

    def augmented(self, images: Tensor, masks: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """The batch with the random changes of this step, channels last."""
        args, generator = self.args, make_generator(self.args.seed, 1, self.global_step)
        images, masks = augment(
            images, masks, generator, args.aug_scale, args.aug_angle, whole=whole
        )
        if args.drop_sequences:
            images = drop_sequences(images, generator, args.drop_sequences, whole)
        if args.aug_intensity:
            images = vary_intensity(images, generator, args.aug_intensity, self.sequences, whole)
        return images.contiguous(memory_format=torch.channels_last), masks

    def blank(self, size: int) -> Tensor:
        """A batch of so many slices as the network sees them, all 0."""
        shape = self.model.settings["in_channels"], self.args.image_size, self.args.image_size
        images = torch.zeros((size, *shape), device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.network(images, logits=True)

    def train_epoch(
        self, train_set: BrainSegmentationDataset, weights: Tensor, interruption: Interruption
    ) -> float | None:
        """Train on slices drawn by `weights` to the epoch's end: slices a second, None if stopped.

        Raises ValueError once the loss is NaN or infinite. Processes share each batch, so that
        an epoch has the same slices and steps whatever their number; a signal to one stops all.
        """
        generator = make_generator(self.args.seed, 0, self.epoch)
        drawn = torch.multinomial(weights, len(train_set), replacement=True, generator=generator)
        batches = drawn.split(self.args.batch_size)
        ahead = self.feed.batches([share_of_batch(b) for b in batches[self.step :]])
        start, first = time.perf_counter(), self.step * self.args.batch_size
        bar = tqdm(
            total=len(train_set),
            initial=first,
            desc=f"epoch {self.epoch + 1}/{self.args.epochs}",
            unit="image",
            leave=False,
            disable=None,
        )
        losses = []
        with bar:
            for batch, part in zip(batches[self.step :], ahead, strict=True):
                loss = self.step_in_memory(*part, len(batch))
                losses.append(loss * len(batch))
                self.step += 1
                bar.update(len(batch))
                last, stop = self.step == len(batches), largest(interruption.signal or 0)
                if last or self.step % SYNC == 0 or stop:
                    self.loss_sum += torch.stack(losses).cpu().double().sum().item()
                    losses.clear()
                    together(lambda: self.check_finite(self.loss_sum))
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if stop and not last:
                    return None
        return (len(train_set) - first) / (time.perf_counter() - start)

    def check_finite(self, loss: float) -> None:
        """Raise ValueError if a loss is NaN or infinite, before anything of the epoch is saved."""
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is no longer finite at epoch {self.epoch + 1}, step {self.step}; "
                f"nothing of this epoch was written to {self.args.weights}: "
                "start anew with a lower --lr, or with --no-amp"
            )

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "best": self.best,
            "cases": self.cases,
            "initialised_from": self.initialised_from,
            "args": plain(self.args) | {"resume": False, "amp": self.amp},
        }

    def load(self, checkpoint: dict) -> None:
        """Take over what `state` gave; ValueError if the training cases are not the same."""
        if checkpoint["cases"] != self.cases:
            raise ValueError(f"{self.args.images}: not the training cases of the checkpoint")
        try:
            self.model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            raise ValueError(f"{self.args.images}: slices of other channels than before") from error
        if self.ema:
            average = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items()}
            average.pop("n_averaged", None)  # of checkpoints before version 2 of preprocessing
            self.ema.load_state_dict(average)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for name in ("epoch", "step", "loss_sum", "best", "initialised_from"):
            setattr(self, name, checkpoint[name])

    def evaluate(
        self, dataset: BrainSegmentationDataset
    ) -> tuple[float, dict[str, float], list[np.ndarray]]:
        """Loss over the slices, DSC of each case, and the masks (S, H, W), in source geometry.

        Processes share the cases: loss and DSCs are of all, masks of those that are its own.
        """
        copy_buffers(self.trained)
        segmenter = Segmenter(
            self.trained,
            self.args.image_size,
            batch_size=self.args.batch_size,
            device=self.device,
            amp=self.amp,
            neighbours=self.args.neighbours,
            version=self.args.preprocessing,
        )
        volumes = share(dataset.volumes)
        bar = tqdm(total=len(volumes), desc="validating", unit="case", leave=False, disable=None)
        losses, scores, masks = [], [], []
        with bar:
            at_once = 1 if self.device.type == "cpu" else AT_ONCE
            for group in in_groups(volumes, lambda volume: len(volume.mask), at_once):
                for volume, probabilities in zip(
                    group, self.probabilities(segmenter, group), strict=True
                ):
                    target = to_device(torch.from_numpy(volume.mask), self.device)[:, None]
                    logits = torch.logit(probabilities, eps=1e-6)  # within ± 14, always finite
                    losses.append(LOSSES[self.args.loss](logits, target.to(logits)))
                    masks.append(segmenter.finish(probabilities, volume.frame))
                    scores.append(dsc(masks[-1], volume.truth))
                    bar.update()
        losses = gather(torch.stack(losses).tolist() if losses else [])
        loss = sum(x * len(v.mask) for x, v in zip(losses, dataset.volumes, strict=True))
        names = [volume.name for volume in dataset.volumes]
        return loss / len(dataset), dict(zip(names, gather(scores), strict=True)), masks

    def probabilities(self, segmenter: Segmenter, group: list[Prepared]) -> Sequence[Tensor]:
        """Those (S, 1, N, N) of each volume, from batches that go on from one to the next."""
        images = [to_device(torch.from_numpy(volume.images), self.device) for volume in group]
        lengths = [len(volume.images) for volume in group]
        return segmenter.probabilities(torch.cat(images), lengths=lengths).split(lengths)

    def describe(self, validation_set: BrainSegmentationDataset) -> dict:
        """What a weights' card says of the run: data, split, recipe, versions, device. No paths."""
        recipe = {name: getattr(self.args, name) for name in (*RECIPE, "epochs")}
        for name in ("pretrained", "patients"):
            if isinstance(recipe[name], str):
                recipe[name] = Path(recipe[name]).name
        cuda = self.device.type == "cuda"
        about = {
            "model": self.args.model,
            "settings": self.model.settings,
            "image_size": self.args.image_size,
            "neighbours": self.args.neighbours,
            "preprocessing": self.args.preprocessing,
            "cases": {
                "train": self.cases,
                "validation": [volume.name for volume in validation_set.volumes],
            },
            "recipe": recipe | {"amp": self.amp},
            "commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name(self.device) if cuda else str(self.device),
            "processes": processes(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        first = self.initialised_from
        known = named_patients([*self.cases, *about["cases"]["validation"]])
        if known := ((first or {}).get("patients") or {}) | known:
            about["patients"] = known
        if first:  # its training cases were seen by this network too
            earlier = (first["cases"] or {}).get("train", ())
            about["cases"]["train"] = sorted({*self.cases, *earlier})
            about["initialised_from"] = {
                k: v for k, v in first.items() if k not in ("cases", "patients")
            }
        return about


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
