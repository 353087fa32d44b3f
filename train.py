"""Train a network on a folder of cases with masks.

    python3 train.py --images ./kaggle_3m                 100 epochs; best weights: weights/unet.pt
    python3 train.py --recipe classic                     as published: 256 px, 32 features, Dice
    python3 train.py --resume                             go on after an interruption, or for longer
    python3 train.py --config settings.yaml               flag names as keys; flags win
    python3 train.py --folds 5 --fold 0                   cross-validation by patient
    python3 train.py --init-weights weights/unet-folds/unet-a5f30600.pt ...            fine-tune
    torchrun --nproc-per-node=4 train.py ...              on four GPUs of this machine

Writes WEIGHTS/<model>.pt (with its card, <model>.json) and WEIGHTS/<model>.ckpt, and never
touches the shipped weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import cli
import utils
from brainseg import distributed, runs, training
from brainseg.claims import claimed
from brainseg.devices import half_precision, has_bfloat16, pick_device, to_device
from brainseg.io.layouts import Source
from brainseg.metrics import dsc
from brainseg.segmenter import Segmenter
from brainseg.splits import list_cohort
from brainseg.training import TrainState
from brainseg.weights import CARD_DEFAULTS, MODELS
from dataset import BatchLoader, BrainSegmentationDataset
from loss import LOSSES
from transform import augment_all

SYNC = 20  # GPU steps between reads of the loss, for which host and GPU wait


# fmt: off
def get_args_parser() -> cli.Parser:
    """Define every setting. Those added with `recipe` are in the card and kept by --resume."""
    parser, switch = cli.make_parser(__doc__), argparse.BooleanOptionalAction
    parser.presets = {"classic": training.CLASSIC}
    add, recipe = parser.group("data")
    add("--images", type=Path, default="./kaggle_3m", help="folder of cases")
    cli.add_cohort_options(recipe)
    add("--skip-bad", action="store_true", help="skip cases that cannot be read, and name them")
    recipe("--image-size", type=int, least=32,
           help="side of a resized slice (192, or that of --init-weights; classic: 256)")
    recipe("--preprocessing", type=int, choices=(1, 2),
           help="1: sequences scaled together; 2: apart (2, or that of --init-weights; classic: 1)")
    recipe("--folds", type=int, least=2, help="cross-validation: number of folds, split by patient")
    recipe("--fold", type=int, least=0, help="cross-validation: the fold to validate on, from 0")
    add("--cache", type=Path, help="folder of preprocessed volumes (~/.cache/brainseg)")
    add("--prune-cache", action="store_true", help="first delete cached volumes of missing sources")
    add("--workers", type=int, least=1, help="threads that read and preprocess (all cores)")

    add, recipe = parser.group("network")
    recipe("--model", choices=MODELS, default="unet", help="the network")
    recipe("--features", type=int, least=1,
           help="unet: channels of the first level (16, or as in --init-weights; classic: 32)")
    recipe("--pretrained", nargs="?", const=True,
           help="resnext_unet: ImageNet weights for the encoder, downloaded or from a file")
    recipe("--neighbours", type=int, least=0,
           help="adjacent slices seen on either side of each (0, or as in --init-weights)")
    add("--init-weights", type=Path, help="weights to start from; used where name and shape fit")
    add("--allow-seen", action="store_true",
        help="allow validation on patients that --init-weights was trained on; the card says so")

    add_recipe_options(parser)

    add, recipe = parser.group("machine and files")
    add("--device", help="cuda, cuda:1, mps, cpu (an accelerator if available)")
    recipe("--amp", action=switch,
           help="compute in bfloat16, or in float16 on GPUs without it (if bfloat16 is faster)")
    recipe("--sync-bn", action="store_true", help="batch norm over the whole batch across GPUs")
    add("--compile", action=switch, default=False,
        help="compile the network first: takes minutes, speeds up every step (no)")
    add("--deterministic", action=switch, default=True, help="same seed and GPU, same result (yes)")
    add("--weights", type=Path, default="./weights", help="folder to write to")
    add("--logs", "--log-dir", type=Path, default="./logs", help="curves; torchrun wants --log-dir")
    add("--validate-every", default=1, least=1, help="epochs between validations")
    add("--vis-images", default=200, help="validation slices to draw")
    add("--vis-freq", default=10, least=0, help="epochs between drawings, if validated; 0: never")
    add("--resume", action="store_true", help="resume from WEIGHTS/<model>.ckpt, with its settings")
    return parser


def add_recipe_options(parser: cli.Parser) -> None:
    """Add the options for sampling, augmentation and optimisation."""
    share = {"type": float, "least": 0, "below": 1}
    add, recipe = parser.group("recipe")
    recipe("--recipe", choices=("classic",), help="the values published in 2019 as defaults")
    add("--epochs", default=100, least=1, help="each draws as many slices as the training set has")
    recipe("--batch-size", default=16, least=1, help="slices per step")
    recipe("--lr", default=2e-3, least=0, help="peak learning rate of Adam")
    recipe("--schedule", choices=("constant", "cosine"), default="cosine",
           help="learning-rate schedule; cosine falls to 0 at the last epoch")
    recipe("--warmup", default=100, least=0, help="steps of linear warm-up")
    recipe("--ema", **share, default=0.998, help="decay of the averaged weights; 0: off")
    recipe("--weight-decay", type=float, default=0, least=0, help="for AdamW; 0: plain Adam")
    recipe("--loss", choices=LOSSES, default="bce-dice", help="loss function")
    recipe("--background", default=0.5, least=0, below=1e6,
           help="draw slices in proportion to lesion area plus this times the case's mean area")
    recipe("--aug-scale", **share, default=0.2, help="random scale, 1 ± this")
    recipe("--aug-angle", type=float, default=15, least=0, help="random rotation, ± degrees")
    recipe("--aug-intensity", default=0.2, least=0, help="random gain and shift, ± this")
    recipe("--drop-sequences", **share, default=0.4,
           help="with 3 sequences: share of slices whose post-contrast is replaced by FLAIR")
    recipe("--seed", default=42, least=0, help="seed of every random draw")
    recipe("--keep", choices=("best", "last"), default="best",
           help="keep the weights of the epoch with the best validation DSC, or of the last")
# fmt: on


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says. Raises SystemExit, with a sentence, unless it succeeds."""
    note = "error: stopped at once; preprocessed volumes and finished epochs are kept"
    with (
        cli.errors_in_one_sentence(note),
        distributed.only_main_process_prints(),
        distributed.process_group(),
    ):
        args = get_args(argv)
        device = pick_device(distributed.rank_device(args.device))
        sources = list_cohort(
            args.images, args.sequences, args.labels, args.patients, channels=args.channels
        )
        claim = claimed(args.weights, args.logs, args.model, args.resume)
        advice = training.batch_advice(args.batch_size)
        with claim as checkpoint, utils.cudnn(args.deterministic), advice:
            state, loader, validation_set = set_up(args, checkpoint, device, sources)
            asked = cli.plain(args) | {"resume": False}
            parts, recipe = (loader.dataset, validation_set), get_args_parser().recipe
            cases = [[volume.case for volume in part.volumes] for part in parts]
            writer = runs.start_run(state, *cases, asked, recipe, checkpoint, cli.git_commit())
            print(f"{runs.headline(writer.card, state.slices)}; {loader.place}", flush=True)
            if state.epoch >= args.epochs:
                print(f"all {args.epochs} epochs are done; raise --epochs to continue")
                return
            stop = fit(args, state, loader, validation_set, writer)
        if stop:
            print(runs.how_to_resume(state, args.weights, args.model))
            sys.exit(128 + stop)
        print(f"weights: {args.weights / args.model}.pt   logs: tensorboard --logdir {args.logs}")


