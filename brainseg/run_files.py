"""The files of a run of inference.py: where they may be written, the tables, what it prints."""

import datetime
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from . import distributed
from .io import files
from .io.dicom_seg import holds_dicom
from .io.files import RUN
from .io.labels import NO_LESION, Labels
from .io.opening import Source
from .io.pictures import save_dsc_figure
from .optional import import_optional
from .pipeline import Outputs, Result
from .reports.cohort import save_cohort
from .reports.growth import growth_section, growth_table
from .reports.scores import scores_text
from .reports.volumes import read_volumes, volumes_table, warn_of_unlike
from .segmenter import Segmenter, settings_text
from .visits import Patient

TABLES = ("volumes.csv", "metrics.csv", "growth.csv")
SAVE_EVERY = 5.0  # seconds between writings of the tables


@dataclass
class Run:
    """A run: what made it, and its results as far as it came."""

    outputs: Outputs
    segmenter: Segmenter
    record: dict  # what args.json says
    results: list[Result] = field(default_factory=list)
    drawn: list[Path] = field(default_factory=list)  # figure and page

    @property
    def rows(self) -> list[dict]:
        """Return the rows of volumes.csv."""
        return [each.volumes for each in self.results]

    @property
    def failed(self) -> dict[str, str]:
        """Return why cases have no mask, or not all files, by case."""
        return {each.volumes["case"]: each.error for each in self.results if each.error}

    def collect(self, results: Iterable[Result], count: int, labels: Labels) -> None:
        """Take this rank's `count` results as they come, then those of the other ranks.

        The tables are written now and then, and at the end. Raises ValueError if a chosen label is
        in no mask.
        """
        if distributed.is_main_process():
            results = tqdm(results, "segmenting", count, unit="case", disable=None)
        saved = time.monotonic()
        for result in results:
            if result.error:
                tqdm.write(f"error: {result.error}", file=sys.stderr)
            self.results.append(result)
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.results = distributed.gather(self.results)
        warn_of_unlike(self.rows, {each.volumes["case"]: each.spacing for each in self.results})
        self.save()
        for of_rank in distributed.gather([labels.by_case]):
            labels.by_case.update(of_rank)
        labels.check()

    def save(self) -> None:
        """Write volumes.csv and metrics.csv, if this is the main process."""
        if not distributed.is_main_process() or not self.results:
            return
        volumes, scores = {}, {}
        for result in self.results:
            case = result.volumes["case"]
            if result.state == "edited":
                continue
            volumes[case] = result.volumes
            scores[case] = result.scores
        files.update_table(self.outputs.folder / "volumes.csv", volumes)
        files.update_table(self.outputs.folder / "metrics.csv", scores)

    def report(
        self, patients: Sequence[Patient], notes: Sequence[str], weights: Sequence[Path]
    ) -> None:
        """Write growth.csv, print what was found, and draw the figure and the page."""
        outputs, folder = self.outputs, self.outputs.folder
        owners = {row["case"]: row["patient"] for row in self.rows}
        write_growth(patients, notes, folder / "growth.csv", outputs.run, owners)
        reason = self.segmenter.no_expected_dsc
        print(volumes_table(self.rows, folder / "volumes.csv", reason).as_text(), end="\n\n")
        scores = [each.scores for each in self.results if each.scores]
        if scores:
            print(scores_text(scores))
            if not any(row["lesion_voxels"] for row in scores):
                print(NO_LESION.format(len(scores)), file=sys.stderr)
            line = f"table: {folder / 'metrics.csv'}"
            if outputs.pictures and len(scores) > 1:
                marked = [row["case"] for row in scores if row["trained_on"]]
                save_dsc_figure(outputs.figure, {row["case"]: row["dsc"] for row in scores}, marked)
                self.drawn.append(outputs.figure)
                line += f"   figure: {outputs.figure}"
            print(line)
        if patients:
            print(growth_table(patients, folder / "growth.csv").as_text(), end="\n\n")
        if outputs.page:
            sections = list(map(growth_section, patients))
            thumbnails = [each.thumbnail for each in self.results]
            save_cohort(outputs.page, self.rows, thumbnails, self.record, sections, scores)
            self.drawn.append(outputs.page)
            print(f"report: {outputs.page}")
        count = Counter(each.state for each in self.results)
        network = f"{' '.join(map(str, weights))} by {self.segmenter.runtime}"
        line = f"{count['segmented']} of {len(self.results)} cases segmented with {network}"
        if count["kept"]:
            line += f", {count['kept']} kept from an earlier run"
        print(f"{line}; {'masks and pictures' if outputs.pictures else 'masks'}: {folder}")


@contextmanager
def open_run(
    outputs: Outputs,
    sources: Sequence[Source],
    skip_existing: bool,
    segmenter: Segmenter,
    record: dict,
    given_by: Mapping[str, str],
) -> Iterator[Run]:
    """Check and lock the places to write to, read which masks to keep, and record the run.

    `record` becomes args.json and, with where each setting is from (`given_by`), run.json. Raises
    ValueError or OSError if results cannot be written, if they would replace sources or files of
    others, if another run is writing there, or if masks to keep were made otherwise.
    """
    folder = outputs.folder
    for source in sources:
        # Volume files too, as true masks are beside them; links are followed.
        path = source.folder.resolve()
        targets = folder, folder / path.name, folder / source.name
        if path in [target.resolve() for target in targets]:
            raise ValueError(f"{path}: is a source; name another folder with --predictions")
        if outputs.figure.parent.resolve() == (folder / source.name).resolve():
            raise ValueError(
                f"{outputs.figure}: is among the pictures of a case; name another place with "
                "--figure"
            )
    if outputs.algorithm:
        import_optional("highdicom", "--dicom-seg", "dicom")
        if not any(holds_dicom(source.folder) for source in sources):
            raise ValueError(f"{sources[0].folder}: is not a DICOM series; leave out --dicom-seg")
    check_places(outputs)
    with distributed.main_process_locks((folder, "--predictions", "run")):
        run = Run(outputs, segmenter, record)
        with recorded(run, given_by):
            if skip_existing:
                earlier = read_volumes(folder / "volumes.csv")
                check_kept(folder, earlier, sources, segmenter.run)
                run.outputs = replace(outputs, earlier=earlier)
            distributed.barrier()  # every rank has read the earlier volumes.csv
            if distributed.is_main_process():
                files.write_json(folder / "args.json", record)
                print(f"settings: {settings_text(segmenter)}", flush=True)
                for note in segmenter.notes:
                    print(note, file=sys.stderr)
            yield run


