"""Search for a recipe by cross-validation, then train one network per fold: the weights that ship.

    python3 -m weights.campaign --images ./kaggle_3m --jobs 2
    python3 -m weights.campaign --images ./kaggle_3m --stage search --only dice three-slices
    python3 -m weights.campaign --images ./kaggle_3m --stage ship --jobs 2
    python3 -m weights.campaign --images ./kaggle_3m --start weights/unet-folds -- --epochs 3

search  Short trainings on small slices that each differ in one thing from train.py's defaults, on
        the first three of five folds by patient, scored on the patients held out and compared case
        by case. Changes that help are put into the defaults by hand.
ship    The defaults, one network per fold, first on small slices, then on slices as large as a
        cropped head. All are exported into OUT/weights, each patient is scored by the network that
        has not seen it, and the expected DSC is fitted to these scores and saved in the cards.
nested  For some of the five folds (--outer): four networks, each trained without that fold and
        without a quarter of the rest. No patient of the fold has been seen by any of them, so what
        is made of these networks can be scored on it. All are exported into OUT/nested/fold<k>.
student For the same folds, one network that learns from these four (train.py --teachers) on all
        patients outside the fold, as long as those of ship. Both are scored on the fold, case by
        case: the four averaged and mirrored, the student as it is.
one     One network that learns from the five of ship on all patients: what is used by default. Its
        expected DSC is fitted by those five and by the students of the folds (weights/fitting.py).

Students see FLAIR alone in two fifths of the slices and no skull in a third, and learn to leave
heads without a lesion empty: every fourth case mirrored (weights/negatives.py), and the scans of
people without a tumour in --negatives.

Every training keeps its last epoch: nothing is chosen on the patients held out. With --start, each
training continues from the network of that folder that has not seen them either, and ship skips the
small slices. Trainings run at low priority, --jobs at once, each on its share of the cores. Options
after -- are passed to each call of train.py. The tables are in OUT/campaign.md. Ctrl-C or SIGTERM
saves the running trainings, and the same command resumes them. Test cases are never opened.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from brainseg.io.files import atomic_write, remove
from brainseg.io.slices import Case
from brainseg.metrics import mean_text, summarise, values_of
from brainseg.patients import names_of
from brainseg.reports.scores import read_scores
from brainseg.splits import list_cohort, outside_test, split_folds
from brainseg.weights import has_card, is_card, read_card
from cli import fail
from dataset import open_cases

from .fitting import STUDENT_MASKS, fit_student
from .negatives import link_scans, write_mirrored
from .trainings import Pool, Training, call, script

FOLDS, SEARCH_FOLDS = 5, 3
COMMON = f"--keep last --vis-freq 0 --validate-every 5 --folds {FOLDS}".split()
SEARCH = "--image-size 128 --epochs 4".split()
SMALL = "--image-size 128 --epochs 45".split()
NATIVE = "--image-size 192 --epochs 15 --lr 1e-3 --seed 43".split()
INNER_FOLDS = 4  # of the patients outside an outer fold; shorter trainings than those that ship
INNER_SMALL = "--image-size 128 --epochs 24".split()
INNER_NATIVE = "--image-size 192 --epochs 9 --lr 1e-3 --seed 43".split()
BASE = "defaults"
CHANGES = {
    "preprocessing-1": "--preprocessing 1",
    "three-slices": "--neighbours 1",
    "dice": "--loss dice",
    "no-dropped-sequence": "--drop-sequences 0",
    "fewer-dropped-sequences": "--drop-sequences 0.2",
    "no-intensity": "--aug-intensity 0",
    "little-scale": "--aug-scale 0.05",
    "little-background": "--background 0.1",
    "constant-rate": "--schedule constant",
    "no-average": "--ema 0",
    "wide": "--features 32",
    "large-slices": "--image-size 192",
}
STUDENT = "--keep last --vis-freq 0 --validate-every 5 --flair-alone --strip-skulls 0.33".split()
MIRRORED = 4  # every so many cases, one is written without its lesion
MASKS = ["--tta", "--min-volume", "200"]  # how those of an ensemble are made: see MODEL_CARD.md


def search(args: argparse.Namespace, pool: Pool) -> str:
    """Train, compare, and return the table."""
    out, images = args.out, args.images
    changes = {BASE: ""}
    for name in args.only or CHANGES:
        changes[name] = CHANGES[name]
    trainings, weights = [], []
    for name, more in changes.items():
        folder = out / "search" / name
        weights.append(f"{name}={folder}")
        for k in range(SEARCH_FOLDS):
            start = network_of_fold(args.start, k) if args.start else None
            trainings.append(training(args, folder / f"fold{k}", k, SEARCH, start, more.split()))
    train_all("search", trainings, pool)
    cases = held_out_by(trainings[:SEARCH_FOLDS])
    words = ["--images", images, *cases, "--weights", *weights]
    call(script("evaluate.py", *words, "--out", out / "search" / "scores"))
    models = read_summary(out / "search" / "scores")
    rows = []
    for name, summary in models.items():
        options = f"`{changes[name]}`" if changes[name] else ""
        change = mean_text(summary["difference"], "+") if name != BASE else ""
        rows.append([name, options, dsc(summary["scores"]["dsc"]), change])
    return table(["change", "options", "DSC", "difference, case by case"], rows)


def ship(args: argparse.Namespace, pool: Pool) -> str:
    """Train the networks of an ensemble, export, score and fit them; return the table."""
    out, images = args.out, args.images
    if args.start:
        start = [network_of_fold(args.start, k) for k in range(FOLDS)]
    else:
        small = [training(args, out / "small" / f"fold{k}", k, SMALL) for k in range(FOLDS)]
        train_all("small slices", small, pool)
        start = [each.weights for each in small]
    trainings = [
        training(args, out / "ship" / f"fold{k}", k, NATIVE, start[k]) for k in range(FOLDS)
    ]
    train_all("ship", trainings, pool)
    weights, scores = out / "weights", out / "ship" / "scores"
    for earlier in weights.glob("unet-*.pt"):
        remove(earlier, has_card)
        remove(earlier.with_suffix(".json"), is_card)
    call(script("export.py", "--weights", *[t.weights for t in trainings], "--out", weights))
    cases = held_out_by(trainings)
    words = ["--images", images, *cases, "--weights", weights, "--fit-expected-dsc", *MASKS]
    call(script("evaluate.py", *words, "--out", scores, "--report", scores / "report.html"))
    (summary,) = read_summary(scores).values()
    row = [str(weights), dsc(summary["scores"]["dsc"])]
    return table(["weights", "DSC of every patient, unseen"], [row])


def nested(args: argparse.Namespace, pool: Pool) -> str:
    """Train and export the inner networks of each outer fold; return the table."""
    rows = []
    for outer in args.outer:
        folder = args.out / "nested" / f"fold{outer}"
        link_cases(split_cases(args.images, outer)[0], folder / "images")
        inner = argparse.Namespace(images=folder / "images", options=args.options)
        folds = ["--folds", str(INNER_FOLDS)]
        small = []
        native = []
        for k in range(INNER_FOLDS):
            small.append(training(inner, folder / f"small{k}", k, INNER_SMALL, change=folds))
            start = small[k].weights
            native.append(training(inner, folder / f"native{k}", k, INNER_NATIVE, start, folds))
        for first in range(0, INNER_FOLDS, pool.jobs):  # so that some are finished early
            some = slice(first, first + pool.jobs)
            train_all(f"fold {outer}, small slices", small[some], pool)
            train_all(f"fold {outer}", native[some], pool)
        files = [each.weights for each in native]
        call(script("export.py", "--weights", *files, "--out", folder / "weights"))
        rows.append([str(outer), str(folder / "weights")])
    return table(["fold that none has seen", "weights"], rows)


def held_out_by(trainings: Sequence[Training]) -> list[str]:
    """Return the options of evaluate.py that choose the patients held out by these trainings."""
    names = []
    for training in trainings:
        names += training.card["cases"]["validation"]
    return ["--subset", "all", "--cases", *names]


def student(args: argparse.Namespace, pool: Pool) -> str:
    """Train the student of each outer fold's networks, score both on the fold; return the table."""
    rows, teachers, students = [], [], []
    for outer in args.outer:
        folder = args.out / "nested" / f"fold{outer}"
        train, held_out = split_cases(args.images, outer)
        weights = train_student(args, folder, train, folder / "weights", pool)
        names = names_of(held_out)
        four = scored(args, names, folder / "weights", folder / "teachers-masks", MASKS)
        one = scored(args, names, weights, folder / "student-masks", STUDENT_MASKS)
        rows.append([str(outer), *compared(four, one)])
        teachers += four
        students += one
    if len(args.outer) > 1:
        rows.append(["all", *compared(teachers, students)])
    return table(["fold", "four, mirrored", "student", "difference, case by case"], rows)


