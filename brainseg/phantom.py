"""Synthetic brain MRI with a FLAIR lesion, and patients whose lesion grows at a known speed.

    python3 -m brainseg.phantom ./phantom --cases 20 --size 96 --slices 16 --seed 0

writes ./phantom/phantom_000/phantom_000_1.tif (H x W x 3 uint8: pre-contrast, FLAIR, post-contrast)
and phantom_000_1_mask.tif (H x W uint8, 0 or 255), and so on for each slice of each case: the
folder layout of the kaggle_3m data set.

    python3 -m brainseg.phantom ./patients --patients 20 --scans 4 --growth 4

writes patients. Each scan is a NIfTI file of three channels with its mask,
phantom_000_2014-03-02.nii.gz, of the same head: turned and moved in the scanner, with slices of
another thickness, another contrast, gain and coil bias, and its own noise. truth.csv has the true
volume and mean tumour diameter.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .growth import YEAR, mean_diameter
from .io.files import MARK, RUN, check_ours, has_mark, remove, write_table
from .io.grid import Grid
from .io.nifti import write_nifti
from .io.predictions import save_tiff
from .phantom_head import (
    MIN_SIZE,
    MIN_SLICES,
    head_coordinates,
    make_volume,
    paint_head,
    paint_lesion,
    scan,
)

FIELD, HEIGHT = 220.0, 150.0  # mm: the field of view of a slice, and from the first to the last
DETAIL = 112, 80  # rows, and slices, of the head before it is scanned
LAYERS = 3  # of a slice, averaged as a thick slice averages what lies in it
THICKNESS = (3.0, 4.0, 5.0, 6.0)  # mm
START = 25.0, 40.0  # mm, the mean tumour diameter on the first scan
DAYS = 120, 300  # from one scan to the next
DIRECTIONS = 20_000  # in which the lesion's outline is integrated


def write_data_set(
    directory: str | Path,
    cases: int = 20,
    slices: int = 16,
    size: int = 96,
    seed: int = 0,
    no_lesion: int = 0,
) -> None:
    """Write `cases` folders `phantom_000`, ... into `directory`, replacing phantoms of that name.

    Every `no_lesion`-th case is healthy (0: none). A case does not depend on the number of cases.
    Raises OSError if the directory cannot be written, ValueError if other files are in the way.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError("it is a file, not a folder")
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(cases):
        lesion = not no_lesion or (index + 1) % no_lesion != 0
        volume, mask = make_volume((seed, index), slices, size, lesion)
        folder = directory / f"phantom_{index:03d}"
        remove(folder, _is_phantom)
        folder.mkdir()
        for k, (image, label) in enumerate(zip(volume, mask, strict=True), start=1):
            name = f"{folder.name}_{k}"
            save_tiff(folder / f"{name}.tif", image, MARK, photometric="rgb")
            save_tiff(folder / f"{name}_mask.tif", label * np.uint8(255), MARK)


def _is_phantom(folder: Path) -> bool:
    """Tell whether every file in a folder was written by this program."""
    return folder.is_dir() and all(map(has_mark, folder.iterdir()))


@dataclass(frozen=True)
class Lesion:
    """A lesion whose outline keeps its form: its distance in a direction is that times its size."""

    centre: np.ndarray  # (3,) in mm: z, y, x
    form: np.ndarray  # (3, 3)
    bumps: np.ndarray  # (4, 3) directions

    def reach(self, offsets: np.ndarray) -> np.ndarray:
        """Return by how much a lesion of size 1 must grow to reach offsets (..., 3), in mm."""
        distance = np.linalg.norm(offsets, axis=-1)
        unit = offsets / np.maximum(distance, 1e-9)[..., None]
        irregular = np.exp(0.12 * np.sin(3 * unit @ self.bumps.T).sum(axis=-1))
        return distance * np.linalg.norm(unit @ self.form, axis=-1) * irregular

    def size_of(self, ml: float) -> float:
        """Return the size at which the lesion has a volume: the integral over all directions."""
        k = np.arange(DIRECTIONS) + 0.5
        z = 1 - 2 * k / DIRECTIONS
        turn = np.pi * (1 + 5**0.5) * k  # a spiral that covers the sphere evenly
        radius = np.sqrt(1 - z**2)
        unit = np.stack((z, radius * np.sin(turn), radius * np.cos(turn)), axis=1)
        volume = 4 * np.pi / 3 * np.mean(self.reach(unit) ** -3.0)  # of size 1, in mm^3
        return (1000 * ml / volume) ** (1 / 3)


