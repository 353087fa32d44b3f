"""Segment cases, with or without masks, and score those that have masks.

    python3 inference.py --images ./kaggle_3m                    every case, the shipped weights
    python3 inference.py --images ./scans/patient_7              one case: a folder of slices
    python3 inference.py --images ./scans/patient_7.nii.gz       NIfTI, NRRD, MetaImage, DICOM
    python3 inference.py --flair f.nii.gz --post t1ce.nii.gz     sequences in files of their own
    python3 inference.py --images ./kaggle_3m --subset validation
    python3 inference.py --images ./kaggle_3m --weights weights/unet.pt --skip-existing
    torchrun --nproc-per-node=4 inference.py --images ./cohort   cases shared by four GPUs
    python3 inference.py --images ./kaggle_3m --weights weights/unet-<hash>.onnx   of export.py
    python3 inference.py --images ./kaggle_3m --weights folds/   an ensemble: all weights in it
    python3 inference.py --config settings.yaml                  the names of the flags; flags win

For every source slice, PREDICTIONS/<case>/ gets <case>_<k>_mask.tif (0 or 255, the source's
height and width) and <case>_<k>.png with the outline drawn (green truth, red prediction);
PREDICTIONS/<case>.gif shows them one after another. A volume file gets one mask on its own grid,
PREDICTIONS/<case>_mask.nii.gz, in place of the TIFFs. Where cases have masks, metrics.csv and the
figure of sorted DSCs are written too, and cases that the weights were trained on are marked.
args.json says how it was done.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from brainseg.devices import in_groups, in_order
from brainseg.distributed import (
    barrier,
    gather,
    is_main_process,
    local_rank_zero_first,
    only_main_process_prints,
    process_group,
    rank_device,
    rank_workers,
    shard,
)
from brainseg.io.files import check_writable, sentence, write_json, write_table
from brainseg.io.labels import Labels
from brainseg.io.layouts import Source, find_sequences
from brainseg.io.pictures import save_dsc_figure
from brainseg.io.predictions import find_masks, since, table_row, write_case
from brainseg.io.scans import Scan
from brainseg.io.slices import Case
from brainseg.metrics import describe, describe_distances
from brainseg.preprocess import Frame
from brainseg.segmenter import Segmenter
from brainseg.splits import (
    SUBSETS,
    by_subset,
    count_patients,
    list_cohort,
    patient_of,
    patients_of_card,
    select_cases,
    use_patients,
)
from brainseg.weights import file_hash, read_card, shipped_weights, weights_files
from utils import (
    add_cohort_options,
    add_segmenter_options,
    fail,
    make_parser,
    provenance,
    segmenter_options,
    sigterm_interrupts,
)

GROUP = 4  # batches; a GPU is handed cases of so many slices at once


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--images", type=Path, help="cases, or one case (./kaggle_3m)")
    add("--flair", type=Path, help="in place of --images: the FLAIR sequence of one scan")
    add("--pre", type=Path, help="with --flair: pre-contrast, on any grid (FLAIR)")
    add("--post", type=Path, help="with --flair: post-contrast, on any grid (FLAIR)")
    add("--register", action="store_true", help="move the other sequences to fit FLAIR")
    add("--subset", type=str, default="all", help=f"all, {', '.join(SUBSETS)} (%(default)s)")
    add("--cases", type=str, nargs="+", help="only these cases")
    add_cohort_options(add)
    add("--skip-existing", action="store_true", help="keep the masks of an earlier run")
    add(
        "--weights",
        type=Path,
        nargs="+",
        help="weights or .onnx file; several, or a folder: averaged (those of the project)",
    )
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
    probabilities: Tensor | None = None  # the network's output (S, 1, N, N)
    prediction: np.ndarray | None = None  # (S, H, W) bool
    row: dict | None = None  # of the table, where there is a truth


def main(argv: list[str] | None = None) -> None:
    with only_main_process_prints():
        parser = get_parser()
        args = parser.parse_args(argv)
        options = segmenter_options(parser, args)
        if (args.pre or args.post) and not args.flair:
            parser.error("--pre and --post go with --flair")
        if args.flair and (args.images or args.cases or args.sequences or args.subset != "all"):
            parser.error("--flair is one scan; --images, --cases and the like choose others")
    try:
        with sigterm_interrupts(), process_group():
            failed = run(args, options)
    except (ValueError, OSError) as error:
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory beside the network: {str(error).splitlines()[0]}; use --device cpu")
    except KeyboardInterrupt:
        sys.exit("stopped; finished cases are kept, go on with --skip-existing")
    if failed:
        sys.exit(1)


def run(args: argparse.Namespace, options: dict) -> int:
    """Segment the chosen cases, write and report; the number of cases that could not be read.

    Several processes share the cases; the main one writes the table and reports on all.
    """
    weights = args.weights or [shipped_weights("unet")]
    about = provenance(args)  # before this process takes its part of the machine
    # The first rank of a machine keeps what TensorRT builds, and the others find it.
    with local_rank_zero_first():
        segmenter, sources = prepare(args, options, weights)
    if len(sources) > 1:
        print(count_patients(by_subset(source.name for source in sources)), flush=True)
    files = weights_files(weights)
    trained_on = set().union(*(patients_of_card(read_card(file), "train") for file in files))
    about["weights"] = {str(file): file_hash(file) for file in files}
    about["since"] = since(args.predictions, about, args.skip_existing)
    barrier()  # every rank has read the earlier args.json
    if is_main_process():
        write_json(args.predictions / "args.json", about)
    rows, failed, kept = [], 0, 0
    try:
        for result in segment_all(shard(sources), segmenter, args, about["since"]):
            rows.append(None)
            if isinstance(result, Exception):
                tqdm.write(f"error: {sentence(result)}", file=sys.stderr)
                failed += 1
                continue
            kept += not result.fresh
            if result.row:
                seen = patient_of(result.case.name) in trained_on
                rows[-1] = result.row | {"trained_on": int(seen)}
        rows, failed, kept = gather(rows), sum(gather([failed])), sum(gather([kept]))
    finally:
        rows = [row for row in rows if row]
        if rows and is_main_process():
            write_table(args.predictions / "metrics.csv", rows)
    labels = sources[0].labels
    for found in gather([labels.found]):
        labels.found.update(found)
    labels.check()
    summary = (
        f"{len(sources) - failed - kept} of {len(sources)} cases segmented with "
        f"{' '.join(map(str, weights))} by {segmenter.runtime}"
        + (f", {kept} kept from an earlier run" if kept else "")
        + f"; masks and pictures: {args.predictions}"
    )
    if is_main_process():
        report(rows, args, summary)
    return failed


def prepare(
    args: argparse.Namespace, options: dict, weights: list[Path]
) -> tuple[Segmenter, list[Source | Case]]:
    """The segmenter and the cases; raises what would stop the run."""
    args.workers = rank_workers(args.workers)
    segmenter = Segmenter.from_weights(
        weights, **options | {"device": rank_device(options["device"])}
    )
    if args.flair:
        scan = find_sequences(args.flair, args.pre, args.post)
        found = [replace(scan, labels=Labels(args.labels))]
        use_patients(args.patients, [scan.name])
    else:
        images = args.images or Path("kaggle_3m")
        how = args.sequences, args.labels, args.patients
        found = list_cohort(images, *how, args.cases, args.predictions)
    sources = select_cases(found, args.subset)
    check_writable(args.predictions)
    check_writable(args.figure.parent)
    for source in sources:
        path = source.folder.resolve()
        target = args.predictions.resolve()
        if path in (target, target / path.name):  # also of a volume file: beside it lie true masks
            raise ValueError(f"{path}: is a source; name another folder with --predictions")
    return segmenter, sources


def segment_all(
    sources: list[Source | Case], segmenter: Segmenter, args: argparse.Namespace, since: float
) -> Iterator[Result | Exception]:
    """For each case its result, written to disk, or what is wrong with its files.

    Threads read ahead and write behind while the network runs on batches that go on from one case
    to the next; or, on a processor, each thread does all of a case.
    """

    def segmented(group: list[Result | Exception]) -> list[Result | Exception]:
        results = [item for item in group if slices_of(item)]
        for item, part in zip(results, probabilities_in_memory(segmenter, results), strict=True):
            # Threads may use CUDA at once, but not every other accelerator.
            item.images, item.probabilities = None, part if part.is_cuda else part.cpu()
        return group

    def finished(item: Result | Exception) -> Result | Exception:
        if isinstance(item, Result):
            if item.fresh:
                item.prediction = segmenter.finish(item.probabilities, item.frame)
                item.probabilities = None
                write_case(args.predictions, item.case, item.volume, item.prediction, item.truth)
            if item.truth is not None:
                item.row = table_row(item.case, item.prediction, item.truth)
        return item

    def loaded(source: Source | Case) -> Result | Exception:
        return load(source, segmenter, args, since)

    bar = functools.partial(
        tqdm,
        desc="segmenting",
        total=len(sources),
        unit="case",
        disable=None if is_main_process() else True,
    )
    if segmenter.on_cpu and len(sources) > 1:
        # Several cases at once with a core each: nothing waits for a thread that another one holds.
        def whole(source: Source | Case) -> Result | Exception:
            return finished(*segmented([loaded(source)]))

        return iter(bar(in_order(whole, sources, args.workers)))
    ahead = bar(in_order(loaded, sources, args.workers))
    groups = in_groups(ahead, lambda item: slices_of(item) or 1, GROUP * segmenter.batch_size)
    return in_order(finished, chain.from_iterable(map(segmented, groups)), args.workers)


def slices_of(item: Result | Exception) -> int:
    """How many slices the network has to do."""
    return len(item.images) if isinstance(item, Result) and item.fresh else 0


def probabilities_in_memory(segmenter: Segmenter, items: list[Result]) -> Sequence[Tensor]:
    """Those of each case; where the memory does not do, by smaller batches from now on."""
    lengths = list(map(slices_of, items))
    while items:
        try:
            place = items[0].images.device
            images = torch.cat([item.images.to(place) for item in items])
            return segmenter.probabilities(images, lengths=lengths).split(lengths)
        except torch.OutOfMemoryError as error:
            if segmenter.batch_size == 1:
                raise ValueError(f"{segmenter.device}: not even one slice fits in it") from error
        size = segmenter.batch_size
        segmenter.batch_size = size // 2
        tqdm.write(
            f"{segmenter.device} is out of memory at --batch-size {size}; going on with "
            f"{segmenter.batch_size}",
            file=sys.stderr,
        )
        for item in items:
            item.images = item.images.cpu()
    return []


def load(
    source: Source | Case, segmenter: Segmenter, args: argparse.Namespace, since: float
) -> Result | Exception:
    """Read a case and prepare it for the network; what is wrong is handed on, not raised."""
    try:
        case = source.open() if isinstance(source, Source) else source
        if args.register and isinstance(case, Scan):
            case = replace(case, register=True)
        for note in case.notes:
            tqdm.write(note, file=sys.stderr)
        volume, truth = case.read_pair() if case.masks else (case.read(), None)
        earlier = find_masks(args.predictions, case, since) if args.skip_existing else None
        if earlier is not None and earlier.shape == volume.shape[:3]:
            return Result(case, volume, truth, fresh=False, prediction=earlier)
    except (ValueError, OSError) as error:
        return error
    try:
        images, frame = segmenter.preprocess(volume, case.aspect)
    except ValueError as error:
        return ValueError(f"{case.folder}: {error}")
    for note in frame.notes:
        tqdm.write(f"{case.folder}: {note}", file=sys.stderr)
    if frame.blank:
        tqdm.write(f"{case.folder}: every voxel is 0, and so is its mask", file=sys.stderr)
    return Result(case, volume, truth, fresh=True, images=images, frame=frame)


def report(rows: list[dict], args: argparse.Namespace, summary: str) -> None:
    """Print the summary; if any case had a mask, the table before it, and draw the figure."""
    if rows:
        report_scores(rows, args)
    print(summary)


def report_scores(rows: list[dict], args: argparse.Namespace) -> None:
    width = max(len(row["case"]) for row in rows) + 2
    hd95 = "hd95_mm" if all("hd95_mm" in row for row in rows) else "hd95_px"
    print(
        f"{'case':{width}}slices   lesion  predicted    DSC    IoU  precision  recall  "
        f"HD95 {hd95[-2:]}"
    )
    for row in rows:
        print(
            f"{row['case']:{width}}{row['slices']:6d} {row['lesion_voxels']:8d} "
            f"{row['predicted_voxels']:10d} {row['dsc']:6.3f} {row['iou']:6.3f} "
            f"{row['precision']:10.3f} {row['recall']:7.3f} {row[hd95]:8.1f}"
            f"{'  *' if row['trained_on'] else ''}"
        )
    unseen = [row for row in rows if not row["trained_on"]]
    if len(unseen) < len(rows):
        print("* of a patient whom the weights were trained on: not counted below")
    if unseen:
        patients = [patient_of(row["case"]) for row in unseen]
        print(describe([row["dsc"] for row in unseen], patients))
        print(describe_distances(unseen, hd95))
    scores = {row["case"]: row["dsc"] for row in rows}
    save_dsc_figure(args.figure, scores, [row["case"] for row in rows if row["trained_on"]])
    print(f"table: {args.predictions / 'metrics.csv'}   figure: {args.figure}")


if __name__ == "__main__":
    main()
