"""Score the same cases as if other scanners and pipelines had written them.

    python3 -m benchmarks.robustness --images ./kaggle_3m
    python3 -m benchmarks.robustness --images ./kaggle_3m --weights weights/unet.pt --subset test
    python3 -m benchmarks.robustness --images ./kaggle_3m --subset train validation \\
        --only "FLAIR alone" "skull taken away"

Prints, for each change of the input, mean and median DSC per patient volume and the difference from
the untouched files, case by case, with a 95 % interval by bootstrap over patients; then how many of
the expected DSCs hold the true one in their interval, and warn of a poor mask. With an ensemble
of folds, each case is segmented only by the networks that have not seen its patient. The skull is
removed crudely, with everything within 14 pixels of the edge of the head.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from brainseg.evaluation.scoring import NetworkModel, open_networks
from brainseg.io.layouts import Source, list_cases
from brainseg.metrics import dsc, mean_text, summarise
from brainseg.quality import POOR, WARN_BELOW
from brainseg.segmenter import Segmentation
from brainseg.splits import select_cases
from brainseg.weights import shipped_weights
from cli import errors_in_one_sentence

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
    within_slices = ndimage.generate_binary_structure(2, 1)[None]
    head = ndimage.binary_fill_holes(head, within_slices)
    brain = ndimage.binary_erosion(head, square, iterations=14)
    return np.where(brain[..., None], volume, 0)


def stripped_and_normalised(volume: np.ndarray) -> np.ndarray:
    """Subtract the mean of the brain from each sequence, divide by its deviation; keep air at 0."""
    stripped = without_skull(volume).astype(np.float32)
    brain = stripped.any(axis=-1)
    stripped[brain] -= stripped[brain].mean(axis=0)
    stripped[brain] /= stripped[brain].std(axis=0)
    return stripped


def on_scale(volume: np.ndarray) -> np.ndarray:
    """Return the volume on a scanner's scale, with its air at 50 or a little more."""
    return 5 * volume.astype(np.float32) + 50


def blank_slices(volume: np.ndarray, slices: list[int], value: float) -> np.ndarray:
    changed = on_scale(volume)
    changed[slices] = value
    return changed


def corners(volume: np.ndarray, value: float, factor: float = 5, offset: float = 50) -> np.ndarray:
    """Fill what a square field of view, turned by 30 degrees, leaves of every slice."""
    changed = factor * volume.astype(np.float32) + offset
    rows, columns = np.mgrid[-1 : 1 : volume.shape[1] * 1j, -1 : 1 : volume.shape[2] * 1j]
    along = rows * np.cos(np.pi / 6) + columns * np.sin(np.pi / 6)
    across = columns * np.cos(np.pi / 6) - rows * np.sin(np.pi / 6)
    changed[:, (np.abs(along) > 1) | (np.abs(across) > 1)] = value
    return changed


def offset_where_above_0(volume: np.ndarray, sequences: list[int]) -> np.ndarray:
    changed = volume.astype(np.float32)
    for k in sequences:
        changed[..., k] = np.where(volume[..., k] > 0, 3.7 * changed[..., k] + 50, 0)
    return changed


def cases_of(images: Path, subsets: Sequence[str]) -> list[Source]:
    """List the cases of several subsets, one subset after the other."""
    chosen = []
    for subset in subsets:
        chosen += select_cases(list_cases(images), subset)
    return chosen


def segment_unseen(model: NetworkModel, source: Source, volume: np.ndarray) -> Segmentation:
    """Segment a raw volume (S, H, W, C) made from a case by networks that have not seen it."""
    if not model.unseen(source):
        raise SystemExit(f"error: {model.path}: trained on {source.name}; choose another --subset")
    segmenter = model.segmenter_for(source)
    images, frame = segmenter.preprocess(volume)
    return segmenter.segmentation_of(segmenter.probabilities(images), frame)


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
    "skull taken away, normalised, air at 0": stripped_and_normalised,
    "one blank end slice, -1000": lambda volume: blank_slices(volume, [0], -1000),
    "one blank end slice, 0, air at 50": lambda volume: blank_slices(volume, [0], 0),
    "two blank end slices, -1000": lambda volume: blank_slices(volume, [0, -1], -1000),
    "second and third slice blank, -1000": lambda volume: blank_slices(volume, [1, 2], -1000),
    "corners at -1000": lambda volume: corners(volume, -1000),
    "corners at 0, air at 50": lambda volume: corners(volume, 0),
    "corners at 32767": lambda volume: corners(volume, 32767),
    "corners at -1, the rest 0 to 1": lambda volume: corners(volume, -1, 1 / 255, 0),
    "FLAIR times 3.7 plus 50 where above 0": lambda v: offset_where_above_0(v, [FLAIR]),
    "the same, every sequence": lambda v: offset_where_above_0(v, [PRE, FLAIR, POST]),
}
UNTOUCHED = "as published"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="cases with masks")
    parser.add_argument("--subset", nargs="+", default=["validation"], help="(validation)")
    parser.add_argument("--weights", type=Path, default=shipped_weights("unet-folds"))
    parser.add_argument("--device", help="cuda, cpu ... (an accelerator if available)")
    parser.add_argument("--only", nargs="+", choices=CHANGES, help="only these changes (all)")
    args = parser.parse_args()

    model = open_networks(args.weights.name, args.weights, {"device": args.device})
    sources = cases_of(args.images, args.subset)
    names = [name for name in CHANGES if not args.only or name in (UNTOUCHED, *args.only)]
    scores = {name: [] for name in names}
    expected = {name: [] for name in names}
    for source in tqdm(sources, unit="case", disable=None):
        volume, truth = source.open().read_pair()
        for name in names:
            result = segment_unseen(model, source, CHANGES[name](volume))
            scores[name].append(dsc(result.mask, truth))
            expected[name].append(result.expected)

    untouched = scores[UNTOUCHED]
    print(f"{args.weights.name}, {' '.join(args.subset)}, n = {len(sources)}\n")
    print("| input | mean DSC | median | difference, case by case | in the 80 % interval |"
          " under 0.70, warned of | false alarms |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name, values in scores.items():
        gains = [after - before for after, before in zip(values, untouched, strict=True)]
        change = mean_text(summarise(gains), "+")
        forecast = rate_forecast(values, expected[name])
        print(
            f"| {name} | {np.mean(values):.3f} | {np.median(values):.3f} | {change} | {forecast} |"
        )


def rate_forecast(scores: list[float], expected: list[tuple | None]) -> str:
    """Say in cells how well the expected DSCs, of masks that have one, agree with the true ones."""
    inside, poor, warned, false_alarms, n = 0, 0, 0, 0, 0
    for true, forecast in zip(scores, expected, strict=True):
        if forecast is None:
            continue
        value, low, high = forecast
        n += 1
        inside += low <= true <= high
        poor += true < POOR
        warned += value < WARN_BELOW and true < POOR
        false_alarms += value < WARN_BELOW and true >= POOR
    share = ""
    if n:
        share = f"{inside / n:.2f} of {n}"
    return f"{share} | {warned} of {poor} | {false_alarms}"


if __name__ == "__main__":
    with errors_in_one_sentence("stopped"):
        main()
