"""Open the models to compare, networks or tables of scores, and score them case by case."""

import copy
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..appearance import LOOKS
from ..devices import in_order
from ..ensemble import Ensemble, networks_of, weights_files
from ..io.files import RUN
from ..io.layouts import Source
from ..io.pictures import outline, to_grey
from ..io.slices import Case
from ..metrics import dsc, score
from ..onnx import card_of
from ..patients import patient_of, patients_of_card, site_of
from ..preprocess import Frame, missing_sequences
from ..quality import FEATURES, FITTED_WITH
from ..reports.scores import read_scores
from ..reports.volumes import EXPECTED
from ..segmenter import Segmentation, Segmenter, least_voxels, to_mask
from ..splits import subset_of
from ..weights import read_card
from .statistics import SCORES, SETTINGS


@dataclass
class NetworkModel:
    """A model to compare: a network, or the networks of an ensemble or a cross-validation."""

    name: str
    path: Path
    segmenter: Segmenter  # with all networks
    trained_on: dict[Path, set[str]]  # patients, by weights file
    chose_epoch_on: dict[Path, set[str]]  # patients, by weights file

    def unseen(self, case: Case | Source) -> list[Path]:
        """List the files of the networks that were not trained on the patient of a case."""
        patient = patient_of(case)
        return [file for file, patients in self.trained_on.items() if patient not in patients]

    def was_trained_on(self, case: Case | Source) -> bool:
        return not self.unseen(case)

    def segmenter_for(self, case: Case | Source) -> Segmenter:
        """Return a segmenter with only the networks that have not seen the patient of a case."""
        files = self.unseen(case)
        if len(files) == len(self.trained_on):
            return self.segmenter
        assert isinstance(self.segmenter.model, nn.Module)  # an ONNX file is one network
        networks = dict(zip(self.trained_on, networks_of(self.segmenter.model), strict=True))
        segmenter = copy.copy(self.segmenter)
        segmenter.model = Ensemble([networks[file] for file in files]).eval()
        segmenter.hashes = {file: self.segmenter.hashes[file] for file in files}
        return segmenter

    def settings(self) -> dict:
        """Describe the model as summary.json does, to reproduce its scores."""
        settings = {"half_precision": self.segmenter.amp}
        settings |= self.segmenter.values(("image_size", "runtime") + FITTED_WITH)
        described = {}
        for file, digest in self.segmenter.hashes.items():
            described[str(file)] = {"sha256": digest} | settings
        return described

    def score(self, case: Case, segmentation: Segmentation, truth: np.ndarray) -> dict:
        """Score a mask, also at other thresholds, and add what tells how good it may be."""
        files, patient = self.unseen(case), patient_of(case)
        weights = f"{len(files)} in {self.path}"
        if len(files) == 1:
            weights = str(files[0])
        row = {
            "weights": weights,
            "chose_epoch": int(any(patient in self.chose_epoch_on[file] for file in files)),
            "predicted_voxels": int(segmentation.mask.sum()),
            RUN: self.segmenter_for(case).run,
        }
        row |= score(segmentation.mask, truth, case.spacing)
        probabilities = torch.from_numpy(segmentation.probabilities)
        least = least_voxels(self.segmenter.min_volume, case.spacing)
        for column, (threshold, largest) in SETTINGS.items():
            mask = to_mask(probabilities, threshold, largest, least)
            row[column] = dsc(mask, truth)
        row |= {name: segmentation.features.get(name) for name in list(FEATURES) + list(LOOKS)}
        return row | dict(zip(EXPECTED, segmentation.expected or (None, None, None), strict=True))


@dataclass
class TableModel:
    """A model to compare: the scores in a metrics.csv of inference.py."""

    name: str
    path: Path
    scores: dict[str, dict]  # by case

    def was_trained_on(self, case: Case | Source) -> bool:
        return case.name in self.scores and self.scores[case.name]["trained_on"]

    def settings(self) -> str:
        return str(self.path)

    def scores_of(self, case: Case, facts: Mapping[str, object]) -> dict:
        """Look up a case; raise ValueError if its scores are of other data than the `facts`."""
        row = self.scores[case.name]
        for name in ("slices", "lesion_voxels"):
            if row[name] != facts[name]:
                raise ValueError(
                    f"{self.path}: {case.name} has {name} {row[name]:.0f} there, but "
                    f"{facts[name]} in {case.folder}; run inference.py on the same data"
                )
        return {name: row[name] for name in list(SCORES) + [RUN] if name in row}


