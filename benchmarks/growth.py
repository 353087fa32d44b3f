"""Compare measured growth with the truth: phantoms, errors of real masks, and real outlines.

    python3 -m benchmarks.growth --patients 20 --scans 4 --growth 0 4 8     phantoms, segmented
    python3 -m benchmarks.growth --simulate 2000 --scans 2 4 --growth 0 4   errors of the 88
    python3 -m benchmarks.growth --images ./kaggle_3m                       outlines of real lesions

Phantoms (brainseg.phantom) go through inference.py with the shipped weights, so that the whole
program is tried; a row says so for their true masks, too. --simulate draws the error of each volume
from docs/volume_errors.csv: pairs of expected DSC and error of masks that no network had seen. The
outlines are made larger and smaller by known factors, in all three directions, on their own grid.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainseg.diameters import bidimensional
from brainseg.growth import YEAR, Estimate, Visit, estimated_volume, mean_diameter, rate_until
from brainseg.io.layouts import find_case, find_cases
from brainseg.phantom_patients import DAYS, START, write_patients
from brainseg.volume_errors import fit_volume_errors
from cli import errors_in_one_sentence

ROOT = Path(__file__).resolve().parents[1]
FACTORS = (0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
SPACING = (5.0, 1.0, 1.0)  # mm, of the outlines: the files state none
COLUMNS = f"{'scans':>6} {'patients':>9} {'true':>6} {'bias':>7} {'spread':>7} {'covered':>8} "
COLUMNS += f"{'said to grow':>13} {'to shrink':>10}"


def read_errors() -> tuple[np.ndarray, np.ndarray, dict]:
    """Return expected DSC and log(true / predicted volume) of each of the 88, and the fit."""
    with open(ROOT / "docs" / "volume_errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [float(row["expected_dsc"]) for row in rows]
    predicted = [int(row["predicted_voxels"]) for row in rows]
    true = [int(row["lesion_voxels"]) for row in rows]
    errors = np.log(np.array(true) / np.array(predicted))
    return np.array(expected), errors, fit_volume_errors(expected, predicted, true)


def visit(day: datetime.date, volume: Estimate) -> Visit:
    return Visit("", "", day, volume, None, SPACING, "", "", "")


def simulate(patients: int, scans: int, growth: float) -> list[Estimate]:
    """Measure lesions that grow at a speed, with errors drawn from those of the 88."""
    rng = np.random.default_rng(0)
    expected, errors, fit = read_errors()
    rates = []
    for _ in range(patients):
        start, day = rng.uniform(*START), datetime.date(2010, 1, 1)
        first, visits = day, []
        for k in rng.integers(len(errors), size=scans):
            true = (start + growth * (day - first).days / YEAR) ** 3 / 2000
            measured = float(true * np.exp(-errors[k]))
            visits.append(visit(day, estimated_volume(measured, float(expected[k]), fit)))
            day += datetime.timedelta(days=int(rng.integers(*DAYS)))
        rates.append(rate_until(visits))
    return rates


def segment_phantoms(
    patients: int, scans: int, growth: float, size: int
) -> tuple[list[Estimate], list[Estimate]]:
    """Segment phantom patients; return their rates by the masks, and by their true masks."""
    with tempfile.TemporaryDirectory() as folder:
        images, predictions = Path(folder, "images"), Path(folder, "predictions")
        write_patients(images, patients, scans, growth, size)
        command = [sys.executable, str(ROOT / "inference.py"), "--images", str(images)]
        command += ["--predictions", str(predictions), "--figure", str(Path(folder, "dsc.png"))]
        done = subprocess.run([*command, "--no-register"], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr[-2000:])
        with open(predictions / "growth.csv", newline="") as file:
            last = {row["patient"]: row for row in csv.DictReader(file)}
        true = [true_rate(images, row["patient"]) for row in last.values()]
    names = ("mm_per_year", "mm_per_year_low", "mm_per_year_high")
    return [Estimate(*(float(row[name] or "nan") for name in names)) for row in last.values()], true


def true_rate(images: Path, patient: str) -> Estimate:
    """Measure the rate of a phantom on its true masks: what thick slices and pixels do to it."""
    visits = []
    for path in sorted(images.glob(f"{patient}_*_mask.nii.gz")):
        case = find_case(path.with_name(path.name.replace("_mask", "")))
        assert case.spacing is not None  # of a NIfTI file
        ml = float(case.read_mask().sum() * np.prod(case.spacing) / 1000)
        day = datetime.date.fromisoformat(case.name.rpartition("_")[2])
        visits.append(visit(day, Estimate(ml)))
    return rate_until(visits)


def line(scans: int, growth: float, rates: Sequence[Estimate]) -> str:
    """Format bias and spread in mm a year, and shares of the patients."""
    values = np.array([rate.value for rate in rates])
    lows, highs = (np.array([getattr(rate, end) for rate in rates]) for end in ("low", "high"))
    text = f"{scans:6} {len(rates):9} {growth:6.1f} {values.mean() - growth:+7.2f} "
    text += f"{values.std(ddof=1):7.2f} "
    if np.isnan(lows).all():
        return text + f"{'-':>8} {'-':>13} {'-':>10}"
    covered = ((lows <= growth) & (growth <= highs)).mean()
    return text + f"{covered:8.2f} {(lows > 0).mean():13.2f} {(highs < 0).mean():10.2f}"


def scaled(mask: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Make a mask (S, H, W) larger by a factor, on the same grid, at a random place in a voxel."""
    places = np.argwhere(mask)
    low, high = places.min(axis=0), places.max(axis=0)
    shape = np.ceil((high - low + 1) * factor).astype(int) + 4
    indices = np.moveaxis(np.indices(shape), 0, -1) - 2 + rng.uniform(-0.5, 0.5, 3)
    source = np.floor(low + (indices + 0.5) / factor).astype(int)
    inside = ((source >= 0) & (source < mask.shape)).all(axis=-1)
    z, y, x = np.moveaxis(np.where(inside[..., None], source, 0), -1, 0)
    return mask[z, y, x] & inside


