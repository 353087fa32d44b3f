"""Compare weights on the same cases: scores with intervals, paired differences, a report.

    python3 evaluate.py --images ./kaggle_3m --weights a/unet.pt b/unet.pt
    python3 evaluate.py --images ./kaggle_3m --weights dice=a/unet.pt bce=b/unet.pt --report r.html
    python3 evaluate.py --images ./kaggle_3m --weights cv/ --subset train validation   folds, pooled
    python3 evaluate.py --images ./kaggle_3m --weights a/unet.pt predictions/metrics.csv

Each of --weights is a model: a weights file, an .onnx file from export.py, a folder of weights
files (an ensemble), or a metrics.csv that inference.py wrote. NAME=PATH names it. An ensemble
scores each case with the networks that were not trained on its patient: after cross-validation, one
for the cross-validated cases, all for others. Models are compared with the first one, case by case.
All have the threshold, components, minimum volume and mirroring of the first, unless with
--own-settings; the run begins with those that differ. Nothing changes a metrics.csv. A case that
any model was trained on is left out for all; a case on which train.py --keep best chose the epoch
counts, but is marked.

--fit-expected-dsc learns from these scores to predict the DSC of a mask without a truth, and how
far its volume may be off, writes both into the cards of the weights (see brainseg/quality.py and
volume_errors.py) and expected_dsc.png and volume_errors.csv to OUT. The --threshold, --min-volume
and --tta that it was run with become the defaults of these weights.

Writes scores.csv (a row per model and case), summary.json, scores.png and gallery.png to OUT and,
with --report, one self-contained page with all of it.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import cli
import utils
from brainseg import distributed
from brainseg.evaluation import report, scoring
from brainseg.evaluation.statistics import compare
from brainseg.io.archives import unpacked
from brainseg.io.files import check_ours, check_page, remove, write_json, write_table
from brainseg.io.labels import NO_LESION
from brainseg.io.opening import check_apart, check_file_apart
from brainseg.io.slices import Case
from brainseg.patients import SUBSETS, count_patients, names_of
from brainseg.quality import FITTED_WITH, check_cases, fit_and_save
from brainseg.reports.page import write_page
from brainseg.segmenter import settings_text
from brainseg.splits import by_subset, list_cohort
from brainseg.weights import shipped_weights

FITTED = ("expected_dsc.png", "volume_errors.csv")
FILES = ("scores.csv", "summary.json", "scores.png", "gallery.png") + FITTED


# fmt: off
def get_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.group("what")
    add = parser.add
    add("--images", type=Path, default="./kaggle_3m", help="folder or .zip of cases with masks")
    add("--subset", nargs="+", choices=("all",) + SUBSETS, default=["validation"],
        help="all, train, validation, test, or several (validation)")
    add("--cases", nargs="+", help="only these cases")
    cli.add_cohort_options(parser)
    add("--weights", nargs="+", help="the models, as above (the shipped weights)")
    add("--own-settings", action="store_true",
        help="compare each model at its own settings (at those of the first)")
    add("--fit-expected-dsc", action="store_true", help="learn to predict the DSC of a mask")
    cli.add_segmenter_options(parser)
    parser.group("where to")
    add("--out", type=Path, default="./evaluation", help="folder to write to")
    add("--report", type=Path, help="HTML page to write")
    return parser


# fmt: on
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    options = cli.segmenter_options(parser, args)
    with cli.errors_in_one_sentence("stopped before all cases were scored; run it again"):
        with unpacked(args.images, distributed.world_size()) as images:
            run(args, options, images)


def run(args: argparse.Namespace, options: dict, images: Path) -> None:
    """Open models and the cases in `images`, then score every model on every case."""
    sources = list_cohort(images, names=args.cases, **cli.cohort_options(args))
    if not args.weights:
        shipped = shipped_weights("unet")
        args.weights = [f"{shipped.stem}={shipped}"]
    models = scoring.open_models(args.weights, options, sources)
    if args.fit_expected_dsc:
        scoring.model_to_fit(models)
    differing = report.differing_settings(models)
    if differing:
        print(report.differences_table(differing, models, args.own_settings).as_text(), end="\n\n")
        if not args.own_settings:
            scoring.use_settings_of_first(models)
    if not args.fit_expected_dsc:
        for model in scoring.networks_among(models):
            print(f"{model.name}: {settings_text(model.segmenter)}")
            for note in model.segmenter.notes:
                print(f"{model.name}: {note}", file=sys.stderr)
    cases, left_out = scoring.choose_cases(sources, args.subset, models, args.images)
    if args.fit_expected_dsc:
        check_cases(len(cases))
    print(count_patients(by_subset(cases)), flush=True)
    check_apart(args.out, "--out", sources, images)
    for name in FILES:
        check_ours(args.out / name)
    if args.report:
        check_file_apart(args.report, "--report", sources, images)
        check_page(args.report)
    with distributed.main_process_locks((args.out, "--out", "run")):
        score(args, models, cases, left_out, differing)


def score(
    args: argparse.Namespace,
    models: Sequence[scoring.Model],
    cases: Sequence[Case],
    left_out: list[str],
    differing: dict[str, dict[str, object]],
) -> None:
    """Score every model on every case, print the tables, write the files."""
    rows, pictures, digest = scoring.score_all(cases, models, args.workers)
    cases[0].labels.check()
    write_table(args.out / "scores.csv", list(chain.from_iterable(rows.values())))
    if not any(row["lesion_voxels"] for row in rows[models[0].name]):
        print(NO_LESION.format(len(cases)), file=sys.stderr)
    summary = compare(rows)
    shown = report.tables(summary)
    shown[0].note = "\n".join([shown[0].note] + report.notes_on_tables(models))
    print("\n\n".join(table.as_text() for table in shown))
    if left_out:
        print(f"\n{len(left_out)} cases left out: a model was trained on their patients")
    if args.fit_expected_dsc:
        model = scoring.model_to_fit(models)
        options = model.segmenter.values(FITTED_WITH)
        print("\n" + fit_and_save(list(model.trained_on), options, rows[model.name], args.out))

    details = utils.provenance(args) | {
        "weights": {model.name: model.settings() for model in models},
        "settings that differ": differing,
        "compared at": "own settings" if args.own_settings else "settings of the first",
        "cases": names_of(cases),
        "left out": left_out,
        "SHA-256 of the voxels and masks": digest,
    }
    write_json(args.out / "summary.json", details | {"models": summary})
    figures = {"DSC of every case": args.out / "scores.png"}
    report.save_scores(args.out / "scores.png", rows)
    remove(args.out / "gallery.png")  # of an earlier run
    if pictures:
        figures["Worst, median and best case of each model"] = args.out / "gallery.png"
        report.save_gallery(args.out / "gallery.png", rows, pictures)
    if args.report:
        title = f"brainseg: {', '.join(rows)}"
        shown.append(report.case_table(rows))
        if differing:
            shown.insert(0, report.differences_table(differing, models, args.own_settings))
        pngs = {name: path.read_bytes() for name, path in figures.items()}
        write_page(args.report, "comparison.html", title, details, tables=shown, pictures=pngs)
    print(f"\ntables and pictures: {args.out}")
    if args.report:
        print(f"report: {args.report}")


if __name__ == "__main__":
    main()
