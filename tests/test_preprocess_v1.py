"""Test preprocessing version 1 against the plain recipe, and its inverse.

The recipe is written here with scikit-image and NumPy, in float64 and as one 4-D spline.
"""

import math

import numpy as np
import pytest
import torch
from skimage.exposure import rescale_intensity
from skimage.transform import resize

from brainseg import phantom
from brainseg.io.layouts import find_case
from brainseg.metrics import dsc
from brainseg.preprocess import (
    Frame,
    neighbourhoods,
    preprocess,
    preprocess_mask,
    restore,
)


def plain_crop(volume: np.ndarray) -> tuple[slice, slice, list[tuple[int, int]]]:
    """Find the foreground of (S, H, W, C), and how much pads it evenly to a square."""
    foreground = (volume >= 0.1 * volume.max()) & (volume != 0)
    rows = np.flatnonzero(foreground.any(axis=(0, 2, 3)))
    columns = np.flatnonzero(foreground.any(axis=(0, 1, 3)))
    rows, columns = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    side = max(height, width)
    padding = [(0, 0)]
    for length in (height, width):
        before = (side - length) // 2
        padding.append((before, side - length - before))
    return rows, columns, padding


def plain_preprocess(volume: np.ndarray, size: int) -> np.ndarray:
    """Turn a volume (S, H, W, C) into the network's input (S, size, size, C)."""
    rows, columns, padding = plain_crop(volume)
    volume = np.where(volume < 0.1 * volume.max(), 0, volume)[:, rows, columns]
    volume = np.pad(volume, [*padding, (0, 0)]).astype(np.float64)
    shape = (len(volume), size, size, volume.shape[3])
    options = {"mode": "constant", "anti_aliasing": False, "preserve_range": True}
    volume = resize(volume, shape, order=2, cval=0, clip=True, **options)
    low, high = np.percentile(volume, (10, 99))
    volume = rescale_intensity(volume, in_range=(low, high), out_range=(0.0, 1.0))
    mean, deviation = volume.mean(axis=(0, 1, 2)), volume.std(axis=(0, 1, 2))
    flat = deviation < 1e-9  # the spline leaks 1e-15 of a channel into the next
    return np.where(flat, 0.0, (volume - mean) / np.where(flat, 1.0, deviation))


