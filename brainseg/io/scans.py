"""Scans as hospitals keep them: NIfTI, MetaImage, NRRD and DICOM, read and written by medpy.

The network has learned axial slices whose columns run to the patient's left, whose rows run to
the posterior, and whose numbers run upward. A scan of any other orientation is turned that way by
its header, and its mask is turned back and written on the scan's own grid.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from .files import atomic_write
from .grid import Grid, damaged, is_nifti, read_fields, read_grid
from .slices import Case

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
FLOATS = {"16": "f4", "64": "f8"}  # of the data types of NIfTI
BYTES = {  # of an element of MetaImage
    **dict.fromkeys(("CHAR", "UCHAR"), 1),
    **dict.fromkeys(("SHORT", "USHORT"), 2),
    **dict.fromkeys(("INT", "UINT", "LONG", "ULONG", "FLOAT"), 4),
    **dict.fromkeys(("LONG_LONG", "ULONG_LONG", "DOUBLE"), 8),
}


@dataclass(frozen=True)
class Scan(Case):
    """A case of volume files: `slices` is one, or pre-contrast, FLAIR and post-contrast.

    A file of one channel is taken for FLAIR, which also stands in for the sequences that are not
    there. `masks` is empty or one file on the same grid. A DICOM series is its folder.
    """

    mask_name: ClassVar[str] = "<scan>_mask.nii.gz"
    grid: Grid
    channels: int  # of the first file

    @classmethod
    def open(cls, name: str, files: Sequence[Path], mask: Path | None = None) -> Scan:
        """The scan in one file, or in pre-contrast, FLAIR, post-contrast; raises ValueError."""
        grid, channels = read_grid(files[0])
        numbers = tuple(range(1, grid.shape[grid.axes[2]] + 1))
        return cls(name, numbers, tuple(files), (mask,) if mask else (), grid, channels)

    @property
    def folder(self) -> Path:
        return self.slices[0]

    @property
    def files(self) -> list[Path]:
        found = []
        for path in self.slices + self.masks:
            found += sorted(path.iterdir()) if path.is_dir() else [path]
            if path.suffix.lower() == ".mhd":  # its voxels are in another file
                found += [p for s in (".raw", ".zraw") if (p := path.with_suffix(s)).exists()]
        return found

    @property
    def spacing(self) -> tuple[float, float, float]:
        return tuple(self.grid.spacing[axis] for axis in reversed(self.grid.axes))

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.channels == 1:
            pre, flair, post = self.slices if len(self.slices) == 3 else self.slices * 3
            missing = ["pre-contrast"] * (pre == flair) + ["post-contrast"] * (post == flair)
            if missing:
                notes.append(f"FLAIR stands in for {' and '.join(missing)}")
        rows, columns = self.spacing[1:]
        if max(rows, columns) > 1.5 * min(rows, columns):
            notes.append(
                f"its axial pixels are {rows:.1f} x {columns:.1f} mm, so that the head is squashed "
                "and the mask will be poor; resample it to square pixels"
            )
        return [f"{self.name}: {note}" for note in notes]

    def read(self) -> np.ndarray:
        """The volume (S, H, W, C); raises ValueError, naming the file, if one cannot be used."""
        loaded = {path: self._on_grid(path) for path in dict.fromkeys(self.slices)}
        for path, voxels in loaded.items():
            if len(self.slices) > 1 and voxels.shape[3] > 1:
                raise ValueError(f"{path}: {voxels.shape[3]} channels; give it with --images alone")
        voxels = np.concatenate([loaded[path] for path in self.slices], axis=3)
        if voxels.shape[3] == 1:
            voxels = np.repeat(voxels, 3, axis=3)
        return np.ascontiguousarray(self.grid.to_axial(voxels))

    def read_mask(self) -> np.ndarray:
        """The mask (S, H, W), bool: true wherever the mask file is above 0."""
        (path,) = self.masks
        voxels = self._on_grid(path)
        if voxels.shape[3] > 1 or voxels.min() < 0:
            raise ValueError(f"{path}: is no mask of 0 and 1; give one channel, 0 for background")
        return np.ascontiguousarray(self.grid.to_axial(voxels)[..., 0] > 0)

    def _on_grid(self, path: Path) -> np.ndarray:
        """Voxels (X, Y, Z, C) of a file; ValueError, naming both, if its grid is another."""
        read_grid(path)[0].check_same(path, self.grid, self.slices[0])
        return read_voxels(path)

    def write_mask(self, path: Path, mask: np.ndarray) -> None:
        """Write a mask (S, H, W), 0 or 1, on the grid of the scan, whole or not at all."""
        self.write_map(path, mask.astype(np.uint8))

    def write_map(self, path: Path, values: np.ndarray) -> None:
        """Write values (S, H, W) of any type on the grid of the scan, whole or not at all."""
        from medpy.io import Header, save

        header = Header(spacing=self.grid.spacing, offset=self.grid.offset)
        header.direction = self.grid.direction  # given above, medpy 0.5.2 would fail on it
        voxels = np.ascontiguousarray(self.grid.from_axial(values))
        with atomic_write(path) as temporary:
            try:
                save(voxels, str(temporary), header)
                whole = np.array_equal(read_voxels(temporary)[..., 0], voxels)
            except (RuntimeError, ValueError):
                whole = False
            if not whole:  # the writer of NIfTI says nothing of a full disk
                raise OSError(f"{path}: not written; is the disk full? What was there is kept")


def scan_name(path: Path) -> str:
    """The name of a volume file without its suffix, of which .nii.gz is one."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def is_scan(path: Path) -> bool:
    """Whether a path is a volume file that can be read, or the folder of a DICOM series."""
    if path.is_dir():
        return any(map(_is_dicom, sorted(path.iterdir())))
    return path.name.lower().endswith(SUFFIXES) and path.name[0] != "."


