"""Test DICOM Segmentations: where they lie, and what they say whatever their source says.

They are read by highdicom, pydicom and dcmqi, never by us.
"""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, ornt_transform
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import EnhancedMRImageStorage, MRImageStorage
from test_hospital_files import (
    BRAIN,
    BRIGHT,
    CENTRE,
    KINDS,
    ML,
    SPACING,
    VOXELS,
    affine,
    flair,
    slices,
    store,
)

from brainseg.io.dicom_seg import write_dicom_seg
from brainseg.io.files import has_mark
from brainseg.io.layouts import find_cases


def corner() -> nibabel.Nifti1Image:
    """Return 10 x 8 x 5 voxels of the phantom, with a corner of the lesion in one corner."""
    return nibabel.Nifti1Image(flair().T, affine()).slicer[56:66, 34:42, 7:12]


def write_series(folder: Path, image: nibabel.Nifti1Image, **fields: object) -> Path:
    """Write the slices of an image as a DICOM series.

    `fields` are set in every file: None removes a field, bytes are written as they are.
    """
    voxels, to_lps = np.asarray(image.dataobj), np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = nibabel.affines.voxel_sizes(to_lps)
    directions = to_lps[:3, :3] / spacing
    folder.mkdir()
    template = slices()[0]
    for k in range(voxels.shape[2]):
        data = copy.deepcopy(template)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        data.InstanceNumber = k + 1
        data.ImageOrientationPatient = directions.T[:2].round(9).ravel().tolist()
        data.ImagePositionPatient = (to_lps @ [0, 0, k, 1])[:3].round(6).tolist()
        data.PixelSpacing, data.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        data.Columns, data.Rows = voxels.shape[:2]
        store(data, voxels[..., k].T)
        for name, value in fields.items():
            if value is None:
                del data[name]
            elif isinstance(value, bytes):
                tag, vr = Tag(name), dictionary_VR(name)
                data[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
            else:
                setattr(data, name, value)
        data.save_as(folder / f"{k:03}.dcm", enforce_file_format=True)
    return folder


def places(voxels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the places of the true voxels, in mm to the left, posterior and up, in order."""
    found = nibabel.affines.apply_affine(matrix, np.argwhere(voxels)).round(2) + 0.0
    return found[np.lexsort(found.T)]


def lesion_places(image: nibabel.Nifti1Image) -> np.ndarray:
    return places(np.asarray(image.dataobj) == BRIGHT, np.diag([-1, -1, 1, 1]) @ image.affine)


def write_segmentation(series: Path) -> Path:
    """Write the lesion of a series as the program does."""
    (case,) = find_cases(series)
    path = series.parent / "seg.dcm"
    write_dicom_seg(path, case, case.read()[..., 1] > (BRAIN + BRIGHT) / 2, "brainseg", "1")
    return path


def places_by_highdicom(segmentation: highdicom.seg.Segmentation) -> np.ndarray:
    volume = segmentation.get_volume(combine_segments=True)
    return places(volume.array > 0, volume.affine)


def places_by_dcmqi(path: Path) -> np.ndarray:
    program = Path(sys.executable).with_name("segimage2itkimage")
    words = ["--inputDICOM", path, "--outputDirectory", path.parent, "--outputType", "nrrd"]
    subprocess.run([program, *words], check=True, capture_output=True)
    image = sitk.ReadImage(path.parent / "1.nrrd")
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return places(sitk.GetArrayFromImage(image).T > 0, matrix)


FLIPS = [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]  # with six orders of axes: either handedness
ORIENTATIONS = [
    "".join(letters[flip] for letters, flip in zip(axes, flips, strict=True))
    for axes in itertools.permutations(["LR", "PA", "SI"])
    for flips in FLIPS
]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_segmentation_lies_on_its_series(tmp_path, orientation):
    """The slices of a series may be in either order along their normal."""
    ours, wanted = (axcodes2ornt(axes) for axes in ("LPS", orientation))
    image = corner().as_reoriented(ornt_transform(ours, wanted))
    path = write_segmentation(write_series(tmp_path / "p7", image))
    segmentation, expected = highdicom.seg.segread(path), lesion_places(image)
    assert np.array_equal(places_by_highdicom(segmentation), expected)
    instances = [f"1.2.3.{k + 1}" for k in range(image.shape[2])]
    planes = segmentation.get_pixels_by_source_instance(instances, [1])[..., 0]
    assert np.array_equal(planes.T, np.asarray(image.dataobj) == BRIGHT)
    if ORIENTATIONS.index(orientation) % 4 == 1:  # one of each order of axes
        assert np.array_equal(places_by_dcmqi(path), expected)


OTHER_KINDS = [name for name, row in KINDS.items() if name.startswith("DICOM") and not row.refused]
OTHER_KINDS.remove(
    "DICOM: files that state neither patient nor study, beside others of their series"
)
# The kinds after these are of folders and of words, which choose a series.
OTHER_KINDS = OTHER_KINDS[: OTHER_KINDS.index("DICOM: patient, study and series")]
OTHER_KINDS.append("DICOM: a series in several folders")


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_a_segmentation_of_each_kind_of_series(tmp_path, what):
    path = write_segmentation(KINDS[what].make(tmp_path))
    segmentation = highdicom.seg.segread(path)
    found = places_by_highdicom(segmentation)
    assert len(found) == VOXELS and found.mean(axis=0) == pytest.approx(CENTRE, abs=0.1)
    voxel_volume = segmentation.get_volume_geometry().voxel_volume
    assert voxel_volume * len(found) / 1000 == pytest.approx(ML, 1e-3)
    source = pydicom.dcmread(path).SourceImageSequence[0]
    assert source.ReferencedSOPClassUID == (
        EnhancedMRImageStorage if "enhanced" in what else MRImageStorage
    )


# Fields of a header that are missing or wrong, and what the Segmentation must hold in their place.
ODD_FIELDS = [
    ({"SliceThickness": None}, {}),
    ({"SliceThickness": ""}, {}),
    ({"SliceThickness": b"thin"}, {}),
    ({"SpacingBetweenSlices": 1}, {}),
    ({"SpacingBetweenSlices": -6}, {}),
    ({"PatientID": None}, {"PatientID": ""}),
    ({"SpecificCharacterSet": "ISO_IR 6"}, {}),
    (
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"},
        {"PatientName": "Yamada^Tarou=山田^太郎"},
    ),
    (
        {"SpecificCharacterSet": ["", "ISO 2022 IR 149"], "PatientName": "Hong^Gildong=洪^吉洞"},
        {"PatientName": "Hong^Gildong=洪^吉洞"},
    ),
    (
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"},
        {"PatientName": "Müller^Jörg"},
    ),
    ({"PatientName": b"M\xfcller^J\xf6rg"}, {"PatientName": "Müller^Jörg"}),
    ({"SpecificCharacterSet": "none", "PatientName": "Doe"}, {"PatientName": "Doe"}),
    ({"PatientName": "Doe\\John\n"}, {"PatientName": "Doe John"}),
    ({"PatientID": "7" * 70, "StudyID": "s" * 17}, {"PatientID": "7" * 64, "StudyID": "s" * 16}),
    ({"PatientBirthDate": "1950-01-01"}, {"PatientBirthDate": ""}),
    ({"PatientBirthDate": "19500230"}, {"PatientBirthDate": ""}),
    ({"PatientSex": "U", "PatientAge": "45"}, {"PatientSex": "", "PatientAge": None}),
    ({"PatientAge": "045Y", "PatientSex": "F"}, {"PatientSex": "F", "PatientAge": "045Y"}),
    ({"PatientWeight": b"70,5"}, {"PatientWeight": None}),
    ({"StudyDate": "2020.13.1", "StudyTime": "10:11:12"}, {"StudyDate": "", "StudyTime": ""}),
    ({"SeriesNumber": b"IV"}, {"SeriesNumber": 1}),
    ({"SeriesNumber": 2147483647}, {"SeriesNumber": 1}),
    ({"SeriesNumber": 7}, {"SeriesNumber": 8}),
    ({"Modality": ""}, {"Modality": "SEG"}),
    ({"LossyImageCompression": "NO"}, {"LossyImageCompression": "00"}),
]


@pytest.mark.parametrize("fields, expected", ODD_FIELDS, ids=str)
def test_a_segmentation_is_valid_whatever_its_headers_say(tmp_path, fields, expected):
    image = corner()
    path = write_segmentation(write_series(tmp_path / "p7", image, **fields))
    with pydicom.config.strict_reading():
        data = pydicom.dcmread(path)
        assert str(data)  # for which each value is decoded
    for name, value in expected.items():
        assert data.get(name) == value, name
    assert has_mark(path)
    (measures,) = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SliceThickness == measures.SpacingBetweenSlices == SPACING[0]
    assert measures.PixelSpacing == [SPACING[1], SPACING[2]]
    assert np.array_equal(places_by_highdicom(highdicom.seg.segread(path)), lesion_places(image))
    if "SpacingBetweenSlices" in fields:  # dcmqi goes by it
        assert np.array_equal(places_by_dcmqi(path), lesion_places(image))


def test_a_segmentation_of_an_oblique_series_of_ge(tmp_path):
    """The orientations of its files differ by 6e-8."""
    turn = np.eye(4)
    turn[:3, :3] = nibabel.eulerangles.euler2mat(0.1, 0.2, 0.3)
    image = nibabel.Nifti1Image(flair().T, turn @ affine())
    series = write_series(tmp_path / "p7", image)
    for path in series.iterdir():
        data = pydicom.dcmread(path)
        odd = 6e-8 * (data.InstanceNumber % 2)
        data.ImageOrientationPatient = [value + odd for value in data.ImageOrientationPatient]
        data.save_as(path)
    path = write_segmentation(series)
    for found in (places_by_highdicom(highdicom.seg.segread(path)), places_by_dcmqi(path)):
        np.testing.assert_allclose(found, lesion_places(image), atol=0.02)
    positions = [
        frame.PlanePositionSequence[0].ImagePositionPatient
        for frame in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    ]
    np.testing.assert_allclose(np.diff(positions, 2, axis=0), 0, atol=1e-6)
