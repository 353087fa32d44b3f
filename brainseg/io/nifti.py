"""Write NIfTI files that lie on their scan in every program, and read them back."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from .files import MARK, atomic_write
from .grid import TO_LPS, UNITS, Grid, is_nifti, open_nifti

CODES = ("qform_code", "sform_code")
TURNS = ("quatern_b", "quatern_c", "quatern_d")
LENGTHS = ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
QUIET = logging.Logger("brainseg.nifti")  # nibabel would report what it mends in a header
QUIET.addHandler(logging.NullHandler())


def write_nifti(path: Path, voxels: np.ndarray, grid: Grid, source: Path) -> None:
    """Write voxels (X, Y, Z) on the grid of `source`, in millimetres, whole or not at all.

    Of a NIfTI source, the file takes both forms and both codes, because programs differ in which
    they use. Raises OSError unless voxels and header are read back as they were written.
    """
    header = nibabel.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = MARK
    if is_nifti(source):
        _copy_forms(_read_header(source), header)
    else:
        affine = np.eye(4)
        affine[:3, :3] = TO_LPS * grid.direction * grid.spacing
        affine[:3, 3] = TO_LPS[:, 0] * grid.offset
        header.set_sform(affine, "scanner")
        header.set_qform(affine, "scanner")
    image = nibabel.Nifti1Image(voxels, None, header)
    with atomic_write(path) as temporary:
        nibabel.save(image, temporary)
        if not _holds(temporary, image):
            raise OSError(f"{path}: not read back as it was written; check the disk")


def _holds(path: Path, image: nibabel.Nifti1Image) -> bool:
    """Tell whether a file has the voxels and the header of an image that was saved to it."""
    try:
        written = nibabel.load(path)
        same_voxels = np.array_equal(written.dataobj, image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError):
        return False
    return same_voxels and written.header == image.header


def _copy_forms(source: nibabel.Nifti1Header, header: nibabel.Nifti1Header) -> None:
    """Copy qform, sform and their codes from one header to another, whose unit is a millimetre."""
    unit = UNITS.get(int(source["xyzt_units"]) & 7, 1.0)
    for name in CODES + TURNS:
        header[name] = source[name]
    for name in LENGTHS:
        header[name] = source[name] * unit
    header["pixdim"][0] = source["pixdim"][0]  # -1 if the qform is left-handed
    header["pixdim"][1:4] = source["pixdim"][1:4] * unit


def _read_header(path: Path) -> nibabel.Nifti1Header:
    """Read the header of a NIfTI-1 or -2 file, mended as nibabel does when it opens the file."""
    with open_nifti(path) as file:
        content = file.read(nibabel.Nifti2Header.sizeof_hdr)
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        if kind.may_contain_header(content):
            header = kind(content[: kind.sizeof_hdr], check=False)
            header.check_fix(QUIET)
            return header
    raise ValueError(f"{path}: not a NIfTI file; export it again")
