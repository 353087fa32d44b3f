"""Train a network on a folder of cases with masks.

    python3 train.py --images ./kaggle_3m                 100 epochs; best weights: weights/unet.pt
    python3 train.py --recipe classic                     as published: 256 px, 32 features, Dice
    python3 train.py --resume                             go on after an interruption
    python3 train.py --resume --epochs 150                train on for longer
    python3 train.py --config settings.yaml               the names of the flags; flags win
    python3 train.py --folds 5 --fold 0                   cross-validation by patient
    python3 train.py --init-weights weights/unet-folds/unet-04cf1cdf.pt ...            fine-tune
    torchrun --nproc-per-node=4 train.py ...              on four GPUs of this machine
    tensorboard --logdir logs                             curves and outlined slices

Writes WEIGHTS/<model>.pt (with its card, <model>.json) and WEIGHTS/<model>.ckpt, and never
touches the weights that came with the project.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import utils
from brainseg import distributed as dist
from brainseg import runs, training
from brainseg.devices import half_precision, has_bfloat16, in_groups, pick_device, to_device
from brainseg.metrics import dsc
from brainseg.segmenter import Segmenter
from brainseg.splits import list_cohort
from brainseg.training import TrainState
from brainseg.weights import CARD_DEFAULTS, MODELS
from dataset import BrainSegmentationDataset, Feed
from loss import LOSSES
from transform import augment_all

# The values of 2019, under --recipe classic; the defaults are those of the shipped weights.
CLASSIC = {
    "lr": 1e-4, "schedule": "constant", "warmup": 0, "ema": 0.0, "loss": "dice", "background": 0.1,
    "aug_scale": 0.05, "aug_intensity": 0, "drop_sequences": 0,
}  # fmt: skip
SYNC = 20  # steps between two looks at the loss, for which host and device wait for each other
AT_ONCE = 256  # slices whose probabilities a GPU holds in validation


# fmt: off
def get_args_parser() -> utils.Parser:
    """Every setting, once: what `recipe` adds stands in the card, and --resume keeps it."""
    parser, switch = utils.make_parser(__doc__), argparse.BooleanOptionalAction
    parser.presets = {"classic": CLASSIC}
    share = {"type": float, "least": 0, "below": 1}
    add, recipe = parser.group("data")
    add("--images", type=Path, default="./kaggle_3m", help="folder of cases")
    utils.add_cohort_options(recipe)
    add("--skip-bad", action="store_true", help="leave out cases that cannot be read, naming them")
    recipe("--image-size", type=int, least=32,
           help="side of a resized slice (128, or that of --init-weights; classic: 256)")
    recipe("--preprocessing", type=int, choices=(1, 2),
           help="1: all sequences on one scale; 2: each by itself (2, or that of --init-weights; "
           "classic: 1)")
    recipe("--folds", type=int, least=2, help="cross-validation: number of folds by patient")
    recipe("--fold", type=int, least=0, help="cross-validation: the fold to validate on, from 0")
    add("--cache", type=Path, help="preprocessed volumes (~/.cache/brainseg)")
    add("--prune-cache", action="store_true", help="first delete volumes whose sources are gone")
    add("--workers", type=int, least=1, help="threads that read and preprocess (all cores)")

    add, recipe = parser.group("network")
    recipe("--model", type=str, choices=MODELS, default="unet", help="the network")
    recipe("--features", type=int, least=1,
           help="unet: channels of its first level (16, or those of --init-weights; classic: 32)")
    recipe("--pretrained", type=str, nargs="?", const=True,
           help="resnext_unet: ImageNet weights for its encoder, downloaded or from a file")
    recipe("--neighbours", type=int, least=0,
           help="slices seen on either side of each (0, or those of --init-weights)")
    add("--init-weights", type=Path, help="weights to start from, as far as they fit")
    add("--allow-seen", action="store_true",
        help="validate on patients that --init-weights was trained on too; the card says so")

    add, recipe = parser.group("recipe")
    recipe("--recipe", type=str, choices=("classic",),
        help="the published values, where nothing else is given (those of the shipped weights)")
    add("--epochs", type=int, default=100, least=1, help="each draws as many slices as there are")
    recipe("--batch-size", type=int, default=16, least=1, help="slices per step")
    recipe("--lr", type=float, default=2e-3, help="peak learning rate of Adam")
    recipe("--schedule", type=str, choices=("constant", "cosine"), default="cosine",
           help="of the learning rate; cosine falls to 0 at the last epoch")
    recipe("--warmup", type=int, default=100, least=0, help="steps of linear warm-up")
    recipe("--ema", **share, default=0.998, help="decay of averaged weights; 0: off")
    recipe("--weight-decay", type=float, default=0, least=0, help="of AdamW; 0: plain Adam")
    recipe("--loss", type=str, choices=LOSSES, default="bce-dice", help="of a batch")
    recipe("--background", type=float, default=0.5, least=0,
           help="slices are drawn by lesion area plus this times the mean area")
    recipe("--aug-scale", **share, default=0.2, help="random scale, 1 ± this")
    recipe("--aug-angle", type=float, default=15, least=0, help="random rotation, ± degrees")
    recipe("--aug-intensity", type=float, default=0.2, least=0,
           help="random gain and shift, ± this")
    recipe("--drop-sequences", **share, default=0.2,
           help="share of slices without post-contrast, of cases with 3 sequences")
    recipe("--seed", type=int, default=42, least=0, help="of every random draw")
    recipe("--keep", type=str, choices=("best", "last"), default="best",
           help="weights of the epoch with the best validation DSC, or of the last")

    add, recipe = parser.group("machine and files")
    add("--device", type=str, help="cuda, cuda:1, mps, cpu (an accelerator if there is one)")
    recipe("--amp", action=switch,
           help="compute in bfloat16 (where it is faster); on CUDA cards without it, in float16")
    recipe("--sync-bn", action="store_true", help="batch norm over the whole batch of several GPUs")
    add("--compile", action=switch, default=False, help="compile first: minutes, faster steps (no)")
    add("--deterministic", action=switch, default=True, help="same seed and GPU, same result (yes)")
    add("--weights", type=Path, default="./weights", help="folder to write to")
    add("--logs", "--log-dir", type=Path, default="./logs", help="curves (torchrun: --log-dir)")
    add("--validate-every", type=int, default=1, least=1, help="epochs between validations")
    add("--vis-images", type=int, default=200, help="validation slices to draw")
    add("--vis-freq", type=int, default=10, least=0, help="epochs between drawings; 0: never")
    add("--resume", action="store_true", help="go on from WEIGHTS/<model>.ckpt, with its settings")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says. Raises SystemExit, with a sentence, unless it succeeds."""
    try:
        with utils.sigterm_interrupts(), dist.only_main_process_prints(), dist.process_group():
            args, checkpoint = get_args(argv)
            with utils.cudnn(args.deterministic), training.memory_advice(args.batch_size):
                run(args, checkpoint)
    except (ValueError, OSError) as error:
        utils.fail(error)
    except KeyboardInterrupt:
        utils.fail("stopped at once; preprocessed volumes and finished epochs are kept")


