"""Segment cases, with or without masks, and score those that have masks.

    python3 inference.py --images ./kaggle_3m                    every case, the shipped weights
    python3 inference.py --images ./scans/patient_7              one case folder
    python3 inference.py --images ./kaggle_3m --subset validation
    python3 inference.py --images ./kaggle_3m --weights weights/unet.pt --skip-existing

For every source slice, PREDICTIONS/<case>/ gets <case>_<k>_mask.tif (0 or 255, the source's
height and width) and <case>_<k>.png with the outline drawn (green truth, red prediction);
PREDICTIONS/<case>.gif shows them one after another. Where cases have masks, metrics.csv and the
figure of sorted DSCs are written too, and cases that the weights were trained on are marked.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from torch import Tensor
from tqdm import tqdm

from checkpoint import read_card, shipped_weights
from dataset import SUBSETS, patient_of, select_cases
from metrics import describe, in_pixels, score
from segmentation import Segmenter
from utils import (
    add_segmenter_options,
    check_writable,
    fail,
    in_order,
    make_parser,
    naming,
    outline,
    save_dsc_figure,
    save_gif,
    segmenter_options,
    sentence,
    to_grey,
    write_table,
)
from volume import Case, Frame, case_folders, find_case, read_slice


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--images", type=Path, default="./kaggle_3m", help="cases, or one case (%(default)s)")
    add("--subset", type=str, default="all", help=f"all, {', '.join(SUBSETS)} (%(default)s)")
    add("--folds", type=int, help="with --fold: the subsets of a cross-validation")
    add("--fold", type=int, help="the fold that was validated on, from 0")
    add("--cases", type=str, nargs="+", help="only these cases")
    add("--skip-existing", action="store_true", help="keep the masks of an earlier run")
    add("--weights", type=Path, help="weights file (those that came with the project)")

    add_segmenter_options(parser)
    add = parser.add_argument_group("where to").add_argument
    add(
        "--predictions", type=Path, default="./predictions", help="folder to write to (%(default)s)"
    )
    add("--figure", type=Path, default="./dsc.png", help="bars of each case's DSC (%(default)s)")
    return parser


@dataclass
class Result:
    """A case on its way from its files to its masks and scores."""

    case: Case
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool
    fresh: bool  # to be segmented now, not found as an earlier run left it
    images: Tensor | None = None  # the network's input
    frame: Frame | None = None
    prediction: np.ndarray | None = None  # (S, H, W) bool
    row: dict | None = None  # of the table, where there is a truth


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    options = segmenter_options(parser, args)
    if (args.folds is None) != (args.fold is None):
        parser.error("--folds and --fold go together, as in --folds 5 --fold 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    try:
        failed = run(args, options)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit("stopped; finished cases are kept, go on with --skip-existing")
    sys.exit(1 if failed else 0)


def run(args: argparse.Namespace, options: dict) -> int:
    """Segment the chosen cases, write and report; the number of cases that could not be read."""
    weights = args.weights or shipped_weights("unet")
    segmenter = Segmenter.from_weights(weights, **options)
    trained_on = set(map(patient_of, read_card(weights).get("cases", {}).get("train", ())))
    found = case_folders(args.images, args.cases)
    folders = select_cases(found, args.subset, args.folds, args.fold)
    check_writable(args.predictions)
    for folder in folders:
        if (args.predictions / folder.name).resolve() == folder.resolve():
            raise ValueError(f"{folder}: is a source; name another folder with --predictions")

    rows, failed, kept = [], 0, 0
    try:
        for result in segment_all(folders, segmenter, args):
            if isinstance(result, Exception):
                tqdm.write(f"error: {sentence(result)}", file=sys.stderr)
                failed += 1
                continue
            kept += not result.fresh
            if result.row:
                seen = patient_of(result.case.name) in trained_on
                rows.append(result.row | {"trained_on": int(seen)})
    finally:
        if rows:
            write_table(args.predictions / "metrics.csv", rows)
    report(rows, args)
    done = len(folders) - failed - kept
    print(
        f"{done} of {len(folders)} cases segmented with {weights}"
        + (f", {kept} kept from an earlier run" if kept else "")
        + f"; masks and pictures: {args.predictions}"
    )
    return failed


def segment_all(
    folders: list[Path], segmenter: Segmenter, args: argparse.Namespace
) -> Iterator[Result | Exception]:
    """For each case folder its result, written to disk, or what is wrong with its files.

    Threads read ahead and write behind while the network runs.
    """

    def segmented() -> Iterator[Result | Exception]:
        loading = in_order(lambda folder: load(folder, segmenter, args), folders, args.workers)
        for item in tqdm(loading, "segmenting", len(folders), unit="case", disable=None):
            if isinstance(item, Result) and item.fresh:
                item.prediction = segmenter.segment(item.images, item.frame)
                item.images = None
            yield item

    def finish(item: Result | Exception) -> Result | Exception:
        if isinstance(item, Result):
            if item.fresh:
                write_case(item, args.predictions)
            if item.truth is not None:
                item.row = row_of(item)
        return item

    return in_order(finish, segmented(), args.workers)


def load(folder: Path, segmenter: Segmenter, args: argparse.Namespace) -> Result | Exception:
    """Read a case and prepare it for the network; what is wrong is handed on, not raised."""
    try:
        case = find_case(folder)
        volume, truth = case.read_pair() if case.masks else (case.read(), None)
        earlier = find_prediction(case, args.predictions) if args.skip_existing else None
        if earlier is not None and earlier.shape == volume.shape[:3]:
            return Result(case, volume, truth, fresh=False, prediction=earlier)
    except (ValueError, OSError) as error:
        return error
    try:
        images, frame = segmenter.preprocess(volume)
    except ValueError as error:
        return ValueError(f"{folder}: {error}")
    return Result(case, volume, truth, fresh=True, images=images, frame=frame)


def mask_name(case: Case, number: int) -> str:
    return f"{case.name}_{number}_mask.tif"


def find_prediction(case: Case, predictions: Path) -> np.ndarray | None:
    """The mask (S, H, W) that an earlier run wrote, if it is there whole."""
    paths = [predictions / case.name / mask_name(case, number) for number in case.numbers]
    if not all(path.is_file() for path in paths):
        return None
    try:
        return np.concatenate([read_slice(path)[None, ..., 0] for path in paths]) > 0
    except ValueError:  # damaged, or of several sizes: made anew
        return None


def write_case(result: Result, predictions: Path) -> None:
    """Write masks, outlined slices and the GIF, each whole; other files of the folder stay."""
    case, folder = result.case, predictions / result.case.name
    pictures = outline(to_grey(result.volume), result.prediction, result.truth, side=256)
    masks = result.prediction * np.uint8(255)
    save_gif(predictions / f"{case.name}.gif", pictures)
    with (
        naming(folder),
        tempfile.TemporaryDirectory(dir=predictions, prefix=f".{case.name}-") as scratch,
    ):
        for number, mask, picture in zip(case.numbers, masks, pictures, strict=True):
            iio.imwrite(Path(scratch) / mask_name(case, number), mask)
            iio.imwrite(Path(scratch) / f"{case.name}_{number}.png", picture)
        folder.mkdir(exist_ok=True)
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def row_of(result: Result) -> dict:
    return {
        "case": result.case.name,
        "slices": len(result.truth),
        "lesion_voxels": int(result.truth.sum()),
        "predicted_voxels": int(result.prediction.sum()),
        **in_pixels(score(result.prediction, result.truth)),
    }


def report(rows: list[dict], args: argparse.Namespace) -> None:
    """Print the table and its summary, and draw the figure, if any case had a mask."""
    if not rows:
        return
    width = max(len(row["case"]) for row in rows) + 2
    print(f"{'case':{width}}slices   lesion  predicted    DSC    IoU  precision  recall  HD95 px")
    for row in rows:
        print(
            f"{row['case']:{width}}{row['slices']:6d} {row['lesion_voxels']:8d} "
            f"{row['predicted_voxels']:10d} {row['dsc']:6.3f} {row['iou']:6.3f} "
            f"{row['precision']:10.3f} {row['recall']:7.3f} {row['hd95_px']:8.1f}"
            f"{'  *' if row['trained_on'] else ''}"
        )
    unseen = [row for row in rows if not row["trained_on"]]
    if len(unseen) < len(rows):
        print("* of a patient whom the weights were trained on: not counted below")
    if unseen:
        print(describe([row["dsc"] for row in unseen]))
    scores = {row["case"]: row["dsc"] for row in rows}
    save_dsc_figure(args.figure, scores, [row["case"] for row in rows if row["trained_on"]])
    print(f"table: {args.predictions / 'metrics.csv'}   figure: {args.figure}")


if __name__ == "__main__":
    main()
