"""Train a network on a folder of cases with masks.

    python3 train.py --images ./kaggle_3m                 100 epochs; best weights: weights/unet.pt
    python3 train.py --resume                             go on after an interruption
    python3 train.py --resume --epochs 150                train on for longer
    python3 train.py --folds 5 --fold 0                   cross-validation by patient
    python3 train.py --init-weights weights/unet.pt ...   fine-tune
    tensorboard --logdir logs                             curves and outlined slices

Writes WEIGHTS/<model>.pt (with its card, <model>.json) and WEIGHTS/<model>.ckpt, and never
touches the weights that came with the project.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import MODELS, build_model, initialise, load_tensors, save_weights
from dataset import BrainSegmentationDataset
from loss import LOSSES
from metrics import dsc, summarise
from segmentation import Segmenter, has_bfloat16, pick_device
from transform import augment
from utils import Interruption, fail, make_generator, outline, to_grey, written_whole

ROOT = Path(__file__).resolve().parent
# Settings that change the numbers of a run: a resumed run keeps those it was started with.
FIXED = (
    "images image_size batch_size lr schedule warmup ema loss model features seed aug_scale "
    "aug_angle folds fold amp keep init_weights"
).split()


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--images", type=Path, default="./kaggle_3m", help="folder of cases (%(default)s)")
    add("--image-size", type=int, default=256, help="side of a resized slice (%(default)s)")
    add("--folds", type=int, help="cross-validation: number of folds, by patient")
    add("--fold", type=int, help="cross-validation: the fold to validate on, from 0")
    add("--cache", type=Path, help="preprocessed volumes (~/.cache/brainseg)")
    add("--workers", type=int, help="threads that read and preprocess (all cores)")

    add = parser.add_argument_group("network").add_argument
    add("--model", default="unet", help=f"one of: {', '.join(MODELS)} (%(default)s)")
    add("--features", type=int, default=32, help="channels of the first level (%(default)s)")
    add("--init-weights", type=Path, help="weights to start from, as far as they fit")

    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=int, default=100, help="each of as many slices as there are (%(default)s)")
    add("--batch-size", type=int, default=16, help="slices a step (%(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam, its peak (%(default)s)")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of the learning rate; cosine falls to 0 at the last epoch (%(default)s)",
    )
    add("--warmup", type=int, default=0, help="steps of linear warm-up (%(default)s)")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, say 0.998; 0 is off")
    add("--loss", default="dice", help=f"one of: {', '.join(LOSSES)} (%(default)s)")
    add("--aug-scale", type=float, default=0.05, help="random scale, 1 ± this (%(default)s)")
    add("--aug-angle", type=float, default=15, help="random rotation, ± degrees (%(default)s)")
    add("--seed", type=int, default=42, help="of every random draw (%(default)s)")
    add(
        "--keep",
        choices=("best", "last"),
        default="best",
        help="weights of the epoch with the best validation DSC, or of the last (%(default)s)",
    )

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", help="cuda, cuda:1, mps, cpu (an accelerator if there is one)")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (where the device is faster so)",
    )
    add("--weights", type=Path, default="./weights", help="folder to write to (%(default)s)")
    add("--logs", type=Path, default="./logs", help="folder for TensorBoard (%(default)s)")
    add("--vis-images", type=int, default=200, help="validation slices to draw (%(default)s)")
    add("--vis-freq", type=int, default=10, help="epochs between drawings, 0: never (%(default)s)")
    add("--resume", action="store_true", help="go on from WEIGHTS/<model>.ckpt, as it was started")
    return parser


def get_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The arguments and, with --resume, the checkpoint whose settings they take over."""
    parser = get_parser()
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "features", "image_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if (args.folds is None) != (args.fold is None):
        parser.error("--folds and --fold go together, as in --folds 5 --fold 0")
    if args.loss not in LOSSES:
        parser.error(f"no loss is called {args.loss!r}; known: {', '.join(LOSSES)}")
    if args.model not in MODELS:
        parser.error(f"no model is called {args.model!r}; known: {', '.join(MODELS)}")
    if not args.resume:
        return args, None

    path = args.weights / f"{args.model}.ckpt"
    checkpoint = load_tensors(path)
    if not {"args", "model", "optimizer", "epoch"} <= checkpoint.keys():
        raise ValueError(f"{path}: is not a training checkpoint")
    settings = checkpoint["args"]
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    for name in FIXED:
        if str(getattr(args, name)) != str(settings[name]):
            raise ValueError(
                f"{path}: was started with --{name.replace('_', '-')} {settings[name]}, "
                f"not {getattr(args, name)}; leave that out, or start anew in another --weights"
            )
    args.images, args.logs = Path(args.images), Path(args.logs)
    return args, checkpoint


