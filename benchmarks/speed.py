"""Time this working tree against an earlier commit, side by side.

    python3 -m benchmarks.speed --images ./kaggle_3m --against 7bf2103
    python3 -m benchmarks.speed --images ./kaggle_3m --against 7bf2103 --only case --pairs 9

Each row runs whole processes of the two checkouts in turn, on the same input and with the default
weights of each, on one core and on two; it gives the medians of their wall time, and of the peak
memory of all their processes. Run it on an otherwise idle Linux machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from tqdm import tqdm

from brainseg.io.layouts import find_cases
from brainseg.phantom import make_volume
from cli import errors_in_one_sentence

from .clients import ask, pack_slices, serving
from .timing import ROOT, Measured, PeakMemory, conditions, measure

SLICES = 53  # of the single case
VOLUME = 176, 256  # slices and pixels of the 3-D FLAIR, 1 mm
Work = Callable[[Path, argparse.Namespace], Measured]


def segment(tree: Path, *options: object) -> Measured:
    """Measure inference.py of a checkout."""
    with tempfile.TemporaryDirectory() as out:
        return segment_into(out, tree, *options)


def segment_into(out: str, tree: Path, *options: object) -> Measured:
    """Measure inference.py of a checkout, whose masks stay in the folder `out`."""
    command = [sys.executable, tree / "inference.py"] + list(options)
    command += ["--predictions", out, "--figure", f"{out}/dsc.png"]
    return measure(command)


def validation(tree: Path, args: argparse.Namespace) -> Measured:
    """Measure inference.py on the ten validation cases."""
    return segment(tree, "--images", args.images, "--subset", "validation")


def case(tree: Path, args: argparse.Namespace) -> Measured:
    """Measure inference.py on one case, from the command to its end."""
    return segment(tree, "--images", args.case)


def mask(tree: Path, args: argparse.Namespace) -> Measured:
    """Measure inference.py on one case, from the command until its whole mask is in its place."""
    start = time.time()
    with tempfile.TemporaryDirectory() as out:
        measured = segment_into(out, tree, "--images", args.case)
        moved = [path.stat().st_ctime for path in Path(out).glob("*/*_mask.tif")]
    return measured._replace(seconds=max(moved) - start)


def volume(tree: Path, args: argparse.Namespace) -> Measured:
    """Measure inference.py on a 3-D FLAIR."""
    return segment(tree, "--flair", args.flair)


def page(tree: Path, args: argparse.Namespace) -> Measured:
    """Measure one request to the page, from scan to masks."""
    with tempfile.TemporaryDirectory() as folder:
        with serving(tree, [], subprocess.DEVNULL, TMPDIR=folder) as (url, process):
            ask(url, args.scan)  # not timed: the first request loads the network
            with PeakMemory(process) as memory:
                masks, seconds = ask(url, args.scan)
    if not masks:
        raise ValueError("the page refused the scan")
    return Measured(seconds, memory.gib, "")


WORK: dict[str, Work] = {
    "validation": validation,
    "mask": mask,
    "case": case,
    "volume": volume,
    "page": page,
}
TITLES = {
    "validation": "the ten validation cases",
    "mask": f"one case of {SLICES} slices, to the mask",
    "case": f"one case of {SLICES} slices, to the end",
    "volume": "a 3-D FLAIR of 176 x 256 x 256",
    "page": "the page, one client",
}


def write_inputs(args: argparse.Namespace, folder: Path) -> None:
    """Choose the case whose slices are nearest to `SLICES`, and write a 3-D FLAIR."""
    cases = find_cases(args.images)
    chosen = min(cases, key=lambda case: abs(len(case.slices) - SLICES))
    args.case = chosen.folder
    args.scan = pack_slices(chosen.slices)
    flair = SimpleITK.GetImageFromArray(make_volume(0, *VOLUME)[0][..., 1])
    args.flair = folder / "flair.nii.gz"
    SimpleITK.WriteImage(flair, str(args.flair))


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a folder while the block runs."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run(git + ["add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run(git + ["remove", "--force", str(folder)], check=True)


def compare(work: Work, then: Path, args: argparse.Namespace) -> str:
    """Measure the two checkouts in turn; return the cells of a row: medians and their ratio."""
    runs: dict[Path, list[tuple[float, float]]] = {then: [], ROOT: []}
    for _ in range(args.pairs):
        for tree, measured in runs.items():
            done = work(tree, args)
            measured.append((done.seconds, done.memory))
    before, now = np.median(runs[then], axis=0), np.median(runs[ROOT], axis=0)
    ratio = now / before
    return (
        f"{before[0]:.2f} | {now[0]:.2f} | {ratio[0]:.2f} | "
        f"{before[1]:.2f} | {now[1]:.2f} | {ratio[1]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the real cases")
    add("--against", required=True, metavar="COMMIT", help="the earlier commit")
    add("--only", nargs="+", choices=WORK, default=list(WORK), help="only these rows (all)")
    add("--cores", type=int, nargs="+", default=[1, 2], help="(1 2)")
    add("--pairs", type=int, default=5, help="runs of each checkout (%(default)s)")
    args = parser.parse_args()

    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name, errors_in_one_sentence("stopped"):
        folder = Path(name)
        write_inputs(args, folder)
        print(conditions(torch.device("cpu")))
        print(f"medians of {args.pairs} pairs\n")
        print(f"| work | cores | {args.against}, s | now, s | ratio | GiB | GiB now | ratio |")
        print("|---|---|---|---|---|---|---|---|")
        with checkout(args.against, folder / "then") as then:
            for count in tqdm(args.cores, unit="count", disable=None):
                os.sched_setaffinity(0, cores[:count])  # the processes inherit it
                for name in args.only:
                    cells = compare(WORK[name], then, args)
                    tqdm.write(f"| {TITLES[name]} | {count} | {cells} |")


if __name__ == "__main__":
    main()