def plain_resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize a mask (S, M, M) to (S, size, size), bool, by nearest neighbour."""
    options = {"mode": "constant", "anti_aliasing": False, "preserve_range": True}
    return resize(mask, (len(mask), size, size), order=0, **options) > 0


def plain_preprocess_mask(volume: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """Crop, pad and resize a mask (S, H, W) like its volume: (S, size, size), bool."""
    rows, columns, padding = plain_crop(volume)
    return plain_resize_mask(np.pad(mask[:, rows, columns], padding), size)


def plain_restore(prediction: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Return a prediction (S, N, N) in the geometry of its raw volume, (S, H, W) bool."""
    rows, columns, padding = plain_crop(volume)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    square = plain_resize_mask(prediction, max(height, width))
    top, left = padding[1][0], padding[2][0]
    mask = np.zeros(volume.shape[:3], dtype=bool)
    mask[:, rows, columns] = square[:, top : top + height, left : left + width]
    return mask


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Make a phantom volume (6, 64, 64, 3) uint8 and its mask."""
    return phantom.make_volume(1, slices=6, size=64)


def noise(*shape: int, low=0, high=256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


# Preprocessing

VARIANTS = {
    "as it is": lambda v: v,
    "wide": lambda v: v[:, 14:47],
    "tall, at the border": lambda v: v[:, :, 20:45],
    "odd padding": lambda v: v[:, 10:51, 16:48],
    "square crop, no background": lambda v: np.maximum(v[:, 22:42, 22:42], 30),
    "wide crop, no background": lambda v: np.maximum(v[:, 25:40, 22:42], 30),
    "one channel": lambda v: v[..., 1:2],
    "one slice": lambda v: v[2:3],
    "uint16": lambda v: v.astype(np.uint16) * 257,
    "int16 with negative values": lambda v: v.astype(np.int16) * 20 - 300,
    "float32": lambda v: (v / 255).astype(np.float32),
    "float64": lambda v: v * 12.5,
    "a dim channel": lambda v: (v * np.array([1, 1, 0.05])).astype(np.uint8),
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@variants
def test_preprocess_is_the_plain_recipe(pair, variant):
    volume = variant(pair[0][1:4])
    image_size = 24 if volume.shape[2] > 40 else 48  # smaller and larger than the crop
    images, _ = preprocess(volume, image_size, 1)
    assert images.shape == (len(volume), volume.shape[3], image_size, image_size)
    assert images.dtype == torch.float32
    expected = plain_preprocess(volume, image_size)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-4, rtol=0)


@variants
@pytest.mark.parametrize("image_size", [32, 80])
def test_preprocess_mask_is_the_plain_recipe(pair, variant, image_size):
    volume = variant(pair[0])
    mask = noise(*volume.shape[:3]) > 127
    _, frame = preprocess(volume, image_size, 1)
    made = preprocess_mask(mask, frame)
    assert made.dtype == torch.bool
    np.testing.assert_array_equal(made, plain_preprocess_mask(volume, mask, image_size))


def test_preprocess_of_a_real_case_is_the_plain_recipe(lgg):
    volume, mask = find_case(lgg / "TCGA_CS_4944_20010208").read_pair()
    volume, mask = volume[10:11], mask[10:11]
    images, frame = preprocess(volume, 128, 1)
    expected = plain_preprocess(volume, 128)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-4, rtol=0)
    small = preprocess_mask(mask, frame)
    np.testing.assert_array_equal(small, plain_preprocess_mask(volume, mask, 128))
    assert mask.any() and dsc(restore(small, frame).numpy(), mask) > 0.94


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_preprocess_on_an_accelerator_is_that_of_the_processor(pair):
    device = torch.accelerator.current_accelerator()
    images, frame = preprocess(pair[0], 64, device=device)
    expected, expected_frame = preprocess(pair[0], 64)
    assert images.device.type == device.type and frame == expected_frame
    torch.testing.assert_close(images.cpu(), expected, atol=1e-4, rtol=0)


def test_inputs_are_not_modified(pair):
    volume, mask = (array.copy() for array in pair)
    volume.flags.writeable = mask.flags.writeable = False
    images, frame = preprocess(volume, 32)
    small = preprocess_mask(mask, frame)
    before = images.clone(), small.clone()
    restore(images[:, 0], frame), restore(small, frame)
    assert np.array_equal(volume, pair[0]) and np.array_equal(mask, pair[1])
    assert torch.equal(images, before[0]) and torch.equal(small, before[1])


def test_each_channel_has_mean_0_and_deviation_1(pair):
    images, _ = preprocess(pair[0], 64, 1)
    std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-5, rtol=0)


def test_channel_wiped_by_the_ten_percent_rule_is_finite(pair):
    """Once, a dim sequence had standard deviation 0 and became NaN."""
    volume = pair[0].astype(np.uint16) * 100
    volume[..., 2] = volume[..., 2] // 2000
    images, _ = preprocess(volume, 48, 1)
    assert torch.isfinite(images).all()
    assert (images[:, 2] == 0).all() and images[:, 0].std() > 0.9


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_bright_voxels_are_finite(n):
    volume = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    volume[1, 5 : 5 + n, 9, 1] = 200
    images, frame = preprocess(volume, 32, 1)
    assert images.shape == (2, 3, 32, 32) and torch.isfinite(images).all()
    assert frame.box == (5, 5 + n, 9, 10)
    assert restore(images[:, 0], frame).shape == (2, 32, 32)


def test_blank_volume_does_not_crash():
    images, frame = preprocess(np.zeros((3, 20, 30, 3), dtype=np.uint8), 32)
    assert frame.blank and images.shape == (3, 3, 32, 32) and not images.any()
    assert not preprocess_mask(np.zeros((3, 20, 30), dtype=bool), frame).any()
    for output in (torch.ones(3, 32, 32), torch.ones(3, 32, 32, dtype=torch.bool)):
        restored = restore(output, frame)
        assert restored.dtype == output.dtype
        assert restored.shape == (3, 20, 30) and not restored.any()


@pytest.mark.parametrize("value", [7, 0.5, -3.0])
def test_constant_volume_is_refused(value):
    with pytest.raises(ValueError, match=f"every voxel is {value}"):
        preprocess(np.full((3, 20, 30, 3), value), 32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(pair, value):
    volume = pair[0].astype(np.float32)
    volume[2, 3, 4, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        preprocess(volume, 32)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 8, 8)),
        np.zeros((1, 4, 8, 8, 3)),
        np.zeros((0, 8, 8, 3)),
        np.zeros((4, 8, 8, 0)),
        np.zeros((4, 8, 8, 3), dtype=complex),
        np.full((4, 8, 8, 3), "a"),
    ],
    ids=["3 axes", "5 axes", "no slice", "no channel", "complex", "text"],
)
def test_anything_but_a_volume_is_refused(bad):
    with pytest.raises(ValueError, match="a volume"):
        preprocess(bad, 32)


def test_mask_of_another_shape_is_refused(pair):
    _, frame = preprocess(pair[0], 32)
    with pytest.raises(ValueError, match="mask of 6 x 64 x 63 voxels .* 6 x 64 x 64"):
        preprocess_mask(pair[1][:, :, 1:], frame)


# The way back


@variants
def test_round_trip_of_a_mask(pair, variant):
    """Every slice comes back, the first and last included, in the source's shape."""
    volume = variant(pair[0])
    _, frame = preprocess(volume, 96)
    top, bottom, left, right = frame.box
    y, x = np.mgrid[: frame.shape[1], : frame.shape[2]]
    middle, centre = (top + bottom) / 2, (left + right) / 2
    spot = ((y - middle) / (bottom - top)) ** 2 + ((x - centre) / (right - left)) ** 2 < 0.15
    mask = np.broadcast_to(spot, frame.shape)
    small = preprocess_mask(mask, frame)
    for restored in (restore(small, frame), restore(small.float(), frame) >= 0.5):
        assert restored.dtype == torch.bool and restored.shape == volume.shape[:3]
        assert all(dsc(a, b) > 0.95 for a, b in zip(restored.numpy(), mask, strict=True))


