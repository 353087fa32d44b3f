"""Score the same cases as other scanners and pipelines would have written them.

    python3 -m benchmarks.robustness --images ./kaggle_3m
    python3 -m benchmarks.robustness --images ./kaggle_3m --weights weights/unet.pt --subset test

Prints, for each change of the input, the mean DSC per patient volume and its difference from the
untouched files, case by case, with a 95 % interval by bootstrap over patients. The skull is taken
away crudely: what lies within 14 pixels of the edge of the head.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from brainseg.io.layouts import list_cases
from brainseg.metrics import dsc, summarise
from brainseg.segmenter import Segmenter
from brainseg.splits import select_cases
from brainseg.weights import shipped_weights

PRE, FLAIR, POST = range(3)


def scaled(volume: np.ndarray, sequence: int, factor: float, offset: float = 0) -> np.ndarray:
    changed = volume.astype(np.float32)
    changed[..., sequence] = factor * changed[..., sequence] + offset
    return changed


def with_hot_voxel(volume: np.ndarray) -> np.ndarray:
    changed = volume.astype(np.float32)
    changed[0, 0, 0, FLAIR] = 4 * float(volume.max())
    return changed


def flair_alone(volume: np.ndarray) -> np.ndarray:
    return np.repeat(volume[..., FLAIR : FLAIR + 1], 3, axis=-1)


def without_skull(volume: np.ndarray) -> np.ndarray:
    bright = volume.max(axis=-1) > 0.1 * np.percentile(volume, 99.9)
    square = np.ones((1, 3, 3), bool)
    head = ndimage.binary_opening(bright, square, iterations=2)
    head = np.stack([ndimage.binary_fill_holes(each) for each in head])
    brain = ndimage.binary_erosion(head, square, iterations=14)
    return np.where(brain[..., None], volume, 0)


CHANGES = {
    "as published": lambda volume: volume,
    "post-contrast at 3 times its scale": lambda volume: scaled(volume, POST, 3),
    "post-contrast at 4 times its scale": lambda volume: scaled(volume, POST, 4),
    "post-contrast at 4 times its scale, int16": lambda v: scaled(v, POST, 4).astype(np.int16),
    "FLAIR at a tenth of its scale": lambda volume: scaled(volume, FLAIR, 0.1),
    "pre-contrast with an offset of -500": lambda volume: scaled(volume, PRE, 1, -500),
    "one hot voxel, 4 times the maximum": with_hot_voxel,
    "FLAIR alone": flair_alone,
    "skull taken away": without_skull,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="cases with masks")
    parser.add_argument("--subset", default="validation", help="(%(default)s)")
    parser.add_argument("--weights", type=Path, default=shipped_weights("unet"))
    parser.add_argument("--device", help="(an accelerator if there is one)")
    args = parser.parse_args()

    segmenter = Segmenter.from_weights(args.weights, device=args.device)
    paths = select_cases(list_cases(args.images), args.subset)
    scores = {name: [] for name in CHANGES}
    for path in tqdm(paths, unit="case", disable=None):
        volume, truth = path.open().read_pair()
        for name, change in CHANGES.items():
            scores[name].append(dsc(segmenter(change(volume)), truth))

    untouched = scores["as published"]
    print(f"{args.weights.name}, {args.subset}, n = {len(paths)}\n")
    print("| input | mean DSC | difference, case by case |\n|---|---|---|")
    for name, values in scores.items():
        gains = [after - before for after, before in zip(values, untouched, strict=True)]
        change = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**summarise(gains))
        print(f"| {name} | {np.mean(values):.3f} | {change} |")


if __name__ == "__main__":
    main()
