"""Recognise and check an upload of several scans of one patient, whose growth is measured."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import UploadFile

from brainseg.io.formats import SUFFIXES, scan_name
from brainseg.io.sequences import contradiction
from brainseg.patients import patient_named

from .unpacking import plain

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


def several_files(files: Sequence[UploadFile]) -> list[SentScan]:
    """List files that are a scan each: volumes that name no other sequence, no mask; else none."""
    scans = []
    for file in files:
        name = file.filename or ""
        if not name.lower().endswith(SUFFIXES) or contradiction("FLAIR", scan_name(Path(name))):
            return []
        scans.append(SentScan(scan_name(Path(plain(name))), "", {"images": [file]}))
    if len(scans) < 2:
        return []
    return scans


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