def _is_dicom(path: Path) -> bool:
    """Whether it is a DICOM image; the table of contents of a CD is none."""
    if not path.is_file() or path.name[0] == "." or path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in (".tif", ".tiff", ".png"):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_voxels(path: Path) -> np.ndarray:
    """The voxels (X, Y, Z, C) of a file; ValueError, naming it, if it cannot be read."""
    from medpy.io import load

    if is_nifti(path):
        _check_nifti(path, read_fields(path))
    if path.name.lower().endswith((".mha", ".mhd")):
        _check_metaimage(path)
    try:
        voxels, header = load(str(path))
    except MemoryError:
        raise
    except Exception as error:  # SimpleITK raises RuntimeError, medpy its own
        raise ValueError(damaged(path)) from error
    if header.sitkimage.GetDimension() == 4:  # medpy takes the last of four axes for its channels
        voxels = voxels.transpose(3, 0, 1, 2)
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError(not_finite(path))
    return voxels


def not_finite(path: Path) -> str:
    return f"{path}: holds NaN or infinite voxels; export it again"


def _check_nifti(path: Path, field: dict[str, str]) -> None:
    """Raise ValueError if voxels are cut short, NaN or infinite: their reader makes them 0."""
    offset, kind = int(float(field["vox_offset"])), FLOATS.get(field["datatype"])
    sizes = [int(field[f"dim[{k}]"]) for k in range(1, 1 + int(field["dim[0]"]))]
    needed = offset + math.prod(sizes) * int(field["bitpix"]) // 8
    length, finite, packed = 0, True, path.name.lower().endswith(".gz")
    step = int(kind[1]) if kind else 1
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            head = file.read(offset)
            order = "<" if head[:2] in (b"\x5c\x01", b"\x1c\x02") else ">"  # 348 or 540
            length = len(head)
            while part := file.read(1 << 20):  # to the end, where the checksum of a .gz is
                length += len(part)
                part = part[: max(0, len(part) - max(0, length - needed))]  # what follows is free
                if kind:
                    floats = np.frombuffer(part[: len(part) // step * step], order + kind)
                    finite &= bool(np.isfinite(floats).all())
                elif not packed:
                    length = path.stat().st_size
                    break
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(damaged(path)) from error
    if length < needed:
        raise ValueError(damaged(path))
    if not finite:
        raise ValueError(not_finite(path))


def _check_metaimage(path: Path) -> None:
    """Raise ValueError if the voxels are cut short: their reader says so in lines of its own."""
    with open(path, "rb") as file:
        header = file.read(1 << 16)
    end = re.search(rb"^ElementDataFile *= *(.*?) *\r?\n", header, re.M)
    if not end:
        return  # the reader will say what it is
    field = dict(re.findall(r"^(\w+) *= *(.*?)\s*$", header[: end.end()].decode("latin-1"), re.M))
    compressed = field.get("CompressedData", "False").lower() == "true"
    text = field.get("BinaryData", "True").lower() == "false"
    if text or (compressed and "CompressedDataSize" not in field):
        return  # how long it is to be is not known
    voxels, length = path.parent / field["ElementDataFile"], path.stat().st_size - end.end()
    if field["ElementDataFile"].upper() != "LOCAL":
        if re.match(r"LIST\b|.*%", field["ElementDataFile"]):  # of many files
            return
        if not voxels.is_file():
            raise ValueError(
                f"{path}: its voxels, {voxels.name}, are not beside it; copy them there"
            )
        length = voxels.stat().st_size
    try:
        sizes = [int(size) for size in field["DimSize"].split()]
        needed = math.prod(sizes) * int(field.get("ElementNumberOfChannels", 1))
        needed *= BYTES[field["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")]
        needed = int(field.get("CompressedDataSize", needed))
    except (KeyError, ValueError):
        return
    if length < needed:
        raise ValueError(damaged(path))
