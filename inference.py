"""Segment cases, with or without masks, and score those that have masks.

    python3 inference.py --images ./kaggle_3m                    every case; shipped weights
    python3 inference.py --images ./scans/patient_7              one case: a folder of slices
    python3 inference.py --images ./scans/patient_7.nii.gz       NIfTI, NRRD, MetaImage, DICOM
    python3 inference.py --flair f.nii.gz --post t1ce.nii.gz     one file per sequence
    python3 inference.py --images ./kaggle_3m --subset validation
    python3 inference.py --images ./kaggle_3m --weights weights/unet.pt --skip-existing
    torchrun --nproc-per-node=4 inference.py --images ./cohort   cases shared by four GPUs
    python3 inference.py --images ./kaggle_3m --weights weights/unet-<hash>.onnx   from export.py
    python3 inference.py --images ./kaggle_3m --weights folds/   all weights in it, averaged
    python3 inference.py --images ./cohort --report report.html  one page to browse
    python3 inference.py --images ./dicom --dicom-seg            also a DICOM Segmentation
    python3 inference.py --config settings.yaml                  flag names as keys; flags win

For each source slice, PREDICTIONS/<case>/ gets <case>_<k>_mask.tif (0 or 255, height and width of
the source) and <case>_<k>.png with outlines (truth dashed green, prediction red);
PREDICTIONS/<case>.gif animates them. A volume file gets one mask on its own grid instead of the
TIFFs, PREDICTIONS/<case>_mask.nii.gz. volumes.csv has a row per case: what was found, its volume,
the expected DSC, notes on what happened to the scan, and a warning if somebody should look: a mask
that is empty, only at an end of the scan or probably poor, a scan unlike most, or unread. If
cases have masks, metrics.csv and, from two on, a figure of sorted DSCs are written too; cases that
the weights were trained on are marked. For patients with two or more dated scans, growth.csv has
the mean tumour diameter, its changes and mm a year, with intervals (brainseg/growth.py). Tables
keep the rows of other cases; their last column names the weights and settings that made each mask.
args.json (a valid --config) and run.json (settings and where each is from, files, seconds, exit
status) record how the last run was made. Files that this program did not write are never replaced,
and only one run at a time writes to a folder.

--probabilities adds <case>_probability.nii.gz (float32) or <case>_<k>_probability.tif and, for an
ensemble, _disagreement: the standard deviation over its networks. --dicom-seg adds <case>_seg.dcm.
--no-pictures leaves out pictures, GIFs and the figure; --spacing gives slices their millimetres.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import cli
import utils
from brainseg import distributed
from brainseg.devices import rank_device, rank_workers
from brainseg.io.archives import unpacked
from brainseg.io.dicom_seg import algorithm_name
from brainseg.io.files import RUN
from brainseg.io.layouts import Source
from brainseg.io.opening import Sequences, check_file_apart
from brainseg.patients import SUBSETS, names_of, patients_of_card, read_dates
from brainseg.pipeline import Outputs, segment_all
from brainseg.run_files import open_run
from brainseg.segmenter import MASK_SETTINGS, Segmenter
from brainseg.splits import list_cohort, select_cases
from brainseg.visits import follow_all
from brainseg.weights import shipped_weights


# fmt: off
def get_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    parser.group("what")
    add = parser.add
    add("--images", type=Path, help="folder or .zip of cases, or one case (./kaggle_3m)")
    add("--flair", type=Path, help="instead of --images: the FLAIR sequence of one scan")
    add("--pre", type=Path, help="with --flair: pre-contrast, on any grid (FLAIR)")
    add("--post", type=Path, help="with --flair: post-contrast, on any grid (FLAIR)")
    add("--register", action=cli.SWITCH,
        help="register the other sequences to FLAIR; --no-register: nor a patient's scans to the "
        "first of them")
    add("--subset", default="all", help=f"all, {', '.join(SUBSETS)}")
    add("--cases", nargs="+", help="only these cases")
    cli.add_cohort_options(parser)
    add("--spacing", type=float, nargs="+", least=0.01, below=100,
        help="of slices, which state none: mm from slice to slice, row to row, column to column")
    add("--dates", type=Path,
        help="CSV with the columns case and date (DICOM headers, BIDS tables, names)")
    add("--skip-existing", action="store_true",
        help="keep the masks that an earlier run made with these weights and settings")
    add("--weights", type=Path, nargs="+",
        help="weights or .onnx file; several are averaged, or those in a folder or, if none, "
        "in its folders (the shipped weights)")
    cli.add_segmenter_options(parser)
    parser.group("where to")
    add("--predictions", type=Path, default="./predictions", help="folder to write to")
    add("--figure", type=Path, default="./dsc.png", help="bar chart of the cases' DSC, from two on")
    add("--pictures", action=cli.SWITCH, default=True,
        help="draw outlined slices, GIFs and the figure; --no-pictures: masks and tables alone")
    add("--probabilities", action="store_true", help="also write maps of the lesion probability")
    add("--dicom-seg", action="store_true", help="also write a Segmentation of each DICOM series")
    add("--report", type=Path, help="HTML page to write: each case at its slice with most lesion")
    return parser


# fmt: on
def main(argv: list[str] | None = None) -> None:
    with distributed.only_main_process_prints():
        parser = get_parser()
        args = parser.parse_args(argv)
        options = cli.segmenter_options(parser, args)
        if (args.pre or args.post) and not args.flair:
            parser.error("--pre and --post go with --flair")
        others = ("images", "cases", "sequences", "channels")
        if args.flair and (args.subset != "all" or any(getattr(args, name) for name in others)):
            parser.error(f"--flair is one scan; leave out --{', --'.join(others)}, --subset")
        if args.spacing and (args.flair or len(args.spacing) != 3):
            parser.error("--spacing takes three lengths in mm, for slices; files state their own")
    stopped = "stopped; finished cases are kept: continue with --skip-existing"
    with cli.errors_in_one_sentence(stopped), distributed.process_group():
        with unpacked(args.images or Path("kaggle_3m"), distributed.world_size()) as images:
            failed = run(args, options, parser.sources, images)
    if failed:
        sys.exit(1)


def run(args: argparse.Namespace, options: dict, given_by: Mapping[str, str], images: Path) -> int:
    """Segment cases in `images`, write and report; return the number of cases with an error.

    Several processes share the cases; the main one writes the tables and reports on all. `given_by`
    says where each of the `args` is from.
    """
    sources = list_sources(args, images)
    figure = args.figure if args.pictures and len(sources) > 1 else None
    for option, path in (("--figure", figure), ("--report", args.report)):
        if path and not path.resolve().is_relative_to(args.predictions.resolve()):
            check_file_apart(path, option, sources, images)
    dates = read_dates(args.dates, names_of(sources)) if args.dates else {}
    weights = args.weights or [shipped_weights("unet")]
    # The first rank of a machine caches what TensorRT builds, for the others.
    with distributed.local_rank_zero_first():
        options["device"] = rank_device(options["device"])
        segmenter = Segmenter.from_weights(weights, **options)
    trained_on = patients_of_card(segmenter.card, "train", cases=sources)
    record = utils.provenance(args) | {
        "weights": {str(file): digest for file, digest in segmenter.hashes.items()},
        "settings": segmenter.values(MASK_SETTINGS),
        RUN: segmenter.run,
    }
    algorithm = None
    if args.dicom_seg:
        algorithm = algorithm_name(segmenter.hashes), record["commit"] or "unknown"
    outputs = Outputs(
        folder=args.predictions,
        figure=args.figure,
        page=args.report,
        run=segmenter.run,
        trained_on=trained_on,
        probabilities=args.probabilities,
        pictures=args.pictures,
        algorithm=algorithm,
    )
    opened = open_run(outputs, sources, args.skip_existing, segmenter, record, given_by)
    with opened as current:
        workers = rank_workers(args.workers)
        share = distributed.shard(sources)
        results = segment_all(share, segmenter, current.outputs, workers, bool(args.register))
        current.collect(results, len(share), sources[0].labels)
        if distributed.is_main_process():
            errors = (segmenter.expected_dsc_fit or {}).get("volume_errors")
            register = args.register is not False
            patients, notes = follow_all(
                sources, current.rows, args.predictions, dates, errors, register, workers
            )
            current.report(patients, notes, weights)
    return len(current.failed)


def list_sources(args: argparse.Namespace, images: Path) -> list[Source]:
    """List the chosen cases. Raises ValueError or OSError if there is none, or one is unusable."""
    scan = None
    if args.flair:
        scan = Sequences(args.flair, args.pre, args.post, None)
    options = cli.cohort_options(args) | {"names": args.cases, "other_than": args.predictions}
    sources = list_cohort(images, **options, scan=scan)
    if args.spacing:
        sources = [replace(source, given_spacing=tuple(args.spacing)) for source in sources]
    return select_cases(sources, args.subset)


if __name__ == "__main__":
    main()