def scored(
    args: argparse.Namespace, names: Sequence[str], weights: Path, out: Path, masks: Sequence[str]
) -> list[dict]:
    """Segment the cases of `names` into `out`; return their rows of metrics.csv, in that order."""
    words = ["--images", args.images, "--cases", *names, "--weights", weights]
    call(script("inference.py", *words, "--predictions", out, *masks))
    rows = read_scores(out / "metrics.csv", ["dsc"])
    return [rows[name] for name in names]


def compared(four: Sequence[dict], one: Sequence[dict]) -> list[str]:
    """Return the scores of both, from their rows, and the difference, case by case, as texts."""
    patients = values_of(four, "patient")
    before, after = values_of(four, "dsc"), values_of(one, "dsc")
    gain = mean_text(summarise(after - before, patients), "+")
    return [dsc(summarise(before, patients)), dsc(summarise(after, patients)), gain]


def one(args: argparse.Namespace, pool: Pool) -> str:
    """Train, export and fit the student of all patients, whose teachers are those of ship."""
    folder = args.out / "one"
    students = []
    for outer in args.outer:
        students.append(args.out / "nested" / f"fold{outer}" / "student" / "unet.pt")
        if not students[-1].is_file():
            raise ValueError(f"{students[-1]}: is missing for the fit; run --stage student first")
    cases = open_cases(outside_test(list_cohort(args.images)))
    teachers = args.start or args.out / "weights"
    weights = train_student(args, folder, cases, teachers, pool)
    exported = folder / "weights"
    call(script("export.py", "--weights", weights, "--out", exported))
    fit_student(args.images, teachers, students, folder / "fit", exported)
    return table(["weights", "cases"], [[str(exported), str(len(cases))]])