def test_restore_is_the_plain_one(pair):
    volume = pair[0][:, 10:51, 16:48]
    _, frame = preprocess(volume, 32)
    prediction = noise(6, 32, 32) > 127
    expected = plain_restore(prediction, volume)
    np.testing.assert_array_equal(restore(torch.from_numpy(prediction), frame), expected)


def test_slices_do_not_mix(pair):
    _, frame = preprocess(pair[0], 64)
    output = torch.zeros(6, 64, 64)
    output[3] = 1
    restored = restore(output, frame)
    assert restored[3].any() and restored.sum() == restored[3].sum()


def test_probabilities_stay_in_range_and_are_0_outside_the_crop():
    frame = Frame((2, 40, 50), (5, 35, 10, 30), 32)
    restored = restore(torch.ones(2, 32, 32), frame)
    inside = restored[:, 5:35, 10:30]
    torch.testing.assert_close(inside, torch.ones_like(inside))
    assert restored.sum().item() == pytest.approx(inside.sum().item())
    mixed = restore(torch.rand(2, 32, 32), frame)
    assert mixed.min() >= 0 and mixed.max() <= 1


def test_neighbourhoods():
    assert neighbourhoods([4], 1).tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]
    assert neighbourhoods([3], 0).tolist() == [[0], [1], [2]]
    assert neighbourhoods([1, 2], 2).tolist() == [[0] * 5, [1, 1, 1, 2, 2], [1, 1, 2, 2, 2]]