def try_outlines(images: Path) -> None:
    """Print the errors of diameters of real outlines made larger and smaller, in %."""
    rng = np.random.default_rng(0)
    errors: dict[float, list[list[float]]] = {factor: [] for factor in FACTORS}
    for case in find_cases(images):
        mask = case.read_mask()
        exact = bidimensional(mask, SPACING)
        for factor in FACTORS:
            if exact is None:
                continue
            changed = scaled(mask, factor, rng)
            found = bidimensional(changed, SPACING)
            box = np.argwhere(changed[found.slice]) if found else np.zeros((1, 2))
            sides = np.ptp(box, axis=0) + 1
            diameter = mean_diameter(float(changed.sum())) / mean_diameter(float(mask.sum()))
            errors[factor].append(
                [
                    found.longest / (factor * exact.longest) - 1 if found else -1.0,
                    found.product / (factor**2 * exact.product) - 1 if found else -1.0,
                    diameter / factor - 1,
                    float(sides.prod()) / (factor**2 * exact.product) - 1,
                ]
            )
    names = ("longest", "product", "mean diameter", "sides of a box")
    print("error in %, mean (standard deviation), of outlines made larger by a factor")
    print(f"{'factor':>6} {'n':>4}", *(f"{name:>17}" for name in names))
    for factor, rows in errors.items():
        table = 100 * np.array(rows)
        cells = [f"{m:+8.2f} ({s:6.2f})" for m, s in zip(table.mean(0), table.std(0), strict=True)]
        print(f"{factor:6.2f} {len(rows):4}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patients", type=int, default=20, help="phantoms")
    parser.add_argument("--scans", type=int, nargs="+", default=[4])
    parser.add_argument("--growth", type=float, nargs="+", default=[0.0, 4.0, 8.0])
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a phantom")
    parser.add_argument("--simulate", type=int, help="patients to simulate instead of phantoms")
    parser.add_argument("--images", type=Path, help="real cases with masks, for their outlines")
    args = parser.parse_args()
    if args.images:
        try_outlines(args.images)
        return
    print(COLUMNS)
    for scans in args.scans:
        for growth in args.growth:
            if args.simulate:
                print(line(scans, growth, simulate(args.simulate, scans, growth)), flush=True)
                continue
            measured, true = segment_phantoms(args.patients, scans, growth, args.size)
            print(line(scans, growth, measured), flush=True)
            print(line(scans, growth, true), "   by the true masks", flush=True)


if __name__ == "__main__":
    with errors_in_one_sentence("stopped"):
        main()
