"""Test files as hospitals and colleagues send them: each is read right, or refused aloud.

Every row is a kind of file: a function that writes one and returns its path, with what must come
out: a phantom's lesion (voxels, ml, centre in mm), or the sentence that refuses it. The lesion is
the brightest part of FLAIR, so a threshold stands in for the network; what is compared is which
voxels are read, how large they are, and where they are. Masks are read by nibabel, not by us.
"""

import gzip
import io
import re
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from conftest import make_weights
from PIL import Image
from pydicom import uid

import inference
from brainseg.io.files import MARK
from brainseg.io.layouts import find_cases
from brainseg.io.opening import find_sequences
from brainseg.io.scans import Scan

# The phantom FLAIR: 16 axial slices of 96 x 96, 6 mm apart, of pixels of 2 x 2 mm.
SHAPE = (16, 96, 96)  # S, H, W
SPACING = (6.0, 2.0, 2.0)  # mm
ORIGIN = (-95.0, -95.0, -45.0)  # of the first voxel, in mm to the left, posterior and up (LPS)
LESION = np.s_[6:10, 30:39, 50:65]  # 4 x 9 x 15 voxels
VOXELS = 540
ML = 12.96
CENTRE = (-95 + 2 * 57.0, -95 + 2 * 34.0, -45 + 6 * 7.5)  # LPS, mm
BRAIN, BRIGHT = 400, 1000  # intensities; air is 0


class Kind(NamedTuple):
    make: Callable[[Path], Path]  # writes the files into a folder, returns what --images gets
    refused: str  # a part of the sentence; empty if the file must be read
    noted: str  # a part of a note about how it is read
    truth: bool  # it has a true mask, which must be the phantom's lesion


KINDS: dict[str, Kind] = {}


def kind(what: str, refused: str = "", noted: str = "", truth: bool = False) -> Callable:
    """Add a kind of file to the table."""

    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        assert what not in KINDS
        KINDS[what] = Kind(make, refused, noted, truth)
        return make

    return add


def flair() -> np.ndarray:
    """Make the phantom (S, H, W) uint16: an egg of brain in air, and a brighter lesion in it."""
    s, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    egg = ((s - 7.5) / 9) ** 2 + ((y - 50) / 42) ** 2 + ((x - 47) / 34) ** 2 < 1
    volume = np.where(egg, BRAIN, 0).astype(np.uint16)
    volume[LESION] = BRIGHT
    return volume


def affine() -> np.ndarray:
    """Return the phantom's matrix from voxels (column, row, slice) to RAS, as NIfTI has it."""
    matrix = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    matrix[:3, 3] = -ORIGIN[0], -ORIGIN[1], ORIGIN[2]
    return matrix


# NIfTI, NRRD, MetaImage


@kind("NIfTI, rightly written")
def plain_nifti(folder: Path) -> Path:
    path = folder / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(flair().T, affine()), path)
    return path


@kind("NIfTI whose qform lies 40 mm off its sform", noted="sform and qform disagree")
def two_forms(folder: Path) -> Path:
    image = nibabel.Nifti1Image(flair().T, affine())
    moved = affine()
    moved[:3, 3] += 40
    image.set_qform(moved, 1)
    image.set_sform(affine(), 2)
    nibabel.save(image, folder / "a.nii.gz")
    return folder / "a.nii.gz"


@pytest.mark.parametrize("codes", [(1, 2), (2, 1), (1, 1), (1, 4), (4, 0), (0, 3), (2, 5)])
@pytest.mark.parametrize("handed", [1, -1])
def test_a_mask_has_both_forms_of_its_scan(tmp_path, codes, handed):
    """ITK takes the qform where the codes are (1, 2) or (1, 4); nibabel always takes the sform."""
    turn = np.eye(4)
    turn[:3, :3] = nibabel.eulerangles.euler2mat(0.1, 0.2, 0.3)
    plain = affine() @ np.diag([handed, 1, 1, 1])
    image = nibabel.Nifti1Image(flair().T, None)
    image.set_qform(plain, codes[0])
    image.set_sform(turn @ plain, codes[1])
    nibabel.save(image, tmp_path / "a.nii")
    if handed == 1:
        with open(tmp_path / "a.nii", "r+b") as file:
            file.seek(76)
            file.write(bytes(4))  # pixdim[0] is 0, as in many files; it means 1
    (case,) = find_cases(tmp_path / "a.nii")
    volume = case.read()[..., 1]
    for values, dtype in ((volume > BRAIN, np.uint8), (volume.astype("f4"), np.float32)):
        case.write_map(tmp_path / "mask.nii.gz", values)
        scan, written = (nibabel.load(tmp_path / name) for name in ("a.nii", "mask.nii.gz"))
        for get in ("get_sform", "get_qform"):
            matrix, code = getattr(scan.header, get)(coded=True)
            same_matrix, same_code = getattr(written.header, get)(coded=True)
            assert np.array_equal(matrix, same_matrix) and code == same_code, get
        assert written.get_data_dtype() == dtype and written.header.get_xyzt_units()[0] == "mm"
        assert written.header["descrip"].item().startswith(MARK.encode())
        scan, written = (sitk.ReadImage(tmp_path / name) for name in ("a.nii", "mask.nii.gz"))
        assert scan.IsSameImageGeometryAs(written)


def nifti(folder: Path, name: str = "a.nii.gz", image=nibabel.Nifti1Image, **fields) -> Path:
    """Write the phantom as NIfTI with these values in its header, right or wrong."""
    scan = image(flair().T, affine())
    scan.set_qform(affine(), 1)
    content = scan.to_bytes()
    header = type(scan.header)(content[: scan.header.sizeof_hdr], check=False)
    for field, value in fields.items():
        header[field] = value
    content = header.binaryblock + content[header.sizeof_hdr :]
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def renamed(folder: Path, written: str, name: str) -> Path:
    return nifti(folder, written).rename(folder / name)


@kind("NIfTI of three values in each voxel")
def vectors(folder: Path) -> Path:
    voxels = np.repeat(flair().T[..., None, None], 3, axis=4)  # axis 4 is time
    nibabel.save(nibabel.Nifti1Image(voxels, affine()), folder / "a.nii.gz")
    return folder / "a.nii.gz"


def pixdim(*spacing: float) -> list[float]:
    return [1, *spacing, 1, 1, 1, 1]


def scaled(unit: float) -> dict:
    """Return the fields of the phantom's qform in another unit, without an sform."""
    fields = {"sform_code": 0, "pixdim": pixdim(2 * unit, 2 * unit, 6 * unit)}
    return fields | {"qoffset_x": 95 * unit, "qoffset_y": 95 * unit, "qoffset_z": -45 * unit}


