"""From the voxels of a case to the network's input, and back.

Trained weights depend on the steps of `preprocess`: change one, and every checkpoint must be
trained again. So each version stays as it is, and the card of the weights names theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from .appearance import looks
from .io.files import by
from .io.sequences import SEQUENCES
from .levels import BRIGHTEST, MeasuredSequence, measure, oddities, order_note, treatments
from .metrics import bounding_box

VERSION = 2  # of the preprocessing, for new weights
CHANNELS = {1: ("FLAIR",), 3: SEQUENCES}


@dataclass(frozen=True)
class Frame:
    """The place of a preprocessed volume in its source, from which `restore` goes back."""

    shape: tuple[int, int, int]  # of the source: slices, rows, columns
    box: tuple[int, int, int, int]  # top, bottom, left, right of the crop, in source voxels
    size: int  # side of the preprocessed slice
    blank: bool = False  # the source is all zero: nothing to segment
    notes: tuple[str, ...] = ()  # what is odd about the sequences, a sentence each
    doubts: tuple[str, ...] = ()  # those of the notes that call for a look at the scan
    replaced: tuple[str, ...] = ()  # constant sequences, which FLAIR stands in for
    aspect: float = 1.0  # height of a source pixel over its width, in mm
    looks: tuple[float, ...] = ()  # of the input, see `looks`

    @cached_property
    def axes(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Compute, for rows and columns: side of the padded square, start and end of crop, padding.

        All in source pixels; the square is square in mm, and the padding is that before the crop.
        """
        top, bottom, left, right = self.box
        side = max((bottom - top) * self.aspect, right - left)
        rows, columns = round(side / self.aspect), round(side)
        above, before = (rows - (bottom - top)) // 2, (columns - (right - left)) // 2
        return (rows, top, bottom, above), (columns, left, right, before)


def preprocess(
    volume: np.ndarray,
    image_size: int = 256,
    version: int = VERSION,
    device: torch.device | str = "cpu",
    aspect: float = 1.0,
) -> tuple[Tensor, Frame]:
    """Turn a volume (S, H, W, C) into the network's input (S, C, N, N), float32, and its frame.

    `version` is in the weights' card: 2 (`_preprocess_2`) for all new weights, 1 (`_preprocess_1`)
    for the published checkpoint and weights whose card names none. The volume is not modified.
    Slices are resized on `device`, where the input stays. `aspect` is the height of a pixel over
    its width; the input's pixels are square. Raises ValueError for an unknown version, a wrong
    number of axes, NaN or infinity, or a constant volume that is not 0.
    """
    steps = {1: _preprocess_1, 2: _preprocess_2}
    if version not in steps:
        raise ValueError(f"preprocessing version {version} is not known; update the program")
    voxels = volume
    if volume.ndim == 4 and volume.strides[3] == 0:  # FLAIR alone, see `with_copies`
        voxels = volume[..., :1]  # looked at once
    check_volume(voxels)
    low, high = voxels.min(), voxels.max()
    if low == high == 0:
        slices, rows, columns, channels = volume.shape
        box = (0, rows, 0, columns)
        frame = Frame(volume.shape[:3], box, image_size, blank=True, aspect=aspect)
        return torch.zeros(slices, channels, image_size, image_size, device=device), frame
    if low == high:
        raise ValueError(f"every voxel is {high}: this is not an image")
    return steps[version](volume, image_size, device, aspect)


def _preprocess_2(
    volume: np.ndarray, image_size: int, device: torch.device | str, aspect: float
) -> tuple[Tensor, Frame]:
    """Scale each sequence separately so that its median tissue is 0 and air is -2.

    1. in each sequence, subtract the background, divide by the median of the foreground, clip to
    0..4; 2. crop rows and columns to where most sequences have foreground, pad to a square;
    3. resize each slice with a quadratic spline; 4. map air, 0, to -2 and the median, 1, to 0.

    The result hardly depends on scale, offset, a few hot voxels, a lesion, or the fat of the scalp.
    (With the mean and deviation over the volume instead, as in version 1, removing the skull moves
    the brain by 0.7 of its standard deviation; here by 0.03.) A constant sequence is replaced by
    FLAIR, as the LGG data set replaces a missing one.
    """
    slices, rows, columns, channels = volume.shape
    names = CHANNELS.get(channels) or tuple(f"channel {k + 1}" for k in range(channels))
    lead = "FLAIR" if "FLAIR" in names else names[0]
    flair = measure(volume[..., names.index(lead)])
    if flair is None:
        raise ValueError(f"{lead} is constant: this is not an image")
    copies = missing_sequences(volume)
    measured = [flair] * channels
    for k, name in enumerate(names):
        if name != lead and name not in copies:
            measured[k] = measure(volume[..., k])
    sequences = [sequence or flair for sequence in measured]
    foregrounds = np.zeros((slices, rows, columns), np.uint8)  # of how many sequences
    for sequence in sequences:
        foregrounds += sequence.foreground
    head = foregrounds * 2 >= channels
    box = _head_box(head.sum(axis=0) > 0.05 * slices)  # step 2
    notes, doubts = _observe(names, measured, lead, copies)
    frame = Frame(
        (slices, rows, columns),
        box,
        image_size,
        notes=tuple(notes + doubts),
        doubts=tuple(doubts),
        replaced=tuple(
            name for name, sequence in zip(names, measured, strict=True) if sequence is None
        ),
        aspect=aspect,
    )
    if all(sequence is flair for sequence in sequences):  # FLAIR alone is there once
        images = _scale([flair], frame, device).expand(-1, channels, -1, -1)
    else:
        images = _scale(sequences, frame, device)
    return images, replace(frame, looks=looks(images, names.index(lead)))