def run(args: argparse.Namespace, checkpoint: dict | None) -> None:
    """Read the data, build the network, train it, and say where the weights are."""
    asked = utils.plain(args) | {"resume": False}  # before this rank takes its part of the machine
    device, workers = pick_device(dist.rank_device(args.device)), dist.rank_workers(args.workers)
    amp = has_bfloat16(device) if args.amp is None else args.amp
    first = None if checkpoint else args.init_weights
    sources = list_cohort(args.images, args.sequences, args.labels, args.patients)
    runs.check_inputs((args.weights, args.logs), first, args.batch_size)
    if args.prune_cache:
        runs.prune_cache(args.cache)
    with dist.local_rank_zero_first():  # it fills the cache, the others read it
        train_set, validation_set = BrainSegmentationDataset.train_and_validation(
            sources, args.folds, args.fold, args.skip_bad, image_size=args.image_size,
            cache=args.cache, workers=workers, progress=True, version=args.preprocessing,
        )
        model = training.build_network(
            args.model, args.seed, first, init_features=args.features,
            in_channels=train_set.in_channels * (2 * args.neighbours + 1),
            pretrained=None if checkpoint else args.pretrained,
        )
    model = training.on_device(model, device, args.sync_bn)
    runs.report_notes(train_set.volumes + validation_set.volumes)
    if device.type == "cpu":
        utils.keep_freed_memory()
    feed = Feed(train_set, device, args.neighbours, workers)

    state = training.new_state(
        model, args.lr, args.weight_decay, bool(args.ema), len(feed), args.batch_size, amp)
    rate = partial(
        training.learning_rate, peak=args.lr, schedule=args.schedule, warmup=args.warmup,
        steps=args.epochs * state.steps_per_epoch,
    )
    names = [[volume.name for volume in part.volumes] for part in (train_set, validation_set)]
    runs.report_subsets(*names, sources)
    start = runs.read_start(first) if first else None
    if checkpoint:
        state.load(checkpoint, names[0], args.images)
        start = checkpoint["initialised_from"]
        runs.report_changes(checkpoint, state, names[1], rate, args.epochs)
    elif (path := args.weights / f"{args.model}.ckpt").exists():
        print(f"{path}: an earlier run; it and its weights are overwritten after the first epoch")
    recipe = {name: getattr(args, name) for name in (*get_args_parser().recipe, "epochs")}
    card = runs.describe_run(model, recipe | {"amp": amp}, *names, start, device)
    card["commit"] = utils.git_commit()
    runs.check_seen(card, args.allow_seen or checkpoint is not None)
    print(f"{runs.headline(card, names, len(feed))}; {feed.place}", flush=True)
    if state.epoch >= args.epochs:
        print(f"all {args.epochs} epochs are done; raise --epochs to go on")
        return

    network = model
    if args.compile:  # before the ranks wait for each other's gradients
        sizes = args.batch_size, len(feed) % args.batch_size or args.batch_size
        network = training.compile_ahead(model, sizes, args.image_size, amp, device)
    change = partial(
        augment_all, scale=args.aug_scale, angle=args.aug_angle, intensity=args.aug_intensity,
        drop=args.drop_sequences if train_set.in_channels == 3 else 0,
        sequences=train_set.in_channels,
    )
    step = partial(
        train_step, state, training.parallel(network, device), change=change,
        loss=LOSSES[args.loss], rate=rate, decay=args.ema, amp=amp, seed=args.seed,
    )
    segmenter = partial(
        Segmenter, image_size=args.image_size, batch_size=args.batch_size, device=device, amp=amp,
        neighbours=args.neighbours, version=args.preprocessing,
    )
    kept = {
        "args": utils.plain(args) | {"resume": False, "amp": amp}, "initialised_from": start,
        "cases": names[0], "validation_cases": names[1],
    }
    weights = train_set.sampling_weights(args.background)
    with runs.RunWriter(args.weights, args.logs, card, kept, asked, state.epoch) as writer:
        stop = fit(
            state,
            partial(train_one_epoch, state, step, feed, weights, args.batch_size, args.seed),
            lambda: evaluate(segmenter(state.trained), validation_set, LOSSES[args.loss]),
            partial(writer.slices, validation_set.volumes, args.vis_images),
            writer, args.epochs, args.keep, args.validate_every, args.vis_freq,
        )
    if stop:
        print(runs.how_to_resume(state, args.weights, args.model))
        sys.exit(128 + stop)
    print(f"weights: {args.weights / args.model}.pt   logs: tensorboard --logdir {args.logs}")


