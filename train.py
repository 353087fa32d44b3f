"""Train a network on a folder of cases with masks.

    python3 train.py --images ./kaggle_3m                 100 epochs; best weights: weights/unet.pt
    python3 train.py --resume                             go on after an interruption
    python3 train.py --resume --epochs 150                train on for longer
    python3 train.py --config settings.yaml               the names of the flags; flags win
    python3 train.py --folds 5 --fold 0                   cross-validation by patient
    python3 train.py --init-weights weights/unet.pt ...   fine-tune
    torchrun --nproc-per-node=4 train.py ...              on four GPUs of this machine
    tensorboard --logdir logs                             curves and outlined slices

Writes WEIGHTS/<model>.pt (with its card, <model>.json) and WEIGHTS/<model>.ckpt, and never
touches the weights that came with the project.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from brainseg.cache import Prepared, prune
from brainseg.devices import pick_device
from brainseg.distributed import (
    gather,
    in_main,
    largest,
    one_first,
    only_main_speaks,
    own_device,
    own_workers,
    process_group,
    processes,
    together,
)
from brainseg.io.cohorts import parse_sequences
from brainseg.io.files import check_writable, write_json
from brainseg.io.labels import Labels
from brainseg.io.layouts import Source, list_cases
from brainseg.io.pictures import outline, to_grey
from brainseg.metrics import summarise
from brainseg.preprocess import VERSION
from brainseg.splits import by_subset, count_patients, patient_of, use_patients
from brainseg.weights import MODELS, load_state, load_tensors, save_tensors, save_weights
from dataset import BrainSegmentationDataset
from loss import LOSSES
from trainer import RECIPE, Trainer
from utils import Interruption, add_cohort_options, fail, keep_freed_memory, make_parser, plain

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = set("args model ema optimizer epoch step loss_sum best cases".split())


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--images", type=Path, default="./kaggle_3m", help="folder of cases (%(default)s)")
    add_cohort_options(add)
    add("--skip-bad", action="store_true", help="leave out cases that cannot be read, by name")
    add("--image-size", type=int, default=256, help="side of a resized slice (%(default)s)")
    add(
        "--preprocessing",
        type=int,
        choices=(1, 2),
        default=VERSION,
        help="1: as the published weights, all sequences on one scale; 2: each by itself (2)",
    )
    add(
        "--folds",
        type=int,
        help="cross-validation: number of folds, by patient, of all but the test cases",
    )
    add("--fold", type=int, help="cross-validation: the fold to validate on, from 0")
    add("--cache", type=Path, help="preprocessed volumes (~/.cache/brainseg)")
    add("--prune-cache", action="store_true", help="first delete those whose sources are gone")
    add("--workers", type=int, help="threads that read and preprocess (all cores)")

    add = parser.add_argument_group("network").add_argument
    add("--model", type=str, choices=MODELS, default="unet", help="the network (%(default)s)")
    add("--features", type=int, help="of unet: channels of its first level (32)")
    add(
        "--pretrained",
        type=str,
        nargs="?",
        const=True,
        help="of resnext_unet: ImageNet weights for its encoder, fetched or from a file",
    )
    add(
        "--neighbours", type=int, default=0, help="slices seen on either side of each (%(default)s)"
    )
    add("--init-weights", type=Path, help="weights to start from, as far as they fit")

    add = parser.add_argument_group("recipe").add_argument
    add(
        "--epochs", type=int, default=100, help="in each, as many slices as there are (%(default)s)"
    )
    add("--batch-size", type=int, default=16, help="slices a step (%(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam, its peak (%(default)s)")
    add(
        "--schedule",
        type=str,
        choices=("constant", "cosine"),
        default="constant",
        help="of the learning rate; cosine falls to 0 at the last epoch (%(default)s)",
    )
    add("--warmup", type=int, default=0, help="steps of linear warm-up (%(default)s)")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, say 0.998; 0 is off")
    add("--weight-decay", type=float, default=0, help="of AdamW; 0 is plain Adam (%(default)s)")
    add("--loss", type=str, choices=LOSSES, default="dice", help="on a batch (%(default)s)")
    add(
        "--background",
        type=float,
        default=0.1,
        help="slices are drawn by lesion area plus this times the mean one (%(default)s)",
    )
    add("--aug-scale", type=float, default=0.05, help="random scale, 1 ± this (%(default)s)")
    add("--aug-angle", type=float, default=15, help="random rotation, ± degrees (%(default)s)")
    add("--aug-intensity", type=float, default=0, help="random gain and shift, ± this; 0 is off")
    add("--drop-sequences", type=float, default=0, help="share of slices without post-contrast")
    add("--seed", type=int, default=42, help="of every random draw (%(default)s)")
    add(
        "--keep",
        type=str,
        choices=("best", "last"),
        default="best",
        help="weights of the epoch with the best validation DSC, or of the last (%(default)s)",
    )

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", type=str, help="cuda, cuda:1, mps, cpu (an accelerator if there is one)")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (where the device is faster so)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the network first: minutes, for faster steps (no)",
    )
    add("--sync-bn", action="store_true", help="batch norm over the whole batch of several GPUs")
    add("--weights", type=Path, default="./weights", help="folder to write to (%(default)s)")
    add("--logs", type=Path, default="./logs", help="folder for TensorBoard (%(default)s)")
    add("--vis-images", type=int, default=200, help="validation slices to draw (%(default)s)")
    add("--vis-freq", type=int, default=10, help="epochs between drawings, 0: never (%(default)s)")
    add("--resume", action="store_true", help="go on from WEIGHTS/<model>.ckpt, with its settings")
    return parser


def get_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The arguments and, with --resume, the checkpoint whose settings they take over."""
    parser = get_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    if not args.resume:
        return args, None

    path = args.weights / f"{args.model}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to go on from; start without --resume")
    checkpoint = load_tensors(path)
    if not CHECKPOINT <= checkpoint.keys():
        raise ValueError(f"{path}: is not a training checkpoint of this version")
    # An option that is younger than the checkpoint was at its default then.
    settings = {name: parser.get_default(name) for name in RECIPE} | {"preprocessing": 1}
    settings |= checkpoint["args"]
    # The folder it lies in and the machine may be others by now.
    here = ("weights", "device", "workers", "resume", "prune_cache")
    parser.set_defaults(**{name: value for name, value in settings.items() if name not in here})
    args = parser.parse_args(argv)
    for name in RECIPE:
        if str(getattr(args, name)) != str(settings[name]):
            raise ValueError(
                f"{path}: was started with --{name.replace('_', '-')} {settings[name]}, "
                f"not {getattr(args, name)}; leave that out, or start anew in another --weights"
            )
    return args, checkpoint


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for a value that could not work, before anything long is done."""
    least = {"epochs": 1, "batch_size": 1, "features": 1, "workers": 1, "image_size": 32}
    least |= {
        "seed": 0,
        "vis_freq": 0,
        "warmup": 0,
        "weight_decay": 0,
        "neighbours": 0,
        "background": 0,
        "aug_angle": 0,
        "aug_intensity": 0,
    }
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}")
    for name in ("drop_sequences", "ema", "aug_scale"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} goes from 0 to less than 1")
    if (args.folds is None) != (args.fold is None):
        parser.error("--folds and --fold go together, as in --folds 5 --fold 0")
    if args.features and args.model != "unet":
        parser.error("--features is for --model unet")
    if args.weights.suffix == ".pt":
        parser.error(f"--weights {args.weights} is to be a folder; weights are named by --model")
    stride = MODELS[args.model].stride
    if args.image_size % stride:
        parser.error(f"--image-size {args.image_size} is not a multiple of {stride}")
    if args.init_weights and args.init_weights.resolve() == weights_path(args).resolve():
        parser.error(f"--init-weights {args.init_weights} would be overwritten; set --weights")


def weights_path(args: argparse.Namespace) -> Path:
    return args.weights / f"{args.model}.pt"


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, until training starts
    try:
        with process_group(), only_main_speaks():
            args, checkpoint = together(lambda: get_args(argv))
            run(args, checkpoint)
    except (ValueError, OSError) as error:
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory, with no step under way: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        fail("stopped at once; preprocessed volumes and finished epochs are kept")


def run(args: argparse.Namespace, checkpoint: dict | None) -> None:
    """Train from `args`, from the start or from a checkpoint, to the last epoch or a signal."""
    asked = plain(args) | {"resume": False}  # before this process takes its part of the machine
    sources = together(lambda: check_machine(args))
    if args.prune_cache:
        in_main(lambda: report_pruned(args.cache))
    train_set, validation_set = one_first(
        lambda: BrainSegmentationDataset.train_and_validation(
            sources,
            args.folds,
            args.fold,
            args.skip_bad,
            image_size=args.image_size,
            cache=args.cache,
            workers=args.workers,
            progress=True,
            version=args.preprocessing,
        )
    )
    parts = {"train": train_set.volumes, "validation": validation_set.volumes}
    subsets = {subset: [volume.name for volume in part] for subset, part in parts.items()}
    subsets["test"] = by_subset(source.name for source in sources)["test"]
    print(count_patients(subsets), flush=True)
    in_main(lambda: report_notes(train_set.volumes + validation_set.volumes))
    trainer = one_first(lambda: Trainer(args, train_set))
    if checkpoint:
        together(lambda: trainer.load(checkpoint))
    elif (path := args.weights / f"{args.model}.ckpt").exists():
        print(f"{path}: the checkpoint of an earlier run, overwritten after the first epoch")
    about = trainer.describe(validation_set)
    print(
        f"{args.model} on {f'{processes()} x ' if processes() > 1 else ''}{about['device']}"
        f"{', bfloat16' if trainer.amp else ''}: "
        f"{len(train_set)} slices of {len(train_set.volumes)} cases to train on, "
        f"{len(validation_set.volumes)} cases to validate on; {trainer.feed.place}",
        flush=True,
    )
    if trainer.epoch >= args.epochs:
        print(f"all {args.epochs} epochs are done; raise --epochs to go on")
        return

    in_main(lambda: write_json(args.logs / "args.json", about | {"args": asked}))
    stop = train(trainer, train_set, validation_set, about)
    if trainer.epoch < args.epochs:
        python = "python3" if processes() == 1 else "torchrun, as before, with:"
        print(
            f"stopped at epoch {trainer.epoch + 1}, step {trainer.step}; go on with: "
            f"{python} train.py --resume --weights {args.weights} --model {args.model}"
        )
        sys.exit(128 + stop)
    print(f"weights: {weights_path(args)}   logs: tensorboard --logdir {args.logs}")


def report_notes(volumes: list[Prepared]) -> None:
    """Say on stderr what is odd about the sequences of a case."""
    for volume in volumes:
        for note in volume.frame.notes:
            print(f"{volume.case.folder}: {note}", file=sys.stderr)


def report_pruned(cache: Path | None) -> None:
    count, freed, unknown = prune(cache)
    print(
        f"cache: {count} volumes without a source deleted ({freed / 2**30:.1f} GiB)"
        + f"; {unknown} of earlier versions kept, which do not name theirs" * bool(unknown)
    )


def check_machine(args: argparse.Namespace) -> list[Source]:
    """List the cases; raise what would stop the run later, before the long work."""
    args.device, args.workers = own_device(args.device), own_workers(args.workers)
    pick_device(args.device)
    layout, labels = parse_sequences(args.sequences), Labels(args.labels)
    sources = list_cases(args.images, layout=layout, labels=labels)
    use_patients(args.patients, [source.name for source in sources])
    for folder in (args.weights, args.logs):
        check_writable(folder)
    if args.init_weights and not args.resume:
        load_state(args.init_weights)
    if args.batch_size < processes():
        raise ValueError(
            f"--batch-size {args.batch_size} is less than a slice for each of {processes()} "
            "processes; raise it, or start fewer"
        )
    return sources


def train(
    trainer: Trainer,
    train_set: BrainSegmentationDataset,
    validation_set: BrainSegmentationDataset,
    about: dict,
) -> int:
    """Train until the last epoch is done or a signal comes; the number of the signal, or 0."""
    args = trainer.args
    if trainer.device.type == "cpu":
        keep_freed_memory()
    if args.compile:  # before processes wait for each other's gradients: one may fail here
        print(f"compiled in {together(trainer.compile):.1f} s", flush=True)
    trainer.parallelise()
    interruption = Interruption()
    weights = train_set.sampling_weights(args.background)
    bar = tqdm(total=args.epochs, initial=trainer.epoch, desc=args.model, disable=None)
    with in_main(lambda: open_log(trainer)) or nullcontext() as log, bar:
        while not (stop := largest(interruption.signal or 0)) and trainer.epoch < args.epochs:
            speed = trainer.train_epoch(train_set, weights, interruption)
            if speed is None:
                in_main(lambda: save_checkpoint(trainer))
            else:
                dsc = finish_epoch(trainer, len(train_set), validation_set, about, speed, log)
                bar.set_postfix(DSC=f"{dsc:.3f}", best=f"{trainer.best:.3f}", refresh=False)
                bar.update()
    return stop


def open_log(trainer: Trainer) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # slow: nobody waits for it with --help

    return SummaryWriter(trainer.args.logs, purge_step=trainer.epoch + 1)


def finish_epoch(
    trainer: Trainer,
    slices: int,
    validation_set: BrainSegmentationDataset,
    about: dict,
    speed: float,
    log: SummaryWriter | None,
) -> float:
    """Validate, save what the epoch has brought, and log it in the main process; the mean DSC."""
    args, epoch = trainer.args, trainer.epoch + 1
    learning_rate, train_loss = trainer.learning_rate(), trainer.loss_sum / slices
    loss, scores, masks = trainer.evaluate(validation_set)
    together(lambda: trainer.check_finite(loss))
    mean = sum(scores.values()) / len(scores)

    better = mean > trainer.best
    trainer.best = max(mean, trainer.best)
    trainer.epoch, trainer.step, trainer.loss_sum = epoch, 0, 0.0
    interval = summarise(list(scores.values()), list(map(patient_of, scores)))
    card = about | {"epoch": epoch, "validation_dsc": interval}
    in_main(lambda: save(trainer, card if better or args.keep == "last" else None))

    curves = {
        "loss/train": train_loss,
        "loss/validation": loss,
        "dsc/validation": mean,
        **{f"dsc_by_case/{name}": value for name, value in scores.items()},
        "learning_rate": learning_rate,
        "images_per_second": speed,
    }
    in_main(lambda: [log.add_scalar(name, value, epoch) for name, value in curves.items()])
    if args.vis_freq and (epoch % args.vis_freq == 0 or epoch == args.epochs):
        masks = gather(masks)
        in_main(lambda: draw(log, validation_set, masks, args.vis_images, epoch))
    tqdm.write(
        f"epoch {epoch:3d}/{args.epochs}  loss {train_loss:.4f}  validation loss {loss:.4f}  "
        f"DSC {mean:.4f}{' *' if better else '  '}  {speed:.1f} images/s"
    )
    sys.stdout.flush()
    return mean


def draw(
    log: SummaryWriter,
    dataset: BrainSegmentationDataset,
    masks: list[np.ndarray],
    most: int,
    epoch: int,
) -> None:
    """Log up to `most` slices of the validation cases, outlined, in the source geometry."""
    for volume, mask in zip(dataset.volumes, masks, strict=True):
        count = min(len(mask), most)
        if count < 1:
            return
        most -= count
        grey = to_grey(volume.case.read())[:count]
        pictures = outline(grey, mask[:count], volume.truth[:count])
        log.add_images(volume.name, pictures, epoch, dataformats="NHWC")


def save(trainer: Trainer, card: dict | None) -> None:
    """Write the checkpoint and, with a card, the weights."""
    if card:
        save_weights(weights_path(trainer.args), trainer.trained.state_dict(), card)
    save_checkpoint(trainer)


def save_checkpoint(trainer: Trainer) -> None:
    save_tensors(trainer.args.weights / f"{trainer.args.model}.ckpt", trainer.state())


if __name__ == "__main__":
    main()
