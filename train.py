"""Train a network on a folder of cases with masks.

    python3 train.py --images ./kaggle_3m                 100 epochs; best weights: weights/unet.pt
    python3 train.py --recipe classic                     as published: 256 px, 32 features, Dice
    python3 train.py --resume                             go on after an interruption, or for longer
    python3 train.py --config settings.yaml               flag names as keys; flags win
    python3 train.py --folds 5 --fold 0                   cross-validation by patient
    python3 train.py --init-weights weights/unet-folds/unet-a5f30600.pt ...            fine-tune
    torchrun --nproc-per-node=4 train.py ...              on four GPUs of this machine

Writes <model>.pt, its card <model>.json and <model>.ckpt into WEIGHTS; no shipped weights change.
"""

import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import utils
from brainseg import devices, distributed, training, training_files
from brainseg.cache import prune
from brainseg.io.archives import unpacked
from brainseg.io.files import out_of_memory, sentence
from brainseg.io.opening import check_apart
from brainseg.metrics import dsc
from brainseg.origins import settings_of_weights
from brainseg.segmenter import Segmenter
from brainseg.splits import check_folds, list_cohort, validate_on
from brainseg.teachers import Teachers
from brainseg.training import TrainState
from brainseg.weights import CARD_DEFAULTS, MODELS, Network, build_network, load_checkpoint
from dataset import BatchLoader, SliceDataset, train_and_validation
from loss import LOSSES
from transform import Augmentation

OF_NETWORK = {"features", *CARD_DEFAULTS}  # settings that a card decides, not --recipe
SYNC = 20  # steps on a CUDA GPU between reads of the loss, for which host and GPU wait


# fmt: off
def get_args_parser() -> cli.Parser:
    """Define the settings; those that change the result are in `cli.add_recipe_options`."""
    parser = cli.make_parser(__doc__)
    add = parser.add
    parser.group("run")
    add("--images", type=Path, default="./kaggle_3m", help="folder or .zip of cases")
    add("--skip-bad", action="store_true", help="skip cases that cannot be read, and name them")
    add("--cache", type=Path, help="folder of preprocessed volumes (~/.cache/brainseg)")
    add("--prune-cache", action="store_true", help="first delete cached volumes of missing sources")
    add("--init-weights", type=Path, help="weights to start from; used where name and shape fit")
    add("--allow-seen", action="store_true", help="validate even on patients of --init-weights")
    add("--resume", action="store_true", help="resume from WEIGHTS/<model>.ckpt, with its settings")
    add("--epochs", type=int, default=100, least=1, help="each draws as many slices as there are")
    add("--weights", type=Path, default="./weights", help="folder to write to")
    add("--logs", "--log-dir", type=Path, default="./logs", help="curves; torchrun wants --log-dir")
    add("--validate-every", type=int, default=1, least=1, help="epochs between validations")
    add("--vis-images", type=int, default=200, help="validation slices to draw")
    add("--vis-freq", type=int, default=10, least=0, help="epochs between drawings; 0: never")
    add("--device", help="cuda, cuda:1, mps, cpu (an accelerator if available)")
    add("--workers", type=int, least=1, help="threads that read and preprocess (all cores)")
    add("--compile", action=cli.SWITCH, default=False, help="compile first, for minutes (no)")
    add("--deterministic", action=cli.SWITCH, default=True, help="same seed, same result (yes)")
    cli.add_recipe_options(parser)
    return parser
