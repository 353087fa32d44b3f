"""Measure false positives in heads without a lesion, and the cost of stricter masks elsewhere.

    python3 -m benchmarks.lesion_free --images ./kaggle_3m

All real cases have a lesion. Heads without one are made from them: in each slice, the half with the
lesion is replaced by the mirror image of the other half. Slices with a lesion in both halves are
left out, as are heads with fewer than 8 slices left. Each case and its head without lesion is
segmented by the networks of the ensemble that have not seen the patient. The table shows, for each
setting of the mask, the DSC, the share of heads without lesion that stay empty, and the volume
marked in them. Published slices have no spacing; a voxel counts as --voxel-ml millilitres.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from brainseg.evaluation.scoring import open_networks
from brainseg.metrics import dsc, mean_text, summarise
from brainseg.segmenter import to_mask
from brainseg.weights import shipped_weights
from cli import errors_in_one_sentence
from weights.negatives import without_lesion

from .unseen import cases_of, segment_unseen

SETTINGS = [(t, n) for t in (0.5, 0.7) for n in (0, 100, 200, 400, 800)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="cases with masks")
    parser.add_argument("--subset", nargs="+", default=["train", "validation"])
    parser.add_argument("--weights", type=Path, default=shipped_weights("unet"))
    parser.add_argument(
        "--voxel-ml",
        type=float,
        default=0.005,
        help="millilitres per voxel (%(default)s, 1 x 1 x 5 mm)",
    )
    parser.add_argument("--device", help="cuda, cpu ... (an accelerator if available)")
    args = parser.parse_args()

    model = open_networks(args.weights.name, args.weights, {"device": args.device})
    sources = cases_of(args.images, args.subset)
    scores, marked = ({setting: [] for setting in SETTINGS} for _ in range(2))
    for source in tqdm(sources, unit="case", disable=None):
        volume, truth = source.open().read_pair()
        probabilities = torch.from_numpy(segment_unseen(model, source, volume).probabilities)
        healthy = without_lesion(volume, truth)
        if healthy is not None:
            wrong = torch.from_numpy(segment_unseen(model, source, healthy).probabilities)
        for threshold, least in SETTINGS:
            mask = to_mask(probabilities, threshold, True, least)
            scores[threshold, least].append(dsc(mask, truth))
            if healthy is not None:
                marked[threshold, least].append(to_mask(wrong, threshold, True, least).sum())

    heads = len(marked[SETTINGS[0]])
    print(f"{args.weights.name}: {len(sources)} cases, {heads} heads without lesion\n")
    print("| threshold | least voxels | mean DSC | change | heads left empty | at most 0.5 ml |"
          " ml marked: median, mean |\n|---|---|---|---|---|---|---|")  # fmt: skip
    first = scores[SETTINGS[0]]
    for setting, values in scores.items():
        change = summarise([b - a for a, b in zip(first, values, strict=True)])
        ml = np.array(marked[setting]) * args.voxel_ml
        print(
            f"| {setting[0]} | {setting[1]} | {np.mean(values):.3f} | {mean_text(change, '+')} | "
            f"{(ml == 0).mean():.0%} | {(ml <= 0.5).mean():.0%} | "
            f"{np.median(ml):.2f}, {ml.mean():.2f} |"
        )


if __name__ == "__main__":
    with errors_in_one_sentence("stopped"):
        main()