@dataclass(frozen=True)
class Head:
    """A head without noise, its lesion apart: (Z, Y, X, 3) with the positions of its voxels."""

    image: np.ndarray
    offsets: np.ndarray  # (Z, Y, X, 3) in mm, from the lesion's centre
    lesion: Lesion
    seed: np.random.SeedSequence  # of the lesion's texture

    @classmethod
    def make(cls, seed: np.random.SeedSequence) -> Head:
        head_seed, lesion_seed, texture_seed = seed.spawn(3)
        size, slices = DETAIL
        rng = np.random.default_rng(head_seed)
        head = head_coordinates(rng, slices, size)
        image, brain = paint_head(rng, head)
        rng = np.random.default_rng(lesion_seed)
        inner = (np.linalg.norm(head, axis=0) < 0.5) & (np.abs(head[2]) > 0.25) & (brain > 0.9)
        places = np.argwhere(inner)
        positions = np.moveaxis(np.indices(brain.shape), 0, -1) * _voxel()
        centre = rng.choice(places) * _voxel()
        frame = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        form = frame / rng.uniform(0.8, 1.25, size=3)
        bumps = rng.standard_normal((4, 3))
        return cls(image, positions - centre, Lesion(centre, form, bumps), texture_seed)

    def with_lesion(self, ml: float) -> np.ndarray:
        """Return the head with a lesion of a volume, and its share of each voxel: (Z, Y, X, 4)."""
        size = self.lesion.size_of(ml)
        depth = size - self.lesion.reach(self.offsets)  # roughly mm below its surface
        share = np.clip(0.5 + depth / 3, 0, 1)  # an edge of 3 mm, half of it outside
        image = self.image.copy()
        paint_lesion(np.random.default_rng(self.seed), image, share)
        return np.concatenate((image, share[..., None]), axis=-1)


def _voxel() -> np.ndarray:
    """Return the size of a voxel of a head before it is scanned, in mm: z, y, x."""
    size, slices = DETAIL
    return np.array([HEIGHT / (slices - 1), FIELD / size, FIELD / size])


def scan_head(
    rng: np.random.Generator, painted: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, Grid]:
    """Scan a head with its lesion; return voxels (X, Y, Z, 3) uint8, mask (X, Y, Z) and grid."""
    z, y, x = _voxel().tolist()
    source = sitk.GetImageFromArray(painted.astype(np.float32), isVector=True)
    source.SetSpacing((x, y, z))
    middle = [FIELD / 2, FIELD / 2, HEIGHT / 2]
    turn = sitk.Euler3DTransform()
    turn.SetCenter(middle)
    pitch, roll, yaw = rng.uniform(-0.12, 0.12, 3).tolist()
    turn.SetRotation(pitch, roll, yaw)
    turn.SetTranslation(rng.uniform(-6, 6, 3).tolist())
    thickness = float(rng.choice(THICKNESS))
    pixel = FIELD / size * float(rng.uniform(0.95, 1.1))
    slices = int(HEIGHT / thickness)
    thin = sitk.Resample(
        source,
        [size, size, slices * LAYERS],
        turn,
        sitk.sitkLinear,
        [0.0, 0.0, -thickness / LAYERS],  # so that the middle layer of the first slice is at 0
        [pixel, pixel, thickness / LAYERS],
    )
    layers = sitk.GetArrayFromImage(thin).reshape(slices, LAYERS, size, size, 4)
    averaged = layers.mean(axis=1)
    image, mask = averaged[..., :3], averaged[..., 3] > 0.5
    image = np.maximum(image, 0) ** rng.uniform(0.85, 1.2)  # another contrast
    voxels = scan(rng, image)
    grid = Grid((size, size, slices), (pixel, pixel, thickness), (0.0, 0.0, 0.0), np.eye(3))
    return voxels.transpose(2, 1, 0, 3), mask.transpose(2, 1, 0), grid


