"""Synthetic brain MRI with a FLAIR lesion, in the folder layout of the kaggle_3m data set.

    python3 -m brainseg.phantom ./phantom --cases 20 --size 96 --slices 16 --seed 0

writes ./phantom/phantom_000/phantom_000_1.tif (H x W x 3 uint8: pre-contrast, FLAIR, post-contrast)
and phantom_000_1_mask.tif (H x W uint8, 0 or 255), and so on for each slice of each case.
`--patients 20 --scans 4 --growth 4` writes patients instead, see brainseg/phantom_patients.py.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from .io.files import MARK, has_mark, remove
from .io.slices import save_tiff
from .phantom_head import MIN_SIZE, MIN_SLICES, make_volume
from .phantom_patients import write_patients


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
