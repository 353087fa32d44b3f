"""Test files as hospitals and colleagues send them: each is read right, or refused aloud.

Every row is a kind of file: a function that writes one and returns its path, with what must come
out: a phantom's lesion (voxels, ml, centre in mm), or the sentence that refuses it. The lesion is
the brightest part of FLAIR, so a threshold stands in for the network; what is compared is which
voxels are read, how large they are, and where they are. Masks are read by nibabel, not by us.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from brainseg.io.files import MARK
from brainseg.io.layouts import find_cases

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


KINDS: dict[str, Kind] = {}


def kind(what: str, refused: str = "", noted: str = "") -> Callable:
    """Add a kind of file to the table."""

    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        assert what not in KINDS
        KINDS[what] = Kind(make, refused, noted)
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
        assert written.header["descrip"].item() == MARK.encode()
        scan, written = (sitk.ReadImage(tmp_path / name) for name in ("a.nii", "mask.nii.gz"))
        assert scan.IsSameImageGeometryAs(written)


# DICOM: pixels and geometry


# DICOM: folders, series, patients and words


# DICOM Segmentations


# Slices and masks


# Values that fill what was not scanned


# The table


@pytest.mark.parametrize("what", [name for name, row in KINDS.items() if not row.refused])
def test_is_read_right(what, tmp_path):
    make, _, noted = KINDS[what]
    (case,) = find_cases(make(tmp_path))
    volume = case.read()
    mask = volume[..., volume.shape[-1] // 2] > (BRAIN + BRIGHT) / 2
    case.write_map(tmp_path / "found_mask.nii.gz", mask)
    image = nibabel.load(tmp_path / "found_mask.nii.gz")
    voxels = np.argwhere(np.asanyarray(image.dataobj) > 0)
    assert len(voxels) == VOXELS
    assert abs(np.linalg.det(image.affine[:3, :3])) * len(voxels) / 1000 == pytest.approx(ML, 1e-3)
    centre = nibabel.affines.apply_affine(image.affine, voxels).mean(axis=0) * (-1, -1, 1)
    assert centre == pytest.approx(CENTRE, abs=0.1)
    assert re.search(noted, " ".join(case.notes))


@pytest.mark.parametrize("what", [name for name, row in KINDS.items() if row.refused])
def test_is_refused_in_a_sentence(what, tmp_path):
    make, refused, _ = KINDS[what]
    path = make(tmp_path)
    with pytest.raises((ValueError, OSError), match=refused) as caught:
        for case in find_cases(path):
            case.read_pair() if case.masks else case.read()
    assert "\n" not in str(caught.value)
