"""Set up trainings as train.py does, and write ONNX files, for timing in benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

import export
from brainseg import training
from brainseg.devices import pick_device
from dataset import BatchLoader, BrainSegmentationDataset
from train import get_args, make_state, train_one_epoch, train_step
from utils import Interruption


@dataclass
class Trainer:
    """A training on a data set, ready for its first step."""

    state: training.TrainState
    step: Callable[[Tensor, Tensor, int], Tensor]
    epoch: Callable[[Tensor], float | None]  # trains on slices drawn with these weights


def set_up(options: Sequence[object], dataset: BrainSegmentationDataset) -> Trainer:
    """Set up the training that train.py would run with these options."""
    args = get_args([str(option) for option in options])
    device = pick_device(args.device)
    channels = dataset.in_channels * (2 * args.neighbours + 1)
    model = training.build_network(
        args.model, args.seed, None, in_channels=channels, init_features=args.features
    )
    state = make_state(args, training.on_device(model, device), dataset)
    if args.compile:
        training.compile_ahead(state, args.image_size)
    loader = BatchLoader(dataset, device, args.neighbours, args.workers)

    def epoch(weights: Tensor) -> float | None:
        state.step, state.loss_sum = 0, 0.0
        return train_one_epoch(state, loader, weights, Interruption())

    return Trainer(state, partial(train_step, state), epoch)


def export_onnx(weights: Sequence[Path], images: Path, out: Path | str, precision: str) -> Path:
    """Export weights, several as one ensemble, to an ONNX file in the folder `out`."""
    words = ["--weights", *weights, "--images", images, "--out", out]
    with redirect_stdout(sys.stderr):  # stdout is for the table
        export.main([str(word) for word in (*words, "--format", "onnx", "--precision", precision)])
    (path,) = Path(out).glob("*.onnx")
    return path