Model = NetworkModel | TableModel


def networks_among(models: Sequence[Model]) -> list[NetworkModel]:
    """List the models that are networks; a table of scores has no settings to change."""
    return [model for model in models if isinstance(model, NetworkModel)]


def use_settings_of_first(models: Sequence[Model]) -> None:
    """Give all networks the first one's settings, except the image size; drop other fits."""
    first = networks_among(models)[0]
    for model in networks_among(models)[1:]:
        for setting in FITTED_WITH:
            value = getattr(first.segmenter, setting)
            if getattr(model.segmenter, setting) != value:
                setattr(model.segmenter, setting, value)
                model.segmenter.expected_dsc_fit = None
                model.segmenter.reasons[setting] = f"that of {first.name}"


def open_models(texts: Sequence[str], options: dict, cases: Sequence[Source] = ()) -> list[Model]:
    """Open each [NAME=]PATH, or raise ValueError or FileNotFoundError; `cases` are today's."""
    paths = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        path = Path(text)
        if equals and not path.exists():
            path = Path(rest or text)
        elif path.is_file():
            name = str(path.with_suffix(""))
        else:
            name = str(path)
        if not path.exists():
            raise FileNotFoundError(f"{text}: no such file; give a path, or NAME=PATH")
        if not name or name in paths:
            raise ValueError(f"{text}: needs a name that no other model has; give NAME=PATH")
        paths[name] = path
    if options.get("providers") and all(path.suffix != ".onnx" for path in paths.values()):
        raise ValueError("--providers is for .onnx files, and none is given; omit it")
    models = []
    for name, path in paths.items():
        if path.suffix == ".csv":
            needed = [column for column in SCORES if not column.endswith("_mm")]
            scores = read_scores(path, needed + ["slices", "lesion_voxels"])
            models.append(TableModel(name, path, scores))
        else:
            models.append(open_networks(name, path, options, cases))
    return models


def open_networks(
    name: str, path: Path, options: dict, cases: Sequence[Source] = ()
) -> NetworkModel:
    """Open weights, an ONNX file, or a folder of folds; `cases` are those of today."""
    files = weights_files(path)
    if files[0].suffix != ".onnx":
        options = options | {"providers": None}
    trained_on, chose_epoch_on = {}, {}
    for file in files:
        card = card_of(file)
        if "train" not in card.get("cases", {}):
            fault = f"{file}: no card says what it was trained on"
            if len(files) > 1:
                raise ValueError(f"{fault}; it cannot be used as a fold")
            print(f"{fault}; no case is left out", file=sys.stderr)
        trained_on[file] = patients_of_card(card, "train", cases=cases)
        chose_epoch_on[file] = set()
        if card.get("recipe", {}).get("keep") == "best":
            chose_epoch_on[file] = patients_of_card(card, "validation", cases=cases)
    segmenter = Segmenter.from_weights(files, **options)
    return NetworkModel(name, path, segmenter, trained_on, chose_epoch_on)


def model_to_fit(models: Sequence[Model]) -> NetworkModel:
    """Return the one model if its cards can hold a fit of the expected DSC, else ValueError."""
    if len(models) > 1:
        raise ValueError("--fit-expected-dsc is for one model; give --weights a single one")
    model = models[0]
    if isinstance(model, TableModel) or any(file.suffix != ".pt" for file in model.trained_on):
        raise ValueError(
            f"{model.path}: --fit-expected-dsc needs .pt weights; fit those, then export them"
        )
    for file, patients in model.trained_on.items():
        if not patients:
            raise ValueError(
                f"{file}: no card says what it was trained on, and the expected DSC can "
                "only be learnt from other cases; put the card that train.py wrote next to it"
            )
        size = read_card(file).get("image_size")
        if model.segmenter.image_size != size:
            raise ValueError(
                f"{file}: was trained on slices of {size} x {size}, for which the fit must "
                "be made; leave out --image-size"
            )
    return model


def choose_cases(
    sources: Sequence[Source], subsets: Sequence[str], models: Sequence[Model], images: Path
) -> tuple[list[Case], list[str]]:
    """Choose the cases that no model was trained on; return them and the names of the others.

    Raises ValueError, naming the case, if one cannot be scored or nothing is left.
    """
    chosen = sources
    if "all" not in subsets:
        chosen = [source for source in sources if subset_of(source) in subsets]
    if not chosen:
        raise ValueError(
            f"{images}: none of its {len(sources)} cases is in {' or '.join(subsets)}; "
            "choose another --subset, such as all"
        )
    cases, left_out = [], []
    for source in chosen:
        if any(model.was_trained_on(source) for model in models):
            left_out.append(source.name)
        else:
            cases.append(source.open())
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
            if isinstance(model, TableModel) and case.name not in model.scores:
                raise ValueError(
                    f"{model.path}: has no score of {case.name}; a comparison needs the same "
                    "cases, so choose them with --subset or --cases, or run inference.py on them"
                )
    return cases, sorted(left_out)