def set_up(
    args: argparse.Namespace, checkpoint: dict | None, device: torch.device, sources: list[Source]
) -> tuple[TrainState, BatchLoader, BrainSegmentationDataset]:
    """Read the data and build the network; return the state and what to train and validate on."""
    first, workers = (
        None if checkpoint else args.init_weights,
        distributed.rank_workers(args.workers),
    )
    if args.prune_cache:
        runs.prune_cache(args.cache)
    how = {"image_size": args.image_size, "version": args.preprocessing, "workers": workers}
    with distributed.local_rank_zero_first():  # it fills the cache, the others read it
        train_set, validation_set = BrainSegmentationDataset.train_and_validation(
            sources, args.folds, args.fold, args.skip_bad, cache=args.cache, **how
        )
        channels = train_set.in_channels * (2 * args.neighbours + 1)
        pretrained = None if checkpoint else args.pretrained
        chosen = {"in_channels": channels, "init_features": args.features, "pretrained": pretrained}
        model = training.build_network(args.model, args.seed, first, **chosen)
    runs.report_cases(train_set.volumes, validation_set.volumes, sources)
    utils.keep_freed_memory(device)
    state = make_state(args, training.on_device(model, device, args.sync_bn), train_set)
    return state, BatchLoader(train_set, device, args.neighbours, workers), validation_set


