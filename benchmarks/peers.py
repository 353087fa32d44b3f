"""Time brainseg against MONAI and segmentation_models_pytorch, on the same cases in one run.

    pip install -r requirements-peers.txt                  in a separate environment
    python3 -m benchmarks.peers --images ./kaggle_3m --json peers.json         hours on a CPU
    python3 -m benchmarks.peers --images ./kaggle_3m --only prepare segment --cases 12 --epochs 1

Each row runs one process per tool and measures its wall time, including its start, and the peak
memory of the process and its children. All use the same split, slice size, batch size and epochs,
bfloat16 where the device is faster with it, and random initial weights; the U-Nets of brainseg and
MONAI have the same width. benchmarks/peer.py is what users of the peers would write. If a peer
cannot be imported, its column says so; if one fails, its cell says so. The rest runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from brainseg.devices import has_bfloat16, pick_device
from brainseg.io.files import write_json
from brainseg.io.layouts import list_cases
from brainseg.splits import select_cases
from cli import fail

from .timing import ROOT, Measured, conditions, measure

PEERS = {  # package, and options of peer.py
    "MONAI": ("monai", ("--library", "monai")),
    "smp resnet34": ("segmentation_models_pytorch", ("--library", "smp")),
    "smp resnext50": ("segmentation_models_pytorch",
                      ("--library", "smp", "--encoder", "resnext50_32x4d")),
}  # fmt: skip
OURS = "brainseg"
PREPARE = """
from dataset import BrainSegmentationDataset
BrainSegmentationDataset.train_and_validation({images!r}, image_size={size}, cache={cache!r})
"""


class Bench:
    """The commands of one tool, and their measurements."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace):
        self.name, self.args, self.folder = name, args, folder / name.replace(" ", "-")
        self.folder.mkdir()
        self.images, self.files = folder / "images", folder / "files.json"
        self.weights = self.folder / "unet.pt"

    def command(self, task: str, cache: str = "cache", epochs: int | None = None) -> list:
        """Build the command line that prepares, trains or segments."""
        args, out = self.args, self.folder
        shared = ["--device", str(args.device), "--batch-size", args.batch_size]
        epochs = ["--epochs", epochs or args.epochs]
        if self.name != OURS:
            options = ["--files", self.files, "--weights", self.weights, "--out", out / "masks"]
            options += ["--size", args.image_size, "--features", args.features, *shared, *epochs]
            options += ["--amp"] * args.amp
            script = ROOT / "benchmarks/peer.py"
            return [sys.executable, script, task, *PEERS[self.name][1], *options]
        cache = str(out / cache)
        if task == "prepare":
            text = PREPARE.format(images=str(self.images), size=args.image_size, cache=cache)
            return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", text]
        shared += ["--images", self.images, "--image-size", args.image_size]
        shared += ["--amp" if args.amp else "--no-amp"]
        if task == "segment":
            options = ["--weights", self.weights, "--subset", "validation"]
            options += ["--predictions", out / "masks", "--figure", out / "dsc.png"]
            return [sys.executable, ROOT / "inference.py", *shared, *options]
        options = ["--features", args.features, "--weights", out, "--logs", out / "logs"]
        options += ["--cache", cache, "--vis-freq", 0, *epochs]
        return [sys.executable, ROOT / "train.py", *shared, *options]

    def prepare(self) -> dict:
        """Measure reading and preprocessing all cases, once."""
        return figure(measure(self.command("prepare")))

    def epoch(self) -> dict:
        """Measure the second epoch of a training, with its validation."""
        run = measure(self.command("train", epochs=2))
        first, second = (at for at, line in run.lines if line.startswith("epoch "))
        slices = len(json.loads(self.files.read_text())[0])
        return figure(run) | {"value": slices / (second - first)}

    def target(self) -> dict:
        """Measure a training from an empty cache until it reaches the mean validation DSC."""
        args, command = self.args, self.command("train", "target-cache")
        run = measure(command, reaches(args.target), args.minutes * 60)
        last = run.lines[-1][1]
        if not last:  # it ran to its end, or too long
            epochs = [line.strip() for _, line in run.lines if line.startswith("epoch ")]
            so_far = epochs[-1] if epochs else "no epoch was finished"
            note = f"not reached in {run.seconds:.0f} s; {so_far}"
            return figure(run) | {"value": None, "note": note}
        return figure(run) | {"note": last.split("/")[0]}

    def segment(self) -> dict:
        """Measure segmenting the validation cases, from their files to masks and scores."""
        if not self.weights.exists():
            measure(self.command("train", epochs=1))
        return figure(measure(self.command("segment")))


def reaches(target: float) -> Callable[[str], bool]:
    """Make a function that tells whether the line of an epoch has this DSC or more."""

    def reached(line: str) -> bool:
        said = re.match(r"epoch .* DSC (\d\.\d+)", line)
        return bool(said) and float(said[1]) >= target

    return reached


