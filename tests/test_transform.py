"""Test augmentation: geometry, filling from outside, and reproducible draws."""

import numpy as np
import pytest
import torch
from skimage.transform import SimilarityTransform, warp

from brainseg.training import make_generator
from transform import (
    Augmentation,
    drop_sequences,
    move,
    strip_skulls,
    vary_intensity,
    widths_to_strip,
)

STILL = {"scale": 0, "angle": 0, "flip": 0}


def draws(slices: int, numbers: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(slices, numbers, generator=make_generator(seed))


def augment(images: torch.Tensor, masks: torch.Tensor, seed: int = 0, **how):
    """Move the slices by draws of a seed."""
    return move(images, masks, draws(len(images), 3, seed), **how)


def blobs(height: int, width: int) -> np.ndarray:
    """Make a smooth picture (H, W): a blob off the centre and a weaker one, on 0."""
    y, x = np.mgrid[:height, :width]
    places = (0.38, 0.66, 1.0), (0.6, 0.4, 0.5)
    spots = [
        peak * np.exp(-((y - row * height) ** 2 + (x - column * width) ** 2) / 18)
        for row, column, peak in places
    ]
    return np.sum(spots, axis=0).astype(np.float32)


def batch(n: int, height: int = 64, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Make three channels of blobs, and the mask of the bright one."""
    picture = torch.from_numpy(blobs(height, width))
    images = torch.stack([picture, 2 * picture - 1, 3 - picture])
    mask = (picture > 0.6).float()[None]
    return images.repeat(n, 1, 1, 1), mask.repeat(n, 1, 1, 1)


def place(pictures: torch.Tensor) -> torch.Tensor:
    """Compute centres of mass of (N, H, W) from the picture's centre: x + iy, in voxels."""
    height, width = pictures.shape[1:]
    y = torch.arange(height) - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    total = pictures.sum(dim=(1, 2))
    return torch.complex(
        (pictures.sum(dim=1) * x).sum(dim=1) / total, (pictures.sum(dim=2) * y).sum(dim=1) / total
    )


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (33, 17)])
def test_identity(height, width):
    images, masks = batch(2, height, width)
    moved, moved_masks = augment(images, masks, **STILL)
    torch.testing.assert_close(moved, images, atol=1e-5, rtol=0)
    assert torch.equal(moved_masks, masks)


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (33, 17)])
def test_flip_alone_is_the_mirror_image(height, width):
    images, masks = batch(2, height, width)
    moved, moved_masks = augment(images, masks, scale=0, angle=0, flip=1)
    torch.testing.assert_close(moved, images.flip(-1), atol=1e-5, rtol=0)
    assert torch.equal(moved_masks, masks.flip(-1))


def test_about_half_are_flipped():
    images, masks = batch(200, 16, 16)
    _, moved = augment(images, masks, scale=0, angle=0)
    flipped = (moved == masks.flip(-1)).all(dim=(1, 2, 3))
    kept = (moved == masks).all(dim=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert 70 < flipped.sum() < 130


def test_same_generator_same_result_and_another_another():
    images, masks = batch(4)
    one, again, other = (augment(images, masks, seed) for seed in (0, 0, 1))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_each_slice_of_a_batch_and_each_batch_has_its_own_draws():
    """The same augmentation must not be repeated."""
    images, masks = batch(4)
    generator, augmentation = make_generator(0), Augmentation(0.05, 15, 0, 0, 3)
    first, second = (augmentation(images, masks, generator, 4)[0] for _ in range(2))
    slices = torch.cat((first, second)).flatten(1)
    assert len(torch.unique(slices, dim=0)) == 8


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80)])
def test_rotation_and_scale_are_in_range_and_fill_it(height, width):
    images, masks = batch(300, height, width)
    images = images[:, :1]
    moved, _ = augment(images, masks, scale=0.1, angle=20, flip=0)
    change = place(moved[:, 0]) / place(images[:, 0])
    angle, zoom = torch.rad2deg(change.angle()), change.abs()
    assert -20.3 < angle.min() < -18 and 18 < angle.max() < 20.3
    assert 0.89 < zoom.min() < 0.92 and 1.08 < zoom.max() < 1.11
    assert abs(angle.mean()) < 3 and abs(zoom.mean() - 1) < 0.02


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80)])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_scikit_image(height, width, seed):
    """It is a similarity about the picture's centre, without shear even if it is not square."""
    images, masks = batch(1, height, width)
    moved, _ = augment(images, masks, seed, scale=0.2, angle=30, flip=0)
    change = (place(moved[:, 0]) / place(images[:, 0])).item()
    assert abs(np.rad2deg(np.angle(change))) > 2, "choose a seed that moves something"
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    forward = (
        SimilarityTransform(translation=-centre)
        + SimilarityTransform(scale=abs(change), rotation=np.angle(change))
        + SimilarityTransform(translation=centre)
    )
    expected = warp(images[0, 0].numpy(), forward.inverse, order=1)
    np.testing.assert_allclose(moved[0, 0].numpy(), expected, atol=0.02)


