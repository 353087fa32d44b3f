"""Measure training and inference on a GPU with one command that can be repeated.

    python3 -m benchmarks.gpu --images ./kaggle_3m
    python3 -m benchmarks.gpu --images ./kaggle_3m --only profile target
    python3 -m benchmarks.gpu --images ./phantoms --device cpu --shapes 4x32 --steps 2 --epochs 1

Saves each figure in OUT/gpu.json as soon as it is measured, and all in OUT/gpu.md, with the name of
the device. A second run measures only what is missing. A part that fails is reported with the
reason, and the rest runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import train
from brainseg import training
from brainseg.devices import has_bfloat16, pick_device, to_device
from brainseg.io.files import check_writable, sentence, write_json
from brainseg.io.layouts import find_cases
from brainseg.onnx import PROVIDERS
from brainseg.segmenter import Segmenter
from brainseg.weights import shipped_weights
from cli import fail
from dataset import BatchLoader, BrainSegmentationDataset
from utils import cudnn

from .ours import export_onnx, set_up
from .peers import reaches
from .scaling import scale_cases, scale_pixels
from .timing import BATCH, ROOT, ROWS, conditions, measure, seconds

WAITS = (  # calls that make the host wait, or may
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "cudaMemcpyAsync", "aten::item", "aten::_local_scalar_dense", "aten::copy_",
)  # fmt: skip
SETTINGS = ("shapes", "steps", "epochs", "target")  # what the figures depend on
PRECISIONS = ("bfloat16", "float32", "float16")
Row = tuple[str, float, str]  # what, value, unit


def steps(args: argparse.Namespace, shape: str, precision: str, compiled: bool) -> Callable:
    """Set up training a U-Net on `shape`, features x pixels; return what runs some of its steps."""
    features, size = shape.split("x")
    dataset = BrainSegmentationDataset(args.images, "validation", int(size), args.cache)
    options = ["--device", args.device, "--features", features, "--image-size", size]
    options += ["--no-amp" if precision == "float32" else "--amp", *["--compile"] * compiled]
    ours = set_up(options, dataset)
    loader, weights = BatchLoader(dataset, args.device), dataset.sampling_weights(0.5)

    def some(count: int = args.steps) -> None:
        drawn = torch.multinomial(weights, count * BATCH, replacement=True).split(BATCH)
        for images, masks in loader.batches(drawn):
            loss = ours.step(images, masks, len(images))
        training.check_finite(loss.item(), ours.state)

    return some


def speed(args: argparse.Namespace, shape: str, precision: str, compiled: bool) -> list[Row]:
    """Time some training steps, after some that do not count."""
    torch.compiler.reset()  # else the ninth network would run eagerly
    half = {"half_precision": lambda device: getattr(torch, precision)}
    with mock.patch.multiple(train, **half), mock.patch.multiple(training, **half):
        took = seconds(steps(args, shape, precision, compiled))
    how = f"{precision}, {'compiled' if compiled else 'eager'}"
    return [(f"training, {shape}, {how}", args.steps * BATCH / took, "slices/s")]


def profiled(args: argparse.Namespace) -> list[Row]:
    """Count what the host waits for in a step, and the time of the longest operations."""
    cuda = args.device.type == "cuda"
    precision = "bfloat16" if has_bfloat16(args.device) else "float32"
    some = steps(args, args.shapes[0], precision, compiled=False)
    some()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        some()
    events = found.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    longest = sorted(events, key=lambda event: getattr(event, key), reverse=True)[:12]
    counts = {event.key: event.count for event in events}
    return [
        *[(f"{name}, per step", counts.get(name, 0) / args.steps, "calls") for name in WAITS],
        *[(e.key[:80], getattr(e, key) / args.steps / 1000, "ms a step") for e in longest],
    ]


def target(args: argparse.Namespace) -> list[Row]:
    """Time a training from its start until it reaches the mean validation DSC."""
    with tempfile.TemporaryDirectory() as out:
        features, size = args.shapes[-1].split("x")
        command = [sys.executable, ROOT / "train.py", "--images", args.images]
        command += ["--weights", f"{out}/w", "--logs", f"{out}/l", "--device", args.device]
        command += ["--features", features, "--image-size", size, "--epochs", args.epochs]
        command += ["--cache", args.cache] if args.cache else []
        run = measure(command, reaches(args.target))
    if not run.lines[-1][1]:
        raise ValueError(f"DSC {args.target}: not reached in {args.epochs} epochs; raise --epochs")
    what = f"train.py, {args.shapes[-1]}, to DSC {args.target}: {run.lines[-1][1].split('/')[0]}"
    return [(what, run.seconds, "s"), ("its peak host memory", run.memory, "GiB")]


def infer(args: argparse.Namespace, runtime: str, precision: str) -> list[Row]:
    """Segment the validation cases, preprocessed in memory, with the shipped weights."""
    weights = shipped_weights("unet")
    if runtime == "PyTorch":
        amp = precision == "bfloat16"
        segmenter = Segmenter.from_weights(weights, device=args.device, amp=amp)
    else:
        folder = args.out / f"{weights.stem}-{precision}"
        found = [*folder.glob("*.onnx")] or [export_onnx([weights], args.images, folder, precision)]
        segmenter = Segmenter.from_weights(found[0], providers=[runtime], batch_size=BATCH)
    size = segmenter.image_size
    dataset = BrainSegmentationDataset(args.images, "validation", size, args.cache)
    images = torch.cat([torch.from_numpy(volume.images) for volume in dataset.volumes])
    images = to_device(images, segmenter.device)
    took = seconds(lambda: segmenter.probabilities(images), 3)
    return [(f"inference, {runtime}, {precision}, {size} pixels", len(images) / took, "slices/s")]


def scaled(args: argparse.Namespace, scale: Callable) -> list[Row]:
    """Run a row of speed.py."""
    before = len(ROWS)
    with redirect_stdout(sys.stderr):
        scale(find_cases(args.images), args)
    return [(row["what"], row["brainseg"], row["unit"]) for row in ROWS[before:]]


def parts(args: argparse.Namespace) -> dict[str, Callable[[argparse.Namespace], list[Row]]]:
    """List all measurements by name, the most informative first."""
    found = {}
    for compiled in (False, True):
        for shape in args.shapes:
            for precision in PRECISIONS:
                name = f"speed {shape} {precision} {'compiled' if compiled else 'eager'}"
                found[name] = partial(speed, shape=shape, precision=precision, compiled=compiled)
        if not compiled:
            found |= {"profile": profiled, "target": target}
            for runtime in ("PyTorch", *PROVIDERS):
                for precision in ("float32", "bfloat16" if runtime == "PyTorch" else "float16"):
                    name = f"inference {runtime} {precision}"
                    found[name] = partial(infer, runtime=runtime, precision=precision)
    scales = {"scaling cases": scale_cases, "scaling pixels": scale_pixels}
    return found | {name: partial(scaled, scale=scale) for name, scale in scales.items()}


def shape(text: str) -> str:
    """Check a width and a size, such as 16x192."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be features x pixels, e.g. 16x192")
    return text


