"""Test preprocessing version 1 against the plain recipe, and its inverse."""

import math

import numpy as np
import pytest
import torch

from benchmarks import plain
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
    expected = plain.preprocess(volume, image_size)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-4, rtol=0)


@variants
@pytest.mark.parametrize("image_size", [32, 80])
def test_preprocess_mask_is_the_plain_recipe(pair, variant, image_size):
    volume = variant(pair[0])
    mask = noise(*volume.shape[:3]) > 127
    _, frame = preprocess(volume, image_size, 1)
    made = preprocess_mask(mask, frame)
    assert made.dtype == torch.bool
    np.testing.assert_array_equal(made, plain.preprocess_mask(volume, mask, image_size) > 0)


def test_preprocess_of_a_real_case_is_the_plain_recipe(lgg):
    volume, mask = find_case(lgg / "TCGA_CS_4944_20010208").read_pair()
    volume, mask = volume[10:11], mask[10:11]
    images, frame = preprocess(volume, 128, 1)
    expected = plain.preprocess(volume, 128)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-4, rtol=0)
    small = preprocess_mask(mask, frame)
    np.testing.assert_array_equal(small, plain.preprocess_mask(volume, mask, 128) > 0)
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
    expected = plain.restore(prediction, volume)
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
