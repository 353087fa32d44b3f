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
that is empty, at an end of the scan or probably poor, a scan unlike most of the run, or unread. If
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
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import cli
import utils
from brainseg import distributed
from brainseg.io import files
from brainseg.io.archives import unpacked
from brainseg.io.dates import read_dates
from brainseg.io.dicom_seg import algorithm_name, holds_dicom
from brainseg.io.labels import NO_LESION, Labels
from brainseg.io.layouts import Source
from brainseg.io.opening import find_sequences
from brainseg.io.pictures import save_dsc_figure
from brainseg.io.slices import Case
from brainseg.optional import import_optional
from brainseg.patients import SUBSETS, names_of, patients_of_card, with_patients
from brainseg.pipeline import Outputs, Result, segment_all
from brainseg.reports.cohort import save_cohort
from brainseg.reports.growth import growth_section, growth_table
from brainseg.reports.page import check_page
from brainseg.reports.scores import scores_text
from brainseg.reports.volumes import check_kept, read_volumes, volumes_table, warn_of_unlike
from brainseg.run_files import TABLES, Outcome, recorded, write_growth, write_tables
from brainseg.segmenter import MASK_SETTINGS, Segmenter, settings_text
from brainseg.splits import list_cohort, select_cases
from brainseg.visits import Patient, follow_all
from brainseg.weights import shipped_weights

SAVE_EVERY = 5.0  # seconds between writings of the tables


