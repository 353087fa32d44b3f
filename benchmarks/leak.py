"""Measure how a random split of slices changes the score.

    python3 -m benchmarks.leak --images ./kaggle_3m

Trains a small U-Net twice on the training and validation cases, with the same recipe, number of
steps and share of held-out slices: once holding out whole patients (fold 0 of 5), once slices drawn
at random from all patients, so that neighbouring slices, a few millimetres away, are trained on.
Each network is scored on its held-out slices, in the geometry of the source:

- by patient: DSC over the held-out slices of a patient, averaged over patients;
- by slice: DSC of each slice, 1 where both masks are empty, averaged over slices;
- pooled: DSC of all held-out slices together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brainseg.metrics import dsc, mean_text, summarise
from brainseg.segmenter import Segmenter
from brainseg.splits import split_folds
from cli import errors_in_one_sentence
from dataset import BrainSegmentationDataset
from utils import make_generator

from .ours import set_up

FOLDS = 5  # a fifth is held out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="the real cases")
    parser.add_argument("--image-size", type=int, default=64, help="side of a slice (%(default)s)")
    parser.add_argument("--features", type=int, default=8, help="width of the U-Net (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    args = parser.parse_args()

    parts = BrainSegmentationDataset.train_and_validation(args.images, image_size=args.image_size)
    volumes = [volume for part in parts for volume in part.volumes]
    dataset = BrainSegmentationDataset.of(sorted(volumes, key=lambda volume: volume.name))
    print(
        f"{len(dataset.volumes)} cases, {len(dataset)} slices of {args.image_size} x "
        f"{args.image_size}, {args.features} features, {args.epochs} epochs\n"
    )
    print("| held out | seed | by patient | by slice | pooled |\n|---|---|---|---|---|")
    for seed in args.seeds:
        for name, held_out in (
            ("patients", by_patient(dataset)),
            ("slices", by_slice(dataset, seed)),
        ):
            network = train(dataset, ~held_out, args, seed)
            patients, slices, pooled = scores(network, dataset, held_out, args.image_size)
            s = summarise(patients)
            print(
                f"| {name} ({int(held_out.sum())} slices of {s['n']} patients) | {seed} "
                f"| {mean_text(s)} "
                f"| {np.mean(slices):.3f} | {pooled:.3f} |",
                flush=True,
            )
            if name == "patients":
                empty = np.mean(
                    [not volume.mask[s].any() for volume, s in slices_held_out(dataset, held_out)]
                )
    print(
        f"\nA network that predicts nothing scores {empty:.3f} by slice on the patients held out."
    )


def by_patient(dataset: BrainSegmentationDataset) -> Tensor:
    """Mark the slices (len(dataset),) of the patients of the first fold."""
    cases = [volume.case for volume in dataset.volumes]
    held_out = {case.name for case in split_folds(cases, FOLDS, 0)[1]}
    return torch.tensor([dataset.locate(k)[0] in held_out for k in range(len(dataset))])


def by_slice(dataset: BrainSegmentationDataset, seed: int) -> Tensor:
    """Mark as many slices (len(dataset),) as `by_patient`, drawn at random from all patients."""
    order = torch.randperm(len(dataset), generator=make_generator(seed, 9))
    held_out = torch.zeros(len(dataset), dtype=torch.bool)
    held_out[order[: int(by_patient(dataset).sum())]] = True
    return held_out


def train(
    dataset: BrainSegmentationDataset, allowed: Tensor, args: argparse.Namespace, seed: int
) -> torch.nn.Module:
    """Train on the slices that are `allowed`; return the network of the last epoch."""
    options = ["--image-size", args.image_size, "--features", args.features, "--seed", seed]
    training = set_up([*options, "--epochs", args.epochs], dataset)
    weights = dataset.sampling_weights(0.1) * allowed
    for training.state.epoch in range(args.epochs):
        training.epoch(weights)
    return training.state.trained


def slices_held_out(dataset: BrainSegmentationDataset, held_out: Tensor) -> list[tuple]:
    """List the held-out slices, each as its volume and its index there."""
    slices = [(volume, s) for volume in dataset.volumes for s in range(len(volume.mask))]
    return [place for place, held in zip(slices, held_out.tolist(), strict=True) if held]


def scores(
    network: torch.nn.Module, dataset: BrainSegmentationDataset, held_out: Tensor, size: int
) -> tuple[list[float], list[float], float]:
    """Score the held-out slices: DSC of each patient, of each slice, and of all together."""
    segmenter = Segmenter(network, size, largest_component=False)
    patients, slices, overlap, total = [], [], 0, 0
    for volume, held in zip(
        dataset.volumes, held_out.split([len(v.mask) for v in dataset.volumes]), strict=True
    ):
        if not held.any():
            continue
        found = segmenter.probabilities(torch.from_numpy(volume.images))
        mask = segmenter.finish(found, volume.frame)[held.numpy()]
        truth = volume.truth[held.numpy()]
        patients.append(dsc(mask, truth))
        slices += [dsc(a, b) for a, b in zip(mask, truth, strict=True)]
        overlap, total = overlap + (mask & truth).sum(), total + mask.sum() + truth.sum()
    return patients, slices, float(2 * overlap / total)


if __name__ == "__main__":
    with errors_in_one_sentence("stopped"):
        main()
