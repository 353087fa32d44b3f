"""Compare a student with its teachers on the patients that none of them has seen.

    python3 -m benchmarks.student --images ./kaggle_3m --teachers campaign/nested/fold0/weights \\
        --student campaign/nested/fold0/student/unet.pt --healthy ./healthy

The teachers are averaged and mirrored, the student is used as it is; both drop components of fewer
than 200 voxels. Each case is segmented as published, from FLAIR alone and without its skull (as in
benchmarks.robustness). That takes some of the lesion away too: so this mask is also compared with
what is left of the lesion, beside the mask of the whole head, cut alike. The table has the mean DSC
of both and the difference, case by case. Then heads without a lesion: the same cases mirrored
(weights/negatives.py), a voxel counting as 0.005 millilitres, and scans of people without a tumour,
if a folder of them is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from brainseg.evaluation.scoring import NetworkModel, open_networks
from brainseg.io.layouts import list_cases
from brainseg.io.slices import Case
from brainseg.metrics import dsc, mean_text, summarise
from brainseg.patients import patient_of
from brainseg.segmenter import Segmenter
from brainseg.splits import outside_test
from cli import errors_in_one_sentence
from weights.negatives import without_lesion

from .robustness import flair_alone, without_skull

CHANGES = {
    "as published": lambda volume: volume,
    "FLAIR alone": flair_alone,
    "skull taken away": without_skull,
}
LEFT = "the same, against what is left of the lesion"
CUT = "as published, both cut to what is left of the head"
LEAST = 200  # voxels of a component
VOXEL_ML = 0.005  # 1 x 1 x 5 mm: published slices have no spacing


def unseen_cases(images: Path, models: Sequence[NetworkModel]) -> list[Case]:
    """Open the cases that no network has seen; test cases stay closed."""
    chosen = []
    for source in outside_test(list_cases(images)):
        if all(len(model.unseen(source)) == len(model.trained_on) for model in models):
            chosen.append(source.open())
    if not chosen:
        raise ValueError(f"{images}: every case was seen by a network; name other weights")
    return chosen


def segment(
    segmenter: Segmenter,
    volume: np.ndarray,
    aspect: float = 1.0,
    spacing: Sequence[float] | None = None,
) -> np.ndarray:
    images, frame = segmenter.preprocess(volume, aspect)
    return segmenter.mask_of(segmenter.probabilities(images), frame, spacing)


def scores_of(segmenter: Segmenter, volume: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the DSC of a case for each of CHANGES, and against what is left without the skull."""
    scores, masks = {}, {}
    for name, change in CHANGES.items():
        masks[name] = segment(segmenter, change(volume))
        scores[name] = dsc(masks[name], truth)
    left = without_skull(volume).any(axis=-1)
    scores[LEFT] = dsc(masks["skull taken away"], truth & left)
    scores[CUT] = dsc(masks["as published"] & left, truth & left)
    return scores


def heads_text(title: str, marked: Sequence[Sequence[float]]) -> str:
    """Give a row of the table of heads without a lesion; `marked` holds ml by model and head."""
    cells = []
    for ml in marked:
        if not ml:
            return f"| {title}: none | | | |"
        empty = sum(value == 0 for value in ml)
        cells.append(f"{empty} of {len(ml)} empty, {np.mean(ml):.2f} ml (most {max(ml):.1f})")
    return f"| {title} | {' | '.join(cells)} | |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="cases with masks")
    add("--teachers", type=Path, required=True, help="folder of the networks that are averaged")
    add("--student", type=Path, required=True, help="weights file")
    add("--healthy", type=Path, help="folder of scans of people without a tumour")
    add("--hold-back", nargs="+", default=[""], metavar="NAME",
        help="only those of --healthy whose names begin so")  # fmt: skip
    args = parser.parse_args()

    options = {"min_volume": LEAST, "threshold": 0.5}
    models = [
        open_networks("teachers", args.teachers, options | {"tta": True}),
        open_networks("student", args.student, options | {"tta": False}),
    ]
    segmenters = [model.segmenter for model in models]
    cases = unseen_cases(args.images, models)
    healthy_scans = []
    for source in list_cases(args.healthy) if args.healthy else []:
        if source.name.startswith(tuple(args.hold_back)):
            healthy_scans.append(source.open())
    patients = [patient_of(case) for case in cases]
    scores = {name: ([], []) for name in (*CHANGES, LEFT, CUT)}
    mirrored = [], []
    for case in tqdm(cases, unit="case", disable=None):
        volume, truth = case.read_pair()
        healthy = without_lesion(volume, truth)
        for k, segmenter in enumerate(segmenters):
            for name, score in scores_of(segmenter, volume, truth).items():
                scores[name][k].append(score)
            if healthy is not None:
                mirrored[k].append(float(segment(segmenter, healthy).sum()) * VOXEL_ML)
    print(f"{len(cases)} patients\n\n| input | teachers | student | difference, case by case |")
    print("|---|---|---|---|")
    for name, (teachers, student) in scores.items():
        gains = [after - before for before, after in zip(teachers, student, strict=True)]
        change = mean_text(summarise(gains, patients), "+")
        print(f"| {name} | {np.mean(teachers):.3f} | {np.mean(student):.3f} | {change} |")
    print(heads_text("mirrored heads", mirrored))
    marked = [], []
    for case in healthy_scans:
        volume = case.read()
        for k, segmenter in enumerate(segmenters):
            voxels = segment(segmenter, volume, case.aspect, case.spacing).sum()
            marked[k].append(float(voxels * np.prod(case.spacing or (5, 1, 1)) / 1000))
    print(heads_text("people without a tumour", marked))


if __name__ == "__main__":
    with errors_in_one_sentence("stopped"):
        main()
