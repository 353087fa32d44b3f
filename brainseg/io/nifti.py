"""Read NIfTI files by what their headers state, and write such as lie on their scan everywhere."""

import gzip
import io
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.quaternions import quat2mat
from nibabel.spatialimages import HeaderDataError

from .files import atomic_write
from .grid import AXES, ROUNDED, TO_LPS, Grid, damaged, grid_of_header
from .quiet import quiet

CODES = ("qform_code", "sform_code")
TURNS = ("quatern_b", "quatern_c", "quatern_d")
LENGTHS = ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
CHECKSUM = re.compile(rb" voxels ([0-9a-f]{8})$")
UNITS = {1: 1000.0, 3: 0.001}  # millimetres per metre and per micron, by xyzt_units
PART = 1 << 20  # bytes
DEFLATE = 1032  # the most bytes that one of a .gz unpacks to


@quiet  # nibabel would report what it mends in a header
def write_nifti(path: Path, voxels: np.ndarray, grid: Grid, source: Path, mark: str) -> None:
    """Write voxels (X, Y, Z) on the grid of `source`, in millimetres, whole or not at all.

    Of a NIfTI source, the file takes both forms and both codes, because programs differ in which
    they use. `mark` says what made it, with a checksum for `is_edited`. Raises OSError unless
    voxels and header are read back as they were written.
    """
    header = nibabel.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = f"{mark} voxels {_checksum(voxels)}"
    if is_nifti(source):
        _copy_forms(nifti_header(source), header)
    else:
        header.set_sform(grid.affine, "scanner")
        header.set_qform(grid.affine, "scanner")
    image = nibabel.Nifti1Image(voxels, None, header)
    with atomic_write(path) as temporary:
        nibabel.save(image, temporary)
        if not _holds(temporary, image):
            raise OSError(f"{path}: not read back as it was written; check the disk")


def is_edited(path: Path) -> bool:
    """Tell whether the voxels of a file that `write_nifti` wrote were changed since, as by hand."""
    if not (is_nifti(path) and path.is_file()):
        return False
    try:
        stated = CHECKSUM.search(bytes(nifti_header(path)["descrip"]).rstrip(b"\0"))
        return bool(stated) and _checksum(nifti_voxels(path)[..., 0]).encode() != stated[1]
    except ValueError:  # damaged: by no hand
        return False


def _checksum(voxels: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(voxels).data):08x}"


def _holds(path: Path, image: nibabel.Nifti1Image) -> bool:
    """Tell whether a file has the voxels and the header of an image that was saved to it."""
    try:
        written = nibabel.Nifti1Image.from_filename(path)
        same_voxels = np.array_equal(written.dataobj, image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError):
        return False
    return same_voxels and written.header == image.header


def _copy_forms(source: nibabel.Nifti1Header, header: nibabel.Nifti1Header) -> None:
    """Copy qform, sform and their codes from one header to another, whose unit is a millimetre."""
    unit = _unit(source)
    length = max(1.0, np.linalg.norm([source[name] for name in TURNS]))  # above 1 if rounded
    for name in TURNS:
        header[name] = _field(source, name) / length
    for name in CODES:
        header[name] = _field(source, name)
    for name in LENGTHS:
        header[name] = _field(source, name) * unit
    sizes = _field(source, "pixdim")
    header["pixdim"][0] = sizes[0]  # -1 if the qform is left-handed
    header["pixdim"][1:4] = sizes[1:4] * unit
    header.check_fix()


def _field(header: nibabel.Nifti1Header, name: str) -> np.ndarray:
    return header[name]


def _unit(header: nibabel.Nifti1Header) -> float:
    """Return millimetres per unit of length."""
    return UNITS.get(int(header["xyzt_units"]) & 7, 1.0)


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def nifti_header(path: Path) -> nibabel.Nifti1Header:
    """Read the header of a NIfTI-1 or NIfTI-2 file as it is; ValueError if it is damaged."""
    try:
        with _open(path) as file:
            head = file.read(nibabel.Nifti2Header.sizeof_hdr)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(damaged(path)) from error
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        block = head[: kind.sizeof_hdr]
        if kind.may_contain_header(block):
            return kind(block, check=False)  # a check would mend a header, and log it
    raise ValueError(damaged(path))


def _open(path: Path) -> io.BufferedIOBase:
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"  # its name may say otherwise
    if compressed:
        return gzip.GzipFile(path)
    return open(path, "rb")


