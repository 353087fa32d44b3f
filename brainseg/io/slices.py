"""A case, its files in slice order, and reading the image of a slice."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image, ImageSequence
from tifffile import PHOTOMETRIC

from .files import by, out_of_memory
from .labels import Labels, painted
from .quiet import quiet

SLICE_NAME = re.compile(r"^(?P<stem>.+)_(?P<number>\d+)(?P<mask>_mask)?\.(?:tiff?|png)$", re.I)
ORIENTATION = 274  # the number of the tag in Exif
COLOURS = "has a palette of colours; save it as RGB, or in grey if it is FLAIR alone"
TURNS = "its tag Orientation turns it; save it upright, without"
TURNED = range(2, 9)  # values of the tag Orientation of TIFF; at 1, it is shown as it is stored
IMAGE_SUFFIXES = {".tif", ".tiff", ".png"}


@dataclass(frozen=True)
class Case:
    """The files of one case, in slice order. `masks` is empty if the case has none."""

    mask_name: ClassVar[str] = "<slice>_mask.tif"
    notes: ClassVar[Sequence[str]] = ()  # what the user should know about how it is read
    replaced: ClassVar[Sequence[str]] = ()  # sequences that FLAIR stands in for
    patient_id: ClassVar[str] = ""  # in DICOM headers
    name: str
    numbers: tuple[int, ...]
    slices: tuple[Path, ...]
    masks: tuple[Path, ...]
    labels: Labels = field(default_factory=Labels, kw_only=True, compare=False, repr=False)
    # What a --patients file says, or the size of the cohort asks for; see splits.
    patient: str = field(default="", kw_only=True, compare=False)
    subset: str = field(default="", kw_only=True, compare=False)
    doubts: tuple[str, ...] = field(default=(), kw_only=True)  # notes that call for a look
    # The channels to use of files with several: pre-contrast, FLAIR, post-contrast, or FLAIR.
    picked: tuple[int, ...] = field(default=(), kw_only=True)
    given_spacing: tuple[float, float, float] | None = field(default=None, kw_only=True)

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Return mm from slice to slice, row to row, column to column; None: not recorded."""
        return self.given_spacing

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
        if self.spacing is None:
            return 1.0
        ratio = self.spacing[1] / self.spacing[2]
        if abs(ratio - 1) <= 0.01:
            return 1.0
        return ratio

    def read(self) -> np.ndarray:
        """Read the volume (S, H, W, C) in the type of its files; ValueError if one is unusable."""
        return self.pick(read_slices(self.slices))

    def pick(self, volume: np.ndarray) -> np.ndarray:
        """Select the channels (..., C) to use; ValueError, naming the case, if one is missing."""
        if not self.picked:
            return volume
        channels = volume.shape[-1]
        if max(self.picked) >= channels:
            raise ValueError(
                f"{self.folder}: has the channels 0 to {channels - 1}; there is no "
                f"{max(self.picked)} to choose with --channels"
            )
        return volume[..., list(self.picked)]

    def read_mask(self) -> np.ndarray:
        """Read the mask (S, H, W), bool: true wherever a mask file holds a lesion label."""
        masks = read_slices(self.masks, of_mask=True)
        if masks.shape[-1] in (2, 4):  # the last channel is opacity
            masks = painted(masks[..., :-1], masks[..., -1:], self.folder)
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
    """Raise what goes wrong with a case, of whatever kind, as a ValueError that names it."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        if out_of_memory(error):
            fault = "does not fit into memory; crop it, or use a machine with more"
        else:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            fault = f"cannot be read ({lines[-1]}); export it again"
        raise ValueError(f"{path}: {fault}") from error


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
        files = masks if match["mask"] else slices
        number = int(match["number"])
        stems.setdefault(match["stem"], path)
        if number in files:
            raise ValueError(f"{path}: slice {number} is also in {files[number].name}; remove one")
        files[number] = path
    if not slices:
        raise ValueError(
            f"{folder}: holds no slice named <anything>_<number>.tif or .png, no volume file and "
            "no DICOM image"
        )
    if len(stems) > 1:
        first, other = list(stems.values())[:2]
        raise ValueError(
            f"{other}: is of another case than {first.name}, by its name; give each case a folder"
        )
    _check_complete(folder, slices, masks)
    slices, masks = dict(sorted(slices.items())), dict(sorted(masks.items()))
    return Case(folder.name, tuple(slices), tuple(slices.values()), tuple(masks.values()))


def _check_complete(folder: Path, slices: dict[int, Path], masks: dict[int, Path]) -> None:
    """Raise ValueError if a number is missing, or if only some of the slices have a mask."""
    numbers = sorted(slices)
    for number, following in pairwise(numbers):
        if following > number + 1:
            raise ValueError(
                f"{folder}: slice {number + 1} is missing between {numbers[0]} and {numbers[-1]}; "
                "add it or renumber the slices"
            )
    unpaired = sorted(set(slices) ^ set(masks))
    if masks and unpaired:
        lacking = "slice" if unpaired[0] in masks else "mask"
        raise ValueError(
            f"{folder}: {lacking} {unpaired[0]} is missing, but others exist; "
            "add it (all 0 for no lesion) or remove all the masks"
        )


@quiet  # on damaged files
def read_slices(paths: Sequence[Path], of_mask: bool = False) -> np.ndarray:
    """Read images of one shape as a volume (S, H, W, C), black lowest; ValueError if one is bad.

    The numbers of a palette of colours are labels `of_mask`; in a scan they are refused.
    """
    images = []
    doubtful = []  # the places of those tagged "white is zero"
    for path in paths:
        image, white_is_zero = _read_image(path, of_mask)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{path}: {by(image.shape)} voxels, but {paths[0].name} has "
                f"{by(images[0].shape)}; all slices of a case must agree"
            )
        if images and image.dtype != images[0].dtype:
            raise ValueError(
                f"{path}: {image.dtype} pixels, but {paths[0].name} has {images[0].dtype}; export "
                "all slices of a case alike"
            )
        if white_is_zero:
            doubtful.append(len(images))
        images.append(image)
    volume = np.stack(images)
    if doubtful:
        volume[doubtful] = _black_is_zero(volume[doubtful], paths[doubtful[0]])
    return volume


class UnfitImage(ValueError):
    """An image can be read, but not by every reader in the same way."""


def _read_image(path: Path, of_mask: bool) -> tuple[np.ndarray, bool]:
    """Read one image (H, W, C), and whether its tag says that white is zero."""
    white_is_zero = False
    try:
        if path.suffix.lower() == ".png":
            image = _read_png(path, of_mask)
        else:
            image, white_is_zero = _read_tiff(path, of_mask)
    except (FileNotFoundError, PermissionError, MemoryError, UnfitImage):
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
    if image.dtype == bool:
        image = image.view(np.uint8)
    return image, white_is_zero


def _black_is_zero(images: np.ndarray, path: Path) -> np.ndarray:
    """Return images (S, H, W, C) whose tag says that white is 0, with black as the lowest value.

    The tag alone does not tell: ImageJ sets it for images that it only shows inverted. The edge
    tells: it is air, and no lesion. Raises ValueError, naming `path`, if the edge is grey.
    """
    edges = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    edge = np.concatenate([line.ravel() for line in edges]).mean()
    lowest, highest = images.min(), images.max()
    quarter = (float(highest) - float(lowest)) / 4
    if edge >= highest - quarter:
        return highest - images
    if edge <= lowest + quarter:
        return images
    raise ValueError(
        f"{path}: its tag PhotometricInterpretation says that white is 0, but its edge is grey, so "
        "its air is not known; export it with black as 0"
    )


def check_finite(path: Path, voxels: np.ndarray) -> None:
    """Raise ValueError, naming the file, for NaN or infinite voxels."""
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError(f"{path}: holds NaN or infinite voxels; export it again")


def _read_png(path: Path, of_mask: bool) -> np.ndarray:
    with open(path, "rb") as file:
        header = file.read(26)
    if header[24:] == b"\x10\x04":  # Pillow would keep only 8 of them, and ITK reads none
        raise UnfitImage(f"{path}: has 16 bits of grey, and opacity; save it without opacity")
    deep_colour = header[24:] in (b"\x10\x02", b"\x10\x06")  # 16 bits of RGB or RGBA
    if not deep_colour:
        return _decode(path, "PNG", of_mask)
    image = sitk.ReadImage(str(path), imageIO="PNGImageIO")  # Pillow keeps only 8 bits
    return sitk.GetArrayFromImage(image)


def _read_tiff(path: Path, of_mask: bool) -> tuple[np.ndarray, bool]:
    """Read a TIFF, and whether its tag says that white is zero; several pages give 4 axes."""
    white_is_zero, kind = False, np.dtype(bool)
    try:
        with tifffile.TiffFile(path) as tiff:
            if not tiff.pages:
                raise ValueError("no page")
            page = tiff.pages[0]
            if page.dtype is not None:
                kind = page.dtype
            if page.tags.valueof("Orientation") in TURNED:
                raise UnfitImage(f"{path}: {TURNS}")
            if "BitsPerSample" not in page.tags and page.samplesperpixel > 1:
                raise ValueError("its directory is cut short")
            if len(tiff.pages) > 1:
                # Not tiff.asarray(): an OME-TIFF may name other files, and it would open them.
                images = np.stack([page.asarray(maxworkers=1) for page in tiff.pages])
                height, width = page.shape[:2]
                return images.reshape(len(images), height, width, -1), False
            # tifffile sets this tag for every bool array, whose True it stores as 1.
            own_bool = page.bitspersample == 1 and page.software == "tifffile.py"
            white_is_zero = page.photometric == PHOTOMETRIC.MINISWHITE and not own_bool
            if page.photometric > PHOTOMETRIC.MASK:
                raise ValueError("its colours are not RGB")
            image = page.asarray(maxworkers=1)  # threads of its own take longer to start
            if page.photometric == PHOTOMETRIC.PALETTE:
                palette = (page.colormap.T >> 8).astype(np.uint8)
                image = _from_palette(image, palette, path, of_mask)
            if page.axes == "SYX":
                image = np.moveaxis(image, 0, -1)
            return image, white_is_zero
    except UnfitImage:
        raise
    except ValueError:  # e.g. LZW or CMYK, which only Pillow can turn into RGB
        image = _decode(path, "TIFF", of_mask)
    # Of 16-bit colours Pillow keeps 8 bits, and of signed bytes not the sign.
    sign_lost = kind.kind == "i" and image.dtype.kind == "u"
    if sign_lost or image.dtype.itemsize < kind.itemsize:
        raise UnfitImage(f"{path}: has compressed {kind} pixels; save it without compression")
    return image, white_is_zero


def _decode(path: Path, kind: str, of_mask: bool) -> np.ndarray:
    """Read an image by Pillow (else its content would choose the `kind`); frames give 4 axes."""
    frames = []
    with Image.open(path, formats=[kind]) as image:
        if image.getexif().get(ORIENTATION) in TURNED:
            raise UnfitImage(f"{path}: {TURNS}")
        for frame in ImageSequence.Iterator(image):
            if frame.mode == "P":
                palette = np.array(frame.getpalette("RGB"), np.uint8).reshape(-1, 3)
                frames.append(_from_palette(np.asarray(frame), palette, path, of_mask))
                continue
            if frame.mode in ("CMYK", "YCbCr", "LAB"):
                frame = frame.convert("RGB")
            frames.append(np.asarray(frame))
    return frames[0] if len(frames) == 1 else np.stack(frames)


def _from_palette(
    numbers: np.ndarray, palette: np.ndarray, path: Path, of_mask: bool
) -> np.ndarray:
    """Return the greys (H, W) that numbers stand for in a palette (K, 3), or the colours (H, W, 3).

    Of colours, the numbers (H, W) are labels, if 0 alone is black: ValueError unless `of_mask`.
    """
    if (palette == palette[:, :1]).all():
        return palette[numbers, 0]
    shown = palette[numbers]
    if np.array_equal(shown.any(axis=-1), numbers > 0):
        if not of_mask:
            raise UnfitImage(f"{path}: {COLOURS}")
        return numbers
    return shown