def check_places(outputs: Outputs) -> None:
    """Raise ValueError or OSError if a file cannot be written, or would replace one of others."""
    files.check_writable(outputs.folder)
    figure = outputs.figure
    try:
        files.check_writable(figure.parent)
    except OSError as error:
        fault = "its folder cannot be written; name another file with --figure"
        raise OSError(f"{figure}: {fault}") from error
    files.clear_leftovers(figure.parent)
    if figure.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg") or figure.is_dir():
        raise ValueError(f"{figure}: --figure must be a .png, .pdf, .svg or .jpg file")
    files.check_ours(figure)
    if outputs.page:
        files.check_page(outputs.page)
    for name in TABLES:
        files.check_ours(outputs.folder / name)
        files.read_table(outputs.folder / name)
    for name in ("args.json", "run.json"):
        files.check_ours(outputs.folder / name)


def check_kept(
    folder: Path, earlier: Mapping[str, dict], sources: Sequence[Source], run: str
) -> None:
    """Raise ValueError if another `run` made the masks of `sources`, by `earlier` volumes.csv."""
    names = [source.name for source in sources if source.name in earlier]
    others = [name for name in names if earlier[name][RUN] not in ("", run)]
    if others:
        same_weights = earlier[others[0]][RUN].partition("-")[0] == run.partition("-")[0]
        what = "other settings" if same_weights else "other weights"
        raise ValueError(
            f"{folder}: {len(others)} of the masks there were made with {what} ({others[0]}); "
            "leave out --skip-existing, or name another folder with --predictions"
        )


@contextmanager
def recorded(run: Run, given_by: Mapping[str, str]) -> Iterator[None]:
    """Write the tables and run.json when the block ends, also by an error or Ctrl-C."""
    path, error = run.outputs.folder / "run.json", ""
    if distributed.is_main_process():
        files.remove(path)  # of an earlier run: what is killed would be taken for it
    began, start = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    try:
        yield
    except BaseException as reason:
        error = files.sentence(reason) or type(reason).__name__
        with suppress(OSError):  # if the disk is full, the error of the block is the one to report
            run.save()
        raise
    finally:
        content = dict(run.record)
        content |= {
            "settings": settings_and_sources(content.pop("args"), given_by, run.segmenter),
            "began": began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            "exit_status": 1 if error or run.failed else 0,
            "error": error,
            "cases": {each.volumes["case"]: each.state for each in run.results},
            "failed": run.failed,
            "files": written(run, began.timestamp()),
        }
        if distributed.is_main_process():
            with suppress(OSError) if error else nullcontext():
                files.write_json(path, content)


def settings_and_sources(
    args: Mapping[str, object], sources: Mapping[str, str], segmenter: Segmenter
) -> dict[str, dict]:
    """Return each setting of a run and where it is from: the command line, a file or the card."""
    settings = {}
    for name, value in args.items():
        settings[name] = {"value": value, "from": sources[name]}
    for name, reason in segmenter.reasons.items():
        value = getattr(segmenter, name)
        settings[name]["value"] = value if isinstance(value, (bool, int, float)) else str(value)
        if reason != "given":
            settings[name]["from"] = reason
    return settings


def write_growth(
    patients: Sequence[Patient],
    notes: Sequence[str],
    path: Path,
    run: str,
    owners: Mapping[str, str],
) -> None:
    """Write the rows of patients with several scans to growth.csv, and say what was left out.

    They are sorted by patient, and in order of time. Earlier rows of these patients are replaced,
    and those of cases that the run has made anew, or knows as another patient's, removed: `owners`
    are the patients by case.
    """
    for note in notes:
        print(note, file=sys.stderr)
    names = {patient.name for patient in patients}
    rows: list[dict] = []
    for case, row in files.read_table(path).items():
        is_current = row["patient"] == owners.get(case) and row[RUN] == run
        if row["patient"] not in names and (is_current or case not in owners):
            rows.append(row)
    for patient in patients:
        rows += [row | {RUN: run} for row in patient.rows]
    rows.sort(key=lambda row: row["patient"])
    files.replace_table(path, rows)


def written(run: Run, since: float) -> list[str]:
    """List the files that a run has written, by their path in its folder or from the root."""
    folder = run.outputs.folder
    paths = run.drawn + [folder / name for name in TABLES + ("args.json",)]
    for result in run.results:
        paths += map(folder.joinpath, result.files)
    names = []
    for path in paths:
        if path.is_file() and path.stat().st_mtime > since - 2:  # clocks of file systems are coarse
            inside = path.is_relative_to(folder)
            names.append(str(path.relative_to(folder) if inside else path.absolute()))
    return names