def figure(run: Measured) -> dict:
    return {"value": run.seconds, "memory": run.memory}


ROWS = {  # title, unit, and whether more is better
    "prepare": ("preparing the data set", "s", False),
    "epoch": ("a training epoch, validation included", "slices/s", True),
    "target": ("from the command to the target DSC", "s", False),
    "segment": ("segmenting the validation cases", "s", False),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the real cases")
    add("--only", nargs="+", choices=ROWS, default=list(ROWS), help="only these rows (all)")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="only these columns (all)")
    add("--cases", type=int, help="use at most this many, a quarter of them for validation (all)")
    add("--epochs", type=int, default=30, help="epochs of a training (%(default)s)")
    add("--target", type=float, default=0.8, help="mean validation DSC (%(default)s)")
    add("--minutes", type=float, default=120, help="time limit of the target row (%(default)s)")
    add("--image-size", type=int, default=192, help="side of a resized slice (%(default)s)")
    add("--features", type=int, default=16, help="width of the U-Nets (%(default)s)")
    add("--batch-size", type=int, default=16, help="(%(default)s)")
    add("--device", help="cuda, cpu ... (an accelerator if available)")
    add("--json", type=Path, help="file to keep figures and conditions in")
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
        args.amp = has_bfloat16(args.device)
        sources = list_cases(args.images)
        parts = [select_cases(sources, subset) for subset in ("train", "validation")]
        if args.cases:
            few = max(args.cases // 4, 1)
            parts = [parts[0][: args.cases - few], parts[1][:few]]
        with tempfile.TemporaryDirectory() as folder:
            lay_out(parts, Path(folder))
            print(table(run_all(Path(folder), args, [*parts[0], *parts[1]])))
    except (ValueError, OSError) as error:
        fail(error)


def lay_out(parts: list, folder: Path) -> None:
    """Link the cases into a folder, and list their slices for the peers, in order."""
    (folder / "images").mkdir()
    files: list[list[dict]] = []
    for part in parts:
        files.append([])
        for source in part:
            (folder / "images" / source.name).symlink_to(source.folder.resolve())
            paths = [p for p in source.folder.glob("*.tif") if not p.stem.endswith("_mask")]
            paths = sorted(paths, key=lambda path: int(path.stem.rsplit("_", 1)[1]))
            for path in map(Path.resolve, paths):
                mask = path.with_name(f"{path.stem}_mask.tif")
                files[-1].append({"image": str(path), "mask": str(mask), "case": source.name})
    (folder / "files.json").write_text(json.dumps(files))


def run_all(folder: Path, args: argparse.Namespace, cases: list) -> dict:
    """Measure row by row, with the tools in turn, so that a slow hour affects all of them."""
    about = conditions(args, cases) | {"features": args.features, "batch size": args.batch_size}
    result = {"conditions": about | {"target": args.target}, "notes": {}, "rows": {}}
    benches = [Bench(OURS, folder, args)]
    for name in args.peers:
        package = PEERS[name][0]
        found = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True)
        if found.returncode:
            reason = found.stderr.decode().strip().splitlines()[-1]
            result["notes"][name] = f"not installed ({reason})"
            continue
        result["conditions"][package] = version(package)
        benches.append(Bench(name, folder, args))
    for row in args.only:
        result["rows"][row] = {}
        for bench in benches:
            print(f"{row}: {bench.name}", file=sys.stderr)
            try:
                result["rows"][row][bench.name] = getattr(bench, row)()
            except ValueError as error:
                result["rows"][row][bench.name] = {"value": None, "note": f"failed: {error}"}
            if args.json:  # a long run that is stopped keeps its results
                write_json(args.json, result)
    return result


def table(result: dict) -> str:
    """Render conditions and figures as Markdown; (2.0 x): brainseg is twice as good."""
    names = {name for row in result["rows"].values() for name in row} | result["notes"].keys()
    names = [name for name in (OURS, *PEERS) if name in names]
    lines = [", ".join(f"{key}: {value}" for key, value in result["conditions"].items()), ""]
    lines += ["| what | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, figures in result["rows"].items():
        title, unit, more = ROWS[row]
        for key, what in (("value", f"{title}, {unit}"), ("memory", "its peak memory, GiB")):
            cells = [cell(figures, name, key, more and key == "value") for name in names]
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines += [""] + [f"{name}: {note}" for name, note in result["notes"].items()]
    for row, figures in result["rows"].items():
        lines += [f"{row}, {n}: {f['note']}" for n, f in figures.items() if "note" in f]
    return "\n".join(lines)


def cell(figures: dict, name: str, key: str, more: bool) -> str:
    if name not in figures:
        return "not installed"
    value, ours = figures[name].get(key), figures[OURS].get(key)
    if value is None:
        return "-"
    if name == OURS or not ours:
        return f"{value:.4g}"
    return f"{value:.4g} ({ours / value if more else value / ours:.1f} x)"


if __name__ == "__main__":
    main()