def _scale(
    sequences: Sequence[MeasuredSequence], frame: Frame, device: torch.device | str
) -> Tensor:
    """Scale and resize sequences to slices (S, C, N, N): steps 1, 3 and 4 of `_preprocess_2`."""
    top, bottom, left, right = frame.box
    shape = frame.shape[0], len(sequences), frame.size, frame.size
    images = torch.empty(shape, device=device)
    for k, sequence in enumerate(sequences):
        first = sequences.index(sequence)
        if first < k:  # a copy of FLAIR
            images[:, k] = images[:, first]
            continue
        scaled = sequence.scaled(np.s_[:, top:bottom, left:right])  # step 1
        resized = _resize(torch.from_numpy(scaled), frame, device)  # step 3
        images[:, k] = resized.clip_(0, BRIGHTEST).sub_(1).mul_(2)  # step 4
    return images


def _observe(
    names: Sequence[str], measured: Sequence[MeasuredSequence | None], lead: str, copies: list[str]
) -> tuple[list[str], list[str]]:
    """Say how the sequences are treated, and what is doubtful about them; copies are as FLAIR."""
    flair = measured[names.index(lead)]
    assert flair is not None
    notes, doubts = [], []
    for name, sequence in zip(names, measured, strict=True):
        if name in copies:
            continue
        notes += treatments(name, sequence)
        if sequence is not None:
            doubts += oddities(name, sequence, flair, lead)
    order = order_note(measured)
    if order:
        doubts.append(order)
    return notes, doubts


def _head_box(present: np.ndarray) -> tuple[int, int, int, int]:
    """Find the box of a map (H, W), ignoring specks of one or two pixels if there is more."""
    from scipy import ndimage

    square = np.ones((3, 3), bool)
    eroded = ndimage.binary_erosion(present, square, border_value=1)
    without_specks = np.asarray(ndimage.binary_dilation(eroded, square))
    if without_specks.any():
        return _bounding_box(without_specks)
    if present.any():
        return _bounding_box(present)
    return (0, present.shape[0], 0, present.shape[1])


def _bounding_box(present: np.ndarray) -> tuple[int, int, int, int]:
    """Find top, bottom, left and right of what is true in a map (H, W)."""
    rows, columns = bounding_box(present)
    return rows.start, rows.stop, columns.start, columns.stop


def _preprocess_1(
    volume: np.ndarray, image_size: int, device: torch.device | str, aspect: float
) -> tuple[Tensor, Frame]:
    """Scale all sequences together, as https://doi.org/10.1016/j.compbiomed.2019.05.002 does.

    1. voxels under 10 % of the maximum become 0; 2. crop rows and columns to what is left, pad
    to a square; 3. resize each slice with a quadratic spline; 4. clip to the 10th and 99th
    percentile and scale to 0..1; 5. per channel, subtract the mean, divide by the deviation.
    """
    largest = volume.max()
    if largest <= 0:
        raise ValueError(f"no voxel is above 0 (the largest is {largest}): shift the intensities")
    least = 0.1 * float(largest)  # step 1
    box = _bounding_box(volume.max(axis=0).max(axis=-1) >= least)
    frame = Frame(volume.shape[:3], box, image_size, aspect=aspect)  # step 2
    top, bottom, left, right = box
    crop = np.s_[:, top:bottom, left:right]
    voxels = np.where(volume[crop] >= least, volume[crop], 0).astype(np.float32)
    low = float(voxels.min())
    for side, start, end, _ in frame.axes:
        if side != end - start:  # it is padded, with 0
            low = 0.0
    voxels = torch.from_numpy(voxels).permute(0, 3, 1, 2)  # (S, C, h, w)
    resized = _resize(voxels, frame, device).clip_(low, float(largest))  # step 3
    p10, p99 = np.percentile(resized.cpu().numpy(), (10, 99)).tolist()
    scaled = resized.clip_(p10, p99).sub_(p10).div_(p99 - p10 or 1.0)  # step 4
    centred = scaled.sub_(scaled.mean(dim=(0, 2, 3), keepdim=True))  # step 5
    deviation = centred.square().mean(dim=(0, 2, 3), keepdim=True).sqrt()
    # A sequence that step 1 wiped out is constant: it becomes 0 rather than NaN.
    return centred.div_(torch.where(deviation > 1e-6, deviation, 1.0)), frame


