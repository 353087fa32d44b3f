"""The same pipeline written plainly with scikit-image and NumPy, for comparison only.

The yardstick of `benchmarks/speed.py` and the reference of a correctness test: float64 arrays,
whole-volume spline resize, eager float32 network, nothing slowed on purpose and nothing tuned.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage.exposure import rescale_intensity
from skimage.io import imread, imsave
from skimage.measure import label
from skimage.transform import rescale, resize, rotate
from torch import Tensor, nn

from brainseg.unet import UNet

GREEN, RED = (0, 255, 0), (255, 0, 0)


def read_case(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a volume (S, H, W, 3) uint8 and its mask (S, H, W) uint8, 0 or 1, in slice order.

    Raises FileNotFoundError for a slice without its mask file.
    """
    paths = [p for p in Path(folder).glob("*.tif") if not p.stem.endswith("_mask")]
    paths.sort(key=lambda p: int(p.stem.rsplit("_", 1)[1]))
    volume = np.stack([imread(p) for p in paths])
    masks = np.stack([imread(p.with_name(f"{p.stem}_mask.tif")) for p in paths])
    return volume, (masks > 0).astype(np.uint8)


def preprocess(volume: np.ndarray, image_size: int = 256) -> np.ndarray:
    """Turn a volume (S, H, W, C) into the network's input (S, N, N, C), float64, in a copy.

    A channel without contrast becomes zeros. Its test allows for rounding, because the 4-D spline
    also runs along the channel axis and leaks about 1e-15 of one channel into the next.
    """
    rows, cols = bounding_box(volume)
    volume = remove_background(volume)[:, rows, cols]
    volume = resize(
        pad_to_square(volume).astype(np.float64),
        (volume.shape[0], image_size, image_size, volume.shape[3]),
        order=2,
        mode="constant",
        cval=0,
        clip=True,
        anti_aliasing=False,
        preserve_range=True,
    )
    p10, p99 = np.percentile(volume, (10, 99))
    volume = rescale_intensity(volume, in_range=(p10, p99), out_range=(0.0, 1.0))
    mean = volume.mean(axis=(0, 1, 2))
    std = volume.std(axis=(0, 1, 2))
    flat = std < 1e-9
    return np.where(flat, 0.0, (volume - mean) / np.where(flat, 1.0, std))


def preprocess_mask(volume: np.ndarray, mask: np.ndarray, image_size: int = 256) -> np.ndarray:
    """Crop, pad and resize a mask (S, H, W) like its volume: (S, N, N) uint8, nearest neighbour."""
    rows, cols = bounding_box(volume)
    return resize_mask(pad_to_square(mask[:, rows, cols]), image_size).astype(np.uint8)


def remove_background(volume: np.ndarray) -> np.ndarray:
    """Copy the volume with voxels under 10 % of its maximum set to 0."""
    return np.where(volume < 0.1 * volume.max(), 0, volume)