def write_patients(
    directory: Path, patients: int, scans: int, growth: float, size: int = 96, seed: int = 0
) -> None:
    """Write the dated scans of patients whose lesions grow by `growth` mm a year in diameter.

    A patient does not depend on the number of patients, nor the head on the growth. Raises OSError
    if the directory cannot be written, ValueError if other files are in the way.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(patients):
        head_seed, *scan_seeds = np.random.SeedSequence((seed, index)).spawn(scans + 1)
        head = Head.make(head_seed)
        rng = np.random.default_rng((seed, index))
        start = rng.uniform(*START)
        day = datetime.date(2005, 1, 1) + datetime.timedelta(days=int(rng.integers(3000)))
        first = day
        for scan_seed in scan_seeds:
            years = (day - first).days / YEAR
            ml = max(start + growth * years, 1.0) ** 3 / 2000
            name = f"phantom_{index:03d}_{day}"
            painted = head.with_lesion(ml)
            voxels, mask, grid = scan_head(np.random.default_rng(scan_seed), painted, size)
            for end, values in (("", voxels), ("_mask", mask.astype(np.uint8))):
                path = directory / f"{name}{end}.nii.gz"
                check_ours(path)
                write_nifti(path, values, grid, directory, MARK)
            row = {"patient": f"phantom_{index:03d}", "case": name}
            row |= {"ml": ml, "diameter_mm": mean_diameter(ml), "mm_per_year": growth}
            rows.append(row | {RUN: "phantom"})
            day += datetime.timedelta(days=int(rng.integers(*DAYS)))
    check_ours(directory / "truth.csv")
    write_table(directory / "truth.csv", rows)


def main(argv: list[str] | None = None) -> None:
    """Write the data set that the command line describes; exit with one sentence if it cannot."""
    parser = argparse.ArgumentParser(
        description="Write synthetic brain MRI with a FLAIR lesion, in the layout of kaggle_3m.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("directory", metavar="DIR", help="folder for the case folders; created if missing")
    add("--cases", type=int, default=20, help="number of cases")
    add("--size", type=int, default=96, help=f"rows and columns of a slice, {MIN_SIZE} or more")
    add("--slices", type=int, default=16, help=f"slices per case, {MIN_SLICES} or more")
    add("--seed", type=int, default=0, help="the same seed gives the same images")
    add("--no-lesion", type=int, default=0, metavar="N", help="every N-th case is healthy; 0: none")
    add("--patients", type=int, default=0, help="patients scanned again and again, in NIfTI")
    add("--scans", type=int, default=4, help="with --patients: scans of each, from 2 to 12")
    add("--growth", type=float, default=4.0, help="with --patients: mm a year in diameter")
    args = parser.parse_args(argv)
    if min(args.seed, args.no_lesion, args.patients) < 0 or args.cases < 1:
        parser.error("--cases must be 1 or more, --seed, --no-lesion and --patients 0 or more")
    if not (2 <= args.scans <= 12 and abs(args.growth) <= 20 and args.size >= MIN_SIZE):
        parser.error("--scans must be from 2 to 12, --growth at most 20, --size 32 or more")
    try:
        if args.patients:
            write_patients(
                Path(args.directory), args.patients, args.scans, args.growth, args.size, args.seed
            )
            print(f"{args.patients} patients of {args.scans} scans, written to {args.directory}")
            return
        write_data_set(
            args.directory, args.cases, args.slices, args.size, args.seed, args.no_lesion
        )
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        reason = error.strerror or error
        sys.exit(f"phantom.py: cannot write the cases to {args.directory}: {reason}")
    print(f"{args.cases} cases of {args.slices} slices, written to {args.directory}")


if __name__ == "__main__":
    main()