kind("NIfTI-2")(partial(nifti, image=nibabel.Nifti2Image))
kind("gzip named .nii")(partial(renamed, written="a.nii.gz", name="b.nii"))
kind("NIfTI named .nii.gz, not compressed")(partial(renamed, written="a.nii", name="b.nii.gz"))
for what, refused, noted, fields in [
    ("metres", "", "", {"xyzt_units": 1, **scaled(1e-3)}),
    ("microns", "", "", {"xyzt_units": 3, **scaled(1e3)}),
    ("pixdim 0 beside an sform", "", "disagree", {"pixdim": pixdim(0, 0, 0)}),
    ("a quaternion of NaN beside an sform", "", "disagree", {"quatern_b": np.nan}),
    ("a quaternion of five digits", "", "", {"sform_code": 0, "quatern_d": 1.00001}),
    ("pixdim 0", "is 2 x 0 x 6 mm", "", {"sform_code": 0, "pixdim": pixdim(2, 0, 6)}),
    ("pixdim -2", "is -2 x 2 x 6 mm", "", {"sform_code": 0, "pixdim": pixdim(-2, 2, 6)}),
    ("pixdim NaN", "is 2 x nan x 6 mm", "", {"sform_code": 0, "pixdim": pixdim(2, np.nan, 6)}),
    ("millimetres called metres", "is 2000 x 2000 x 6000 mm", "", {"xyzt_units": 1}),
    ("a quaternion of length 1.4", "is not a number", "", {"sform_code": 0, "quatern_b": 1}),
    ("skewed axes", "not at right angles", "", {"srow_x": [-2, 0.4, 0, 95]}),
    ("NaN in its sform", "its spacing is nan", "", {"srow_x": [np.nan, 0, 0, 95]}),
    ("sform and qform of code 0", "no orientation", "", {"sform_code": 0, "qform_code": 0}),
    ("sform of code 9", "sform_code is 9", "", {"sform_code": 9}),
    ("voxels inside its header", "cut short", "", {"vox_offset": 100}),
    ("voxels nowhere", "cut short", "", {"vox_offset": np.nan}),
    ("complex voxels", "are complex", "", {"datatype": 32, "bitpix": 64}),
]:
    kind(f"NIfTI with {what}", refused, noted)(partial(nifti, **fields))


def nrrd(folder: Path, fields: str, sizes: str = "96 96 16", name: str = "a.nrrd") -> Path:
    """Write the phantom as NRRD; its voxels are in a.raw if the fields say so."""
    header = f"NRRD0005\n# made by hand\ntype: ushort\ndimension: {len(sizes.split())}\n"
    header += f"sizes: {sizes}\nencoding: raw\nendian: little\n{fields}\n\n"
    voxels = flair().astype("<u2").tobytes()
    (folder / "a.raw").write_bytes(voxels)
    content = header.encode() if "a.raw" in fields else header.encode() + voxels
    (folder / name).write_bytes(content)
    return folder / name


LPS = "space: left-posterior-superior\n"
STEPS = "space directions: (2,0,0) (0,2,0) (0,0,6)\n"
PLACE = "space origin: (-95,-95,-45)"
RAS = "space: RAS\nspace directions: (-2,0,0) (0,-2,0) (0,0,6)\nspace origin: (95,95,-45)"
LAS = "space: LAS\nspace directions: (2,0,0) (0,-2,0) (0,0,6)\nspace origin: (-95,95,-45)"
CM = "space directions: (.2,0,0) (0,.2,0) (0,0,.6)\nspace origin: (-9.5,-9.5,-4.5)"
UNIT = '\nspace units: "cm" "cm" "cm"'
FRAME = "\nmeasurement frame: (0,1,0) (-1,0,0) (0,0,1)"
SKEWED = "space directions: (2,0.2,0) (0,2,0) (0,0,6)\n"
VECTOR = "space directions: none (2,0,0) (0,2,0) (0,0,6)\nkinds: vector space space space\n"
LIST = "space directions: (2,0,0) (0,2,0) (0,0,6) none\nkinds: space space space list\n"
FLAT = "space directions: (2,0,0) (0,2,0) none\n"
for what, refused, noted, fields in [
    ("in RAS", "", "", RAS),
    ("in LAS", "", "", LAS),
    ("in centimetres", "", "", LPS + CM + UNIT),
    ("with a measurement frame", "", "", LPS + STEPS + PLACE + FRAME),
    ("with a key named as a field", "", "", LPS + STEPS + PLACE + "\nspace:=RAS"),
    ("of no geometry", "no orientation.*space directions", "", "content: FLAIR"),
    ("of spacings alone", "no orientation", "", "spacings: 2 2 6"),
    ("in scanner coordinates", "no orientation", "", "space: scanner-xyz\n" + STEPS + PLACE),
    ("in a space without a name", "no orientation", "", "space dimension: 3\n" + STEPS + PLACE),
    ("without a direction", "no orientation", "", LPS + FLAT + PLACE),
    ("at skewed axes", "not at right angles", "", LPS + SKEWED + PLACE),
    ("of spacing 0", "spacing is 0 x 2 x 6", "", LPS + STEPS.replace("(2,", "(0,") + PLACE),
    (
        "in feet",
        "unit of length is feet",
        "",
        LPS + STEPS + PLACE + '\nspace units: "feet" "feet" "feet"',
    ),
    (
        "without its voxels",
        "b.raw, are not beside it",
        "",
        LPS + STEPS + PLACE + "\ndata file: b.raw",
    ),
]:
    kind(f"NRRD {what}", refused, noted)(partial(nrrd, fields=fields))
kind("NRRD with its vector axis first")(
    partial(nrrd, fields=LPS + VECTOR + PLACE, sizes="1 96 96 16")
)
kind("NRRD with its list axis last")(partial(nrrd, fields=LPS + LIST + PLACE, sizes="96 96 16 1"))
kind("a header .nhdr beside its voxels")(
    partial(nrrd, fields=LPS + STEPS + PLACE + "\ndata file: a.raw", name="a.nhdr")
)


def metaimage(folder: Path, fields: str) -> Path:
    """Write the phantom as MetaImage."""
    header = f"ObjectType = Image\nNDims = 3\nDimSize = 96 96 16\n{fields}\n"
    header += "ElementType = MET_USHORT\nElementDataFile = LOCAL\n"
    (folder / "a.mha").write_bytes(header.encode() + flair().astype("<u2").tobytes())
    return folder / "a.mha"


SPACED = "ElementSpacing = 2 2 6\n"
TURN = "TransformMatrix = 1 0 0 0 1 0 0 0 1\n"
OFFSET = "Offset = -95 -95 -45"
OLD = "Orientation = 1 0 0 0 1 0 0 0 1\nPosition = -95 -95 -45"
IN_CM = "ElementSpacing = .2 .2 .6\nOffset = -9.5 -9.5 -4.5\nDistanceUnits = cm\n"
for what, refused, fields in [
    ("with the older names", "", SPACED + OLD),
    ("in centimetres", "", IN_CM + TURN),
    ("of no geometry", "no orientation.*TransformMatrix", "Comment = FLAIR"),
    ("of spacings alone", "no orientation", SPACED + OFFSET),
    ("without spacings", "no spacing", TURN + OFFSET),
    ("at skewed axes", "not at right angles", SPACED + TURN.replace("= 1 0", "= 1 .1") + OFFSET),
    ("of spacing 0", "spacing is 0", SPACED.replace("= 2", "= 0") + TURN + OFFSET),
    ("of spacing -2", "spacing is -2 x 2 x 6 mm", SPACED.replace("= 2", "= -2") + TURN + OFFSET),
    ("of spacing NaN", "its spacing is 0", SPACED.replace("= 2", "= nan") + TURN + OFFSET),
]:
    kind(f"MetaImage {what}", refused)(partial(metaimage, fields=fields))


PACKED = "CompressedData = True\n" + SPACED + TURN + OFFSET