# fmt: off
def get_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    parser.group("what")
    add = parser.add
    add("--images", type=Path, help="folder or .zip of cases, or one case (./kaggle_3m)")
    add("--flair", type=Path, help="instead of --images: the FLAIR sequence of one scan")
    add("--pre", type=Path, help="with --flair: pre-contrast, on any grid (FLAIR)")
    add("--post", type=Path, help="with --flair: post-contrast, on any grid (FLAIR)")
    add("--register", action=argparse.BooleanOptionalAction,
        help="register the other sequences to FLAIR; --no-register: nor a patient's scans to the "
        "first of them")
    add("--subset", type=str, default="all", help=f"all, {', '.join(SUBSETS)}")
    add("--cases", type=str, nargs="+", help="only these cases")
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
    add("--pictures", action=argparse.BooleanOptionalAction, default=True,
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
        with unpacked(args.images or Path("kaggle_3m")) as images:
            failed = run(args, options, parser.sources, images)
    if failed:
        sys.exit(1)


def run(args: argparse.Namespace, options: dict, given_by: Mapping[str, str], images: Path) -> int:
    """Segment cases in `images`, write and report; return the number of cases with an error.

    Several processes share the cases; the main one writes the tables and reports on all. `given_by`
    says where each of the `args` is from.
    """
    weights = args.weights or [shipped_weights("unet")]
    # The first rank of a machine caches what TensorRT builds, for the others.
    with distributed.local_rank_zero_first():
        options["device"] = distributed.rank_device(options["device"])
        segmenter = Segmenter.from_weights(weights, **options)
        sources = list_sources(args, images)
        check_outputs(sources, args.predictions, args.figure, args.report, args.dicom_seg)
    dates = read_dates(args.dates, names_of(sources)) if args.dates else {}
    record = utils.provenance(args)
    record["weights"] = {str(file): digest for file, digest in segmenter.hashes.items()}
    record["settings"] = segmenter.values(MASK_SETTINGS)
    record[files.RUN] = segmenter.run
    if distributed.is_main_process():
        print(f"settings: {settings_text(segmenter)}", flush=True)
        for note in segmenter.notes:
            print(note, file=sys.stderr)
    locks = distributed.main_process_locks((args.predictions, "--predictions", "run"))
    with locks, recorded(args.predictions / "run.json", record, given_by, segmenter) as outcome:
        outputs = plan_outputs(args, segmenter, sources, record["commit"])
        distributed.barrier()  # every rank has read the earlier volumes.csv
        if distributed.is_main_process():
            files.write_json(args.predictions / "args.json", record)
        workers = distributed.rank_workers(args.workers)
        segment(sources, segmenter, outputs, workers, bool(args.register), outcome.results)
        if distributed.is_main_process():
            measured = [row for row in outcome.rows if row["slices"]]
            errors = (segmenter.expected_dsc_fit or {}).get("volume_errors")
            register = args.register is not False
            patients, notes = follow_all(
                sources, measured, args.predictions, dates, errors, register, workers
            )
            owners = {row["case"]: row["patient"] for row in outcome.rows}
            growth = args.predictions / "growth.csv"
            write_growth(patients, notes, growth, segmenter.run, owners)
            table = args.predictions / "volumes.csv"
            text = volumes_table(outcome.rows, table, segmenter.no_expected_dsc).as_text()
            print(text, end="\n\n")
            network = f"{' '.join(map(str, weights))} by {segmenter.runtime}"
            outcome.files += report(args, outcome, patients, network, record)
    return len(outcome.failed)


def list_sources(args: argparse.Namespace, images: Path) -> Sequence[Source | Case]:
    """List the chosen cases. Raises ValueError or OSError if there is none, or one is unusable."""
    if args.flair:
        scan = find_sequences(args.flair, args.pre, args.post)
        return with_patients([replace(scan, labels=Labels(args.labels))], args.patients)
    chosen, output = args.cases, args.predictions
    sources = list_cohort(images, names=chosen, other_than=output, **cli.cohort_options(args))
    if args.spacing:
        sources = [replace(source, given_spacing=tuple(args.spacing)) for source in sources]
    return select_cases(sources, args.subset)


def plan_outputs(
    args: argparse.Namespace,
    segmenter: Segmenter,
    sources: Sequence[Source | Case],
    commit: str | None,
) -> Outputs:
    """Decide what to write and to keep; ValueError if masks to keep were made otherwise."""
    earlier = {}
    if args.skip_existing:
        earlier = read_volumes(args.predictions / "volumes.csv")
        check_kept(args.predictions, earlier, names_of(sources), segmenter.run)
    algorithm = None
    if args.dicom_seg:
        algorithm = algorithm_name(segmenter.hashes), commit or "unknown"
    return Outputs(
        args.predictions,
        segmenter.run,
        earlier=earlier,
        trained_on=patients_of_card(segmenter.card, "train", cases=sources),
        probabilities=args.probabilities,
        pictures=args.pictures,
        thumbnails=args.report is not None,
        algorithm=algorithm,
    )


def segment(
    sources: Sequence[Source | Case],
    segmenter: Segmenter,
    outputs: Outputs,
    workers: int | None,
    register: bool,
    done: list[Result],
) -> None:
    """Segment this rank's share, write tables, put results into `done`; ValueError for --labels."""
    share = distributed.shard(sources)
    results = segment_all(share, segmenter, outputs, workers, register)
    if distributed.is_main_process():
        results = tqdm(results, "segmenting", len(share), unit="case", disable=None)
    saved = time.monotonic()
    try:
        for result in results:
            if result.error:
                tqdm.write(f"error: {result.error}", file=sys.stderr)
            done.append(result)
            if time.monotonic() - saved > SAVE_EVERY:
                write_tables(done, outputs)
                saved = time.monotonic()
        done[:] = distributed.gather(done)
        spacings = {result.volumes["case"]: result.spacing for result in done}
        warn_of_unlike([result.volumes for result in done], spacings)
    finally:
        write_tables(done, outputs)
    labels = sources[0].labels
    for of_rank in distributed.gather([labels.by_case]):
        labels.by_case.update(of_rank)
    labels.check()


def check_outputs(
    sources: Sequence[Source | Case], predictions: Path, figure: Path, page: Path | None, seg: bool
) -> None:
    """Raise ValueError or OSError if results cannot be written or would overwrite sources."""
    files.check_writable(predictions)
    try:
        files.check_writable(figure.parent)
    except OSError as error:
        fault = "its folder cannot be written; name another file with --figure"
        raise OSError(f"{figure}: {fault}") from error
    files.clear_leftovers(figure.parent)
    if figure.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg") or figure.is_dir():
        raise ValueError(f"{figure}: --figure must be a .png, .pdf, .svg or .jpg file")
    if page:
        check_page(page)
    tables = tuple(map(predictions.joinpath, TABLES))
    for path in (figure, predictions / "args.json", predictions / "run.json") + tables:
        files.check_ours(path)
    for path in tables:
        files.read_table(path)
    if seg:
        import_optional("highdicom", "--dicom-seg", "dicom")
        if not any(holds_dicom(source.folder) for source in sources):
            raise ValueError(f"{sources[0].folder}: is not a DICOM series; leave out --dicom-seg")
    for source in sources:
        # Volume files too, as true masks are beside them; links are followed.
        path = source.folder.resolve()
        targets = predictions, predictions / path.name, predictions / source.name
        if path in [target.resolve() for target in targets]:
            raise ValueError(f"{path}: is a source; name another folder with --predictions")


def report(
    args: argparse.Namespace,
    outcome: Outcome,
    patients: Sequence[Patient],
    network: str,
    record: dict,
) -> list[Path]:
    """Print scores, growth and a summary that names the `network`; return the pictures drawn."""
    folder, done, drawn = args.predictions, outcome.results, []
    scores = [result.scores for result in done if result.scores]
    if scores:
        print(scores_text(scores))
        if not any(row["lesion_voxels"] for row in scores):
            print(NO_LESION.format(len(scores)), file=sys.stderr)
        marked = [row["case"] for row in scores if row["trained_on"]]
        line = f"table: {folder / 'metrics.csv'}"
        if args.pictures and len(scores) > 1:
            save_dsc_figure(args.figure, {row["case"]: row["dsc"] for row in scores}, marked)
            drawn.append(args.figure)
            line += f"   figure: {args.figure}"
        print(line)
    if patients:
        print(growth_table(patients, folder / "growth.csv").as_text(), end="\n\n")
    if args.report:
        sections = list(map(growth_section, patients))
        pictures = [result.thumbnail for result in done]
        save_cohort(args.report, outcome.rows, pictures, record, sections, scores)
        drawn.append(args.report)
        print(f"report: {args.report}")
    count = Counter(result.state for result in done)
    line = f"{count['segmented']} of {len(done)} cases segmented with {network}"
    if count["kept"]:
        line += f", {count['kept']} kept from an earlier run"
    print(f"{line}; {'masks and pictures' if args.pictures else 'masks'}: {folder}")
    return drawn


if __name__ == "__main__":
    main()