def fit(
    state: TrainState, train_epoch: Callable, validate: Callable, draw: Callable,
    writer: runs.RunWriter, epochs: int, keep: str, validate_every: int, vis_freq: int,
) -> int:
    """Train, validate and save to the last epoch or a signal; the number of the signal, or 0."""
    bar = tqdm(total=epochs, initial=state.epoch, desc="training", unit="epoch", disable=None)
    with utils.Interruption() as interruption, bar:
        while state.epoch < epochs:
            if stop := dist.all_reduce_max(interruption.signal or 0):
                return stop
            speed, epoch = train_epoch(interruption), state.epoch + 1
            if speed is None:
                writer.checkpoint(state)
                continue
            curves = {
                "loss/train": state.loss_sum / state.slices, "images_per_second": speed,
                "learning_rate": state.optimizer.param_groups[0]["lr"],
            }
            scores, better = {}, False
            if epoch % validate_every == 0 or epoch == epochs:
                dist.broadcast_buffers(state.trained)
                loss, scores, masks = validate()
                training.check_finite(loss, state)
                mean = sum(scores.values()) / len(scores)
                better, state.best = mean > state.best, max(mean, state.best)
                curves |= {"loss/validation": loss, "dsc/validation": mean}
                curves |= {f"dsc_by_case/{name}": score for name, score in scores.items()}
                bar.set_postfix(DSC=f"{mean:.3f}", best=f"{state.best:.3f}", refresh=False)
            state.epoch, state.step, state.loss_sum = epoch, 0, 0.0
            if better or (scores and keep == "last"):
                writer.weights(state, scores)
            writer.checkpoint(state)
            writer.curves(epoch, epochs, curves, better)
            if scores and vis_freq and (epoch % vis_freq == 0 or epoch == epochs):
                draw(epoch, dist.gather(masks))
            bar.update()
    return 0


