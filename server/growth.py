"""Answer an upload of several scans of one patient: masks, growth.csv and the figure of growth."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import UploadFile

from brainseg.alignment import Measured
from brainseg.growth import growth_rows
from brainseg.io.files import RUN, write_table
from brainseg.io.formats import SUFFIXES, scan_name
from brainseg.io.predictions import map_files, mark_of
from brainseg.io.scans import Scan
from brainseg.io.sequences import contradiction
from brainseg.patients import patient_named, patient_of
from brainseg.reports.growth import growth_section
from brainseg.visits import follow, in_order_of_time

from .answers import in_base64
from .unpacking import Limits, plain
from .wording import in_page_words

MOST_SCANS = 12  # of one patient in an upload
Parts = Mapping[str, Sequence[UploadFile]]  # by field, as `unpack` takes them


@dataclass(frozen=True)
class SentScan:
    """One of several scans of an upload, not read yet: a volume file, or an unpacked study."""

    name: str  # of its case
    patient_id: str  # of the header of a study; empty if it names nobody
    parts: Parts  # no file for a study

    @property
    def patient(self) -> str:
        return patient_named(self.name, self.patient_id)


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


def several_files(files: Sequence[UploadFile]) -> list[SentScan]:
    """List files that are a scan each: volumes that name no other sequence, no mask; else none."""
    scans = []
    for file in files:
        name = file.filename or ""
        if not name.lower().endswith(SUFFIXES) or contradiction("FLAIR", scan_name(Path(name))):
            return []
        scans.append(SentScan(scan_name(Path(plain(name))), "", {"images": [file]}))
    return scans if len(scans) > 1 else []


def check_several(fields: Collection[str], scans: Sequence[SentScan]) -> None:
    """Raise ValueError for other fields, too many scans, or scans of several patients."""
    if set(fields) != {"images"}:
        raise ValueError("several scans were sent; send them without any other field")
    if len(scans) > MOST_SCANS:
        raise ValueError(f"{len(scans)} scans were sent; send at most {MOST_SCANS} of one patient")
    patients = dict.fromkeys(scan.patient for scan in scans)
    if len(patients) == 1:
        return
    names = f"these are scans of the patients {' and '.join(patients)} by"
    if scans[0].parts:
        raise ValueError(
            f"{names} their names; send one patient's at once, named after the patient and the "
            "date, such as p1_2014-03-02.nii.gz"
        )
    if all(scan.patient_id for scan in scans):
        raise ValueError(f"{names} their PatientID; send the DICOM studies of one patient at once")
    raise ValueError(
        f"{names} the names of their folders, as not every PatientID names somebody; send one "
        "patient's DICOM studies at once, each in a folder named after the patient and the date, "
        "such as p1_2014-03-02"
    )


def check_voxels(name: str, voxels: int, limits: Limits) -> None:
    """Raise ValueError if the scans up to this one take too much memory together."""
    if voxels > limits.voxels:
        most = f"{limits.voxels / 1e6:.0f} million voxels"
        raise ValueError(f"{name}: the scans have over {most} in all; send fewer of them")


def answer_growth(
    scans: Sequence[Measured], fit: dict | None, folder: Path, run: str, no_expected_dsc: str
) -> GrowthAnswer:
    """Measure the growth over one patient's scans; `no_expected_dsc` says why it has no intervals.

    Raises ValueError if nothing tells the order of the scans.
    """
    name = patient_of(scans[0].case)
    ordered, notes = in_order_of_time({name: [scan.case for scan in scans]}, {})
    if not ordered:
        raise ValueError(
            "nothing tells the order of these scans; name each file, or the folder of each DICOM "
            f"study, after its patient and date, such as p1_2014-03-02 ({'; '.join(notes)})"
        )
    by_case = {scan.case.name: scan for scan in scans}
    in_order = ordered[name]
    errors = (fit or {}).get("volume_errors")
    patient, said = follow([(by_case[case.name], day) for case, day in in_order], errors)
    if no_expected_dsc:
        said.append(f"no expected DSC, and so no intervals: {no_expected_dsc}")
    rows = [row | {RUN: run} for row in growth_rows(patient.visits)]
    section = growth_section(patient)
    out, files = folder / "out", {}
    out.mkdir()
    for case, _ in in_order:
        assert isinstance(case, Scan)
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