def _resize(voxels: Tensor, frame: Frame, device: torch.device | str) -> Tensor:
    """Resize a crop (..., h, w), padded with 0 to a square, to (..., N, N) on `device`."""
    # Padding with zeros adds nothing to a linear operator, so the padded square is never made.
    operators = []
    for side, start, end, pad in frame.axes:
        operator = spline_operator(side, frame.size).to(device)
        operators.append(operator[:, pad : pad + end - start])
    rows, columns = operators
    return rows @ voxels.to(device) @ columns.T


def preprocess_mask(mask: np.ndarray, frame: Frame) -> Tensor:
    """Bring a mask (S, H, W) into the frame of its volume, by nearest neighbour: (S, N, N) bool."""
    if mask.shape != frame.shape:
        raise ValueError(f"mask of {by(mask.shape)} voxels for a volume of {by(frame.shape)}")
    places = []
    for side, start, end, pad in frame.axes:
        inner = spline_operator(side, frame.size, order=0).argmax(dim=1).numpy() - pad  # (N,)
        places.append(np.where((inner >= 0) & (inner < end - start), inner + start, -1))
    rows, columns = places
    inside = (rows >= 0)[:, None] & (columns >= 0)[None, :]
    return torch.from_numpy(mask.astype(bool)[:, rows][:, :, columns] & inside)


def restore(output: Tensor, frame: Frame) -> Tensor:
    """Bring slices (S, N, N) back to the source geometry (S, H, W); outside the crop is 0.

    Probabilities are interpolated linearly, a bool mask by nearest neighbour.
    """
    if frame.blank:
        return output.new_zeros(frame.shape)
    is_mask = output.dtype == torch.bool
    order = int(not is_mask)
    operators = []
    for length, (side, start, end, pad) in zip(frame.shape[1:], frame.axes, strict=True):
        operator = torch.zeros(length, frame.size)
        full = spline_operator(frame.size, side, order=order, mode="nearest")  # (side, N)
        operator[start:end] = full[pad : pad + end - start]
        operators.append(operator.to(output.device))
    rows, columns = operators
    restored = rows @ output.float() @ columns.T  # (S, H, W)
    if is_mask:
        return restored > 0.5
    return restored


def neighbourhoods(lengths: Sequence[int], neighbours: int) -> Tensor:
    """Return the slices (S, 2 K + 1) that the network sees for each: itself and K on either side.

    `lengths` are those of consecutive volumes. Beyond the ends of a volume, its first or last slice
    is repeated.
    """
    around = torch.arange(-neighbours, neighbours + 1)
    parts, first = [], 0
    for slices in lengths:
        parts.append(first + (torch.arange(slices)[:, None] + around).clamp(0, slices - 1))
        first += slices
    return torch.cat(parts)


def check_volume(volume: np.ndarray) -> None:
    """Raise ValueError unless `volume` is a finite, numeric, non-empty (S, H, W, C) array."""
    if volume.ndim != 4 or volume.size == 0:
        raise ValueError(f"a volume is (slices, rows, columns, channels), not {volume.shape}")
    if volume.dtype.kind not in "uif":
        raise ValueError(f"a volume holds numbers, not {volume.dtype}")
    if volume.dtype.kind == "f" and not (np.abs(volume) <= np.finfo(np.float32).max).all():
        raise ValueError("the volume holds NaN or infinite voxels, or values above 3e38")


@lru_cache(maxsize=64)
def spline_operator(
    source: int, target: int, order: int = 2, mode: str = "grid-constant"
) -> Tensor:
    """Return the matrix (target, source), float32, that resizes a line like scikit-image.

    A spline resize is linear and separable: resizing the columns of an identity matrix makes an
    exact replacement, ``A @ slice @ A.T``.
    """
    from scipy import ndimage

    zoom = 1 / (source / target), 1.0
    operator = np.empty((target, source))
    ndimage.zoom(np.eye(source), zoom, operator, order, mode, grid_mode=True)
    # A spline fades but never ends; entries too small to matter would be subnormal numbers, on
    # which CPUs are ten times slower.
    operator[np.abs(operator) < 1e-12] = 0
    return torch.from_numpy(operator.astype(np.float32))


def copies_of_flair(volume: np.ndarray) -> list[int]:
    """List the channels of a volume (S, H, W, 3) that are FLAIR, put in for a missing sequence."""
    return [k for k in (0, 2) if np.array_equal(volume[..., k], volume[..., 1])]


def missing_sequences(volume: np.ndarray) -> list[str]:
    """Name the sequences of a volume (S, H, W, C) that are copies of FLAIR; none unless C is 3."""
    if volume.shape[-1] != 3:
        return []
    return [SEQUENCES[k] for k in copies_of_flair(volume)]
