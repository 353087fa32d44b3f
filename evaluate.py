"""Compare weights on the same cases: scores with intervals, paired differences, a report.

    python3 evaluate.py --images ./kaggle_3m --weights a/unet.pt b/unet.pt
    python3 evaluate.py --images ./kaggle_3m --weights dice=a/unet.pt bce=b/unet.pt --report r.html
    python3 evaluate.py --images ./kaggle_3m --weights cv/ --subset train validation   folds, pooled
    python3 evaluate.py --images ./kaggle_3m --weights a/unet.pt predictions/metrics.csv

Each of --weights is a model: a weights file; a folder with a weights file a fold, each of which
scores the cases that it was not trained on; or the metrics.csv that inference.py wrote. NAME=PATH
gives it a name. The others are compared with the first one, case by case. A case that one of the
models was trained on counts for none.

Writes scores.csv (a line a model and case), summary.json, scores.png and gallery.png to OUT, and
with --report one page that holds all of it and needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cases import case_name, case_paths, find_case
from checkpoint import file_hash, read_card, shipped_weights
from dataset import SUBSETS, patient_of, select_cases, site_of, subset_of
from metrics import dsc, score
from report import (
    SCORES,
    SETTINGS,
    case_table,
    compare,
    save_gallery,
    save_page,
    save_scores,
    tables,
)
from segmentation import Segmenter, to_mask
from utils import (
    add_segmenter_options,
    check_writable,
    fail,
    in_order,
    make_parser,
    outline,
    plain,
    read_scores,
    segmenter_options,
    to_grey,
    write_json,
    write_table,
)
from volume import Case, missing_sequences


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--images", type=Path, default="./kaggle_3m", help="cases with masks (%(default)s)")
    add("--subset", type=str, nargs="+", choices=("all", *SUBSETS), default=["validation"],
        help="all, train, validation, test or several (validation)")  # fmt: skip
    add("--cases", type=str, nargs="+", help="only these cases")
    add("--weights", type=str, nargs="+", help="the models, as above (the one of the project)")
    add_segmenter_options(parser)
    add = parser.add_argument_group("where to").add_argument
    add("--out", type=Path, default="./evaluation", help="folder to write to (%(default)s)")
    add("--report", type=Path, help="HTML file to write")
    return parser


@dataclass
class Model:
    """What is compared: networks, each with the patients it was trained on, or finished scores."""

    name: str
    files: list[Path]
    networks: list[tuple[Segmenter, set[str]]] = field(default_factory=list)
    rows: dict[str, dict] = field(default_factory=dict)  # of a metrics.csv, by case

    def segmenter_for(self, case: str) -> Segmenter | None:
        """The first network that was not trained on the patient of a case."""
        return next((s for s, seen in self.networks if patient_of(case) not in seen), None)

    def was_trained_on(self, case: str) -> bool:
        if self.rows:
            return case in self.rows and self.rows[case]["trained_on"]
        return self.segmenter_for(case) is None


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    options = segmenter_options(parser, args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args, options)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; nothing was written")


def run(args: argparse.Namespace, options: dict) -> None:
    """Score every model on every case, print the tables, write the files."""
    models = [open_model(text, options) for text in args.weights or [str(shipped_weights("unet"))]]
    check_writable(args.out)
    if args.report:
        check_writable(args.report.parent)
    cases, left_out = choose_cases(args, models)

    scored, pictures, digest = {model.name: [] for model in models}, {}, hashlib.sha256()
    bar = tqdm(score_all(cases, models, args), "scoring", len(cases), unit="case", disable=None)
    for fingerprint, rows, drawn in bar:
        digest.update(fingerprint)
        for row in rows:
            scored[row["model"]].append(row)
        pictures |= drawn
    summary = compare(scored)
    shown = tables(summary)
    print("\n\n".join(table.as_text() for table in shown))
    if left_out:
        print(f"\n{len(left_out)} cases left out: a model was trained on their patients")

    about = {
        "arguments": plain(args),
        "weights": {m.name: {str(f): file_hash(f) for f in m.files} for m in models},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cases": [case.name for case in cases],
        "left out": left_out,
        "SHA-256 of the voxels and masks": digest.hexdigest(),
    }
    write_table(args.out / "scores.csv", [row for rows in scored.values() for row in rows])
    write_json(args.out / "summary.json", about | {"models": summary})
    figures = {"DSC of every case": args.out / "scores.png"}
    save_scores(figures["DSC of every case"], scored)
    if pictures:
        figures["Worst, median and best case of each model"] = args.out / "gallery.png"
        save_gallery(args.out / "gallery.png", scored, pictures)
    if args.report:
        page = [*shown, case_table(scored)]
        save_page(args.report, list(scored), page, figures, json.dumps(about, indent=2))
    print(f"\ntables and pictures: {args.out}{f'   report: {args.report}' * bool(args.report)}")


def open_model(text: str, options: dict) -> Model:
    """The model that [NAME=]PATH means; ValueError or FileNotFoundError if it cannot be used."""
    name, _, rest = text.partition("=")
    path = Path(rest if rest and not Path(text).exists() else text)
    name = name if str(path) == rest else str(path.with_suffix("") if path.is_file() else path)
    if path.suffix == ".csv":
        rows = {row["case"]: row for row in read_scores(path, SCORES)}
        return Model(name, [path], rows=rows)
    files = sorted(path.rglob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no weights (.pt) in this folder; name a file")
    networks = []
    for file in files:
        seen = read_card(file).get("cases", {}).get("train")
        if seen is None and len(files) > 1:
            raise ValueError(f"{file}: no card says what it was trained on; it is no use as a fold")
        networks.append((Segmenter.from_weights(file, **options), {*map(patient_of, seen or ())}))
    return Model(name, files, networks)


def choose_cases(args: argparse.Namespace, models: list[Model]) -> tuple[list[Case], list[str]]:
    """The cases that every model can be scored on, and the names of those that one has seen.

    Raises ValueError if two models have one name, nothing is left, or a table lacks a case.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"two models are called {max(names, key=names.count)}; give NAME=PATH")
    found = case_paths(args.images, args.cases)
    chosen = {path for subset in args.subset for path in select_cases(found, subset)}
    seen = {p for p in chosen if any(model.was_trained_on(case_name(p)) for model in models)}
    cases = [find_case(path) for path in found if path in chosen - seen]
    if not cases:
        raise ValueError(
            f"{args.images}: the models were trained on all {len(chosen)} cases; "
            "choose another --subset, or give a folder of folds"
        )
    for model in models:
        for case in cases:
            if model.rows and case.name not in model.rows:
                raise ValueError(
                    f"{model.files[0]}: has no score of {case.name}; a comparison needs the same "
                    "cases: choose them with --subset or --cases, or run inference.py on them"
                )
    return cases, sorted(map(case_name, seen))


