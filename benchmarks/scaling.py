"""Time more cases and more pixels, for rows of speed.py."""

from __future__ import annotations

import argparse
import os
import tempfile

import numpy as np
import torch

from brainseg.cache import prepare
from brainseg.preprocess import preprocess
from brainseg.segmenter import Segmenter
from brainseg.weights import load_pretrained
from dataset import BatchLoader, BrainSegmentationDataset

from .ours import set_up
from .timing import BATCH, one_thread, resident, row, seconds

FEW = 4  # slices per step; more of 512 x 512 may not fit in memory


def scale_cases(cases: list, args: argparse.Namespace) -> None:
    """Time starting, drawing and segmenting a hundredth, a tenth and all of the cases."""
    segmenter = Segmenter(load_pretrained("unet"), args.image_size, device=args.device)
    for percent in (1, 10, 100):
        chosen = cases[: max(len(cases) * percent // 100, 1)]
        with tempfile.TemporaryDirectory() as cache:
            start = seconds(lambda c=chosen: prepare(c, args.image_size, cache), warm=False)
            again = seconds(lambda c=chosen: prepare(c, args.image_size, cache), warm=False)
            dataset = BrainSegmentationDataset.of(prepare(chosen, args.image_size, cache))
            loader, weights = BatchLoader(dataset, args.device), dataset.sampling_weights(0.5)
            drawn = torch.multinomial(weights, 20 * BATCH, replacement=True).split(BATCH)
            batch = seconds(lambda f=loader, d=drawn: list(f.batches(d))) / 20

            def segment(dataset: BrainSegmentationDataset = dataset) -> None:
                for volume in dataset.volumes:
                    found = segmenter.probabilities(torch.from_numpy(volume.images))
                    segmenter.finish(found, volume.frame)

            masks = seconds(segment, warm=False)
        name = f"{len(chosen)} cases, {len(dataset)} slices"
        row(f"{name}: cold start", start, None, "s")
        row(f"{name}: warm start", again, None, "s")
        row(f"{name}: a training batch of {BATCH} drawn", batch, None, "s")
        row(f"{name}: segmented, from preprocessed slices to masks", masks, None, "s")
        row(f"{name}: memory of the process", resident(os.getpid()) / 2**30, None, "GiB")


def scale_pixels(cases: list, args: argparse.Namespace) -> None:
    """Time preprocessing, training and segmenting of slices of 128, 256 and 512 pixels."""
    model = load_pretrained("unet")
    volume, _ = cases[0].read_pair()
    for size in (128, 256, 512):
        with tempfile.TemporaryDirectory() as cache:
            dataset = BrainSegmentationDataset.of(prepare(cases[:1], size, cache))
            images, masks = dataset.batch(np.arange(FEW) % len(dataset))
            options = ["--recipe", "classic", "--device", args.device, "--image-size", size]
            training = set_up(options, dataset)
            segmenter = Segmenter(model, size, device=args.device)
            work = {
                "preprocessed, one core": one_thread(lambda n=size: preprocess(volume, n, 1)),
                "trained on": lambda t=training, i=images, m=masks: t.step(i, m, len(i)),
                "segmented": lambda s=segmenter, i=images: s.probabilities(i),
            }
            for (what, once), slices in zip(work.items(), (len(volume), FEW, FEW), strict=True):
                row(f"{size} x {size}: {what}", seconds(once, 3) / slices, None, "s a slice")
        kept = (images.nbytes + masks.nbytes) / FEW / 2**20
        row(f"{size} x {size}: kept", kept, None, "MiB a slice")
