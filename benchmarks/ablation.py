"""Train every network with every loss, all else alike, and compare them on the validation cases.

    python3 benchmarks/ablation.py --images ./kaggle_3m --out ablation
    python3 benchmarks/ablation.py --images ./kaggle_3m --models unet --seeds 0 1 2 -- --ema 0

Each training keeps its last epoch, so that nothing is chosen on the cases it is scored on. What
follows -- goes to each train.py and replaces the recipe below. A call that was stopped goes on
where it was; the tables, the figure and OUT/report.html come from evaluate.py at the end.
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

RECIPE = """--image-size 128 --epochs 10 --lr 1e-3 --schedule cosine --warmup 200 --ema 0.998
--tumour-share 0.35 --aug-intensity 0.3 --aug-scale 0.2 --drop-sequences 0.1""".split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="the real cases")
    parser.add_argument("--out", type=Path, default="ablation", help="folder (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="(42)")
    parser.add_argument("recipe", nargs="*", help="options of train.py")
    args = parser.parse_args()

    named = []
    for model, loss, seed in product(args.models, args.losses, args.seeds):
        name = f"{model}-{loss}" + (f"-{seed}" if len(args.seeds) > 1 else "")
        folder = args.out / name
        command = ["train.py", "--images", args.images, "--weights", folder, "--model", model]
        if (folder / f"{model}.ckpt").exists():
            command += ["--resume"]
        else:
            command += ["--loss", loss, "--seed", seed, "--keep", "last", "--vis-freq", 0]
            command += ["--logs", folder / "logs", *(args.recipe or RECIPE)]
        print(f"\n{name}", flush=True)
        run(command)
        named.append(f"{name}={folder / model}.pt")
    options = ["--out", args.out / "evaluation", "--report", args.out / "report.html"]
    run(["evaluate.py", "--images", args.images, *options, "--weights", *named])


def run(command: list[object]) -> None:
    script, *words = map(str, command)
    status = subprocess.run([sys.executable, str(ROOT / script), *words]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