def train_student(
    args: argparse.Namespace,
    folder: Path,
    cases: Sequence[Case],
    teachers: Path,
    pool: Pool,
) -> Path:
    """Train on `cases` and heads without lesion, on small slices first; return the weights."""
    images = folder / "student-images"
    link_cases(cases, images)
    write_mirrored(cases[1::MIRRORED], images)  # the first is validated on
    if args.negatives:
        link_scans(args.negatives, images, args.hold_back)
    # train.py wants somebody to validate on: one patient, whom the teachers have seen.
    words = ["--images", images, *STUDENT, "--teachers", teachers, "--allow-seen"]
    words += ["--validation", cases[0].name]
    weights = None
    for name, length in (("student-small", SMALL), ("student", NATIVE)):
        start = ["--init-weights", weights] if weights else []
        options = tuple(str(word) for word in (*words, *length, *start, *args.options))
        training = Training(folder / name, options)
        train_all(f"{folder.name}, {name}", [training], pool)
        weights = training.weights
    assert weights is not None
    return weights


def split_cases(images: Path, outer: int) -> tuple[list[Case], list[Case]]:
    """Split the cases of `images` into those outside the fold `outer` and those in it."""
    return split_folds(open_cases(list_cohort(images)), FOLDS, outer)


def link_cases(cases: Sequence[Case], folder: Path) -> None:
    """Fill `folder` with links to the folders of cases."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        link = folder / case.name
        if not link.is_symlink():
            link.symlink_to(case.folder.resolve())


STAGES = {"search": search, "ship": ship, "nested": nested, "student": student, "one": one}


def training(
    args: argparse.Namespace,
    folder: Path,
    k: int,
    options: Sequence[str],
    start: Path | None = None,
    change: Sequence[str] = (),
) -> Training:
    """Make a training without fold `k`; if an option is given twice, train.py uses the last."""
    words = ["--images", str(args.images), *COMMON, "--fold", str(k), *options]
    first = ["--init-weights", str(start)] if start else []
    return Training(folder, (*words, *first, *args.options, *change))


def network_of_fold(folder: Path, k: int) -> Path:
    """Find the file of an ensemble whose network was trained without fold `k` of FOLDS."""
    for path in sorted(folder.glob("*.pt")):
        recipe = read_card(path).get("recipe", {})
        if (recipe.get("folds"), recipe.get("fold")) == (FOLDS, k):
            return path
    raise ValueError(f"{folder}: no network of fold {k} of {FOLDS}; give a folder made by ship")


def train_all(stage: str, trainings: Sequence[Training], pool: Pool) -> None:
    """Run the trainings; raise ValueError for the first that does not finish."""
    done = pool.run(stage, trainings)
    for each in trainings:
        if each not in done:
            raise ValueError(f"{each.log}: the training did not finish: {each.last_line()}")


def read_summary(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "summary.json").read_text())["models"]


def dsc(scores: dict) -> str:
    return f"{mean_text(scores)}, median {scores['median']:.3f}, n = {scores['n']}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the real cases")
    add("--out", type=Path, default="campaign", help="folder to write to (%(default)s)")
    add("--stage", nargs="+", choices=STAGES, default=["search", "ship"],
        help="what to run (search ship)")  # fmt: skip
    add("--outer", type=int, nargs="+", choices=range(FOLDS), default=[0, 1],
        help="nested, student: the folds to leave out; one: those of its fit (0 1)")  # fmt: skip
    add("--only", nargs="+", choices=CHANGES, help="only these changes in the search (all)")
    add("--start", type=Path,
        help="folder of networks to continue from, one per fold; teachers of one")  # fmt: skip
    add("--negatives", type=Path, help="scans of people without a tumour, for students")
    add("--hold-back", nargs="+", default=[], metavar="NAME",
        help="those of --negatives whose names begin so: not to be trained on")  # fmt: skip
    add("--jobs", type=int, default=1, help="trainings at a time (%(default)s)")
    add("options", nargs="*", help="options of train.py, after --")
    args = parser.parse_args(argv)

    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed connection stops it too
        signal.signal(number, signal.default_int_handler)
    pool = Pool(args.jobs)
    try:
        for stage in args.stage:
            text = STAGES[stage](args, pool)
            print(f"\n{stage}\n\n{text}", flush=True)
            (args.out / f"{stage}.md").write_text(text)
        with atomic_write(args.out / "campaign.md") as temporary:
            parts = [(stage, args.out / f"{stage}.md") for stage in STAGES]
            temporary.write_text(
                "\n".join(f"## {k}\n\n{path.read_text()}" for k, path in parts if path.exists())
            )
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; run the same command to resume")
    print(f"\ntables: {args.out / 'campaign.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