def train_one_epoch(
    state: TrainState, step: Callable[[Tensor, Tensor, int], Tensor], feed: Feed, weights: Tensor,
    batch_size: int, seed: int, interruption: utils.Interruption,
) -> float | None:
    """Train on slices drawn by `weights` to the epoch's end: slices per second, None if stopped.

    Ranks share each batch: an epoch has the same slices and steps whatever their number. Raises
    ValueError once the loss is NaN or infinite.
    """
    generator = utils.make_generator(seed, 0, state.epoch)
    drawn = torch.multinomial(weights, len(feed), replacement=True, generator=generator)
    batches = drawn.split(batch_size)[state.step :]
    ahead = feed.batches([dist.shard_of_batch(batch) for batch in batches])
    start, done = time.perf_counter(), state.step * batch_size
    bar = tqdm(total=len(feed), initial=done, desc=f"epoch {state.epoch + 1}", unit="image",
               leave=False, disable=None)  # fmt: skip
    losses = []
    with bar:
        for batch, (images, masks) in zip(batches, ahead, strict=True):
            loss = step(images, masks, len(batch))
            losses.append(loss * len(batch))
            state.step += 1
            bar.update(len(batch))
            last = state.step == state.steps_per_epoch
            look, stop = last or state.step % SYNC == 0, interruption.signal or 0
            if look or feed.device.type == "cpu":
                stop = dist.all_reduce_max(stop)
            elif dist.world_size() > 1:
                stop = 0  # until all ranks look
            if look or stop:
                state.loss_sum += torch.stack(losses).cpu().double().sum().item()
                losses.clear()
                training.check_finite(state.loss_sum, state)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if stop and not last:
                return None
    return (len(feed) - done) / (time.perf_counter() - start)