def packed(folder: Path, size: bool = True, cut: int = 0, hurt: bool = False) -> Path:
    """Write a compressed MetaImage: right, without its size, or with voxels cut or changed."""
    voxels = flair().astype("<u2").tobytes()
    data = bytearray(zlib.compress(voxels[: len(voxels) - cut]))
    if hurt:
        data[len(data) // 2] ^= 255
    path = metaimage(folder, PACKED + f"\nCompressedDataSize = {len(data)}" * size)
    header = path.read_bytes().partition(b"LOCAL\n")[0]
    path.write_bytes(header + b"LOCAL\n" + data)
    return path


kind("MetaImage, compressed")(packed)
kind("MetaImage, compressed, of unknown size", "CompressedDataSize")(partial(packed, size=False))
kind("MetaImage, compressed, of fewer voxels", "not a readable")(partial(packed, cut=1000))
kind("MetaImage, compressed, with a changed byte", "not a readable")(partial(packed, hurt=True))


def other(folder: Path, suffix: str, alone: bool = True) -> Path:
    path = folder / f"a{suffix}"
    path.write_bytes(bytes(4000))
    return path if alone else folder


for suffix, program in [
    (".mgz", "mri_convert"),
    (".mnc", "mnc2nii"),
    (".hdr", "fslchfiletype"),
    (".img", "fslchfiletype"),
]:
    sentence = f"a{suffix}: {suffix} files are not read; convert it to .nii.gz with {program}"
    kind(suffix, sentence)(partial(other, suffix=suffix))
    kind(f"a folder of {suffix}", sentence)(
        lambda folder, suffix=suffix: other(folder, suffix).parent
    )


@pytest.mark.parametrize(
    "make, fields",
    [
        (nrrd, LPS + STEPS),
        (nrrd, LPS + STEPS + "space origin: (nan,nan,nan)"),
        (metaimage, SPACED + TURN),
        (metaimage, SPACED + TURN + "Offset = nan nan nan"),
    ],
)
def test_a_position_that_is_not_stated_is_said(tmp_path, make, fields):
    (case,) = find_cases(make(tmp_path, fields))
    assert case.grid.offset == (0, 0, 0)
    assert case.notes[-1] == "its header gives no position; its first voxel is put at 0, 0, 0"


@pytest.mark.parametrize("make", [nrrd, metaimage, nifti])
@pytest.mark.parametrize("degrees", [0.04, 0.8, 1.2])
def test_axes_within_a_degree_of_right_angles(tmp_path, make, degrees):
    skew = np.eye(3)
    skew[0, 1] = np.tan(np.radians(degrees))
    columns = (skew * [2, 2, 6]).T
    if make == nrrd:
        steps = " ".join(f"({x},{y},{z})" for x, y, z in columns)
        path = nrrd(tmp_path, f"{LPS}space directions: {steps}\n{PLACE}")
    elif make == metaimage:
        unit = (columns.T / np.linalg.norm(columns, axis=1)).T
        turn = " ".join(str(value) for value in unit.ravel())
        path = metaimage(tmp_path, f"{SPACED}TransformMatrix = {turn}\n{OFFSET}")
    else:
        rows = (skew * [2, 2, 6]) * [[-1], [-1], [1]]
        path = nifti(tmp_path, srow_x=[*rows[0], 95], srow_y=[*rows[1], 95], qform_code=0)
    if degrees > 1:
        with pytest.raises(ValueError, match="its axes are not at right angles"):
            find_cases(path)
        return
    (case,) = find_cases(path)
    said = "up to a degree off right angles" in " ".join(case.notes)
    assert said == (degrees > 0.1)
    error = np.abs(case.grid.direction.T @ case.grid.direction - np.eye(3)).max()
    assert error < (1e-12 if said else 1e-3)
    np.testing.assert_allclose(case.grid.direction, skew, atol=0.008)


# DICOM: pixels and geometry


def slices() -> list[pydicom.Dataset]:
    """Make the phantom as a DICOM series: a data set per slice, upward."""
    series = []
    for k, image in enumerate(flair()):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = uid.MRImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{k + 1}"
        data.StudyInstanceUID, data.SeriesInstanceUID = "1.2", "1.2.3"
        data.FrameOfReferenceUID = "1.2.9"
        data.Modality, data.InstanceNumber, data.PatientID = "MR", k + 1, "anna"
        data.SeriesDescription, data.EchoTime, data.InversionTime = "AX FLAIR", 120, 2500
        data.Rows, data.Columns = image.shape
        data.PixelSpacing, data.SliceThickness = list(SPACING[1:]), SPACING[0]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]  # columns to the left, rows to the back
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING[0] * k]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        store(data, image)
        series.append(data)
    return series


def store(data: pydicom.Dataset, pixels: np.ndarray, bits: int = 0) -> None:
    """Put pixels (H, W) into a data set, with `bits` of those of their type in use."""
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data["PixelData"] = pydicom.DataElement("PixelData", "OW", pixels.tobytes())


