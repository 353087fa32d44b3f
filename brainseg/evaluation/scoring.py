"""Open the models to compare, weights or tables of scores, and score them case by case."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..devices import in_order
from ..ensemble import Ensemble, networks_of
from ..io.files import RUN
from ..io.layouts import Source
from ..io.pictures import outline, to_grey
from ..io.slices import Case
from ..metrics import dsc, score
from ..preprocess import missing_sequences
from ..quality import FEATURES, FITTED_WITH
from ..reports.scores import read_scores
from ..reports.volumes import EXPECTED
from ..segmenter import Segmentation, Segmenter, preprocess_near, to_mask
from ..splits import patient_of, patients_of_card, site_of, subset_of
from ..weights import read_card, weights_files
from .statistics import SCORES, SETTINGS


@dataclass
class Model:
    """A model to compare: a network, an ensemble of folds, or the scores of a metrics.csv."""

    name: str
    path: Path
    scores: dict[str, dict] = field(default_factory=dict)  # of a metrics.csv, by case
    segmenter: Segmenter | None = None
    seen: dict[Path, set[str]] = field(default_factory=dict)  # by file: patients trained on
    chose: dict[Path, set[str]] = field(default_factory=dict)  # patients its epoch was chosen on

    def unseen(self, case: Case | Source) -> list[Path]:
        """List the files of the networks that were not trained on the patient of a case."""
        return [file for file, patients in self.seen.items() if patient_of(case) not in patients]

    def was_trained_on(self, case: Case | Source) -> bool:
        if self.scores:
            return case.name in self.scores and self.scores[case.name]["trained_on"]
        return not self.unseen(case)

    def segmenter_for(self, case: Case | Source) -> Segmenter:
        """Return a segmenter with only the networks that have not seen the patient of a case."""
        files = self.unseen(case)
        if len(files) == len(self.seen):
            return self.segmenter
        part, networks = copy.copy(self.segmenter), networks_of(self.segmenter.model)
        pairs = zip(self.seen, networks, strict=True)
        part.model = Ensemble([network for file, network in pairs if file in files]).eval()
        part.hashes = {file: self.segmenter.hashes[file] for file in files}
        return part


def open_models(texts: list[str], options: dict) -> list[Model]:
    """Open each [NAME=]PATH; raise ValueError or FileNotFoundError if one cannot be used."""
    named = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        path = Path(text)
        if equals and not path.exists():
            path = Path(rest)
        else:
            name = str(path.with_suffix("") if path.is_file() else path)
        if not path.exists():
            raise FileNotFoundError(f"{text}: no such file; give a path, or NAME=PATH")
        if not name or name in named:
            raise ValueError(f"{text}: needs a name that no other model has; give NAME=PATH")
        named[name] = path
    if options.get("providers") and all(path.suffix != ".onnx" for path in named.values()):
        raise ValueError("--providers is for .onnx files, and none is given; omit it")
    return [open_model(name, path, options) for name, path in named.items()]


def open_model(name: str, path: Path, options: dict) -> Model:
    """Open weights, an ONNX file, a folder of folds or a table of scores."""
    if path.suffix == ".csv":
        needed = [column for column in SCORES if not column.endswith("_mm")]
        return Model(name, path, scores=read_scores(path, [*needed, "slices", "lesion_voxels"]))
    files = weights_files(path)
    if files[0].suffix != ".onnx":
        options = options | {"providers": None}
    model = Model(name, path)
    for file in files:
        card = read_card(file)
        if "train" not in card.get("cases", {}):
            fault = f"{file}: no card says what it was trained on"
            if len(files) > 1:
                raise ValueError(f"{fault}; it cannot be used as a fold")
            print(f"{fault}; no case is left out", file=sys.stderr)
        chose = ["validation"] if card.get("recipe", {}).get("keep") == "best" else []
        model.seen[file] = patients_of_card(card, "train")
        model.chose[file] = patients_of_card(card, *chose)
    model.segmenter = Segmenter.from_weights(files, **options)
    return model


def settings_of(model: Model) -> dict | str:
    """Describe a model as summary.json does, to reproduce its scores."""
    if model.scores:
        return str(model.path)
    segmenter = model.segmenter
    names = ("image_size", "runtime", *FITTED_WITH)
    same = {name: getattr(segmenter, name) for name in names}
    same["half_precision"] = segmenter.amp
    return {str(file): {"sha256": digest, **same} for file, digest in segmenter.hashes.items()}


def check_can_fit(models: Sequence[Model]) -> None:
    """Raise ValueError unless there is one model, with weights whose cards can hold a fit."""
    if len(models) > 1:
        raise ValueError("--fit-expected-dsc is for one model; give --weights a single one")
    (model,) = models
    if model.scores or any(file.suffix != ".pt" for file in model.seen):
        raise ValueError(
            f"{model.path}: --fit-expected-dsc needs .pt weights; fit those, then export them"
        )
    for file, patients in model.seen.items():
        if not patients:
            raise ValueError(
                f"{file}: no card says what it was trained on, and the expected DSC can "
                "only be learnt from other cases; put the card that train.py wrote next to it"
            )
        size, trained = model.segmenter.image_size, read_card(file).get("image_size")
        if size != trained:
            raise ValueError(
                f"{file}: was trained on slices of {trained} x {trained}, for which the fit must "
                "be made; leave out --image-size"
            )


def choose_cases(
    sources: Sequence[Source], subsets: Sequence[str], models: Sequence[Model], images: Path
) -> tuple[list[Case], list[str]]:
    """Choose the cases that no model has seen; return them and the names of the others.

    Raises ValueError, naming the case, if one cannot be scored or nothing is left.
    """
    chosen = [s for s in sources if {"all", subset_of(s)} & set(subsets)]
    if not chosen:
        raise ValueError(
            f"{images}: none of its {len(sources)} cases is in {' or '.join(subsets)}; "
            "choose another --subset, such as all"
        )
    seen = {s.name for s in chosen if any(model.was_trained_on(s) for model in models)}
    cases = [source.open() for source in chosen if source.name not in seen]
    if not cases:
        raise ValueError(
            f"{images}: the models were trained on all {len(chosen)} cases; "
            "choose another --subset, or give a folder of folds"
        )
    for case in cases:
        if not case.masks:
            raise ValueError(
                f"{case.folder}: has no mask to score against; choose other cases with --cases"
            )
        for model in models:
            if model.scores and case.name not in model.scores:
                raise ValueError(
                    f"{model.path}: has no score of {case.name}; a comparison needs the same "
                    "cases, so choose them with --subset or --cases, or run inference.py on them"
                )
    return cases, sorted(seen)


def score_all(
    cases: Sequence[Case], models: Sequence[Model], workers: int | None = None
) -> tuple[dict[str, list[dict]], dict[tuple[str, str], np.ndarray], str]:
    """Score cases; return rows by model, pictures by (model, case), and the SHA-256 of the data.

    Threads read the next cases and score the previous ones while the networks run.
    """
    opened = {model.name: model.segmenter for model in models if model.segmenter}
    ways = {name: (s.image_size, s.version, s.device) for name, s in opened.items()}

    def load(case: Case) -> tuple:
        volume, truth = case.read_pair()
        try:
            for segmenter in opened.values():
                segmenter.check_channels(volume.shape[-1])
            prepared = {way: preprocess_near(volume, *way, case.aspect) for way in {*ways.values()}}
        except ValueError as error:
            raise ValueError(f"{case.folder}: {error}") from error
        return case, volume, truth, prepared

    def segmented() -> Iterator[tuple]:
        for case, volume, truth, prepared in in_order(load, cases, workers):
            found = {}
            for model in (model for model in models if model.name in opened):
                segmenter = model.segmenter_for(case)
                images, frame = prepared[ways[model.name]]
                found[model.name] = segmenter.assess(segmenter.probabilities(images), frame)
            yield case, volume, truth, found

    def scored(item: tuple) -> tuple[bytes, list[dict], dict]:
        _, volume, truth, _ = item
        volume = hashlib.sha256(np.ascontiguousarray(volume)).digest()
        return volume + hashlib.sha256(truth).digest(), *score_case(*item, models)

    table, pictures, digest = {model.name: [] for model in models}, {}, hashlib.sha256()
    results = in_order(scored, segmented(), workers)
    for read, rows, drawn in tqdm(results, "scoring", len(cases), unit="case", disable=None):
        digest.update(read)
        pictures |= drawn
        for row in rows:
            table[row["model"]].append(row)
    return table, pictures, digest.hexdigest()


def score_case(
    case: Case,
    volume: np.ndarray,
    truth: np.ndarray,
    found: dict[str, Segmentation],
    models: Sequence[Model],
) -> tuple[list[dict], dict]:
    """Make one row per model, and by (model, case) a picture of the slice with most lesion.

    `found` holds the segmentation by each model that is not a table of scores.
    """
    missing = " and ".join(missing_sequences(volume)) or "none"
    about = {
        "case": case.name,
        "patient": patient_of(case),
        "subset": subset_of(case),
        "site": site_of(patient_of(case)),
        "missing": missing if volume.shape[-1] == 3 else "unknown",
        "slices": len(truth),
        "lesion_voxels": int(truth.sum()),
    }
    rows, pictures, grey = [], {}, to_grey(volume)
    for model in models:
        row = {"model": model.name, **about}
        if model.scores:
            rows.append(row | scores_of(model, case, row))
            continue
        made, files = found[model.name], model.unseen(case)
        mask, probabilities = made.mask, torch.from_numpy(made.probabilities)
        row |= {
            "weights": str(files[0]) if len(files) == 1 else f"{len(files)} in {model.path}",
            "chose_epoch": int(any(about["patient"] in model.chose[file] for file in files)),
            "predicted_voxels": int(mask.sum()),
            RUN: model.segmenter_for(case).run,
        }
        row |= score(mask, truth, case.spacing)
        least = model.segmenter.min_volume
        row |= {key: dsc(to_mask(probabilities, *s, least), truth) for key, s in SETTINGS.items()}
        row |= {name: made.features[name] for name in FEATURES}
        rows.append(row | dict(zip(EXPECTED, made.expected or [None] * 3, strict=True)))
        k = int((truth if truth.any() else mask).sum(axis=(1, 2)).argmax())
        slices = (array[k : k + 1] for array in (grey, mask, truth))
        pictures[model.name, case.name] = outline(*slices, side=256)[0]
    return rows, pictures


def scores_of(model: Model, case: Case, row: dict) -> dict:
    """Look up a case in a metrics.csv; raise ValueError if its scores are from other data."""
    written = model.scores[case.name]
    for name in ("slices", "lesion_voxels"):
        if written[name] != row[name]:
            raise ValueError(
                f"{model.path}: {case.name} has {name} {written[name]:.0f} there, but {row[name]} "
                f"in {case.folder}; run inference.py on the same data"
            )
    names = [name for name in (*SCORES, RUN) if name in written]
    return {name: written[name] for name in names}