def bounding_box(volume: np.ndarray) -> tuple[slice, slice]:
    """Find rows and columns of the foreground of (S, H, W, C); the whole frame if it is empty."""
    foreground = remove_background(volume).any(axis=(0, 3))  # (H, W)
    if not foreground.any():
        return slice(0, volume.shape[1]), slice(0, volume.shape[2])
    rows = np.flatnonzero(foreground.any(axis=1))
    cols = np.flatnonzero(foreground.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


def square_padding(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (before, after) for rows and columns that make height x width a square."""
    side = max(height, width)
    dy, dx = side - height, side - width
    return (dy // 2, dy - dy // 2), (dx // 2, dx - dx // 2)


def pad_to_square(array: np.ndarray) -> np.ndarray:
    """Pad axes 1 and 2 of (S, H, W, ...) evenly with zeros until they are equal."""
    padding = [(0, 0)] * array.ndim
    padding[1:3] = square_padding(*array.shape[1:3])
    return np.pad(array, padding)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize a mask (S, M, M) to (S, size, size) by nearest neighbour, keeping its values."""
    shape = (mask.shape[0], size, size)
    return resize(mask, shape, order=0, mode="constant", anti_aliasing=False, preserve_range=True)


def augment(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    scale: float = 0.05,
    angle: float = 15,
    flip: float = 0.5,
    order: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Randomly scale, rotate and flip one image (N, N, C) and its mask (N, N, 1).

    What moves in from outside is filled with the background, the minimum of each channel.
    `order` is the image's spline order: 2 as in preprocessing; 1 is scikit-image's default.
    """
    size = image.shape[0]
    background = image.min(axis=(0, 1))
    image = image - background

    factor = rng.uniform(1 - scale, 1 + scale)
    options = {"mode": "constant", "preserve_range": True}
    image = rescale(image, factor, order=order, channel_axis=-1, anti_aliasing=False, **options)
    mask = rescale(mask, factor, order=0, channel_axis=-1, anti_aliasing=False, **options)
    image, mask = crop_or_pad(image, size), crop_or_pad(mask, size)

    degrees = rng.uniform(-angle, angle)
    with warnings.catch_warnings():  # order 2 is left to SciPy, as intended
        warnings.filterwarnings("ignore", message="Bi-quadratic")
        image = rotate(image, degrees, order=order, **options)
    mask = rotate(mask, degrees, order=0, **options)

    if rng.random() < flip:
        image, mask = np.fliplr(image), np.fliplr(mask)
    return image + background, mask


def crop_or_pad(image: np.ndarray, size: int) -> np.ndarray:
    """Return the middle size x size of (M, M, C), padded with zeros if M is smaller."""
    difference = size - image.shape[0]
    if difference >= 0:
        around = (difference // 2, difference - difference // 2)
        return np.pad(image, (around, around, (0, 0)))
    start = -difference // 2
    return image[start : start + size, start : start + size]


def augmented_batch(
    dataset_images: Sequence[np.ndarray],
    dataset_masks: Sequence[np.ndarray],
    indices: Iterable[int],
    rng: np.random.Generator,
    order: int = 2,
) -> tuple[Tensor, Tensor]:
    """Return augmented images (B, C, N, N) and masks (B, 1, N, N), float32, on the CPU.

    They are taken from images (M, N, N, C) and masks (M, N, N) or (M, N, N, 1).
    """
    images, masks = [], []
    for i in indices:
        mask = np.reshape(dataset_masks[i], (*dataset_images[i].shape[:2], 1))
        image, mask = augment(dataset_images[i], mask, rng, order=order)
        images.append(image.transpose(2, 0, 1))
        masks.append(mask.transpose(2, 0, 1))
    images, masks = np.stack(images).astype(np.float32), np.stack(masks).astype(np.float32)
    return torch.from_numpy(images), torch.from_numpy(masks)


def dice_loss(probabilities: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """Compute 1 - smooth Dice of the whole batch taken as one set of pixels."""
    intersection = (probabilities * masks).sum()
    return 1 - (2 * intersection + smooth) / (probabilities.sum() + masks.sum() + smooth)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, masks: Tensor
) -> float:
    """Do an eager float32 step on images (B, C, N, N) and masks (B, 1, N, N); return the loss."""
    device = next(model.parameters()).device
    model.train()
    optimizer.zero_grad()
    loss = dice_loss(model(images.to(device)), masks.to(device))
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def segment(
    model: nn.Module, volume: np.ndarray, image_size: int = 256, batch_size: int = 16
) -> np.ndarray:
    """Segment a raw volume (S, H, W, C): the largest connected component, (S, H, W) bool."""
    device = next(model.parameters()).device
    model.eval()
    slices = preprocess(volume, image_size).transpose(0, 3, 1, 2).astype(np.float32)
    probabilities = []
    for start in range(0, len(slices), batch_size):
        batch = torch.from_numpy(slices[start : start + batch_size]).to(device)
        probabilities.append(model(batch)[:, 0].cpu().numpy())
    prediction = np.round(np.concatenate(probabilities)).astype(np.uint8)  # (S, N, N)
    return largest_component(restore(prediction, volume))


def restore(prediction: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Return a prediction (S, N, N) in the geometry of its raw volume, (S, H, W) bool."""
    rows, cols = bounding_box(volume)
    height, width = rows.stop - rows.start, cols.stop - cols.start
    (top, _), (left, _) = square_padding(height, width)
    square = resize_mask(prediction, max(height, width))
    mask = np.zeros(volume.shape[:3], dtype=bool)
    mask[:, rows, cols] = square[:, top : top + height, left : left + width] > 0
    return mask


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest 26-connected component of (S, H, W); an empty mask stays empty."""
    labels = label(mask)
    if labels.max() == 0:
        return np.zeros(mask.shape, dtype=bool)
    sizes = np.bincount(labels.ravel())
    return labels == 1 + np.argmax(sizes[1:])


def dsc(prediction: np.ndarray, mask: np.ndarray) -> float:
    """Compute the Dice similarity coefficient of two masks of a volume; 1 if both are empty."""
    prediction, mask = prediction.astype(bool), mask.astype(bool)
    total = prediction.sum() + mask.sum()
    return 1.0 if total == 0 else float(2 * (prediction & mask).sum() / total)


def outline(image: np.ndarray, mask: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """Copy (H, W) or (H, W, 3) as RGB (H, W, 3), with the mask's edge pixels in `colour`.

    An edge pixel has background among its eight neighbours inside the picture.
    """
    picture = image.copy() if image.ndim == 3 else np.stack([image] * 3, axis=-1)
    for y, x in np.argwhere(mask):
        if not mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].all():
            picture[y, x] = colour
    return picture


def dsc_figure(scores: Mapping[str, float], path: str | Path) -> None:
    """Draw the DSC of each case as a horizontal bar, worst at the bottom, the mean as a line."""
    cases = sorted(scores, key=scores.get)
    values = [scores[case] for case in cases]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(cases)))
    axes.barh(cases, values, color="skyblue")
    axes.axvline(np.mean(values), color="tomato", linewidth=2)
    axes.set(xlim=(0, 1), xlabel="Dice similarity coefficient")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def infer_folder(
    weights: nn.Module | Mapping[str, Tensor],
    images_dir: str | Path,
    cases: Iterable[str],
    out_dir: str | Path,
    image_size: int = 256,
) -> dict[str, float]:
    """Return the DSC of each case; `weights` is a model or a U-Net state dict, on its device.

    Writes `<case>-<slice>.png` (FLAIR, truth green, prediction red) and `dsc.png`.
    """
    model = weights if isinstance(weights, nn.Module) else build_model(weights)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    scores = {}
    for case in cases:
        volume, mask = read_case(Path(images_dir) / case)
        prediction = segment(model, volume, image_size)
        scores[case] = dsc(prediction, mask)
        for k in range(len(volume)):
            picture = outline(volume[k, ..., 1], mask[k], GREEN)
            picture = outline(picture, prediction[k], RED)
            imsave(out_dir / f"{case}-{k + 1:02d}.png", picture, check_contrast=False)
    dsc_figure(scores, out_dir / "dsc.png")
    return scores


def build_model(state_dict: Mapping[str, Tensor]) -> UNet:
    """Build the U-Net that fits a state dict, with its weights, on their device."""
    first, last = state_dict["encoder1.enc1conv1.weight"], state_dict["conv.weight"]
    model = UNet(first.shape[1], last.shape[0], first.shape[0])
    model.load_state_dict(state_dict)
    return model.to(first.device)
