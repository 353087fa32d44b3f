"""A case, its files in slice order, and reading the image of a slice."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image, ImageSequence

from .files import by
from .labels import Labels

# Silence the readers on a damaged file: `read_slice` reports it in one line.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="PIL")

SLICE_NAME = re.compile(r"^(?P<stem>.+)_(?P<number>\d+)(?P<mask>_mask)?\.(?:tiff?|png)$", re.I)
IMAGE_SUFFIXES = {".tif", ".tiff", ".png"}


@dataclass(frozen=True)
class Case:
    """The files of one case, in slice order. `masks` is empty if the case has none."""

    mask_name: ClassVar[str] = "<slice>_mask.tif"
    notes: ClassVar[Sequence[str]] = ()  # what the user should know about how it is read
    # Millimetres from slice to slice, row to row, column to column; None: not recorded.
    spacing: ClassVar[tuple[float, float, float] | None] = None
    patient: ClassVar[str] = ""  # whom DICOM headers name
    name: str
    numbers: tuple[int, ...]
    slices: tuple[Path, ...]
    masks: tuple[Path, ...]
    labels: Labels = field(default_factory=Labels, kw_only=True, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """Return where the case's files are, for messages."""
        return self.slices[0].parent

    @property
    def files(self) -> list[Path]:
        """List every file that is read; if the case changes, one of these does."""
        return [*self.slices, *self.masks]

    @property
    def aspect(self) -> float:
        """Return pixel height over width; 1 if they differ by at most 1 % or are unknown."""
        if not self.spacing:
            return 1.0
        ratio = self.spacing[1] / self.spacing[2]
        return ratio if abs(ratio - 1) > 0.01 else 1.0

    def read(self) -> np.ndarray:
        """Read the volume (S, H, W, C), in the data type of its files.

        Raises ValueError, naming the file, if a slice is damaged or differs in shape.
        """
        return _stack([read_slice(path) for path in self.slices], self.slices)

    def read_mask(self) -> np.ndarray:
        """Read the mask (S, H, W), bool: true wherever a mask file holds a lesion label."""
        masks = _stack([read_slice(path) for path in self.masks], self.masks)
        if masks.shape[-1] in (2, 4):  # the last channel is opacity
            masks = masks[..., :-1]
        return self.labels.lesion(masks.max(axis=-1), self.name, self.folder)

    def read_pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the volume and its mask; ValueError if the mask is missing or of another shape."""
        if not self.masks:
            raise ValueError(f"{self.folder}: has no mask; put one beside it, as {self.mask_name}")
        volume, mask = self.read(), self.read_mask()
        if volume.shape[:3] != mask.shape:
            raise ValueError(
                f"{self.folder}: masks of {by(mask.shape[1:])} pixels beside slices of "
                f"{by(volume.shape[1:3])}; export both from the same grid"
            )
        return volume, mask


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Raise what goes wrong with a case, if it is no sentence yet, as a ValueError that names it.

    Libraries raise errors of every kind on a damaged file, and one file must not end a cohort.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except MemoryError as error:
        fault = "does not fit into memory; crop it, or use a machine with more"
        raise ValueError(f"{path}: {fault}") from error
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: cannot be read ({lines[-1]}); export it again") from error


def find_slices(folder: Path) -> Case:
    """Open the case in a folder of images; ValueError for gaps, duplicates or unpaired masks."""
    slices: dict[int, Path] = {}
    masks: dict[int, Path] = {}
    stems: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        match = SLICE_NAME.match(path.name)
        if not match:
            raise ValueError(f"{path}: a slice is named <anything>_<number>.tif; rename or move it")
        found = masks if match["mask"] else slices
        number = int(match["number"])
        stems.setdefault(match["stem"], path)
        if number in found:
            raise ValueError(f"{path}: slice {number} is also in {found[number].name}; remove one")
        found[number] = path
    if not slices:
        raise ValueError(
            f"{folder}: holds no slice named <anything>_<number>.tif or .png, no volume file and "
            "no DICOM image"
        )
    if len(stems) > 1:
        one, other, *_ = stems.values()
        raise ValueError(
            f"{other}: is of another case than {one.name}, by its name; give each case a folder"
        )
    numbers = sorted(slices)
    gap = next(k for k in count(numbers[0]) if k not in slices)
    if gap < numbers[-1]:
        raise ValueError(
            f"{folder}: slice {gap} is missing between {numbers[0]} and {numbers[-1]}; "
            "add it or renumber the slices"
        )
    if masks and (odd := sorted(set(masks) ^ set(numbers))):
        lacks = "slice" if odd[0] in masks else "mask"
        raise ValueError(
            f"{folder}: {lacks} {odd[0]} is missing, but others exist; "
            "add it (all 0 for no lesion) or remove all the masks"
        )
    paths = tuple(slices[n] for n in numbers), tuple(masks[n] for n in sorted(masks))
    return Case(folder.name, tuple(numbers), *paths)


def read_slice(path: Path) -> np.ndarray:
    """Read one image (H, W, C), 8 or 16 bits or float; ValueError, naming the file, if damaged."""
    try:
        image = _read_png(path) if path.suffix.lower() == ".png" else _read_tiff(path)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # each library raises its own, some a bare Exception
        raise ValueError(f"{path}: not a readable image, or cut short; export it again") from error
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.size == 0:
        raise ValueError(
            f"{path}: holds an array of shape {image.shape}, not one 2-D slice; save one per file"
        )
    check_finite(path, image)
    return image


def save_tiff(path: Path, image: np.ndarray, mark: str, **options: object) -> None:
    """Write an image as a TIFF with our mark. Raises OSError if the disk is full.

    tifffile may not if it writes the file: NumPy does it, in C, and an error with the last bytes
    is lost.
    """
    content = io.BytesIO()
    tifffile.imwrite(content, image, software=mark, **options)
    path.write_bytes(content.getbuffer())


def check_finite(path: Path, voxels: np.ndarray) -> None:
    """Raise ValueError, naming the file, for NaN or infinite voxels."""
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError(f"{path}: holds NaN or infinite voxels; export it again")


def _read_png(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        header = file.read(26)
    deep_colour = header[24:] in (b"\x10\x02", b"\x10\x06")  # 16 bits of RGB or RGBA
    if not deep_colour:
        return _decode(path, "PNG")
    image = sitk.ReadImage(str(path), imageIO="PNGImageIO")  # Pillow keeps only 8 bits
    return sitk.GetArrayFromImage(image)


def _read_tiff(path: Path) -> np.ndarray:
    """Read the one page of a TIFF; several give an array of 4 axes, which `read_slice` rejects."""
    try:
        with tifffile.TiffFile(path) as tiff:
            if not tiff.pages:
                raise ValueError("no page")
            page = tiff.pages[0]
            if "BitsPerSample" not in page.tags and page.samplesperpixel > 1:
                raise ValueError("its directory is cut short")
            if len(tiff.pages) > 1:
                # Not tiff.asarray(): an OME-TIFF may name other files, and it would open them.
                images = np.stack([page.asarray() for page in tiff.pages])
                return images.reshape(len(images), *page.shape[:2], -1)
            image = page.asarray()
            return np.moveaxis(image, 0, -1) if page.axes == "SYX" else image
    except ValueError:  # e.g. LZW, which only Pillow can unpack
        return _decode(path, "TIFF")


def _decode(path: Path, kind: str) -> np.ndarray:
    """Read a PNG or a TIFF by Pillow; without `kind`, the content would choose among 40 decoders.

    Several frames give an array of 4 axes, which `read_slice` rejects.
    """
    frames = []
    with Image.open(path, formats=[kind]) as image:
        for frame in ImageSequence.Iterator(image):
            if frame.mode == "P":
                frame = frame.convert(frame.palette.mode)
            frames.append(np.asarray(frame))
    return frames[0] if len(frames) == 1 else np.stack(frames)


def _stack(images: Sequence[np.ndarray], paths: Sequence[Path]) -> np.ndarray:
    for image, path in zip(images, paths, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{path}: {by(image.shape)} voxels, but {paths[0].name} has "
                f"{by(images[0].shape)}; all slices of a case must agree"
            )
    return np.stack(images)
