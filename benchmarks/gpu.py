"""Time training and inference on a GPU: one command, one table.

    python3 -m benchmarks.gpu --images ./kaggle_3m
    python3 -m benchmarks.gpu --images ./kaggle_3m --only train --shapes 16x192
    python3 -m benchmarks.gpu --images ./phantoms --device cpu --shapes 4x32

Trains a network of each shape (features x pixels) for two epochs with train.py, of which the second
counts, and segments the preprocessed validation cases with the shipped weights, in PyTorch and with
each provider of ONNX Runtime. A row that fails says why, and the rest runs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from brainseg.devices import pick_device, to_device
from brainseg.io.files import sentence
from brainseg.onnx import PROVIDERS
from brainseg.segmenter import Segmenter
from brainseg.weights import shipped_weights
from cli import fail
from dataset import BrainSegmentationDataset

from .timing import ROOT, conditions, measure

REPEATS = 3


def training_speed(args: argparse.Namespace, shape: str, options: list[str]) -> float:
    """Return the slices per second of the second epoch of train.py."""
    features, size = shape.split("x")
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / "train.py", "--images", args.images, "--epochs", 2]
        command += ["--features", features, "--image-size", size, "--device", args.device]
        command += ["--weights", f"{out}/weights", "--logs", f"{out}/logs", "--vis-freq", 0]
        if args.cache:
            command += ["--cache", args.cache]
        epochs = re.findall(r"([\d.]+) images/s", measure(command + options).output)
    return float(epochs[-1])


def network_speed(args: argparse.Namespace, runtime: str, precision: str) -> float:
    """Return the slices per second of the shipped network, from preprocessed slices in memory."""
    weights = shipped_weights("unet")
    with tempfile.TemporaryDirectory() as out:
        if runtime == "PyTorch":
            amp = precision == "bfloat16"
            segmenter = Segmenter.from_weights(weights, device=args.device, amp=amp)
        else:
            command = [sys.executable, ROOT / "export.py", "--weights", weights, "--out", out]
            command += ["--images", args.images, "--format", "onnx", "--precision", precision]
            measure(command)
            (path,) = Path(out).glob("*.onnx")
            segmenter = Segmenter.from_weights(path, providers=[runtime])
        size = segmenter.image_size
        dataset = BrainSegmentationDataset(args.images, "validation", size, args.cache)
        images = torch.cat([torch.from_numpy(volume.images) for volume in dataset.volumes])
        images = to_device(images, segmenter.device)
        segmenter.probabilities(images)  # not timed: the first call prepares
        times = []
        for _ in range(REPEATS):
            synchronize()
            start = time.perf_counter()
            segmenter.probabilities(images)
            synchronize()
            times.append(time.perf_counter() - start)
    return len(images) / float(np.median(times))


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def shape(text: str) -> str:
    """Check a width and a size, such as 16x192."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be features x pixels, e.g. 16x192")
    return text


def print_row(name: str, work, *arguments: object) -> None:
    """Print a row of the table, or why it cannot be measured."""
    try:
        print(f"| {name} | {work(*arguments):.4g} |", flush=True)
    except (Exception, SystemExit) as error:  # the rest runs
        reason = (sentence(error) or repr(error)).splitlines()[0]
        print(f"| {name} | failed: {reason} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the real cases")
    add("--only", choices=("train", "inference"), help="only these rows (both)")
    add("--cache", type=Path, help="preprocessed volumes (~/.cache/brainseg)")
    add("--device", help="cuda, cpu ... (an accelerator if available)")
    shapes = ["16x128", "16x192", "32x256"]
    add("--shapes", nargs="+", type=shape, default=shapes, help="features x pixels")
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        fail(error)

    print(conditions(args.device))
    print("\n| what | slices/s |\n|---|---|")
    if args.only != "inference":
        for size in args.shapes:
            for options in (["--amp"], ["--no-amp"], ["--amp", "--compile"]):
                name = f"train.py, {size}, {' '.join(options)}"
                print_row(name, training_speed, args, size, options)
    if args.only != "train":
        for precision in ("float32", "bfloat16"):
            print_row(f"PyTorch, {precision}", network_speed, args, "PyTorch", precision)
        for provider in PROVIDERS:
            for precision in ("float32", "float16"):
                name = f"ONNX Runtime, {provider}, {precision}"
                print_row(name, network_speed, args, provider, precision)


if __name__ == "__main__":
    main()
