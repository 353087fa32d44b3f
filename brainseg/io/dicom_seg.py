"""A mask as a DICOM Segmentation object, which hospital archives, OHIF and 3D Slicer read.

Its SNOMED CT codes are lesion (52988006), a morphologically abnormal structure (49755003), in the
brain (12738006). It is written by highdicom, which requirements-dicom.txt installs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .dicom import is_dicom, is_series, series_files
from .files import MARK, atomic_write
from .scans import Scan
from .slices import Case

if TYPE_CHECKING:
    from pydicom import Dataset

LABEL = "FLAIR abnormality"
MAKER = "brainseg"
LOST = "; export it again from the archive, or leave out --dicom-seg"
# Attributes that a Segmentation object copies from its source and that may be empty.
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip


def check_dicom_packages() -> None:
    """Raise ValueError unless highdicom is installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise ValueError(
            "--dicom-seg needs highdicom, which is not installed; "
            "run: pip install -r requirements-dicom.txt"
        )


def holds_dicom(path: Path) -> bool:
    """Tell whether a case's folder or file contains a DICOM image."""
    return any(map(is_dicom, path.rglob("*") if path.is_dir() else [path]))


def series_of(case: Case) -> Path | None:
    """Return the DICOM series (its folder or a file of it) that FLAIR is read from, or None."""
    return case.flair if isinstance(case, Scan) and is_series(case.flair) else None


def write_dicom_seg(path: Path, case: Scan, mask: np.ndarray, algorithm: str, version: str) -> bool:
    """Write a mask (S, H, W), bool, as a Segmentation of the case's series, atomically.

    `algorithm` and `version` say what made it. Returns whether every frame starts on a whole byte;
    if not, OHIF 3.13 reads them wrongly. Raises ValueError, naming the series, if its instances
    cannot be referenced, OSError if the file cannot be written.
    """
    series = series_of(case)
    sources = read_references(series)
    frames = case.grid.from_axial(mask).transpose(2, 1, 0)  # as in the series: (S, rows, columns)
    try:
        segmentation = _segmentation(sources, frames, algorithm[:64], version[:64])
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # missing attributes
        raise ValueError(f"{series}: no Segmentation can refer to it ({error}){LOST}") from error
    with atomic_write(path) as temporary:
        segmentation.save_as(temporary)
    return frames[0].size % 8 == 0


def _segmentation(
    sources: list[Dataset], frames: np.ndarray, algorithm: str, version: str
) -> Dataset:
    """Make the Segmentation of frames (S, rows, columns), bool, one per source."""
    import highdicom
    from pydicom.sr.codedict import codes

    made_by = highdicom.AlgorithmIdentificationSequence(
        name=algorithm, version=version, family=codes.DCM.ArtificialIntelligence
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label=LABEL,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=made_by,
        anatomic_regions=[codes.SCT.Brain],
        display_color=highdicom.color.CIELabColor(53.2, 80.1, 67.2),  # red
    )
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(frames, dtype=np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=highdicom.UID(),
        series_number=1 + int(getattr(sources[0], "SeriesNumber", None) or 0),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=algorithm,
        software_versions=version,
        device_serial_number="none",
        series_description=f"{LABEL}, {MARK}",
        content_description=LABEL,
        content_creator_name=f"{MAKER}^",
        omit_empty_frames=False,  # they take one bit per voxel, and readers get the source's grid
    )


def read_references(series: Path) -> list[Dataset]:
    """Read the headers of a series, in order of position.

    Raises ValueError, naming it, if a Segmentation could not refer to all of its instances.
    """
    import pydicom

    headers = [
        pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in series_files(series)
    ]
    for name in ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
        without = sum(not getattr(header, name, None) for header in headers)
        if without:
            raise ValueError(f"{series}: {without} of its files have no {name}{LOST}")
    if len({header.SOPInstanceUID for header in headers}) < len(headers):
        raise ValueError(f"{series}: two of its files share one SOPInstanceUID{LOST}")
    for name in ("FrameOfReferenceUID", "StudyInstanceUID"):
        found = {str(getattr(header, name, None) or "") for header in headers}
        if len(found) > 1 or "" in found:
            number = "no" if found == {""} else "more than one"
            raise ValueError(f"{series}: its files have {number} {name}{LOST}")
    for header in headers:
        for name in MAY_BE_EMPTY:
            header.setdefault(name, None)
    return headers
