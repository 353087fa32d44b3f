"""What is each choice worth? Trainings that differ in one thing, compared by cross-validation.

    python3 benchmarks/ablation.py --images ./kaggle_3m --study recipe
    python3 benchmarks/ablation.py --images ./kaggle_3m --study networks --fold 0
    python3 benchmarks/ablation.py --images ./kaggle_3m --study recipe -- --image-size 128

Study `networks` trains each network with each loss, `recipe` changes one piece of the recipe after
the other. Every variant is trained once a fold of 5, by patient, and keeps its last epoch, so
that nothing is chosen on the cases it is scored on. What follows -- are options of train.py for
all of them. A call that was stopped goes on where it was. In the end evaluate.py pools the folds
and compares every variant with the first, case by case: OUT/<study>/report.html.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import MODELS  # noqa: E402
from loss import LOSSES  # noqa: E402

# Of 600 steps: the moving average and the warm-up are as short as the training.
RECIPE = """--image-size 64 --epochs 4 --lr 2e-3 --schedule cosine --warmup 50 --ema 0.99
--loss bce-dice --aug-scale 0.2 --aug-intensity 0.3 --drop-sequences 0.1
--keep last --vis-freq 0""".split()
STUDIES = {
    "networks": {
        f"{model}-{loss}": f"--model {model} --loss {loss}"
        for loss, model in product(LOSSES, MODELS)
    },
    "recipe": {
        "recipe": "",
        "dice": "--loss dice",
        "constant-rate": "--schedule constant",
        "no-average": "--ema 0",
        "little-scale": "--aug-scale 0.05",
        "no-intensity": "--aug-intensity 0",
        "no-dropped-sequence": "--drop-sequences 0",
        "three-slices": "--neighbours 1",
        "adamw": "--weight-decay 0.01",
        "tversky": "--loss tversky",
        "focal-tversky": "--loss focal-tversky",
    },
}
SMALL = {"networks": "", "recipe": "--features 8"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="the real cases")
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--only", nargs="+", help="variants of the study (all)")
    parser.add_argument("--fold", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of 5 (all)")
    parser.add_argument("--out", type=Path, default="ablation", help="folder (%(default)s)")
    parser.add_argument("options", nargs="*", help="of train.py, after --")
    args = parser.parse_args()

    out, variants = args.out / args.study, STUDIES[args.study]
    if unknown := set(args.only or ()) - variants.keys():
        parser.error(f"no variant is called {unknown.pop()!r}; known: {', '.join(variants)}")
    names = args.only or list(variants)
    for name, fold in product(names, args.fold):
        change = variants[name]
        model = change.split()[1] if "--model" in change else "unet"
        folder = out / name / f"fold{fold}"
        command = ["train.py", "--images", args.images, "--weights", folder, "--model", model]
        if (folder / f"{model}.ckpt").exists():
            command += ["--resume"]
        else:
            command += ["--folds", 5, "--fold", fold, "--logs", folder / "logs", *RECIPE]
            command += [*SMALL[args.study].split(), *args.options, *change.split()]
        print(f"\n{name}, fold {fold}", flush=True)
        run(command)
    models = [f"{name}={out / name}" for name in names]
    where = ["--out", out / "evaluation", "--report", out / "report.html"]
    run(["evaluate.py", "--images", args.images, "--subset", "train", "validation", *where]
        + ["--weights", *models])  # fmt: skip


def run(command: list[object]) -> None:
    script, *words = map(str, command)
    status = subprocess.run([sys.executable, str(ROOT / script), *words]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