def save(folder: Path, series: list[pydicom.Dataset]) -> Path:
    """Write a series, its files in another order than its slices."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, data in enumerate(series):
        data.save_as(folder / f"IM{(7 * k) % 17:03d}", enforce_file_format=True)
    return folder


def dicom_kind(what: str, refused: str = "", noted: str = "", one: bool = False, **tags: object):
    """Add a series to the table whose tags differ, in all files or in `one`; None: left out."""

    def make(folder: Path) -> Path:
        series = slices()
        for data in series[4:5] if one else series:
            for tag, value in tags.items():
                delattr(data, tag) if value is None else setattr(data, tag, value)
        return save(folder / "anna", series)

    kind(f"DICOM: {what}", refused, noted)(make)


ONE = "IM011"  # the file of the fifth slice
BESIDE = [ORIGIN[0] + 3, ORIGIN[1], ORIGIN[2] + 4 * SPACING[0]]
for what, tags in {
    "rightly written": {},
    "SpacingBetweenSlices is 0": {"SpacingBetweenSlices": 0},
    "SpacingBetweenSlices is wrong": {"SpacingBetweenSlices": 1},
    "SpacingBetweenSlices is the gap": {"SpacingBetweenSlices": 1, "SliceThickness": 5},
    "a vast number of no interest": {"RepetitionTime": "1e999"},
}.items():
    dicom_kind(what, **tags)
for what, refused, tags in (
    ("no PixelSpacing", "IM000 has PixelSpacing ''; export", {"PixelSpacing": None}),
    ("empty PixelSpacing", "PixelSpacing ''", {"PixelSpacing": ""}),
    ("PixelSpacing of 0", "PixelSpacing '0", {"PixelSpacing": [0, 0]}),
    ("one PixelSpacing", "PixelSpacing '2.0'", {"PixelSpacing": 2}),
    ("negative PixelSpacing", "PixelSpacing '2", {"PixelSpacing": [2, -2]}),
    ("PixelSpacing of 1 km", "its spacing is", {"PixelSpacing": [1e6, 1e6]}),
    ("no orientation", "ImageOrientationPatient ''", {"ImageOrientationPatient": None}),
    ("axes not at right angles", "right angles", {"ImageOrientationPatient": [1, 0, 0, 0.1, 1, 0]}),
    ("axes without length", "right angles", {"ImageOrientationPatient": [0] * 6}),
    ("no position", "ImagePositionPatient ''", {"ImagePositionPatient": None}),
    ("one position", "slices are all at one position", {"ImagePositionPatient": [0, 0, 0]}),
    ("more rows than pixels", "18432 bytes of PixelData, but .* make 19200", {"Rows": 100}),
    ("fewer rows than pixels", "18432 bytes of PixelData, but .* make 9216", {"Rows": 48}),
    ("colour", "PhotometricInterpretation 'RGB'", {"PhotometricInterpretation": "RGB"}),
    ("frames", "holds several frames; convert", {"NumberOfFrames": 2}),
):
    dicom_kind(what, refused, **tags)
for what, refused, tags in (
    ("no spacing in one", "IM011 has PixelSpacing '', but IM000", {"PixelSpacing": None}),
    ("another spacing in one", "IM011 has PixelSpacing", {"PixelSpacing": [2.5, 2.5]}),
    ("no orientation in one", "IM011 has ImageOrient", {"ImageOrientationPatient": ""}),
    ("another plane in one", "IM011 has ImageOr", {"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}),
    ("fewer rows in one", "IM011 has Rows '48', but", {"Rows": 48, "PixelData": bytes(48 * 192)}),
    ("no echo time in one", "IM011 has EchoTime ''", {"EchoTime": None}),
    ("no position in one", "IM011 has ImagePositionPatient", {"ImagePositionPatient": ""}),
    ("two at one position", "have one ImagePositionPatient", {"ImagePositionPatient": [*ORIGIN]}),
    (
        "one beside the others",
        "IM011 lies 3.0 mm off",
        {"ImagePositionPatient": BESIDE},
    ),
    ("slope 0 in one", "IM011 has RescaleSlope '0.0'", {"RescaleSlope": 0, "RescaleIntercept": 0}),
    ("pixels cut in one", "IM011 has 9000 bytes of PixelData", {"PixelData": bytes(9000)}),
    ("high bits in one", "IM011 has HighBit '15'", {"BitsStored": 12}),
    ("bits above BitsStored", "IM011: has pixels of more than 8", {"BitsStored": 8, "HighBit": 7}),
    ("a table of values", "IM011 has a ModalityLUT", {"ModalityLUTSequence": [pydicom.Dataset()]}),
    ("more pixels in one", "IM011 has 18434 bytes of Pixel", {"PixelData": b"\1" * (96 * 192 + 2)}),
    ("no pixels in one", "IM011: not a readable DICOM image", {"PixelData": None}),
):
    dicom_kind(what, refused, one=True, **tags)
dicom_kind(
    "every second slice", noted="only one in 2 seems to be here",
    SpacingBetweenSlices=3, SliceThickness=3,
)  # fmt: skip
dicom_kind(
    "spacing in another tag", noted="ImagerPixelSpacing is used, 2 x 2 mm",
    PixelSpacing=None, ImagerPixelSpacing=[2, 2],
)  # fmt: skip


@kind("DICOM: each slice 3 mm further to the back", refused="mm off the line.* dcm2niix")
def sheared(folder: Path) -> Path:
    series = slices()
    for k, data in enumerate(series):
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1] + 3 * k, ORIGIN[2] + SPACING[0] * k]
    return save(folder, series)


@kind("DICOM: each slice 0.05 mm further to the left", refused="0.8 mm off the line")
def drifting(folder: Path) -> Path:
    series = slices()
    for k, data in enumerate(series):
        data.ImagePositionPatient = [ORIGIN[0] + 0.05 * k, ORIGIN[1], ORIGIN[2] + SPACING[0] * k]
    return save(folder, series)


@kind("DICOM: slices that jitter by 0.2 mm", noted="up to 0.3 mm off a regular stack")
def jitter(folder: Path) -> Path:
    series = slices()
    for k, data in enumerate(series[1:-1]):
        off = 0.2 * (-1) ** k
        place = np.array(data.ImagePositionPatient, float) + [off, 0, off]
        data.ImagePositionPatient = place.round(3).tolist()
    return save(folder, series)


@pytest.mark.parametrize("step, decimals", [(1.25, 1), (0.95, 1), (5.5, 1)])
def test_positions_of_few_decimals(tmp_path, step, decimals):
    series = slices()
    for k, data in enumerate(series):
        data.ImagePositionPatient = [*ORIGIN[:2], round(step * k, decimals)]
    (case,) = find_cases(save(tmp_path / "a", series))
    assert case.spacing[0] == pytest.approx(step, abs=0.005)


def test_images_of_a_private_class_are_read(tmp_path):
    series = slices()
    for data in series:
        data.SOPClassUID = "1.2.840.113619.4.2"
    (case,) = find_cases(save(tmp_path / "a", series))
    assert np.count_nonzero(case.read()[..., 1] > BRAIN) == VOXELS


@kind("DICOM: copies of its files beside them")
def copies(folder: Path) -> Path:
    for path in list(save(folder / "a", slices()).iterdir()):
        shutil.copy(path, path.with_name(path.name + " copy"))
    return folder / "a"


@kind("DICOM: files that state neither patient nor study, beside others of their series")
def partly_anonymous(folder: Path) -> Path:
    series = slices()
    for data in series[:3]:
        data.PatientID, data.StudyInstanceUID = "", ""
    return save(folder / "a", series)


@pytest.mark.parametrize("padding", [0, 700, 4000])
def test_padding_by_its_tag_is_background(tmp_path, padding):
    series = slices()
    corner = np.zeros(SHAPE[1:], bool)
    corner[:30, :20] = True
    for data in series:
        pixels = data.pixel_array + np.uint16(50)
        pixels[corner] = padding
        store(data, pixels)
        data.PixelPaddingValue = padding
    (case,) = find_cases(save(tmp_path / "a", series))
    volume = case.read()[..., 1]
    assert set(np.unique(volume[:, corner])) == {min(padding, 50)}
    assert np.count_nonzero(volume == BRIGHT + 50) == VOXELS
    assert volume.dtype == np.uint16


@kind("DICOM: a tilted head, its orientation rounded to two decimals", noted="is rounded")
def rounded(folder: Path) -> Path:
    """Turn the grid about the lesion, which stays where it is."""
    cos, sin = np.cos(0.3), np.sin(0.3)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    series = slices()
    for data in series:
        place = turn @ (np.array(data.ImagePositionPatient, float) - CENTRE) + CENTRE
        data.ImagePositionPatient = np.round(place, 4).tolist()
        data.ImageOrientationPatient = [1, 0, 0, 0, round(cos, 2), round(sin, 2)]
    return save(folder, series)


@pytest.mark.parametrize("turn", [(17, 12, 5), (20, 10, 5), (-8, 3, 24)])
def test_an_orientation_of_two_decimals_is_not_lost(tmp_path, turn):
    """Other readers take it for axial. The grid is right within the rounding, and said."""
    turn = nibabel.eulerangles.euler2mat(*np.deg2rad(turn))
    series = slices()
    for data in series:
        data.ImagePositionPatient = np.round(turn @ data.ImagePositionPatient, 4).tolist()
        data.ImageOrientationPatient = np.round(turn.T[:2].ravel(), 2).tolist()
    (case,) = find_cases(save(tmp_path / "a", series))
    assert case.grid.direction == pytest.approx(turn, abs=0.006)
    assert case.grid.spacing == pytest.approx((2, 2, 6), abs=1e-3)
    assert case.grid.direction.T @ case.grid.direction == pytest.approx(np.eye(3), abs=1e-6)
    assert any("is rounded" in note for note in case.notes)


def pixels_of(data: pydicom.Dataset) -> np.ndarray:
    return np.frombuffer(data.PixelData, np.uint16).reshape(SHAPE[1:])


@kind("DICOM: slopes 1, 100, 100")
def slopes(folder: Path) -> Path:
    """65600 does not fit into the 16 bits of the first file."""
    series = slices()
    for data in series[1:]:
        store(data, np.where(pixels_of(data) == BRIGHT, 656, 4).astype(np.uint16))
        data.RescaleSlope, data.RescaleIntercept = 100, 0
    return save(folder, series)


@kind("DICOM: an empty first slice with slope 1, others with a tenth")
def fractions(folder: Path) -> Path:
    """The lesion is 700.4, the rest 699.6."""
    series = slices()
    store(series[0], np.zeros(SHAPE[1:], np.uint16))
    for data in series[1:]:
        store(data, np.where(pixels_of(data) == BRIGHT, 7004, 6996).astype(np.uint16))
        data.RescaleSlope, data.RescaleIntercept = 0.1, 0
    return save(folder, series)


@kind("DICOM: 8 bits in the first file, 12 in the others")
def bits(folder: Path) -> Path:
    series = slices()
    store(series[0], np.zeros(SHAPE[1:], np.uint8))
    for data in series[1:]:
        store(data, pixels_of(data), bits=12)
    return save(folder, series)


@kind("DICOM: the first file is unsigned, others are signed")
def signs(folder: Path) -> Path:
    series = slices()
    for data in series[1:]:
        store(data, pixels_of(data).astype(np.int16) - 50, bits=12)
    return save(folder, series)


@kind("DICOM: white is zero in every second file")
def white_is_zero(folder: Path) -> Path:
    series = slices()
    for data in series[::2]:
        data.PhotometricInterpretation = "MONOCHROME1"
        store(data, 4095 - pixels_of(data), bits=12)
    return save(folder, series)


def recoded(syntax: uid.UID, cut: int = 0) -> Callable[[Path], Path]:
    """Make a maker of a series in another transfer syntax, its last file `cut` bytes short."""

    def make(folder: Path) -> Path:
        series = slices()
        for data in series:
            if syntax == uid.RLELossless:
                data.compress(syntax)
            elif syntax == uid.ExplicitVRBigEndian:
                store(data, data.pixel_array.astype(">u2"))
            data.file_meta.TransferSyntaxUID = syntax
        save(folder, series)
        last = folder / "IM003"
        last.write_bytes(last.read_bytes()[: last.stat().st_size - cut])
        return folder

    return make


for syntax in (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
):
    kind(f"DICOM: {syntax.name}")(recoded(syntax))
    kind(f"DICOM: {syntax.name}, cut", refused="IM003: not a readable")(recoded(syntax, cut=50))


@kind("DICOM: an RLE image whose bytes end early", refused="IM011: its pixels cannot be read")
def short_rle(folder: Path) -> Path:
    series = slices()
    for data in series:
        data.compress(uid.RLELossless)
    (frame,) = pydicom.encaps.generate_frames(series[4].PixelData, number_of_frames=1)
    series[4].PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
    return save(folder, series)


@kind("DICOM: zeros after the pixels")
def padded(folder: Path) -> Path:
    series = slices()
    for data in series:
        data.PixelData += bytes(128)
    return save(folder, series)


@kind("DICOM: enhanced images of one frame")
def enhanced(folder: Path) -> Path:
    series = slices()
    for data in series:
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = uid.EnhancedMRImageStorage
        data.NumberOfFrames = 1
        shared, frame = pydicom.Dataset(), pydicom.Dataset()
        shared.PixelMeasuresSequence = [move(data, "PixelSpacing", "SliceThickness")]
        shared.PlaneOrientationSequence = [move(data, "ImageOrientationPatient")]
        frame.PlanePositionSequence = [move(data, "ImagePositionPatient")]
        data.SharedFunctionalGroupsSequence = [shared]
        data.PerFrameFunctionalGroupsSequence = [frame]
    return save(folder, series)


@kind("DICOM: an enhanced image of several frames", refused="holds several frames; convert")
def frames(folder: Path) -> Path:
    path = min(enhanced(folder).iterdir())
    data = pydicom.dcmread(path)
    data.NumberOfFrames, data.PixelData = 2, 2 * data.PixelData
    data.PerFrameFunctionalGroupsSequence.append(data.PerFrameFunctionalGroupsSequence[0])
    data.save_as(path)
    for other in folder.iterdir():
        if other != path:
            other.unlink()
    return folder


def move(data: pydicom.Dataset, *tags: str) -> pydicom.Dataset:
    """Take tags out of a data set, into another one."""
    other = pydicom.Dataset()
    for tag in tags:
        other[tag] = data.pop(tag)
    return other


def headless(start: bytes) -> Callable[[Path], Path]:
    """Make a maker of a series whose files begin at these bytes, without a preamble."""

    def make(folder: Path) -> Path:
        for path in save(folder, slices()).iterdir():
            whole = path.read_bytes()
            path.write_bytes(whole[whole.index(start) :])
        return folder

    return make


kind("DICOM: no preamble")(headless(b"\2\0\0\0UL"))
kind("DICOM: no preamble and no meta information")(headless(b"\x08\0\x16\0UI"))


@kind("DICOM: text that its character set does not explain", noted="FLAIR is 'FLAIR Sch.del'")
def foreign_text(folder: Path) -> Path:
    for data in (series := slices()):
        data.SpecificCharacterSet = "ISO_IR 192"
        data["SeriesDescription"] = pydicom.DataElement(0x0008103E, "UN", b"FLAIR Sch\xe4del\n\0")
        data["ContrastBolusAgent"] = pydicom.DataElement(0x00180010, "UN", b"Gadovist\xae\xff")
    return save(folder, series)


def test_foreign_text_stops_no_cohort(tmp_path):
    """A study that is refused is named with its text; the others are in the table."""
    weights = make_weights(tmp_path / "narrow.pt")
    plain_nifti(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "a.nii.gz").rename(tmp_path / "in" / "a.nii.gz")
    for k in (1, 2):
        series = slices()
        for data in series:
            data.SeriesInstanceUID = f"1.2.{k}"
            data["ContrastBolusAgent"] = pydicom.DataElement(0x00180010, "UN", b"Gadovist\xae\xff")
        save(tmp_path / "in" / "study" / f"s{k}", series)
    words = ["--images", tmp_path / "in", "--weights", weights, "--predictions", tmp_path / "out"]
    words += ["--figure", tmp_path / "out" / "dsc.png", "--device", "cpu"]
    with pytest.raises(SystemExit):
        inference.main([str(word) for word in words])
    assert "\na," in (tmp_path / "out" / "volumes.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("spacing, thickness", [(6, 5), (0, 6), ("", 6), ("", ""), (-1, 0)])
def test_a_lone_slice_is_as_thick_as_its_header_says(tmp_path, spacing, thickness):
    data = slices()[8]
    data.SpacingBetweenSlices, data.SliceThickness = spacing, thickness
    save(tmp_path / "a", [data])
    if thickness in ("", 0):
        with pytest.raises(ValueError, match="IM000 is one slice without SliceThickness and"):
            find_cases(tmp_path / "a")
        return
    (case,) = find_cases(tmp_path / "a")
    assert case.spacing == SPACING
    assert any("SliceThickness, 6 mm" in note for note in case.notes) == (spacing != 6)


# DICOM: folders, series, patients and words


def series_of(number: int, lesion: bool = True, **tags: object) -> list[pydicom.Dataset]:
    """Make the phantom as the series of this number, with its lesion or without."""
    series = slices()
    for k, data in enumerate(series):
        data.SeriesInstanceUID, data.SeriesNumber = f"1.2.{number}", number
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}.{k + 1}"
        for tag, value in tags.items():
            setattr(data, tag, value)
        if not lesion:
            store(data, np.minimum(data.pixel_array, BRAIN))
    return series


def t1(number: int, words: str, **tags: object) -> list[pydicom.Dataset]:
    tags = {"EchoTime": 12, "InversionTime": None} | tags
    return series_of(number, lesion=False, SeriesDescription=words, **tags)


OBJECTS = {
    "report": uid.BasicTextSRStorage,
    "key images": uid.KeyObjectSelectionDocumentStorage,
    "presentation state": uid.GrayscaleSoftcopyPresentationStateStorage,
    "structure set": uid.RTStructureSetStorage,
    "PDF": uid.EncapsulatedPDFStorage,
    "raw data": uid.RawDataStorage,
    "spectroscopy": uid.MRSpectroscopyStorage,
    "segmentation": uid.SegmentationStorage,
}


def without_image(path: Path, kind: uid.UID) -> Path:
    """Write an object of the phantom's study that holds no image."""
    data = slices()[0]
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = kind
    data.SeriesInstanceUID = f"1.2.99.{kind}"
    if kind != uid.SegmentationStorage:
        del data.PixelData
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path.parent