def table(result: dict) -> str:
    """Render conditions, figures and failures as Markdown."""
    lines = [", ".join(f"{key}: {value}" for key, value in result["conditions"].items())]
    lines += ["", "| what | value | unit |", "|---|---|---|"]
    for rows in result["parts"].values():
        lines += [f"| {what} | {value:.4g} | {unit} |" for what, value, unit in rows]
    lines += [""] + [f"{name}: failed ({why})" for name, why in result["failed"].items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the real cases")
    add("--only", nargs="+", help="parts whose names start with these, e.g. speed profile (all)")
    add("--out", type=Path, default="logs/gpu", help="folder for gpu.json and gpu.md (%(default)s)")
    add("--cache", type=Path, help="preprocessed volumes (~/.cache/brainseg)")
    add("--device", help="cuda, cpu ... (an accelerator if available)")
    shapes = ["16x128", "16x192", "32x256"]
    add("--shapes", nargs="+", type=shape, default=shapes, help="features x pixels")
    add("--steps", type=int, default=100, help="steps timed in each training (%(default)s)")
    add("--epochs", type=int, default=30, help="epochs to reach the target in (%(default)s)")
    add("--target", type=float, default=0.9, help="mean validation DSC (%(default)s)")
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
        check_writable(args.out)
        args.image_size = int(args.shapes[-1].split("x")[1])
        path, about = args.out / "gpu.json", conditions(args, find_cases(args.images))
        about |= {name: getattr(args, name) for name in SETTINGS}
        result = {"conditions": about, "parts": {}, "failed": {}}
        if path.exists():
            result = json.loads(path.read_text())
            for name in ("device", *SETTINGS):
                if result["conditions"].get(name) != about[name]:
                    raise ValueError(f"{path}: has other settings ({name}); give another --out")
    except (ValueError, OSError) as error:
        fail(error)
    start = time.perf_counter()
    for name, part in parts(args).items():
        if name in result["parts"] or not name.startswith(tuple(args.only or [""])):
            continue
        print(f"{time.perf_counter() - start:4.0f} s: {name}", file=sys.stderr, flush=True)
        result["failed"].pop(name, None)
        try:
            with cudnn(deterministic=True):  # the default of train.py
                result["parts"][name] = part(args)
        except (Exception, SystemExit) as error:  # the rest runs
            result["failed"][name] = (sentence(error) or repr(error)).splitlines()[0]
        write_json(path, result)
        (args.out / "gpu.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
