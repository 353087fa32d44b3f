"""A mask as a DICOM Segmentation object, which hospital archives, OHIF and 3D Slicer read.

Its SNOMED CT codes are lesion (52988006), a morphologically abnormal structure (49755003), in the
brain (12738006). It is written by highdicom, which requirements-dicom.txt installs. Its geometry
is that of the checked grid; of the headers it copies only what is valid.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydicom import DataElement, Dataset
from pydicom.config import RAISE
from pydicom.datadict import dictionary_VR
from pydicom.uid import MRImageStorage
from pydicom.valuerep import DA, TM, validate_value

from ..optional import import_optional
from .dicom import Series, is_dicom, text
from .files import MARK, PROGRAM, atomic_write
from .grid import Grid
from .quiet import quiet
from .scans import Scan
from .series import series_headers
from .slices import Case

LABEL = "FLAIR abnormality"
LOST = "; export it again from the archive, or leave out --dicom-seg"
UIDS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID",
)  # fmt: skip
# What a Segmentation copies from its source. The first ones must be there, but may be empty.
REQUIRED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
OPTIONAL = (
    "IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved",
    "DeidentificationMethod", "StudyDescription", "LossyImageCompression", "Manufacturer",
    "ManufacturerModelName",
)  # fmt: skip
CHOICES = {
    "PatientSex": ("M", "F", "O"),
    "PatientIdentityRemoved": ("YES", "NO"),
    "LossyImageCompression": ("00", "01"),
}
LONGEST = {"LO": 64, "SH": 16, "PN": 64}  # characters of a text; of each of the three in a name
LAST_NUMBER = 2**31 - 1


def holds_dicom(path: Path) -> bool:
    """Tell whether a case's folder or file contains a DICOM image."""
    if not path.is_dir():
        return is_dicom(path)
    return any(map(is_dicom, path.rglob("*")))


def series_of(case: Case) -> Series | None:
    """Return the DICOM series that FLAIR is read from, or None."""
    if isinstance(case, Scan) and isinstance(case.flair, Series):
        return case.flair
    return None


def algorithm_name(weights: Iterable[Path]) -> str:
    """Name the program and the weights files that make a Segmentation."""
    return " ".join([PROGRAM] + [file.stem for file in weights])


@quiet  # on names with one part
def write_dicom_seg(path: Path, case: Case, mask: np.ndarray, algorithm: str, version: str) -> bool:
    """Write a mask (S, H, W), bool, as a Segmentation of the case's series, atomically.

    `algorithm` and `version` say what made it. Returns whether every frame starts on a whole byte;
    if not, OHIF 3.13 reads them wrongly. Raises ValueError, naming the series, if its instances
    cannot be referenced, or what was written is read back differently; OSError if the file cannot
    be written.
    """
    assert isinstance(case, Scan) and isinstance(case.flair, Series)
    series = case.flair
    sources = read_references(series)
    for k, source in enumerate(sources):
        _place(source, case.grid, k)
    frames = case.grid.to_file_axes(mask).transpose(2, 1, 0)  # as in the series: (S, rows, columns)
    frames = np.ascontiguousarray(frames, dtype=np.uint8)
    classes = {}
    for source in sources:  # of an enhanced image, highdicom expects several frames
        classes[source.SOPInstanceUID] = source.SOPClassUID
        source.SOPClassUID = MRImageStorage

    def restore_class(item: Dataset, element: DataElement) -> None:
        if element.keyword == "ReferencedSOPInstanceUID":
            item.ReferencedSOPClassUID = classes[element.value]

    try:
        segmentation = _segmentation(sources, frames, _clean(algorithm), _clean(version))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{series}: no Segmentation can refer to it ({error}); leave out --dicom-seg"
        ) from error
    segmentation.walk(restore_class)
    segmentation.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, whatever the source has
    with atomic_write(path) as temporary:
        segmentation.save_as(temporary)
        if not _holds(temporary, frames, case.grid):
            raise ValueError(
                f"{series}: its Segmentation is not read back as it was written; leave out "
                "--dicom-seg"
            )
    return frames[0].size % 8 == 0