def tree_kind(what: str, below: str, given: str, refused: str = "", noted: str = "") -> None:
    """Add a FLAIR series in a folder at `below`; `given` is what --images gets."""

    def make(folder: Path) -> Path:
        save(folder / below, slices())
        return folder / given

    kind(f"DICOM: {what}", refused, noted)(make)


tree_kind("patient, study and series", "LGG/TCGA-CS-4941/1996/3-FLAIR", "LGG")
tree_kind("collection, patient, study and series", "in/LGG/TCGA-CS-4941/1996/3-FLAIR", "in")
tree_kind("a study that holds FLAIR alone", "cohort/anna/s3", "cohort")
tree_kind("ten folders in each other", "/".join("abcdefghij"), "a")


@kind("DICOM: a CD with DICOMDIR", noted="FLAIR is 'AX FLAIR'")
def cd(folder: Path) -> Path:
    (folder / "CD" / "DICOM").mkdir(parents=True)
    shutil.copy(without_image(folder / "other" / "x", uid.MediaStorageDirectoryStorage) / "x",
                folder / "CD" / "DICOMDIR")  # fmt: skip
    for k, series in enumerate((t1(1, "T1"), slices())):
        save(folder / "CD" / "DICOM" / "PA0" / "ST0" / f"SE{k}", series)
    return folder / "CD"