# A case with its volume (S, H, W, C) and truth (S, H, W), and by model: its input, its output.
Loaded = tuple[Case, np.ndarray, np.ndarray, dict[str, tuple[Tensor, Frame]]]
Segmented = tuple[Case, np.ndarray, np.ndarray, dict[str, Segmentation]]
Pictures = dict[tuple[str, str], np.ndarray]  # (H, W, 3) uint8, by model and case


def score_all(
    cases: Sequence[Case], models: Sequence[Model], workers: int | None = None
) -> tuple[dict[str, list[dict]], Pictures, str]:
    """Score cases, in threads; return rows by model, pictures, and the SHA-256 of the data."""
    networks = networks_among(models)
    loaded = in_order(partial(load, networks=networks), cases, workers)
    segmented = map(partial(segment, networks=networks), loaded)
    scored = in_order(partial(score_case, models=models), segmented, workers)
    rows: dict[str, list[dict]] = {model.name: [] for model in models}
    pictures, digest = {}, hashlib.sha256()
    results = tqdm(scored, "scoring", len(cases), unit="case", disable=None)
    for case_rows, case_pictures, case_digest in results:
        for row in case_rows:
            rows[row["model"]].append(row)
        pictures |= case_pictures
        digest.update(case_digest)
    return rows, pictures, digest.hexdigest()


def load(case: Case, networks: Sequence[NetworkModel]) -> Loaded:
    """Read volume and truth, and preprocess once for all models that do it alike."""
    volume, truth = case.read_pair()
    inputs, by_settings = {}, {}
    try:
        for model in networks:
            segmenter = model.segmenter
            segmenter.check_channels(volume.shape[-1])
            settings = (segmenter.image_size, segmenter.version, segmenter.device)
            if settings not in by_settings:
                by_settings[settings] = segmenter.preprocess(volume, case.aspect)
            inputs[model.name] = by_settings[settings]
    except ValueError as error:
        raise ValueError(f"{case.folder}: {error}") from error
    return case, volume, truth, inputs


def segment(loaded: Loaded, networks: Sequence[NetworkModel]) -> Segmented:
    """Segment a case with each model's networks that have not seen its patient."""
    case, volume, truth, inputs = loaded
    segmentations = {}
    for model in networks:
        segmenter = model.segmenter_for(case)
        images, frame = inputs[model.name]
        segmentations[model.name] = segmenter.segmentation_of(
            segmenter.probabilities(images), frame, case.spacing
        )
    return case, volume, truth, segmentations


def score_case(segmented: Segmented, models: Sequence[Model]) -> tuple[list[dict], Pictures, bytes]:
    """Make a row per model, pictures of the largest lesion slice, and the SHA-256 of the data."""
    case, volume, truth, segmentations = segmented
    missing = "unknown"
    if volume.shape[-1] == 3:
        missing = " and ".join(missing_sequences(volume)) or "none"
    facts = {
        "case": case.name,
        "patient": patient_of(case),
        "subset": subset_of(case),
        "site": site_of(patient_of(case)),
        "missing": missing,
        "slices": len(truth),
        "lesion_voxels": int(truth.sum()),
    }
    rows, pictures, grey = [], {}, to_grey(volume)
    for model in models:
        row = {"model": model.name} | facts
        if isinstance(model, TableModel):
            rows.append(row | model.scores_of(case, facts))
            continue
        segmentation = segmentations[model.name]
        rows.append(row | model.score(case, segmentation, truth))
        mask = lesion = segmentation.mask
        if truth.any():
            lesion = truth
        k = int(lesion.sum(axis=(1, 2)).argmax())
        slices = outline(grey[k : k + 1], mask[k : k + 1], truth[k : k + 1], side=256)
        pictures[model.name, case.name] = slices[0]
    digest = hashlib.sha256()
    for part in volume, truth:
        for voxels in part:  # slice by slice, as the whole may be a view
            digest.update(np.ascontiguousarray(voxels).data)
    return rows, pictures, digest.digest()
