"""Answer an upload of several scans of one patient: masks, growth.csv and the figure of growth."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from brainseg.alignment import Measured
from brainseg.growth import growth_rows
from brainseg.io.files import RUN, write_table
from brainseg.io.formats import SUFFIXES, scan_name
from brainseg.io.predictions import map_files, mark_of
from brainseg.io.scans import Scan
from brainseg.io.sequences import contradiction
from brainseg.io.slices import Case
from brainseg.patients import patient_of
from brainseg.reports.growth import growth_section
from brainseg.visits import follow, in_order_of_time

from .answers import in_base64
from .unpacking import Limits
from .wording import in_page_words

MOST_SCANS = 12  # of one patient in an upload


@dataclass
class GrowthAnswer:
    """The result of an upload of several scans."""

    summary: dict  # the patient, its rate, and the rows of growth.csv
    files: dict[str, bytes]  # by name: the masks, growth.csv, growth.png, summary.json
    lines: list[list[str]]  # of the table that the page shows

    def shown(self) -> str:
        """Return all that the page shows as JSON, with the files in base64."""
        shown = {"summary": self.summary, "lines": self.lines, "downloads": self.files}
        return json.dumps({"growth": shown}, default=in_base64)


def is_several_scans(names: Sequence[str]) -> bool:
    """Tell whether files are scans of one patient: volumes that name no other sequence, no mask."""
    if len(names) < 2 or not all(name.lower().endswith(SUFFIXES) for name in names):
        return False
    return not any(contradiction("FLAIR", scan_name(Path(name))) for name in names)


def check_several(parts: Collection[str], count: int) -> None:
    """Raise ValueError if other fields or more scans were sent than the server takes."""
    if set(parts) != {"images"}:
        raise ValueError("several scans were sent; send them without any other field")
    if count > MOST_SCANS:
        raise ValueError(f"{count} scans were sent; send at most {MOST_SCANS} of one patient")


def check_voxels(name: str, voxels: int, limits: Limits) -> None:
    """Raise ValueError if the scans up to this one take too much memory together."""
    if voxels > limits.voxels:
        most = f"{limits.voxels / 1e6:.0f} million voxels"
        raise ValueError(f"{name}: the scans have over {most} in all; send fewer of them")


def answer_growth(
    scans: Sequence[Measured], fit: dict | None, folder: Path, run: str, no_expected_dsc: str
) -> GrowthAnswer:
    """Measure the growth over one patient's scans; `no_expected_dsc` says why it has no intervals.

    Raises ValueError if the scans are of several patients, or nothing tells their order.
    """
    patients: dict[str, list[Case]] = {}
    for scan in scans:
        patients.setdefault(patient_of(scan.case), []).append(scan.case)
    if len(patients) > 1:
        names = " and ".join(patients)
        raise ValueError(
            f"these are scans of the patients {names} by their names; send one patient's at once, "
            "named after the patient and the date, such as p1_2014-03-02.nii.gz"
        )
    ordered, notes = in_order_of_time(patients, {})
    if not ordered:
        raise ValueError(
            "nothing tells the order of these scans; name each after its patient and date, such "
            f"as p1_2014-03-02.nii.gz ({'; '.join(notes)})"
        )
    by_case = {scan.case.name: scan for scan in scans}
    ((name, in_order),) = ordered.items()
    errors = (fit or {}).get("volume_errors")
    patient, said = follow([(by_case[case.name], day) for case, day in in_order], errors)
    if no_expected_dsc:
        said.append(f"no expected DSC, and so no intervals: {no_expected_dsc}")
    rows = [row | {RUN: run} for row in growth_rows(patient.visits)]
    section = growth_section(patient)
    out, files = folder / "out", {}
    out.mkdir()
    for case, _ in in_order:
        assert isinstance(case, Scan)  # a volume file
        for file in map_files(case, "mask"):
            case.write_map(out / file, by_case[case.name].mask, mark_of(run))
            files[file.name] = (out / file).read_bytes()
    write_table(out / "growth.csv", rows)
    files["growth.csv"] = (out / "growth.csv").read_bytes()
    files["growth.png"] = section["picture"]
    summary = {
        "case": name,
        "rate": section["rate"],
        "notes": list(map(in_page_words, notes + said)),
        "growth": rows,
    }
    files["summary.json"] = f"{json.dumps(summary, indent=2, default=str)}\n".encode()
    return GrowthAnswer(json.loads(files["summary.json"]), files, section["lines"])
