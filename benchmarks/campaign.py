"""From a recipe to weights: a search by cross-validation, then networks of three seeds.

    python3 -m benchmarks.campaign --images ./kaggle_3m --jobs 4
    python3 -m benchmarks.campaign --images ./kaggle_3m --stage search --only dice adamw
    python3 -m benchmarks.campaign --images ./kaggle_3m -- --image-size 64 --epochs 2

Stages, for one network after the other:

search  trainings that differ from the recipe in one thing, on small slices, compared with it case
        by case over the folds (five, by patient). Changes whose 95 % interval lies above 0 are
        put together, and kept if the whole is better than the recipe too; but for those that are
        there for comparison (COMPARED).
folds   the chosen recipe on slices of full size, every case scored by the network that has not
        seen its patient, with and without --tta. The same cases have chosen the recipe, from
        small slices, so that this is a little more than to expect on others.
final   the chosen recipe on the training cases, three seeds. The validation cases, ten among the
        many of the search, say which of them is the middle one.
ship    the middle one by export.py, with its card and validation scores, into OUT/weights.

Every training keeps its last epoch. What follows -- are options of train.py for all trainings. The
tables are in OUT/campaign.md. A call that is stopped, by Ctrl-C or SIGTERM, saves what is under way
and the same call goes on there. The test cases are never opened.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
from collections.abc import Sequence
from pathlib import Path

from brainseg.io.files import atomic_write, write_json
from brainseg.metrics import summarise
from brainseg.splits import patient_of
from brainseg.weights import MODELS, load_tensors
from utils import fail

from .trainings import Pool, Training, call, script

RECIPE = """--lr 1e-3 --schedule cosine --warmup 200 --ema 0.995 --loss bce-dice --aug-scale 0.2
--aug-intensity 0.3 --drop-sequences 0.1 --keep last --vis-freq 0""".split()
SMALL = "--image-size 128 --epochs 8".split()
FULL = {"unet": "--epochs 30".split(), "resnext_unet": "--epochs 15".split()}
BASE = "recipe"
SEARCH = {
    "unet": {
        "dice": "--loss dice",
        "tversky": "--loss tversky",
        "focal-tversky": "--loss focal-tversky",
        "lower-rate": "--lr 5e-4",
        "higher-rate": "--lr 2e-3",
        "constant-rate": "--schedule constant",
        "batch-8": "--batch-size 8",
        "batch-32": "--batch-size 32",
        "no-average": "--ema 0",
        "adamw": "--weight-decay 0.01",
        "some-background": "--background 0.5",
        "much-background": "--background 2",
        "little-scale": "--aug-scale 0.05",
        "little-angle": "--aug-angle 5",
        "no-intensity": "--aug-intensity 0",
        "no-dropped-sequence": "--drop-sequences 0",
    },
    "resnext_unet": {"dice": "--loss dice", "lower-rate": "--lr 3e-4"},
}
COMPARED = {  # never chosen: what a seed is worth, and networks of another shape than torch.hub's
    "unet": {
        "seed-1": "--seed 1",
        "seed-2": "--seed 2",
        "wide": "--features 48",
        "narrow": "--features 16",
        "three-slices": "--neighbours 1",
    },
    "resnext_unet": {"seed-1": "--seed 1"},
}
SEEDS = (0, 1, 2)
STAGES = ("search", "folds", "final", "ship")


class Campaign:
    """The stages for one network, their folders and their tables."""

    def __init__(self, args: argparse.Namespace, model: str, pool: Pool):
        self.args, self.model, self.pool = args, model, pool
        self.out = args.out / model

    def search(self) -> str:
        changes = {
            name: options
            for name, options in (SEARCH[self.model] | COMPARED[self.model]).items()
            if not self.args.only or name in self.args.only
        }
        models = self.cross_validate("search", {BASE: "", **changes})
        # Of two values of one option, train.py takes the last: the one that is worth more.
        gains = {name: about["difference"] for name, about in models.items() if name != BASE}
        helped = [n for n in gains if gains[n]["low"] > 0 and n in SEARCH[self.model]]
        helped.sort(key=lambda name: gains[name]["mean"])
        chosen = " ".join(changes[name] for name in helped)
        if len(helped) > 1:
            together = "+".join(helped)
            models |= self.cross_validate("together", {BASE: "", together: chosen})
            if together not in models or models[together]["difference"]["mean"] <= 0:
                chosen = ""
        write_json(self.out / "chosen.json", {"options": chosen.split()})
        rows = [
            [name, changes.get(name, ""), dsc(about), interval(about.get("difference"))]
            for name, about in models.items()
        ]
        shown = table(["change", "options", "DSC", "difference, case by case"], rows)
        return f"{shown}\nThe recipe goes on with: {chosen or 'no change'}.\n"

    def cross_validate(self, name: str, variants: dict[str, str]) -> dict[str, dict]:
        """Train each of the variants once a fold, and score those that went through."""
        trainings = {
            variant: [
                self.training(f"search/{variant}/fold{k}", SMALL, *self.fold(k), *options.split())
                for k in range(self.args.folds)
            ]
            for variant, options in variants.items()
        }
        done = self.pool.run(f"{self.model}, search", sum(trainings.values(), []))
        went_through = [variant for variant, its in trainings.items() if set(its) <= set(done)]
        if BASE not in went_through:
            self.complete("search", trainings[BASE])
        weights = [f"{variant}={self.out / 'search' / variant}" for variant in went_through]
        return self.evaluate(name, weights)

    def folds(self) -> str:
        its = [
            self.training(f"folds/fold{k}", FULL[self.model], *self.fold(k), *self.chosen())
            for k in range(self.args.folds)
        ]
        self.complete("folds", its)
        rows, scores = [], []
        for name, option in ("folds", ()), ("folds-tta", ("--tta",)):
            (about,) = self.evaluate(name, [f"{self.model}={self.out / 'folds'}"], *option).values()
            with open(self.out / "tables" / name / "scores.csv", newline="") as file:
                scores.append({row["case"]: float(row["dsc"]) for row in csv.DictReader(file)})
            change = [scores[-1][case] - value for case, value in scores[0].items()]
            worth = interval(summarise(change, [patient_of(case) for case in scores[0]]))
            rows.append([" ".join(option) or "as trained", dsc(about), worth if option else ""])
        return table(["every case, unseen", "DSC", "difference, case by case"], rows)

    def final(self) -> str:
        self.complete("final", self.finals())
        weights = [f"{training.folder.name}={training.weights}" for training in self.finals()]
        scores = self.evaluate("final", weights, subset=["validation"])
        rows = [
            [
                name := training.folder.name,
                dsc(scores[name]),
                f"{load_tensors(training.checkpoint)['best']:.3f}",
                "ships" if training == self.middle() else "",
            ]
            for training in self.finals()
        ]
        return table(["seed", "DSC of the last epoch", "mean DSC of the luckiest", ""], rows)

    def finals(self) -> list[Training]:
        return [
            self.training(f"final/seed{n}", FULL[self.model], *self.chosen(), "--seed", str(n))
            for n in SEEDS
        ]

    def middle(self) -> Training:
        """Of the final trainings, the one whose mean on the validation cases is the middle one."""
        scores = self.summary("final")
        ranked = sorted(
            self.finals(), key=lambda final: scores[final.folder.name]["scores"]["dsc"]["mean"]
        )
        return ranked[len(ranked) // 2]

    def ship(self) -> str:
        middle, weights = self.middle(), self.args.out / "weights"
        for earlier in weights.glob(f"{self.model}-*"):
            earlier.unlink()
        call(script("export.py", "--weights", middle.weights, "--out", weights))
        (shipped,) = weights.glob(f"{self.model}-*.pt")
        predictions = self.out / "predictions"
        words = ["--weights", shipped, "--images", self.args.images, "--subset", "validation"]
        where = ["--predictions", predictions, "--figure", self.out / "dsc.png"]
        call(script("inference.py", *words, *where, *self.device()))
        scores = ["--metrics", predictions / "metrics.csv", "--out", weights]
        call(script("export.py", "--weights", shipped, *scores))
        size = shipped.stat().st_size / 2**20
        return f"{shipped.name}, {size:.1f} MiB, of {middle.folder.name}.\n"

    def training(self, folder: str, scale: Sequence[str], *options: str) -> Training:
        """Later options win: those of the call over the recipe, those of a variant over both."""
        words = ["--images", str(self.args.images), *RECIPE, *scale, *self.args.options, *options]
        words += self.device()
        return Training(self.model, self.out / folder, tuple(words))

    def device(self) -> list[str]:
        return ["--device", self.args.device] if self.args.device else []

    def fold(self, k: int) -> list[str]:
        return ["--folds", str(self.args.folds), "--fold", str(k)]

    def chosen(self) -> list[str]:
        path = self.out / "chosen.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: nothing is chosen yet; run --stage search first")
        return json.loads(path.read_text())["options"]

    def complete(self, stage: str, trainings: Sequence[Training]) -> None:
        done = self.pool.run(f"{self.model}, {stage}", trainings)
        for training in trainings:
            if training not in done:
                raise ValueError(f"{training.log}: not trained to the end: {training.last_line()}")

    def evaluate(
        self,
        name: str,
        weights: list[str],
        *options: str,
        subset: Sequence[str] = ("train", "validation"),
    ) -> dict[str, dict]:
        """The summary of each model, with its difference from the first one; OUT/tables/name."""
        out = self.out / "tables" / name
        words = ["--images", self.args.images, "--subset", *subset, "--weights", *weights]
        where = ["--out", out, "--report", out / "report.html"]
        call(script("evaluate.py", *words, *where, *options, *self.device()))
        return self.summary(name)

    def summary(self, name: str) -> dict[str, dict]:
        path = self.out / "tables" / name / "summary.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: not there; run --stage {name} first")
        return json.loads(path.read_text())["models"]


def dsc(about: dict) -> str:
    said = "{mean:.3f} ({low:.3f} to {high:.3f}), median {median:.3f}, n = {n}"
    return said.format(**about["scores"]["dsc"])


def interval(difference: dict | None) -> str:
    if difference is None:
        return ""
    return "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the real cases")
    add("--out", type=Path, default="campaign", help="folder (%(default)s)")
    add("--model", nargs="+", choices=MODELS, default=list(MODELS), help="(both)")
    add("--stage", nargs="+", choices=STAGES, default=STAGES, help="(all)")
    add("--only", nargs="+", help="in the search, these changes (all)")
    add("--folds", type=int, default=5, help="(%(default)s)")
    add("--device", help="cuda, cuda:1, cpu (an accelerator if there is one)")
    add("--jobs", type=int, default=1, help="trainings that share the device (%(default)s)")
    add("options", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    known = {change for model in args.model for change in SEARCH[model] | COMPARED[model]}
    if unknown := set(args.only or ()) - known:
        parser.error(f"no change is called {unknown.pop()!r}; known: {', '.join(sorted(known))}")

    for number in (signal.SIGTERM, signal.SIGHUP):  # a connection that ends stops it too
        signal.signal(number, signal.default_int_handler)
    pool = Pool(args.jobs)
    try:
        for model in args.model:
            campaign = Campaign(args, model, pool)
            for stage in STAGES:
                if stage in args.stage:
                    report(args.out, model, stage, getattr(campaign, stage)())
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; the same call goes on here")
    print(f"\ntables: {args.out / 'campaign.md'}")


def report(out: Path, model: str, stage: str, text: str) -> None:
    """Print the table of a stage, keep it, and write those of all stages to OUT/campaign.md."""
    print(f"\n{model}, {stage}\n\n{text}", flush=True)
    (out / model / f"{stage}.md").write_text(text)
    parts = [
        f"## {name}, {each}\n\n{path.read_text()}"
        for name in MODELS
        for each in STAGES
        if (path := out / name / f"{each}.md").exists()
    ]
    with atomic_write(out / "campaign.md") as temporary:
        temporary.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