def test_mask_moves_with_its_image():
    """A bright disk and its mask still coincide."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disk = ((y - 20) ** 2 + (x - 40) ** 2 < 100).float()[None, None].repeat(16, 1, 1, 1)
    images, masks = augment(disk, disk, scale=0.2, angle=40)
    overlap = ((images > 0.5) & (masks > 0)).sum(dim=(1, 2, 3))
    size = (images > 0.5).sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3))
    assert (2 * overlap / size > 0.9).all()
    assert not torch.equal(masks, disk)


def test_masks_stay_0_or_1():
    images, masks = batch(8)
    _, moved = augment(images, masks, scale=0.3, angle=45)
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert moved.shape == masks.shape and moved.dtype == masks.dtype


@pytest.mark.parametrize("background", [(-1.5, -0.25, -3.0), (2.0, 0.5, 0.0)])
def test_background_comes_in_from_outside(background):
    """After normalisation 0 is tissue; as a fill value it once made grey wedges."""
    least = torch.tensor(background)[None, :, None, None]
    images = torch.ones(8, 3, 64, 64) * (least + 1)  # tissue up to the border ...
    images[:, :, 30:34, 30:34] = least  # ... and background inside
    masks = torch.ones(8, 1, 64, 64)
    moved, moved_masks = augment(images, masks, scale=0, angle=60)
    outside = moved_masks[:, 0] == 0
    assert outside.any(dim=(1, 2)).sum() >= 6, "the corners come from outside"
    far = -torch.nn.functional.max_pool2d(-outside[:, None].float(), 5, 1, 2)[:, 0] > 0
    for channel, value in enumerate(background):
        torch.testing.assert_close(
            moved[:, channel][far], torch.full((int(far.sum()),), value), atol=1e-5, rtol=0
        )
    assert (moved >= least - 1e-5).all(), "nothing is darker than the background"


def test_inputs_are_not_modified():
    images, masks = batch(4)
    before = images.clone(), masks.clone()
    augment(images, masks)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


def test_global_random_state_is_left_alone():
    images, masks = batch(2)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Augmentation(0.1, 10, 0.4, 0.2, 3)(images, masks, make_generator(5), 2)
    assert torch.equal(torch.rand(3), expected)


def test_intensity_varies_by_slice_and_sequence_in_bounds():
    images = torch.ones(50, 3, 2, 2)
    before = images.clone()
    varied = vary_intensity(images, draws(50, 6), 0.1)
    assert torch.equal(images, before)
    assert (varied.std(dim=(2, 3)) == 0).all() and len(varied[:, :, 0, 0].unique()) == 150
    assert 0.8 <= varied.min() < 0.85 and 1.15 < varied.max() <= 1.2


def test_dropped_sequences_are_filled_with_flair():
    images = torch.arange(3.0)[None, :, None, None].repeat(2000, 1, 2, 2)
    before = images.clone()
    dropped = drop_sequences(images, draws(2000, 2), 0.2)[:, :, 0, 0]
    assert torch.equal(images, before)
    assert (dropped[:, 1] == 1).all()
    post, pre = dropped[:, 2] == 1, dropped[:, 0] == 1
    assert post.float().mean() == pytest.approx(0.2, abs=0.03)
    assert pre.float().mean() == pytest.approx(0.1, abs=0.03)
    assert not (pre & ~post).any()
    assert torch.equal(drop_sequences(images, draws(2000, 2), 0.0), images)


def test_slices_of_a_sample_vary_and_lose_sequences_alike():
    """The 9 channels are three slices of three sequences."""
    images = torch.arange(3.0)[None, :, None, None].repeat(400, 3, 2, 2)
    dropped = drop_sequences(images, draws(400, 2), 0.5)
    alone = drop_sequences(images[:, :3], draws(400, 2), 0.5)
    assert torch.equal(dropped, alone.repeat(1, 3, 1, 1))
    varied = vary_intensity(images, draws(400, 6), 0.1)
    assert torch.equal(varied[:, :3], varied[:, 3:6]) and torch.equal(varied[:, :3], varied[:, 6:])


def test_parts_of_a_batch_are_augmented_by_the_same_draws():
    """The random stream of each step is part of what a training can be repeated from."""
    generator = make_generator(1)
    moves, drops = torch.rand(5, 3, generator=generator), torch.rand(5, 2, generator=generator)
    changes = torch.rand(2, 5, 3, generator=generator)
    drawn = Augmentation(0.2, 15, 0.4, 0.2, 3).draw(5, make_generator(1))
    assert torch.equal(drawn["move"], moves) and torch.equal(drawn["drop"], drops)
    assert torch.equal(drawn["intensity"], torch.cat((*changes,), dim=1))
    changes = torch.rand(2, 5, 1, generator=make_generator(1))  # nothing is dropped
    drawn = Augmentation(0.2, 15, 0, 0.2, 1).draw(5, make_generator(1))
    assert torch.equal(drawn["move"], moves) and "drop" not in drawn


def heads(n: int, side: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Make round heads of radius 40 with a dark ventricle on air at -2; all of a head is mask."""
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    radius = torch.from_numpy(np.hypot(y, x)).float()
    head = (radius < 40).float()
    image = 2 * head * (radius > 10) - 2
    return image.expand(n, 3, side, side).clone(), head.expand(n, 1, side, side).clone()