def _shape_of(path: Path, header: nibabel.Nifti1Header) -> tuple[int, int, int, int]:
    """Return the voxels along three axes and the channels, which are along axis 4 or 5."""
    axes = int(header["dim"][0])
    shape = _field(header, "dim")[1 : axes + 1].tolist()
    if not 1 <= axes <= 7 or min(shape) < 1:
        raise ValueError(damaged(path))
    if axes > 4 and shape[3] == 1:  # axis 4 is time, axis 5 the values of a voxel
        del shape[3]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) not in (3, 4):
        raise ValueError(AXES.format(path, len(shape)))
    if len(shape) == 3:
        shape.append(1)
    return shape[0], shape[1], shape[2], shape[3]


def _type_of(path: Path, header: nibabel.Nifti1Header) -> np.dtype:
    """Return the data type of a voxel; one of red, green and blue has fields of these names."""
    try:
        kind = header.get_data_dtype()
    except (HeaderDataError, KeyError):  # a code that no type has
        kind = np.dtype("V")
    if kind.itemsize > 8 or not (kind.names or kind.kind in "iuf"):
        raise ValueError(f"{path}: its voxels are complex or of a rare type; save as float32")
    return kind


def nifti_grid(path: Path) -> tuple[Grid, int]:
    """Return the grid of the sform or, without one, of the qform, and the number of channels."""
    header = nifti_header(path)
    shape = _shape_of(path, header)
    channels = shape[3]
    colours = _type_of(path, header).names
    if colours:
        channels *= len(colours)
    for name in CODES:
        if not 0 <= _field(header, name) <= 5:
            raise ValueError(f"{path}: its {name} is {header[name]}, which has no meaning; set it")
    sform, _ = header.get_sform(coded=True)  # None if its code is 0
    has_qform = _field(header, "qform_code") > 0
    if sform is None and not has_qform:
        raise ValueError(f"{path}: its header gives no orientation; set its sform or qform")
    unit = _unit(header)
    qform = _qform(header) * unit * TO_LPS
    matrix, spacing = qform, _field(header, "pixdim")[1:4] * unit
    if sform is not None:
        matrix = sform[:3] * unit * TO_LPS
        spacing = np.linalg.norm(matrix[:, :3], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        direction = matrix[:, :3] / spacing
    grid = grid_of_header(path, shape[:3], spacing, matrix[:, 3], direction)
    if sform is not None and has_qform:
        far = [*grid.shape, 1]  # a small difference of a step is a large one at the far corner
        if not np.allclose(matrix * far, qform * far, rtol=0, atol=0.5):
            note = "its sform and qform disagree; the sform is used"
            grid = replace(grid, notes=(*grid.notes, note))
    return grid, channels


def _qform(header: nibabel.Nifti1Header) -> np.ndarray:
    """Return the matrix (3, 4) of the quaternion; nibabel's refuses one that was rounded."""
    vector = np.array([header[name] for name in TURNS], float)
    square = 1 - vector @ vector
    turn = quat2mat(np.append(max(0.0, square) ** 0.5, vector))
    if square < -ROUNDED:
        turn[:] = np.nan
    sizes = _field(header, "pixdim")
    if sizes[0] < 0:
        turn[:, 2] *= -1
    offset = [header[name] for name in LENGTHS[:3]]
    return np.column_stack((turn * sizes[1:4], offset)).astype(float)


def nifti_voxels(path: Path) -> np.ndarray:
    header = nifti_header(path)
    if not np.isfinite(header["vox_offset"]):
        raise ValueError(damaged(path))
    shape, kind = _shape_of(path, header), _type_of(path, header)
    start, length = header.get_data_offset(), math.prod(shape) * kind.itemsize
    if start < header.sizeof_hdr or length > path.stat().st_size * DEFLATE:
        raise ValueError(damaged(path))
    try:
        with _open(path) as file:
            file.seek(start)
            data = file.read(length)
            while file.read(PART):  # to the end, where the checksum of a .gz is
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(damaged(path)) from error
    if len(data) < length:
        raise ValueError(damaged(path))
    voxels = np.frombuffer(data, kind).reshape(shape, order="F")
    if kind.names:
        return np.concatenate([voxels[name] for name in kind.names], axis=3)
    return _scaled(voxels, float(header["scl_slope"]), float(header["scl_inter"]))


def _scaled(voxels: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Return slope * voxels + inter in float, or the voxels if the header asks for no scaling."""
    native = voxels.dtype.newbyteorder("=")
    if slope == 0 or not np.isfinite(slope):
        slope, inter = 1.0, 0.0
    if not np.isfinite(inter):
        inter = 0.0
    if slope == 1 and inter == 0:
        return voxels.astype(native, copy=False)
    scaled = np.empty_like(voxels, np.float64 if native == np.float64 else np.float32)
    for k in range(voxels.shape[2]):  # in float64, of which a whole volume would be large
        scaled[:, :, k] = np.multiply(voxels[:, :, k], slope, dtype=np.float64) + inter
    return scaled