@kind("DICOM: a series in several folders")
def spread(folder: Path) -> Path:
    for k, data in enumerate(slices()):
        save(folder / "store" / f"{k % 3}" / f"{k}", [data])
    return folder / "store"


@kind("DICOM: a folder with a link to itself")
def link(folder: Path) -> Path:
    save(folder / "anna" / "s0", slices())
    (folder / "anna" / "again").symlink_to(folder / "anna")
    (folder / "anna" / "s0" / "again").symlink_to(folder)
    return folder / "anna"


@kind("DICOM: a study with objects that hold no image", noted="pre-contrast is 'T1'")
def objects(folder: Path) -> Path:
    save(folder / "anna" / "s0", slices())
    save(folder / "anna" / "s1", t1(1, "T1"))
    for name, storage in OBJECTS.items():
        without_image(folder / "anna" / name / "1.dcm", storage)
        without_image(folder / "anna" / "s0" / name, storage)
    return folder / "anna"


@kind("DICOM: nothing but a report", refused="anna: holds no .* no DICOM image")
def report(folder: Path) -> Path:
    return without_image(folder / "anna" / "1.dcm", OBJECTS["report"])


@kind("DICOM: a damaged image of another series", refused="s1/IM000: not a readable DICOM image")
def damaged(folder: Path) -> Path:
    save(folder / "anna" / "s0", slices())
    path = save(folder / "anna" / "s1", t1(1, "T1")) / "IM000"
    path.write_bytes(path.read_bytes()[:300])
    return folder / "anna"


@kind("DICOM: the only series is damaged", refused="IM0..: not a readable DICOM image")
def all_damaged(folder: Path) -> Path:
    for path in save(folder / "anna" / "s0", slices()).iterdir():
        path.write_bytes(path.read_bytes()[:300])
    return folder


@kind("DICOM: an empty file in a series", refused="IM999: not a readable DICOM image")
def empty(folder: Path) -> Path:
    save(folder / "anna", slices())
    (folder / "anna" / "IM999").touch()
    return folder / "anna"


@kind("DICOM: a broken link in a series", refused="IM999: not a readable DICOM image")
def broken_link(folder: Path) -> Path:
    save(folder / "anna", slices())
    (folder / "anna" / "IM999").symlink_to("nowhere")
    return folder / "anna"


@kind("DICOM: screenshots of FLAIR", noted="FLAIR is 'AX FLAIR'")
def screenshots(folder: Path) -> Path:
    save(folder / "anna" / "s0", slices())
    shot = series_of(1)[0]
    shot.SOPClassUID = uid.SecondaryCaptureImageStorage
    save(folder / "anna" / "s1", [shot])
    return folder / "anna"


@kind("DICOM: a CT study of the same patient")
def other_modality(folder: Path) -> Path:
    save(folder / "anna" / "mr", slices())
    save(folder / "anna" / "ct", series_of(1, StudyInstanceUID="1.3", Modality="CT"))
    return folder


def study_kind(what: str, *series: list, refused: str = "", noted: str = "") -> None:
    """Add a study of FLAIR and these series."""

    def make(folder: Path) -> Path:
        for k, one in enumerate((slices(), *series)):
            save(folder / "anna" / f"s{k}", one)
        return folder / "anna"

    kind(f"DICOM: {what}", refused, noted)(make)


PRE = "T1 ax ohne KM"
NO_AGENT = {"ContrastBolusAgent": "N/A"}
NAMED = "not certain which T1 each is: s1 = .*: name them with --flair, --pre and --post"
study_kind("words in German", t1(1, PRE, **NO_AGENT), noted=f"pre-contrast is '{PRE}'")
study_kind("words in French", t1(1, "T1 après injection"), noted="post-contrast is 'T1 apr")
study_kind("T1 that is in doubt", t1(1, "T1 +/- KM"), noted=NAMED)
study_kind("T1 in two planes", t1(1, "T1 ax"), t1(2, "T1 sag"), noted=NAMED)
study_kind("subtraction", t1(1, "T1 SUB"), noted="left out: 'T1 SUB'")
study_kind("two FLAIR", series_of(2), refused="2 FLAIR series; name .* --flair SERIES.* s1 = 'AX")


@kind("DICOM: no descriptions", noted=NAMED)
def nameless(folder: Path) -> Path:
    save(folder / "anna" / "s0", series_of(0, SeriesDescription=""))
    save(folder / "anna" / "s1", t1(1, ""))
    return folder / "anna"


@kind("DICOM: a lone T1 without description", refused="header says otherwise.* --flair")
def nameless_t1(folder: Path) -> Path:
    return save(folder / "anna", t1(1, ""))


@pytest.mark.parametrize("flair_name, post, said", [
    ("t1ce", "flair", "FLAIR is t1ce.nii.gz, which says 't1ce'.*post-contrast is flair.nii.gz"),
    ("anna_T1_post", None, "FLAIR is anna_T1_post.nii.gz, which says 't1'"),
    ("x", "x_t1_ohne_KM", "post-contrast is x_t1_ohne_KM.nii.gz, which says"),
    ("t2f", "t1c", ""),
    ("flair_to_t1", "brain", ""),
])  # fmt: skip
def test_names_of_other_sequences_are_said(tmp_path, flair_name, post, said):
    flair_file = nifti(tmp_path, f"{flair_name}.nii.gz")
    post_file = nifti(tmp_path, f"{post}.nii.gz") if post else None
    text = " ".join(find_sequences(flair_file, None, post_file).notes)
    assert re.search(said, text) if said else "which says" not in text