def test_a_stripped_head_loses_its_edge_and_keeps_its_ventricle():
    images, masks = heads(3)
    before = images.clone()
    stripped, lesion = strip_skulls(images, masks, torch.tensor([0.0, 0.05, 0.08]))
    assert torch.equal(images, before), "the arguments are not modified"
    assert torch.equal(stripped[0], images[0]) and torch.equal(lesion[0], masks[0])
    for k, width in ((1, 5), (2, 8)):
        half = lesion[k, 0, 50].sum() / 2  # pixels of the middle row
        assert abs(half - (40 - width)) <= 1
        brain = lesion[k].bool().expand(3, -1, -1)
        assert torch.equal(stripped[k][brain], images[k][brain])
        assert (stripped[k][~brain] == -2).all()


def test_widths_are_drawn_for_the_share_of_slices():
    widths = widths_to_strip(draws(4000, 2), 0.3)
    drawn = widths[widths > 0]
    assert abs(len(drawn) / 4000 - 0.3) < 0.03
    assert 0.04 <= drawn.min() < 0.045 and 0.085 < drawn.max() <= 0.09


def test_stripping_changes_no_other_draw():
    options = {"scale": 0.2, "angle": 15, "drop": 0.4, "intensity": 0.2, "sequences": 3}
    before = Augmentation(**options).draw(8, make_generator(0))
    after = Augmentation(**options, strip=0.3).draw(8, make_generator(0))
    assert after.keys() - before.keys() == {"strip"}
    assert all(torch.equal(numbers, after[name]) for name, numbers in before.items())


def test_a_stripped_head_is_enlarged_as_the_crop_to_the_brain_would():
    images, masks = heads(1)
    options = {"scale": 0, "angle": 0, "drop": 0, "intensity": 0, "sequences": 3, "flip": 0}
    augment_all = Augmentation(**options, strip=0.999)
    (width,) = widths_to_strip(augment_all.draw(1, make_generator(3))["strip"], 0.999)
    moved, lesion = augment_all(images, masks, make_generator(3), 1)
    radius = lesion[0, 0, 50].sum() / 2
    assert abs(radius - (40 - 100 * width) / (1 - 2 * width)) <= 1.5
    assert moved.min() == -2