def make_state(
    args: argparse.Namespace, model: nn.Module, dataset: BrainSegmentationDataset
) -> TrainState:
    """Make the state before the first step, for a network that is on its device."""
    device, sequences = next(model.parameters()).device, dataset.in_channels
    how = {"scale": args.aug_scale, "angle": args.aug_angle, "intensity": args.aug_intensity}
    how |= {"drop": args.drop_sequences if sequences == 3 else 0, "sequences": sequences}
    return TrainState(
        model,
        slices=len(dataset),
        batch_size=args.batch_size,
        epochs=args.epochs,
        rate=partial(training.learning_rate, args.lr, args.schedule, args.warmup),
        weight_decay=args.weight_decay,
        decay=args.ema,
        amp=has_bfloat16(device) if args.amp is None else args.amp,
        seed=args.seed,
        neighbours=args.neighbours,
        loss=LOSSES[args.loss],
        augment=partial(augment_all, **how),
    )


def fit(
    args: argparse.Namespace,
    state: TrainState,
    loader: BatchLoader,
    validation_set: BrainSegmentationDataset,
    writer: runs.RunWriter,
) -> int:
    """Train, validate and save until the last epoch or a signal; return the signal, or 0."""
    if args.compile:  # before the ranks wait for each other's gradients
        training.compile_ahead(state, args.image_size)
    training.parallel(state)
    weights = loader.dataset.sampling_weights(args.background)
    bar = tqdm(total=args.epochs, initial=state.epoch, desc="training", unit="epoch", disable=None)
    with writer, utils.Interruption() as interruption, bar:
        while state.epoch < args.epochs:
            if stop := distributed.all_reduce_max(interruption.signal or 0):
                return stop
            speed = train_one_epoch(state, loader, weights, interruption)
            if speed is None:
                writer.checkpoint(state)
                continue
            train_loss = state.loss_sum / state.slices
            epoch, loss, scores, better = state.epoch + 1, None, {}, False
            if epoch == args.epochs or epoch % args.validate_every == 0:
                distributed.broadcast_buffers(state.trained)
                loss, scores, masks = evaluate(state, validation_set)
                training.check_finite(loss, state)
                mean = sum(scores.values()) / len(scores)
                better, state.best = mean > state.best, max(mean, state.best)
            state.epoch, state.step, state.loss_sum = epoch, 0, 0.0
            if better or (scores and args.keep == "last"):
                writer.weights(state, scores)
            writer.checkpoint(state)
            writer.curves(state, speed, train_loss, loss, scores, better)
            if scores and args.vis_freq and (epoch == args.epochs or epoch % args.vis_freq == 0):
                writer.slices(
                    validation_set.volumes, args.vis_images, epoch, distributed.gather(masks)
                )
            bar.update()
    return 0