# fmt: on


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says. Raises SystemExit, with a sentence, unless it succeeds."""
    stopped = "error: stopped at once; preprocessed volumes and finished epochs are kept"
    errors, quiet = cli.errors_in_one_sentence(stopped), distributed.only_main_process_prints()
    with errors, quiet, distributed.process_group():
        parser = get_args_parser()
        args = get_args(argv, parser)
        print(cli.summary(parser, args), flush=True)
        with unpacked(args.images, distributed.world_size()) as images:
            try:
                stop = train(args, parser.recipe, images)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise ValueError(
                    f"out of memory at --batch-size {args.batch_size}; start again with a smaller "
                    f"one, or with a smaller --image-size or --features ({sentence(error)})"
                ) from error
        if stop:
            sys.exit(128 + stop)


def get_args(argv: list[str] | None, parser: cli.Parser) -> Namespace:
    """Read the settings.

    Flags win over --config, that over the checkpoint or card, that over --recipe and defaults.
    """
    layers = parser.read(argv)
    args = parser.resolve(layers)
    if args.model != "unet" and parser.sources["features"] != cli.DEFAULTS:
        parser.error("--features is for --model unet")
    weights, stride = args.weights / f"{args.model}.pt", MODELS[args.model].stride
    if args.resume:
        path = weights.with_suffix(".ckpt")
        args = cli.resume(parser, layers, load_checkpoint(path)["args"], path)
    else:
        if args.recipe and parser.sources["recipe"] == cli.FLAGS:  # they win over the file, too
            values = {k: v for k, v in parser.classic.items() if k not in OF_NETWORK}
            layers.insert(1, ("from --recipe", values))
        if args.init_weights:
            card = settings_of_weights(args.init_weights)
            layers.append((f"from the card of {args.init_weights}", card))
        if args.recipe:
            layers.append(("from --recipe", parser.classic))
        args = parser.resolve(layers)
    if args.model != "unet":
        args.features = None
    if (args.folds is None) != (args.fold is None):
        parser.error("--folds and --fold go together, as in --folds 5 --fold 0")
    if args.validation and args.folds:
        parser.error("--validation and --folds both say what to validate on; give one")
    if args.weights.suffix == ".pt":
        parser.error(f"--weights {args.weights} must be a folder; the file is named after --model")
    if args.image_size % stride:
        parser.error(f"--image-size {args.image_size} is not a multiple of {stride}")
    if args.init_weights and args.init_weights.resolve() == weights.resolve():
        parser.error(f"--init-weights {args.init_weights} would be overwritten; set --weights")
    if args.batch_size < devices.world_size():
        raise ValueError(
            f"--batch-size {args.batch_size} is less than one slice for each of "
            f"{devices.world_size()} processes; raise it, or start fewer processes"
        )
    return args


def train(args: Namespace, recipe: list[str], images: Path) -> int:
    """Train on the cases in `images`, or continue; return 0, or the signal that stopped it."""
    device = devices.pick_device(devices.rank_device(args.device))
    workers = devices.rank_workers(args.workers)
    amp = devices.has_bfloat16(device) if args.amp is None else args.amp
    cudnn = devices.cudnn(args.deterministic)
    sources = list_cohort(images, **cli.cohort_options(args))
    if args.validation:
        sources = validate_on(sources, args.validation)
    if args.folds:
        check_folds(sources, args.folds, args.fold)
    places = {"--weights": args.weights, "--logs": args.logs, "--cache": args.cache}
    for option, folder in places.items():
        if folder:
            check_apart(folder, option, sources, images)
    student = args.weights / f"{args.model}.pt"
    teachers = Teachers(args.teachers, student) if args.teachers else None
    with training_files.claimed(student, args.logs, args.resume) as checkpoint, cudnn:
        if teachers and checkpoint:
            teachers.check_resumed(checkpoint)
        if args.prune_cache and distributed.is_main_process():
            print(prune(args.cache))
        with distributed.local_rank_zero_first():  # it fills the cache, the others read it
            size, version, cache = args.image_size, args.preprocessing, args.cache
            train_set, validation_set = train_and_validation(
                sources, args.folds, args.fold, args.skip_bad, size, version, cache, workers
            )
            if teachers:
                train_set.targets = teachers.soft_targets(train_set.volumes, device, cache, workers)
            channels = train_set.in_channels * (2 * args.neighbours + 1)
            pretrained, start = args.pretrained, args.init_weights
            if checkpoint:
                pretrained, start = None, None
            model = build_network(args.model, channels, args.features, pretrained, args.seed, start)
        weights = train_set.sampling_weights(args.background)
        loader = BatchLoader(train_set, device, args.neighbours, workers)
        devices.keep_freed_memory(device)
        state = make_state(args, model, train_set, device, amp)
        if checkpoint:
            state.load(checkpoint, train_set.names, args.images)
            training.report_changes(checkpoint, state, validation_set.names)
        if state.epoch >= args.epochs:
            print(f"all {args.epochs} epochs are done; raise --epochs to continue")
            return 0
        cases, volumes = train_set.cases, validation_set.volumes
        settings, commit = utils.plain(args) | {"resume": False}, utils.git_commit()
        writer = training_files.RunWriter(
            state, cases, volumes, settings, recipe, teachers, checkpoint, commit
        )
        with writer:
            print(f"{writer.headline(state.slices)}; {loader.place}", flush=True)
            training.wrap_network(state, args.image_size if args.compile else None)
            return fit(args, state, loader, weights, validation_set, writer)


def make_state(
    args: Namespace, model: Network, data: SliceDataset, device: torch.device, amp: bool
) -> TrainState:
    """Make the state before the first step, with the network on its device."""
    sequences = data.in_channels
    augmentation = Augmentation(
        scale=args.aug_scale,
        angle=args.aug_angle,
        drop=args.drop_sequences if sequences == 3 else 0,
        drop_both=1 if args.flair_alone else 0.5,
        intensity=args.aug_intensity,
        sequences=sequences,
        strip=args.strip_skulls,
    )
    return TrainState(
        model=training.on_device(model, device, args.sync_bn),
        slices=len(data),
        batch_size=args.batch_size,
        epochs=args.epochs,
        lr=args.lr,
        schedule=args.schedule,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        ema=args.ema,
        amp=amp,
        seed=args.seed,
        neighbours=args.neighbours,
        loss=LOSSES[args.loss],
        augment=augmentation,
    )


def fit(
    args: Namespace,
    state: TrainState,
    loader: BatchLoader,
    weights: Tensor,
    data: SliceDataset,
    writer: training_files.RunWriter,
) -> int:
    """Train on slices drawn by `weights`, validate on `data` and save, epoch by epoch.

    Returns 0 after the last epoch, or the signal that stopped it.
    """
    stop = 0
    bar = tqdm(total=args.epochs, initial=state.epoch, desc="training", unit="epoch", disable=None)
    with utils.Interruption() as interruption, bar:
        while state.epoch < args.epochs:
            start, done = time.perf_counter(), state.step * state.batch_size
            stop = train_one_epoch(state, loader, weights, interruption)
            if stop:
                writer.save(state)
                break
            speed = (state.slices - done) / (time.perf_counter() - start)
            train_loss = state.loss_sum / state.slices
            epoch, validation = state.epoch + 1, None
            last = epoch == args.epochs
            if last or epoch % args.validate_every == 0:
                drawn = args.vis_freq and (last or epoch % args.vis_freq == 0)
                validation = validate(state, data, drawn)
                state.best = max(validation.mean, state.best)
            state.epoch, state.step, state.loss_sum = epoch, 0, 0.0
            writer.save(state, validation)
            writer.report(state, train_loss, speed, validation)
            bar.update()
    if stop:
        python = "python3" if devices.world_size() == 1 else "torchrun, as before, with:"
        print(
            f"stopped at epoch {state.epoch + 1}, step {state.step}; continue with: "
            f"{python} train.py --resume --weights {args.weights} --model {args.model}"
        )
    else:
        print(f"weights: {args.weights / args.model}.pt   logs: tensorboard --logdir {args.logs}")
    return stop


def train_one_epoch(
    state: TrainState, loader: BatchLoader, weights: Tensor, interruption: utils.Interruption
) -> int:
    """Train to the epoch's end on slices drawn by `weights`; return 0, or a signal to stop.

    Ranks share each batch: an epoch has the same slices and steps for any number of ranks.
    """
    generator = training.make_generator(state.seed, 0, state.epoch)
    drawn = torch.multinomial(weights, state.slices, replacement=True, generator=generator)
    batches = drawn.split(state.batch_size)[state.step :]
    parts = [distributed.shard_of_batch(batch) for batch in batches]
    every = SYNC if state.device.type == "cuda" else 1
    losses = []
    name, done = f"epoch {state.epoch + 1}", state.step * state.batch_size
    bar = tqdm(None, name, state.slices, leave=False, initial=done, unit="image", disable=None)
    with bar:
        for batch, (images, masks) in zip(batches, loader.batches(parts), strict=True):
            loss = train_step(state, images, masks, len(batch))
            losses.append(loss * len(batch))
            state.step += 1
            bar.update(len(batch))
            last = state.step == state.steps_per_epoch
            if last or state.step % every == 0:
                state.loss_sum += torch.stack(losses).cpu().double().sum().item()
                losses.clear()
                state.check_finite(state.loss_sum)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                stop = distributed.all_reduce_max(interruption.signal)
                if stop and not last:
                    return stop
    return 0


def train_step(state: TrainState, images: Tensor, masks: Tensor, batch_size: int) -> Tensor:
    """Take one optimiser step on this rank's part of a batch; return the loss of the whole batch.

    `images` (B, C, N, N) and `masks` (B, 1, N, N), as stored, and the loss are on the device.
    """
    generator = training.make_generator(state.seed, 1, state.global_step)
    images, masks = state.augment(images.float(), masks.float(), generator, batch_size)
    state.model.train()
    with state.autocast:
        logits = state.network(images.contiguous(memory_format=torch.channels_last), logits=True)
    if batch_size <= distributed.rank():  # no slice is left for this rank: a stand-in
        logits, masks = logits[:0], masks[:0]
    loss = state.loss(logits, masks, total=distributed.all_reduce_sum)
    state.optimizer.param_groups[0]["lr"] = state.learning_rate()
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema:
        state.update_average()
    return loss.detach()


def validate(state: TrainState, data: SliceDataset, with_masks: bool) -> training_files.Validation:
    """Segment the validation cases as inference does; ranks share them."""
    distributed.broadcast_buffers(state.trained)
    options = {"batch_size": state.batch_size, "device": state.device, "amp": state.amp}
    segmenter = Segmenter(state.trained, neighbours=state.neighbours, **options)
    results, masks = [], []
    part = distributed.shard(data.volumes)
    for volume in tqdm(part, "validating", unit="case", leave=False, disable=None):
        probabilities = segmenter.probabilities(torch.from_numpy(volume.images))
        logits = torch.logit(probabilities, eps=1e-6)  # within ± 14, always finite
        target = torch.from_numpy(volume.mask[:, None]).to(logits)
        loss = state.loss(logits, target).item()
        mask = segmenter.mask_of(probabilities, volume.frame)
        results.append((loss * len(mask), dsc(mask, volume.truth)))
        if with_masks:
            masks.append(mask)
    losses, scores = zip(*distributed.gather(results), strict=True)
    loss = sum(losses) / len(data)
    state.check_finite(loss)
    better = sum(scores) / len(scores) > state.best
    scores = dict(zip(data.names, scores, strict=True))
    return training_files.Validation(loss, scores, distributed.gather(masks), better)


if __name__ == "__main__":
    main()
