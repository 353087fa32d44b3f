"""Write the tables and the run.json of a run of inference.py."""

import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import distributed
from .io.files import RUN, read_table, remove, sentence, update_table, write_json, write_table
from .pipeline import Outputs, Result
from .segmenter import Segmenter
from .visits import Patient

TABLES = ("volumes.csv", "metrics.csv", "growth.csv")


@dataclass
class Outcome:
    """The results of a run, as far as it came."""

    results: list[Result] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # beside those of the cases

    @property
    def rows(self) -> list[dict]:
        """Return the rows of volumes.csv."""
        return [each.volumes for each in self.results]

    @property
    def failed(self) -> dict[str, str]:
        """Return why cases have no mask, or not all files, by case."""
        return {each.volumes["case"]: each.error for each in self.results if each.error}


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


def write_tables(done: list[Result], outputs: Outputs) -> None:
    """Write volumes.csv and metrics.csv, if this is the main process."""
    if not distributed.is_main_process():
        return
    volumes, scores = {}, {}
    for result in done:
        case = result.volumes["case"]
        volumes[case] = result.volumes
        scores[case] = result.scores
    update_table(outputs.folder / "volumes.csv", volumes)
    update_table(outputs.folder / "metrics.csv", scores)


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
    for case, row in read_table(path).items():
        is_current = row["patient"] == owners.get(case) and row[RUN] == run
        if row["patient"] not in names and (is_current or case not in owners):
            rows.append(row)
    for patient in patients:
        rows += [row | {RUN: run} for row in patient.rows]
    rows.sort(key=lambda row: row["patient"])
    if rows:
        write_table(path, rows)
    else:
        remove(path)


@contextmanager
def recorded(
    path: Path, record: dict, sources: Mapping[str, str], segmenter: Segmenter
) -> Iterator[Outcome]:
    """Write run.json, with the `Outcome`, when the block ends, also by an error or Ctrl-C."""
    outcome, error = Outcome(), ""
    if distributed.is_main_process():
        remove(path)  # of an earlier run: what is killed would be taken for it
    began, start = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    try:
        yield outcome
    except BaseException as reason:
        error = sentence(reason) or type(reason).__name__
        raise
    finally:
        content = dict(record)
        content |= {
            "settings": settings_and_sources(content.pop("args"), sources, segmenter),
            "began": began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            "exit_status": 1 if error or outcome.failed else 0,
            "error": error,
            "cases": {each.volumes["case"]: each.state for each in outcome.results},
            "failed": outcome.failed,
            "files": _written(outcome, path.parent, began.timestamp()),
        }
        if distributed.is_main_process():
            # If the disk is full, the error of the block is the one to report.
            with suppress(OSError) if error else nullcontext():
                write_json(path, content)


def _written(outcome: Outcome, folder: Path, since: float) -> list[str]:
    """List the files that a run has written, by their path in `folder` or from the root."""
    files = outcome.files + list(map(folder.joinpath, TABLES + ("args.json",)))
    for result in outcome.results:
        files += map(folder.joinpath, result.files)
    names = []
    for file in files:
        if file.is_file() and file.stat().st_mtime > since - 2:  # clocks of file systems are coarse
            inside = file.is_relative_to(folder)
            names.append(str(file.relative_to(folder) if inside else file.absolute()))
    return names