def train_one_epoch(
    state: TrainState, loader: BatchLoader, weights: Tensor, interruption: utils.Interruption
) -> float | None:
    """Train to the epoch's end on slices drawn by `weights`; return slices per second.

    Returns None if a signal stopped it. Ranks share each batch: an epoch has the same slices and
    steps for any number of ranks. Raises ValueError once the loss is NaN or infinite.
    """
    generator = utils.make_generator(state.seed, 0, state.epoch)
    drawn = torch.multinomial(weights, state.slices, replacement=True, generator=generator)
    batches = drawn.split(state.batch_size)[state.step :]
    ahead = loader.batches([distributed.shard_of_batch(batch) for batch in batches])
    start, done, losses = time.perf_counter(), state.step * state.batch_size, []
    name, every = f"epoch {state.epoch + 1}", 1 if state.device.type == "cpu" else SYNC
    bar = tqdm(None, name, state.slices, leave=False, initial=done, unit="image", disable=None)
    with bar:
        for batch, (images, masks) in zip(batches, ahead, strict=True):
            loss = train_step(state, images, masks, len(batch))
            losses.append(loss * len(batch))
            state.step += 1
            bar.update(len(batch))
            last = state.step == state.steps_per_epoch
            asked = interruption.signal and distributed.world_size() == 1
            if last or asked or state.step % every == 0:
                state.loss_sum += torch.stack(losses).cpu().double().sum().item()
                losses.clear()
                training.check_finite(state.loss_sum, state)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if distributed.all_reduce_max(interruption.signal or 0) and not last:
                    return None
    return (state.slices - done) / (time.perf_counter() - start)


def train_step(state: TrainState, images: Tensor, masks: Tensor, global_batch_size: int) -> Tensor:
    """Take one optimiser step on this rank's part of a batch; return the loss of the whole batch.

    `images` (B, C, N, N) and `masks` (B, 1, N, N) are as stored. The loss stays on the device.
    """
    device, rate = state.device, state.learning_rate()
    images, masks = (to_device(part, device).float() for part in (images, masks))
    generator = utils.make_generator(state.seed, 1, state.global_step)
    images, masks = state.augment(images, masks, generator, global_batch_size=global_batch_size)
    state.model.train()
    with torch.autocast(device.type, half_precision(device), enabled=state.amp):
        logits = state.network(images.contiguous(memory_format=torch.channels_last), logits=True)
    if not distributed.shard(range(global_batch_size)):  # a stand-in: it must not count
        logits, masks = logits[:0], masks[:0]
    value = state.loss(logits, masks, total=distributed.all_reduce_sum)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(value).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema:
        training.update_average(state)
    return value.detach()


def evaluate(
    state: TrainState, dataset: BrainSegmentationDataset
) -> tuple[float, dict[str, float], list[np.ndarray]]:
    """Return the loss over the slices, each case's DSC, and masks in the source geometry.

    Loss and DSC cover all ranks; masks (S, H, W) only this rank's cases.
    """
    how = {"device": state.device, "amp": state.amp, "neighbours": state.neighbours}
    segmenter = Segmenter(state.trained, batch_size=state.batch_size, **how)
    losses, scores, masks = [], [], []
    own = distributed.shard(dataset.volumes)
    for volume in tqdm(own, "validating", unit="case", leave=False, disable=None):
        images = to_device(torch.from_numpy(volume.images), state.device)
        probabilities = segmenter.probabilities(images)
        logits = torch.logit(probabilities, eps=1e-6)  # within ± 14, always finite
        target = torch.from_numpy(volume.mask[:, None]).to(logits)
        losses.append(state.loss(logits, target))
        masks.append(segmenter.finish(probabilities, volume.frame))
        scores.append(dsc(masks[-1], volume.truth))
    losses = distributed.gather(torch.stack(losses).tolist() if losses else [])
    sums = [x * len(v.mask) for x, v in zip(losses, dataset.volumes, strict=True)]
    scores = dict(zip(dataset.names, distributed.gather(scores), strict=True))
    return sum(sums) / len(dataset), scores, masks


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the settings; with --resume, those of the checkpoint are the defaults.

    Ends with a usage error if settings conflict.
    """
    parser = get_args_parser()
    args = parser.parse_args(argv)
    asked = vars(args)
    if args.resume:
        path = args.weights / f"{args.model}.ckpt"
        asked = training.load_checkpoint(path)["args"]
        parser = get_args_parser()  # without what the first parsing took from --config
        args = parser.parse_resumed(argv, training.CLASSIC | CARD_DEFAULTS | asked, path)
    classic = asked.get("recipe", "classic") == "classic"  # older checkpoints lack it
    first = None if args.resume else args.init_weights
    defaults = training.network_defaults(args.model, classic, first)
    vars(args).update({k: value for k, value in defaults.items() if getattr(args, k) is None})
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
    return args


if __name__ == "__main__":
    main()