@pytest.mark.parametrize("study, place", [
    ("in/anna", "in/anna_mask.nii.gz"),
    ("in/anna", "in/anna/s0_mask.nii.gz"),
    ("in/anna/1", "in/anna/anna_20200101_mask.nii.gz"),
    ("in/anna/1", "in/anna/1/anna_20200101_mask.nii.gz"),
])  # fmt: skip
def test_the_mask_of_a_study(tmp_path, study, place):
    for k, one in enumerate(
        (series_of(0, StudyDate="20200101"), t1(1, "T1", StudyDate="20200101"))
    ):
        save(tmp_path / study / f"s{k}", one)
    if study != "in/anna":
        save(tmp_path / "in/anna/2", series_of(3, StudyInstanceUID="1.3", StudyDate="20210101"))
    mask = nibabel.Nifti1Image((flair() > BRAIN).astype("u1").T, affine())
    nibabel.save(mask, tmp_path / place)
    case = find_cases(tmp_path / "in")[0]
    assert case.name == ("anna" if study == "in/anna" else "anna_20200101")
    assert case.read_pair()[1].sum() == VOXELS


def test_a_series_of_another_sequence_is_said(tmp_path):
    for k, series in enumerate((slices(), t1(1, "T1 +C"))):
        save(tmp_path / "anna" / f"s{k}", series)
    scan = find_sequences(tmp_path / "anna" / "s1", None, tmp_path / "anna" / "s0")
    text = " ".join(scan.notes)
    assert "FLAIR is s1, which says 't1': check the order" in text
    assert "post-contrast is s0, which says 'flair'" in text
    with pytest.raises(ValueError, match="holds 2 DICOM series; give the folder of one.* s1 = 'T1"):
        find_sequences(tmp_path / "anna", None, None)


# Slices and masks


def lesion() -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[LESION] = True
    return mask


def masked_slices(
    folder: Path, write: Callable[[Path, np.ndarray], None], suffix: str = ".tif"
) -> Path:
    """Write the phantom as TIFF slices beside its masks (H, W) bool, each written by `write`."""
    for k, (image, mask) in enumerate(zip(flair(), lesion(), strict=True)):
        tifffile.imwrite(folder / f"x_{k}.tif", image)
        write(folder / f"x_{k}_mask{suffix}", mask)
    return folder


def negative(path: Path, image: np.ndarray) -> None:
    """Write a TIFF, inverted, that says so."""
    image = image * np.uint8(255) if image.dtype == bool else image
    tifffile.imwrite(path, np.iinfo(image.dtype).max - image, photometric="miniswhite")


def shown_inverted(path: Path, mask: np.ndarray) -> None:
    """Write a TIFF as ImageJ does with an inverting look-up table: stored as usual."""
    tifffile.imwrite(path, mask * np.uint8(255), photometric="miniswhite", software="ImageJ")


def by_fax(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path, compression="group4", tiffinfo={262: 0})  # Pillow inverts


def in_palette(path: Path, mask: np.ndarray, colours: str = "ffffff000000") -> None:
    """Write an indexed image: with the first colour outside the lesion, the second in it."""
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette(bytes.fromhex(colours))
    image.save(path)


def painted(path: Path, mask: np.ndarray, colour: int = 255, ground: int = 255) -> None:
    """Write RGBA: the lesion opaque, all else see-through."""
    image = np.where(mask[..., None], np.uint8(colour), np.uint8(ground)).repeat(4, axis=2)
    image[..., 3] = mask * np.uint8(255)
    Image.fromarray(image).save(path)


def as_jpeg(path: Path, mask: np.ndarray, quality: int = 80) -> None:
    """Write a PNG of what JPEG leaves of a mask."""
    buffer = io.BytesIO()
    Image.fromarray(mask * np.uint8(255)).save(buffer, "jpeg", quality=quality)
    Image.open(buffer).save(path)


def softened(mask: np.ndarray) -> np.ndarray:
    """Return a mask as a linear resize leaves it: 1 in the lesion, 1/16 to 15/16 at its edges."""
    soft = mask.astype(np.float32)
    for axis in (1, 2):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return soft


for what, write, suffix in (
    ("8 bits, white is zero", negative, ".tif"),
    ("16 bits, white is zero", lambda path, mask: negative(path, mask * np.uint16(65535)), ".tif"),
    ("1 bit by fax, white is zero", by_fax, ".tif"),
    ("1 bit by tifffile, which calls its zero white", tifffile.imwrite, ".tif"),
    ("8 bits by ImageJ, only shown inverted", shown_inverted, ".tif"),
    ("a palette that begins with black", partial(in_palette, colours="000000800000"), ".png"),
    ("a TIFF palette that begins with black", partial(in_palette, colours="000000ffffff"), ".tif"),
    (
        "a TIFF palette of black as 1",
        lambda path, mask: in_palette(path, ~mask, "ffffff000000"),
        ".tif",
    ),
    ("a see-through PNG", painted, ".png"),
    ("a see-through TIFF", painted, ".tif"),
    (
        "CMYK",
        lambda path, mask: Image.fromarray(mask).convert("RGB").convert("CMYK").save(path),
        ".tif",
    ),
):
    kind(f"masks: {what}", truth=True)(partial(masked_slices, write=write, suffix=suffix))
for quality in (30, 95):
    kind(f"masks: JPEG of quality {quality}", noted="grey edges", truth=True)(
        partial(masked_slices, write=partial(as_jpeg, quality=quality), suffix=".png")
    )
for what, refused, write in (
    ("white outside", "calls .* of the scan lesion", lambda p, m: in_palette(p, m, "ffffffff0000")),
    ("painted in black", "painted in black", partial(painted, colour=0)),
):
    kind(f"masks: {what}", refused)(partial(masked_slices, write=write, suffix=".png"))


@kind("slices: 16 bits, white is zero")
def negative_slices(folder: Path) -> Path:
    for k, image in enumerate(flair()):
        negative(folder / f"x_{k}.tif", image)
    return folder


@kind("slices: white is zero, on grey", "x_0.tif: its tag PhotometricInterpretation says that")
def grey_edges(folder: Path) -> Path:
    for k, image in enumerate(flair()):
        image[[0, -1]] = 500
        image[:, [0, -1]] = 500
        tifffile.imwrite(folder / f"x_{k}.tif", image, photometric="miniswhite")
    return folder