def train_step(
    state: TrainState, network: nn.Module, images: Tensor, masks: Tensor, global_batch_size: int,
    *, change: Callable, loss: Callable, rate: Callable, decay: float, amp: bool, seed: int,
) -> Tensor:
    """Take one optimiser step on this rank's part of a batch; the loss of all, on the device.

    `images` (B, C, N, N) and `masks` (B, 1, N, N) are as stored; `change` augments them.
    """
    device = next(state.model.parameters()).device
    images, masks = (to_device(part, device).float() for part in (images, masks))
    generator = utils.make_generator(seed, 1, state.global_step)
    images, masks = change(images, masks, generator, global_batch_size=global_batch_size)
    state.model.train()
    with torch.autocast(device.type, half_precision(device), enabled=amp):
        logits = network(images.contiguous(memory_format=torch.channels_last), logits=True)
    if not dist.shard(range(global_batch_size)):  # a stand-in: it must not count
        logits, masks = logits[:0], masks[:0]
    value = loss(logits, masks, total=dist.all_reduce_sum)
    for group in state.optimizer.param_groups:
        group["lr"] = rate(state.global_step)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(value).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema:
        training.update_average(state.ema, state.model, decay, state.global_step)
    return value.detach()


def evaluate(
    segmenter: Segmenter, dataset: BrainSegmentationDataset, loss: Callable
) -> tuple[float, dict[str, float], list[np.ndarray]]:
    """Loss over the slices, DSC of each case, and masks (S, H, W) in the source geometry.

    Loss and DSC cover all ranks; masks only this rank's cases.
    """
    volumes = dist.shard(dataset.volumes)
    at_once = 1 if segmenter.on_cpu else AT_ONCE
    losses, scores, masks = [], [], []
    with tqdm(total=len(volumes), desc="validating", unit="case", leave=False, disable=None) as bar:
        for group in in_groups(volumes, lambda volume: len(volume.mask), at_once):
            images = [to_device(torch.from_numpy(v.images), segmenter.device) for v in group]
            lengths = [len(part) for part in images]
            found = segmenter.probabilities(torch.cat(images), lengths=lengths).split(lengths)
            for volume, probabilities in zip(group, found, strict=True):
                target = to_device(torch.from_numpy(volume.mask), segmenter.device)[:, None]
                logits = torch.logit(probabilities, eps=1e-6)  # within ± 14, always finite
                losses.append(loss(logits, target.to(logits)))
                masks.append(segmenter.finish(probabilities, volume.frame))
                scores.append(dsc(masks[-1], volume.truth))
                bar.update()
    losses = dist.gather(torch.stack(losses).tolist() if losses else [])
    mean = sum(x * len(v.mask) for x, v in zip(losses, dataset.volumes, strict=True)) / len(dataset)
    names = [volume.name for volume in dataset.volumes]
    return mean, dict(zip(names, dist.gather(scores), strict=True)), masks


# fmt: on


def get_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The settings and, with --resume, the checkpoint whose settings they take over."""
    parser = get_args_parser()
    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        path = args.weights / f"{args.model}.ckpt"
        checkpoint = training.load_checkpoint(path)
        parser = get_args_parser()  # without what the first parsing took from --config
        args = parser.parse_resumed(argv, CLASSIC | CARD_DEFAULTS | checkpoint["args"], path)
    older = checkpoint is not None and "recipe" not in checkpoint["args"]
    first = None if checkpoint else args.init_weights
    for name, value in training.unset(args.model, older or args.recipe == "classic", first).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_args(parser, args)
    return args, checkpoint


def check_args(parser: utils.Parser, args: argparse.Namespace) -> None:
    """End with a usage error for settings that do not go together."""
    weights, stride = args.weights / f"{args.model}.pt", MODELS[args.model].stride
    if (args.folds is None) != (args.fold is None):
        parser.error("--folds and --fold go together, as in --folds 5 --fold 0")
    if args.features and args.model != "unet":
        parser.error("--features is for --model unet")
    if args.weights.suffix == ".pt":
        parser.error(f"--weights {args.weights} must be a folder; the file is named after --model")
    if args.image_size % stride:
        parser.error(f"--image-size {args.image_size} is not a multiple of {stride}")
    if args.init_weights and args.init_weights.resolve() == weights.resolve():
        parser.error(f"--init-weights {args.init_weights} would be overwritten; set --weights")


if __name__ == "__main__":
    main()
