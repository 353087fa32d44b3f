"""Time brainseg against a plain scikit-image, NumPy and eager PyTorch version of the same steps.

    python3 -m benchmarks.speed --images ./kaggle_3m                        every short row
    python3 -m benchmarks.speed --images ./kaggle_3m --only preprocess step
    python3 -m benchmarks.speed --images ./kaggle_3m --only cases pixels    with more of each

Both are timed on the same cases in the same run, in turn, on an otherwise idle machine, on the
accelerator if there is one; the plain version is benchmarks/plain.py. Prints a Markdown table and
the conditions; --json FILE keeps both.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from brainseg.cache import prepare
from brainseg.devices import pick_device, to_device
from brainseg.io.files import write_json
from brainseg.io.layouts import find_cases
from brainseg.metrics import dsc
from brainseg.preprocess import preprocess, preprocess_mask
from brainseg.segmenter import Segmenter
from brainseg.splits import select_cases
from brainseg.unet import UNet
from brainseg.weights import (
    PUBLISHED,
    load_pretrained,
    load_state,
    model_from_state,
    save_weights,
)
from cli import fail
from dataset import BatchLoader, BrainSegmentationDataset
from transform import augment
from utils import make_generator

from . import plain
from .ours import export_onnx, set_up
from .scaling import scale_cases, scale_pixels
from .timing import BATCH, ROOT, ROWS, conditions, measure, one_thread, precisions, row, seconds

LONG = ("ensemble", "cases", "pixels")  # run only if named
PLAIN_INFERENCE = """
import sys; sys.path[:0] = {paths!r}
from benchmarks import plain
from brainseg.weights import load_state
state = {{name: value.to({device!r}) for name, value in load_state({weights!r}).items()}}
scores = plain.infer_folder(state, {images!r}, {cases!r}, {out!r}, {image_size})
print(sum(scores.values()) / len(scores))
"""


def bench_preprocess(cases: list, args: argparse.Namespace) -> None:
    """Time the arithmetic on volumes and masks on one core, without reading or caching."""
    chosen = select_cases(cases, "validation")[: args.volumes]
    pairs = [case.read_pair() for case in chosen]
    slices = sum(len(volume) for volume, _ in pairs)

    def ours() -> None:
        for volume, mask in pairs:
            _, frame = preprocess(volume, args.image_size, 1)
            preprocess_mask(mask, frame)

    def theirs() -> None:
        for volume, mask in pairs:
            plain.preprocess(volume, args.image_size)
            plain.preprocess_mask(volume, mask, args.image_size)

    row(
        f"preprocess {len(pairs)} volumes, {slices} slices, one core",
        seconds(one_thread(ours), 3) / slices,
        seconds(one_thread(theirs), 1, warm=False) / slices,
        "s a slice",
    )
    if args.device.type != "cpu":

        def there() -> None:
            for volume, _ in pairs:
                preprocess(volume, args.image_size, 1, args.device)

        row(f"the volumes alone on {args.device}", seconds(there, 3) / slices, None, "s a slice")


def bench_start(cases: list, args: argparse.Namespace) -> None:
    """Time reading and preprocessing all cases into an empty cache, then opening them from it."""
    slices = sum(len(case.slices) for case in cases)
    with tempfile.TemporaryDirectory() as cache:
        cold = seconds(lambda: prepare(cases, args.image_size, cache), warm=False)
        warm = seconds(lambda: prepare(cases, args.image_size, cache), warm=False)
    row(f"cold start, {len(cases)} cases, {slices} slices, reading included", cold, None, "s")
    row(f"warm start, {len(cases)} cases", warm, None, "s")


def bench_augment(cases: list, args: argparse.Namespace) -> None:
    """Time a training batch from the stored volumes: gathered, scaled, rotated, flipped."""
    dataset = BrainSegmentationDataset(args.images, "validation", args.image_size, args.cache)
    indices = np.linspace(0, len(dataset) - 1, BATCH).astype(int).tolist()
    items = [dataset[index] for index in indices]
    images = np.stack([image.numpy().transpose(1, 2, 0) for image, _ in items])
    masks = np.stack([mask.numpy().transpose(1, 2, 0) for _, mask in items])

    loader = BatchLoader(dataset, args.device)

    def ours() -> None:
        for batch, mask in loader.batches([torch.tensor(indices)]):
            batch, mask = (to_device(part, args.device).float() for part in (batch, mask))
            augment(batch, mask, make_generator(0))

    for order, name in ((1, "linear"), (2, "quadratic")):

        def theirs(order: int = order) -> None:
            rng = np.random.default_rng(0)
            plain.augmented_batch(images, masks, range(BATCH), rng, order=order)

        row(
            f"augment a batch of {BATCH}, plain one {name}",
            seconds(ours, 10),
            seconds(theirs, 3),
            "s",
        )


def bench_step(cases: list, args: argparse.Namespace) -> None:
    """Time forward, loss, backward and optimiser on a batch that is already in memory."""
    dataset = BrainSegmentationDataset(args.images, "validation", args.image_size, args.cache)
    items = [dataset[index] for index in range(0, len(dataset), len(dataset) // BATCH)[:BATCH]]
    images, masks = (torch.stack(part).to(args.device) for part in zip(*items, strict=True))
    model = UNet().to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    theirs = seconds(lambda: plain.train_step(model, optimizer, images, masks), 3)
    for precision, name in precisions(args.device).items():
        options = ["--recipe", "classic", "--image-size", args.image_size, precision]
        options += ["--device", args.device, "--aug-scale", 0, "--aug-angle", 0]
        training = set_up(options, dataset)
        ours = seconds(lambda t=training: t.step(images, masks, len(images)), 3)
        row(
            f"training step, batch {BATCH}, {args.image_size} x {args.image_size}, {name}",
            ours,
            theirs,
            "s",
        )


def bench_network(cases: list, args: argparse.Namespace) -> None:
    """Time the probabilities of 32 slices in memory: eager, batch 16, or through the Segmenter."""
    dataset = BrainSegmentationDataset(args.images, "validation", args.image_size, args.cache)
    images = torch.stack([dataset[index][0] for index in range(32)]).to(args.device)
    model = load_pretrained("unet")
    eager_model = copy.deepcopy(model).to(args.device)

    def theirs() -> None:
        with torch.inference_mode():
            for batch in images.split(BATCH):
                eager_model(batch)

    eager = seconds(theirs, 3) / len(images)
    for precision, name in precisions(args.device).items():
        segmenter = Segmenter(model, args.image_size, device=args.device, amp=precision == "--amp")
        ours = seconds(lambda s=segmenter: s.probabilities(images), 3) / len(images)
        row(f"network alone, {name}", ours, eager, "s a slice")


def bench_onnx(cases: list, args: argparse.Namespace) -> None:
    """Time the probabilities of preprocessed validation cases, and score their masks."""
    if not (find_spec("onnxruntime") and find_spec("onnxscript")):
        print("onnx: not measured; pip install -r requirements-onnx.txt", file=sys.stderr)
        return
    import onnxruntime

    weights = args.weights
    how = {"device": "cpu", "amp": False, "image_size": args.image_size}
    segmenter = Segmenter.from_weights(weights, **how)
    model = model_from_state(load_state(weights), weights)[1].eval()
    prepared = []
    for case in select_cases(cases, "validation"):
        volume, truth = case.read_pair()
        prepared.append((*segmenter.preprocess(volume), truth))

    def eager(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in images.split(BATCH)])

    def measured(network: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        """Return seconds per case, and the mean DSC."""
        network(prepared[0][0])
        start = time.perf_counter()
        maps = [network(images) for images, _, _ in prepared]
        spent = (time.perf_counter() - start) / len(prepared)
        scores = [
            dsc(segmenter.finish(found, frame), truth)
            for found, (_, frame, truth) in zip(maps, prepared, strict=True)
        ]
        return spent, float(np.mean(scores))

    networks = {"the Segmenter's PyTorch, float32": segmenter.probabilities}
    with tempfile.TemporaryDirectory() as out:
        for precision in ("float32", "float16"):
            path = export_onnx([weights], args.images, f"{out}/{precision}", precision)
            onnx = Segmenter.from_weights(path, ["cpu"], image_size=args.image_size)
            networks[f"ONNX Runtime {onnxruntime.__version__}, {precision}"] = onnx.probabilities
    theirs, reference = measured(eager)
    for name, network in networks.items():
        ours, score = measured(network)
        about = f"{name}; mean DSC of {len(prepared)} cases {score:.4f} (plain {reference:.4f})"
        row(about, ours, theirs, "s a case")


def bench_inference(cases: list, args: argparse.Namespace) -> None:
    """Time the whole process on the validation cases: start, reading, network, pictures, figure."""
    names = [case.name for case in select_cases(cases, "validation")]
    with tempfile.TemporaryDirectory() as out:
        weights = str(args.weights)
        program = PLAIN_INFERENCE.format(
            paths=[str(ROOT)],
            weights=weights,
            device=str(args.device),
            image_size=args.image_size,
            images=str(args.images),
            cases=names,
            out=f"{out}/plain",
        )
        theirs, their_memory, _ = measure([sys.executable, "-c", program])
        command = [sys.executable, str(ROOT / "inference.py"), "--images", str(args.images)]
        command += ["--weights", weights, "--subset", "validation", "--figure", f"{out}/dsc.png"]
        command += ["--image-size", str(args.image_size), "--device", str(args.device)]
        for precision, name in precisions(args.device).items():
            masks = ["--predictions", f"{out}/{precision[2:]}"]
            ours, our_memory, _ = measure([*command, precision, *masks])
            row(f"inference.py, {len(names)} validation cases, {name}", ours, theirs, "s")
            row("its peak memory", our_memory, their_memory, "GiB")


def bench_ensemble(cases: list, args: argparse.Namespace) -> None:
    """Time five networks of 16 features at 192 pixels, against one of 32 at 256 as "plain".

    Each process segments the validation cases with random weights that find nothing, from PyTorch
    and from ONNX files.
    """
    with tempfile.TemporaryDirectory() as out:
        commands: dict[str, list[list]] = {"PyTorch": [], "ONNX Runtime": []}
        for features, size, count in ((16, 192, 5), (32, 256, 1)):
            files = [Path(out, str(features), f"{k}.pt") for k in range(count)]
            files[0].parent.mkdir()
            for seed, path in enumerate(files):
                torch.manual_seed(seed)
                model = UNet(init_features=features)
                torch.nn.init.constant_(model.conv.bias, -10)
                save_weights(path, model.state_dict(), {"image_size": size, "preprocessing": 2})
            command = [sys.executable, ROOT / "inference.py", "--images", args.images]
            command += ["--subset", "validation", "--predictions", f"{out}/masks"]
            command += ["--figure", f"{out}/dsc.png", "--weights"]
            commands["PyTorch"].append([*command, *files, "--device", args.device])
            if args.device.type == "cpu" and find_spec("onnxruntime") and find_spec("onnxscript"):
                path = export_onnx(files, args.images, files[0].parent, "float32")
                commands["ONNX Runtime"].append([*command, path])
        for runtime, pair in commands.items():
            if pair:
                ours, theirs = (measure(command).seconds for command in pair)
                row(f"five of 16 at 192, plain one of 32 at 256, {runtime}", ours, theirs, "s")


BENCHES = {
    "preprocess": bench_preprocess,
    "start": bench_start,
    "augment": bench_augment,
    "step": bench_step,
    "network": bench_network,
    "onnx": bench_onnx,
    "inference": bench_inference,
    "ensemble": bench_ensemble,
    "cases": scale_cases,
    "pixels": scale_pixels,
}


def get_args_of_benchmark() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the real cases")
    published = PUBLISHED["unet"]
    add("--weights", type=Path, default=published, help=f"of one network ({published.name})")
    add("--only", nargs="+", choices=BENCHES, help="these rows (all but ensemble, cases, pixels)")
    add("--device", help="cuda, cpu ... (an accelerator if available)")
    add("--image-size", type=int, default=256, help="side of a resized slice (%(default)s)")
    add("--cache", type=Path, help="preprocessed volumes (~/.cache/brainseg)")
    add("--volumes", type=int, default=3, help="volumes to preprocess (%(default)s)")
    add("--json", type=Path, help="file to keep rows and conditions in")
    args = parser.parse_args()
    args.only = args.only or [name for name in BENCHES if name not in LONG]
    return args


def main() -> None:
    args = get_args_of_benchmark()
    try:
        args.device, cases = pick_device(args.device), find_cases(args.images)
    except (ValueError, OSError) as error:
        fail(error)
    about = conditions(args, cases)
    print(", ".join(f"{name}: {value}" for name, value in about.items()) + "\n")
    print("| what | plain | brainseg | unit | times faster |\n|---|---|---|---|---|")
    for name in args.only:
        try:
            BENCHES[name](cases, args)
        except ValueError as error:
            fail(error)
        if args.json:  # after each, so that a stopped run keeps its results
            write_json(args.json, {"conditions": about, "rows": ROWS})


if __name__ == "__main__":
    main()