def read_references(series: Series) -> list[Dataset]:
    """Read UIDs by position, and the patient, of a series; ValueError if they are not all valid."""
    headers = series_headers(series)
    sources = [Dataset() for _ in headers]
    for source, header in zip(sources, headers, strict=True):
        for name in UIDS:
            uid = text(header, name)
            setattr(source, name, uid if re.fullmatch(r"[0-9.]+", uid) else "")
    for name in ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
        without = sum(source[name].value == "" for source in sources)
        if without:
            raise ValueError(f"{series}: {without} of its files have no valid {name}{LOST}")
    if len({source.SOPInstanceUID for source in sources}) < len(sources):
        raise ValueError(f"{series}: two of its files share one SOPInstanceUID{LOST}")
    for name in ("FrameOfReferenceUID", "StudyInstanceUID"):
        values = {source[name].value for source in sources}
        if values == {""}:
            raise ValueError(f"{series}: its files have no valid {name}{LOST}")
        if len(values) > 1:
            raise ValueError(f"{series}: its files have more than one {name}{LOST}")
    _copy_identity(headers[0], sources[0])
    return sources


def _copy_identity(header: Dataset, source: Dataset) -> None:
    """Copy patient and study: text made valid; dates, numbers and codes only if they are."""
    for name in REQUIRED:
        setattr(source, name, None)
    for name in REQUIRED + OPTIONAL:
        vr = dictionary_VR(name)
        value = text(header, name)
        if vr in LONGEST:
            value = _clean(value, vr)
        try:
            validate_value(vr, value, RAISE)
            if vr == "DA":
                DA(value)  # which knows that February has no day 30
            elif vr == "TM":
                TM(value)
        except ValueError:
            continue
        if value and (name not in CHOICES or value in CHOICES[name]):
            setattr(source, name, value)
    number = text(header, "SeriesNumber")
    if re.fullmatch(r"\d{1,10}", number) and int(number) < LAST_NUMBER:
        source.SeriesNumber = number


def _clean(value: str, vr: str = "LO") -> str:
    """Return printable text without backslashes, which separate values, cut to what is allowed."""
    value = value.replace("\\", " ")
    if vr != "PN":
        return value[: LONGEST[vr]].strip()
    groups = value.split("=")[:3]  # alphabetic, ideographic and phonetic
    return "=".join(group[: LONGEST[vr]] for group in groups)


def _place(source: Dataset, grid: Grid, k: int) -> None:
    """Give slice k of a series its place in the grid, whatever its own header says."""
    step = grid.spacing[2] * grid.direction[:, 2]
    source.ImagePositionPatient = (np.array(grid.offset) + k * step).tolist()
    source.ImageOrientationPatient = grid.direction.T[:2].ravel().tolist()
    source.PixelSpacing = [grid.spacing[1], grid.spacing[0]]  # from row to row, column to column
    source.SliceThickness = source.SpacingBetweenSlices = grid.spacing[2]
    source.Columns, source.Rows = grid.shape[:2]


def _segmentation(
    sources: list[Dataset], frames: np.ndarray, algorithm: str, version: str
) -> Dataset:
    """Make the Segmentation of frames (S, rows, columns), 0 or 1, one per source."""
    from pydicom.sr.codedict import codes

    highdicom = import_optional("highdicom", "--dicom-seg", "dicom")
    made_by = highdicom.AlgorithmIdentificationSequence(
        name=algorithm, version=version, family=codes.DCM.ArtificialIntelligence
    )
    lesion = highdicom.seg.SegmentDescription(
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
        pixel_array=frames,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[lesion],
        series_instance_uid=highdicom.UID(),
        series_number=1 + int(sources[0].get("SeriesNumber", 0)),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=PROGRAM,
        manufacturer_model_name=algorithm,
        software_versions=version,
        device_serial_number="none",
        series_description=f"{LABEL}, {MARK}",
        content_label="SEGMENTATION",
        content_description=LABEL,
        content_creator_name=f"{PROGRAM}^",
        omit_empty_frames=False,  # they take one bit per voxel, and readers get the source's grid
    )


def _holds(path: Path, frames: np.ndarray, grid: Grid) -> bool:
    """Tell whether a Segmentation is read back with these frames, in their places."""
    highdicom = import_optional("highdicom", "--dicom-seg", "dicom")

    affine = np.eye(4)
    affine[:3, :3] = (grid.direction * grid.spacing)[:, ::-1]  # slice, row, column
    affine[:3, 3] = grid.offset
    try:
        written = highdicom.seg.segread(path)
        expected = highdicom.Volume(frames, affine, "PATIENT", written.FrameOfReferenceUID)
        volume = written.get_volume(combine_segments=True).match_geometry(expected)
        measures = written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        lengths = [measures.SliceThickness, measures.SpacingBetweenSlices]  # other readers use them
        return np.allclose(lengths, grid.spacing[2]) and np.array_equal(volume.array, frames)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        return False