@kind("slices: 8 and 16 bits", "x_3.tif: uint8 pixels, but x_0.tif has uint16")
def mixed_bits(folder: Path) -> Path:
    for k, image in enumerate(flair()):
        tifffile.imwrite(folder / f"x_{k}.tif", image if k != 3 else (image // 4).astype(np.uint8))
    return folder


def masked_nifti(folder: Path, mask: np.ndarray, name: str = "a_mask.nii.gz", dtype=None) -> Path:
    """Write the phantom with a mask (S, H, W), which nibabel scales if the data type needs it."""
    path = nifti(folder)
    image = nibabel.Nifti1Image(mask.T, affine())
    if dtype:
        image.set_data_dtype(dtype)
    nibabel.save(image, folder / name)
    return path


SOFT = softened(lesion())
NESTED = lesion() * 1.0
NESTED[LESION][:, 1:-1, 1:-1] = 4
NESTED[LESION][:2, 2:-2, 2:-2] = 2
for what, noted, mask, dtype in (
    ("float, of a linear resize", "grey edges", SOFT, None),
    ("8 bits, of a linear resize", "grey edges", np.rint(255 * SOFT).astype(np.uint8), None),
    ("probabilities", "grey edges", (0.97 * SOFT + 0.01).clip(0.02), None),
    ("labels 1, 2 and 4 in 8 scaled bits", "labels 1, 2, 4", NESTED, np.uint8),
    ("labels 1, 2 and 4 in 16 scaled bits", "labels 1, 2, 4", NESTED, np.int16),
):
    kind(f"mask: {what}", noted=noted, truth=True)(partial(masked_nifti, mask=mask, dtype=dtype))
for what, refused, mask in (
    ("labels that a linear resize has blended", "its labels are blended", softened(NESTED)),
    ("all below a half", "its values end at 0.0039", lesion() / 255.0),
):
    kind(f"mask: {what}", refused)(partial(masked_nifti, mask=mask))


@pytest.mark.parametrize("order", ["RAS", "LPI", "ASL"])
def test_a_mask_whose_axes_are_in_another_order(tmp_path, order):
    """Converters turn the axes of a file; its voxels lie where they did."""
    save(tmp_path / "anna", slices())
    mask = nibabel.Nifti1Image((flair() > BRAIN).astype("u1").T, affine())
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(mask.affine), nibabel.orientations.axcodes2ornt(order)
    )
    nibabel.save(mask.as_reoriented(turn), tmp_path / "anna_mask.nii.gz")
    (case,) = find_cases(tmp_path)
    volume, true = case.read_pair()
    assert np.array_equal(true, volume[..., 1] > BRAIN)


for scan, mask in (
    ("x_FLAIR", "x_FLAIR_seg"),
    ("x_FLAIR", "x_FLAIR-label"),
    ("x_FLAIR", "x_FLAIR.seg"),
    ("x_FLAIR", "x_flair_lesion"),
    ("x_FLAIR", "x_FLAIR_roi"),
    ("x_FLAIR", "x_FLAIR_lesion_mask"),
    ("x_FLAIR", "x_FLAIR_gt"),
    ("x_FLAIR", "x_segmentation"),
    ("x_FLAIR", "x_label-lesion_mask"),
    ("x-t2f", "x_manual_mask"),
    ("x", "x_Segmentation"),
    ("x", "x GroundTruth"),
    ("x", "x_lesionmask"),
    ("x", "Segmentation"),
    ("x", "Segmentation.seg"),
    ("FLAIR", "lesion"),
):

    def beside(folder: Path, scan: str = scan, mask: str = mask) -> Path:
        plain_nifti(folder).rename(folder / f"{scan}.nii.gz")
        image = sitk.GetImageFromArray(lesion().astype(np.uint8))
        image.CopyInformation(sitk.ReadImage(folder / f"{scan}.nii.gz"))
        sitk.WriteImage(image, folder / f"{mask}.nrrd")
        return folder

    kind(f"{mask}.nrrd beside {scan}.nii.gz", truth=True)(beside)


@kind("masks of other things", "", "y_lesion.nii.gz: is named as a mask, of no scan here; left out")
def not_its_mask(folder: Path) -> Path:
    path = plain_nifti(folder)
    for name in ("a_brain_mask", "a_t1_seg", "brain_mask", "y_lesion"):
        shutil.copy(path, folder / f"{name}.nii.gz")
    return folder


def two_volumes(folder: Path, *names: str, one: bool = False) -> Path:
    for name in names:
        shutil.copy(nifti(folder, "scan.nii"), folder / f"{name}.nii")
    (folder / "scan.nii").unlink()
    return folder / f"{names[0]}.nii" if one else folder


@pytest.mark.parametrize("name", ["b_lesion", "Segmentation", "c-label"])
def test_a_mask_of_no_scan_is_said(tmp_path, name, capfd):
    two_volumes(tmp_path, "x1_flair", "x2_flair", "x1_brain_mask", name)
    assert [case.name for case in find_cases(tmp_path)] == ["x1_flair", "x2_flair"]
    said = capfd.readouterr().err
    assert said == f"{tmp_path / name}.nii: is named as a mask, of no scan here; left out\n"


kind("two masks", "a.nii: a_lesion.nii and a_seg.nii may both be its mask; move one away")(
    lambda folder: two_volumes(folder, "a", "a_seg", "a_lesion")
)
kind("a mask in place of its scan", "a_roi.nii: its one channel would be .* says 'roi'")(
    lambda folder: two_volumes(folder, "a_roi", "a", one=True)
)
kind("masks named first", "seg_1.nii: its one channel would be .* says 'seg'")(
    lambda folder: two_volumes(folder, "flair_1", "seg_1")
)
kind("masks alone", "a_lesion.nii: is named as a mask; put its scan beside it")(
    lambda folder: two_volumes(folder, "a_lesion", "b_lesion")
)


@kind("a cropped .seg.nrrd", "a.seg.nrrd: 96 x 96 x 4 voxels, but a.nii.gz has 96 x 96 x 16")
def cropped(folder: Path) -> Path:
    path = plain_nifti(folder)
    image = sitk.GetImageFromArray(lesion().astype(np.uint8))
    image.CopyInformation(sitk.ReadImage(path))
    sitk.WriteImage(image[:, :, 6:10], folder / "a.seg.nrrd")
    return folder


# Values that fill what was not scanned


# The table


@pytest.mark.parametrize("what", [name for name, row in KINDS.items() if not row.refused])
def test_is_read_right(what, tmp_path, capfd):
    row = KINDS[what]
    (case,) = find_cases(row.make(tmp_path))
    volume = case.read()
    mask = volume[..., volume.shape[-1] // 2] > (BRAIN + BRIGHT) / 2
    assert mask.sum() == VOXELS
    assert bool(case.masks) == row.truth
    if row.truth:
        assert np.array_equal(case.read_mask(), lesion())
    out, error = capfd.readouterr()
    assert re.search(row.noted, " ".join(case.notes) + error)
    assert out == "" and (row.noted or row.truth or error == "")
    if not isinstance(case, Scan):
        assert np.array_equal(mask, lesion())
        return
    case.write_map(tmp_path / "found_mask.nii.gz", mask)
    image = nibabel.load(tmp_path / "found_mask.nii.gz")
    voxels = np.argwhere(np.asanyarray(image.dataobj) > 0)
    assert len(voxels) == VOXELS
    assert abs(np.linalg.det(image.affine[:3, :3])) * len(voxels) / 1000 == pytest.approx(ML, 1e-3)
    centre = nibabel.affines.apply_affine(image.affine, voxels).mean(axis=0) * (-1, -1, 1)
    assert centre == pytest.approx(CENTRE, abs=0.1)


@pytest.mark.parametrize("what", [name for name, row in KINDS.items() if row.refused])
def test_is_refused_in_a_sentence(what, tmp_path, capfd):
    row = KINDS[what]
    path = row.make(tmp_path)
    with pytest.raises((ValueError, OSError), match=row.refused) as caught:
        for case in find_cases(path):
            case.read_pair() if case.masks else case.read()
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # a page, a table and a terminal can show it
    assert capfd.readouterr() == ("", "")
