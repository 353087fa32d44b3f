"""Fit the expected DSC of a network that has seen every patient.

Nobody is left to score it on, so the fit is that of the networks of the folds, each on the patients
it has not seen, moved to students of some folds (`brainseg.quality.recentre`): networks made in the
same way, scored on the patients of a fold that they have not seen.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from brainseg.io.files import write_json
from brainseg.quality import recentre
from brainseg.weights import read_card

from .trainings import call, script

STUDENT_MASKS = ["--no-tta", "--min-volume", "200"]  # how a student's are made


def fit_student(
    images: Path, folds: Path, students: Sequence[Path], folder: Path, weights: Path
) -> None:
    """Fit with the networks in `folds`, move it to `students`, save it in the cards in `weights`.

    Scores are written to `folder`.
    """
    with tempfile.TemporaryDirectory() as name:  # the fit is written into the cards of the copies
        copies = Path(shutil.copytree(folds, Path(name) / "folds"))
        evaluate(images, copies, folder / "folds-scores", "--fit-expected-dsc")
        fit = read_card(next(copies.glob("*.pt")))["expected_dsc"]
    rows = []
    for student in students:
        scores = folder / f"{student.parent.parent.name}-scores"
        evaluate(images, student, scores)
        with open(scores / "scores.csv", newline="") as file:
            rows += csv.DictReader(file)
    features = [features_of(row, fit) for row in rows]
    dsc = [float(row["dsc"]) for row in rows]
    moved = recentre(fit, features, dsc, [row["patient"] for row in rows])
    for name in ("predicted", "dsc"):  # they are in the tables
        moved["leave_one_out"].pop(name)
    for path in weights.glob("*.pt"):
        write_json(path.with_suffix(".json"), read_card(path) | {"expected_dsc": moved})


def evaluate(images: Path, weights: Path, out: Path, *options: str) -> None:
    """Score weights on the patients that they have not seen."""
    words = ["--images", images, "--subset", "train", "validation", "--weights", weights]
    call(script("evaluate.py", *words, *STUDENT_MASKS, "--out", out, *options))


def features_of(row: dict[str, str], fit: dict) -> dict[str, float]:
    """Read what a fit needs from a row of scores.csv."""
    features = {"voxels": float(row["predicted_voxels"])}
    for name in [*fit["features"], *fit["looks"]["names"]]:
        features[name] = float(row[name])
    return features