def score_all(
    cases: list[Case], models: list[Model], args: argparse.Namespace
) -> Iterator[tuple[bytes, list[dict], dict]]:
    """For each case a fingerprint, a row a model, and a picture by (model, case).

    Threads read ahead and score behind while the networks run.
    """

    def segmented() -> Iterator[tuple]:
        for case, (volume, truth) in zip(
            cases, in_order(Case.read_pair, cases, args.workers), strict=True
        ):
            try:
                maps = {
                    model.name: model.segmenter_for(case.name).probability_map(volume)
                    for model in models
                    if not model.rows
                }
            except ValueError as error:
                raise ValueError(f"{case.folder}: {error}") from error
            yield case, volume, truth, maps

    def scores(item: tuple) -> tuple[bytes, list[dict], dict]:
        case, volume, truth, maps = item
        about = {
            "case": case.name,
            "subset": subset_of(case.name),
            "site": site_of(case.name),
            "missing": missing_sequences(volume),
            "slices": len(truth),
            "lesion_voxels": int(truth.sum()),
        }
        rows, pictures = [], {}
        for model in models:
            row = {"model": model.name, **about}
            if model.rows:
                rows.append(row | {name: model.rows[case.name][name] for name in SCORES})
                continue
            probabilities = maps[model.name]
            mask = to_mask(probabilities, args.threshold, args.largest_component)
            rows.append(
                row
                | {"predicted_voxels": int(mask.sum())}
                | score(mask, truth)
                | {key: dsc(to_mask(probabilities, *s), truth) for key, s in SETTINGS.items()}
            )
            k = int((truth if truth.any() else mask).sum(axis=(1, 2)).argmax())
            slices = (array[k : k + 1] for array in (to_grey(volume), mask, truth))
            pictures[model.name, case.name] = outline(*slices, side=256)[0]
        fingerprint = hashlib.sha256(np.ascontiguousarray(volume)).digest()
        return fingerprint + hashlib.sha256(truth).digest(), rows, pictures

    return in_order(scores, segmented(), args.workers)


if __name__ == "__main__":
    main()