class Trainer:
    """Everything that changes during training, and what a checkpoint holds of it."""

    def __init__(self, args: argparse.Namespace, in_channels: int, steps_per_epoch: int):
        self.args = args
        self.device = pick_device(args.device)
        self.amp = has_bfloat16(self.device) if args.amp is None else args.amp
        torch.manual_seed(args.seed)
        model = build_model(args.model, in_channels=in_channels, init_features=args.features)
        if args.image_size % model.stride:
            raise ValueError(f"--image-size {args.image_size} is not a multiple of {model.stride}")
        if args.init_weights:
            unused, untouched = initialise(model, args.init_weights)
            print(f"{args.init_weights}: not used: {', '.join(unused) or 'nothing'}; "
                  f"left at random: {', '.join(untouched) or 'nothing'}")  # fmt: skip
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, fused=True)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=average, use_buffers=True
        ) if args.ema else None  # fmt: skip
        self.steps_per_epoch = steps_per_epoch
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self.loss_sum = 0.0  # over the slices of these steps
        self.best = -1.0  # any first epoch is better, so that something is always kept

    @property
    def trained(self) -> nn.Module:
        """The network to validate and to keep: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

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

    def train_step(self, images: Tensor, masks: Tensor) -> Tensor:
        """One optimiser step on a batch as stored; the loss, still on the device."""
        images = images.to(self.device, torch.float32, non_blocking=True)
        masks = masks.to(self.device, torch.float32, non_blocking=True)
        generator = make_generator(self.args.seed, 1, self.global_step)
        images, masks = augment(images, masks, generator, self.args.aug_scale, self.args.aug_angle)
        images = images.contiguous(memory_format=torch.channels_last)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.model(images, logits=True)
        loss = LOSSES[self.args.loss](logits, masks)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.ema:
            self.ema.update_parameters(self.model)
        return loss.detach()

    def state(self) -> dict:
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "best": self.best,
            "args": plain | {"resume": False, "amp": self.amp},
        }

    def load(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        if self.ema:
            self.ema.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for name in ("epoch", "step", "loss_sum", "best"):
            setattr(self, name, checkpoint[name])


def train_one_epoch(
    trainer: Trainer, dataset: BrainSegmentationDataset, interruption: Interruption
) -> float | None:
    """Train to the end of the epoch: slices a second; None if a signal came in first."""
    args = trainer.args
    generator = make_generator(args.seed, 0, trainer.epoch)
    weights = dataset.sampling_weights()
    drawn = torch.multinomial(weights, len(dataset), replacement=True, generator=generator)
    batches = drawn.split(args.batch_size)
    start, slices = time.perf_counter(), 0
    bar = tqdm(
        batches[trainer.step :], f"epoch {trainer.epoch + 1}/{args.epochs}", len(batches),
        initial=trainer.step, unit="step", leave=False, disable=None,
    )  # fmt: skip
    losses = []
    for batch in bar:
        loss = trainer.train_step(*dataset.batch(batch.tolist()))
        losses.append(loss * len(batch))
        trainer.step += 1
        slices += len(batch)
        if not bar.disable and trainer.step % 5 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if trainer.step % 20 == 0 or trainer.step == len(batches):
            trainer.loss_sum += torch.stack(losses).double().sum().item()
            losses.clear()
            if not math.isfinite(trainer.loss_sum):
                raise ValueError(
                    f"the loss became NaN at epoch {trainer.epoch + 1}, step {trainer.step}; "
                    "the weights kept so far are whole: try a lower --lr or --no-amp"
                )
        if interruption.signal is not None and trainer.step < len(batches):
            trainer.loss_sum += sum(value.item() for value in losses)
            return None
    return slices / (time.perf_counter() - start)


@torch.inference_mode()
def evaluate(
    trainer: Trainer, dataset: BrainSegmentationDataset
) -> tuple[float, dict[str, float], list[Tensor]]:
    """Loss over the slices, DSC of each case in the source geometry, and the masks (S, H, W)."""
    segmenter = Segmenter(
        trainer.trained, trainer.args.image_size, batch_size=trainer.args.batch_size,
        device=trainer.device, amp=trainer.amp,
    )  # fmt: skip
    total, scores, masks = 0.0, {}, []
    for volume in tqdm(dataset.volumes, "validating", unit="case", leave=False, disable=None):
        images = torch.from_numpy(volume.images)
        probabilities = segmenter.probabilities(images)
        target = torch.from_numpy(volume.mask)[:, None].to(probabilities)
        loss = LOSSES[trainer.args.loss](torch.logit(probabilities, eps=1e-6), target)
        total += loss.item() * len(images)
        masks.append(segmenter.finish(probabilities, volume.frame))
        scores[volume.name] = dsc(masks[-1], volume.truth)
    return total / len(dataset), scores, masks


def main(argv: list[str] | None = None) -> None:
    try:
        args, checkpoint = get_args(argv)
        run(args, checkpoint)
    except (ValueError, OSError) as error:
        fail(error)


def run(args: argparse.Namespace, checkpoint: dict | None) -> None:
    """Train from `args`, from the start or from a checkpoint, to the last epoch or a signal."""
    pick_device(args.device)  # before the long work: a missing device, a folder without right
    args.weights.mkdir(parents=True, exist_ok=True)
    train_set, validation_set = (
        BrainSegmentationDataset(
            args.images, subset, args.image_size, args.folds, args.fold, args.cache, args.workers,
            progress=True,
        )
        for subset in ("train", "validation")
    )  # fmt: skip
    trainer = Trainer(args, train_set.in_channels, math.ceil(len(train_set) / args.batch_size))
    if checkpoint:
        trainer.load(checkpoint)
    about = describe_run(trainer, train_set, validation_set)
    print(
        f"{args.model} on {about['device']}{', bfloat16' if trainer.amp else ''}: "
        f"{len(train_set)} slices of {len(train_set.volumes)} cases to train on, "
        f"{len(validation_set.volumes)} cases to validate on",
        flush=True,
    )
    if trainer.epoch >= args.epochs:
        print(f"all {args.epochs} epochs are done; raise --epochs to go on")
        return

    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

    with SummaryWriter(args.logs, purge_step=trainer.epoch + 1) as log:
        with written_whole(args.logs / "args.json") as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n")
        interruption = Interruption()
        while trainer.epoch < args.epochs:
            speed = train_one_epoch(trainer, train_set, interruption)
            if speed is None:
                save_checkpoint(trainer)
                print(f"stopped at epoch {trainer.epoch + 1}, step {trainer.step}; go on with: "
                      f"python3 train.py --resume --weights {args.weights}")  # fmt: skip
                sys.exit(128 + interruption.signal)
            finish_epoch(trainer, train_set, validation_set, about, speed, log)
            if interruption.signal is not None and trainer.epoch < args.epochs:
                print(f"stopped after epoch {trainer.epoch}; go on with: "
                      f"python3 train.py --resume --weights {args.weights}")  # fmt: skip
                sys.exit(128 + interruption.signal)
    print(f"weights: {args.weights / args.model}.pt   logs: tensorboard --logdir {args.logs}")


def finish_epoch(trainer, train_set, validation_set, about, speed, log) -> None:
    """Validate, log, and save what the epoch has brought."""
    args, epoch = trainer.args, trainer.epoch + 1
    learning_rate = trainer.learning_rate()
    train_loss = trainer.loss_sum / len(train_set)
    loss, scores, masks = evaluate(trainer, validation_set)
    mean = sum(scores.values()) / len(scores)

    log.add_scalar("loss/train", train_loss, epoch)
    log.add_scalar("loss/validation", loss, epoch)
    log.add_scalar("dsc/validation", mean, epoch)
    for name, value in scores.items():
        log.add_scalar(f"dsc_by_case/{name}", value, epoch)
    log.add_scalar("learning_rate", learning_rate, epoch)
    log.add_scalar("images_per_second", speed, epoch)
    if args.vis_freq and (epoch % args.vis_freq == 0 or epoch == args.epochs):
        draw(log, validation_set, masks, args.vis_images, epoch)

    better = mean > trainer.best
    trainer.best = max(mean, trainer.best)
    trainer.epoch, trainer.step, trainer.loss_sum = epoch, 0, 0.0
    if better or args.keep == "last":
        validation = summarise(list(scores.values())) | {"cases": scores}
        card = about | {"epoch": epoch, "validation_dsc": validation}
        save_weights(args.weights / f"{args.model}.pt", trainer.trained.state_dict(), card)
    save_checkpoint(trainer)
    print(
        f"epoch {epoch:3d}/{args.epochs}  loss {train_loss:.4f}  validation loss {loss:.4f}  "
        f"DSC {mean:.4f}{' *' if better else '  '}  {speed:.1f} images/s",
        flush=True,
    )


def draw(log, dataset: BrainSegmentationDataset, masks: list, most: int, epoch: int) -> None:
    """Log up to `most` slices of the validation cases, outlined, in the source geometry."""
    for volume, mask in zip(dataset.volumes, masks, strict=True):
        count = min(len(mask), most)
        if count < 1:
            return
        most -= count
        grey = to_grey(volume.case.read())[:count]
        pictures = outline(grey, mask[:count], volume.truth[:count])
        log.add_images(volume.name, pictures, epoch, dataformats="NHWC")


def save_checkpoint(trainer: Trainer) -> None:
    with written_whole(trainer.args.weights / f"{trainer.args.model}.ckpt") as temporary:
        torch.save(trainer.state(), temporary)


def describe_run(trainer, train_set, validation_set) -> dict:
    """What a weights' card and the logs say of a run: data, split, recipe, versions, device."""
    args = trainer.args
    recipe = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    device = trainer.device
    return {
        "model": args.model,
        "settings": trainer.model.settings,
        "image_size": args.image_size,
        "cases": {
            "train": [volume.name for volume in train_set.volumes],
            "validation": [volume.name for volume in validation_set.volumes],
        },
        "recipe": recipe | {"amp": trainer.amp},
        "kept": f"{args.keep} epoch",
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The commit of this repository, marked if files differ from it; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
