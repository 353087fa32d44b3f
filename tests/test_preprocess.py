"""Test preprocessing version 2: differences between scanners must not reach the network."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from brainseg.appearance import LOOKS
from brainseg.io.layouts import find_case, find_cases
from brainseg.phantom import make_volume
from brainseg.preprocess import preprocess, preprocess_mask

SIZE = 64


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """Make a phantom (12, 96, 96, 3), uint8."""
    return make_volume(3, slices=12, size=96)[0]


def prepared(volume: np.ndarray) -> torch.Tensor:
    return preprocess(volume, SIZE)[0]


def change(volume: np.ndarray, sequence: int, function) -> np.ndarray:
    changed = volume.astype(np.float32)
    changed[..., sequence] = function(changed[..., sequence])
    return changed


@pytest.mark.parametrize("seed", range(12))
def test_scale_offset_and_hot_voxels_change_nothing(volume, seed):
    """Once, a rescaled sequence or a single hot voxel emptied the mask."""
    draw = np.random.default_rng(seed)
    sequence, scale = draw.integers(3), 10 ** draw.uniform(-2, 3)
    offset = draw.uniform(-1, 2) * scale * 100
    changed = change(volume, sequence, lambda x: x * scale + offset)
    places = tuple(draw.integers(0, side, 10) for side in volume.shape[:3])
    greatest = changed[..., sequence].max()
    changed[(*places, sequence)] = greatest * draw.choice([2, 1000], 10)
    expected, frame = preprocess(volume, SIZE)
    images, changed_frame = preprocess(changed, SIZE)
    assert changed_frame.box == frame.box
    # A hot voxel affects a few pixels, as far as the spline of its slice reaches.
    hot = np.zeros(volume.shape[:3], bool)
    hot[places] = True
    near = ndimage.binary_dilation(hot, np.ones((1, 21, 21)))
    far = preprocess_mask(~near, frame)
    difference = (images - expected).abs().amax(dim=1)
    assert far.any() and difference[far].max() < 1e-2


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_the_data_type_changes_nothing(volume, dtype):
    torch.testing.assert_close(prepared(volume.astype(dtype)), prepared(volume))


def test_signed_values_with_an_offset_change_nothing(volume):
    signed = volume.astype(np.int16) * 7 - 1000
    torch.testing.assert_close(prepared(signed), prepared(volume), atol=1e-4, rtol=0)


def test_stripping_the_skull_hardly_moves_the_brain(volume):
    head = ndimage.binary_fill_holes(volume[6].max(-1) > 20)
    brain = ndimage.binary_erosion(head, iterations=16)
    stripped = np.where(brain[..., None], volume[6:7], 0).astype(volume.dtype)
    whole = volume[6:7]

    def level(x: np.ndarray) -> float:
        images, frame = preprocess(x, SIZE)
        inside = preprocess_mask(brain[None], frame)
        return images[:, 1][inside].median().item()

    assert level(stripped) == pytest.approx(level(whole), abs=0.5)


def test_more_air_changes_no_level(volume):
    padded = np.pad(volume, ((4, 4), (20, 30), (10, 0), (0, 0)))
    images, frame = preprocess(padded, SIZE)
    torch.testing.assert_close(images[4:-4], prepared(volume), atol=0.05, rtol=0)
    assert (images[0] == -2).all()


def test_constant_sequence_is_replaced_by_flair(volume):
    images, frame = preprocess(change(volume, 2, lambda x: 0 * x + 7), SIZE)
    assert torch.equal(images[:, 2], images[:, 1])
    assert frame.replaced == ("post-contrast",)
    assert frame.notes == ("FLAIR stands in for post-contrast, which is constant",)


def test_constant_flair_is_refused(volume):
    with pytest.raises(ValueError, match="FLAIR is constant"):
        preprocess(change(volume, 1, lambda x: 0 * x), SIZE)


def test_saturated_sequence_is_reported(volume):
    _, frame = preprocess(change(volume, 0, lambda x: np.minimum(x, 60)), SIZE)
    assert any("pre-contrast is saturated" in note for note in frame.notes)


def test_sequences_that_do_not_overlap_are_reported(volume):
    _, frame = preprocess(change(volume, 2, lambda x: np.roll(x, 30, axis=2)), SIZE)
    assert any("are they registered?" in note for note in frame.notes)


def test_sound_sequences_need_no_note(volume):
    assert preprocess(volume, SIZE)[1].notes == ()


def test_unknown_version_is_refused(volume):
    with pytest.raises(ValueError, match="version 3 is not known"):
        preprocess(volume, SIZE, 3)


def test_real_case_on_a_scanner_scale(lgg):
    volume = find_case(lgg / "TCGA_CS_4944_20010208").read()
    scaled = change(volume, 2, lambda x: 4 * x + 50)
    scaled[3, 100, 100] = 30000
    images, expected = prepared(scaled), prepared(volume)
    images[3], expected[3] = 0, 0
    torch.testing.assert_close(images, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("sequences", [[1], [0, 1, 2]])
def test_normalising_after_stripping_changes_nothing(volume, sequences):
    head = volume.min(axis=-1) > 20
    stripped = np.where(head[..., None], volume, 0)
    stripped[:, 40:44, 40:44] = np.where(head[:, 40:44, 40:44, None], 1, 0)  # fluid
    normalised = stripped.astype(np.float32)
    for k in sequences:
        normalised[..., k] = np.where(head, (stripped[..., k] - 90.3) / 40, 0)
    images, frame = preprocess(normalised, SIZE)
    expected, before = preprocess(stripped, SIZE)
    torch.testing.assert_close(images, expected, atol=0.1, rtol=0)
    assert frame.box == before.box and not before.notes
    assert [note.split()[1:6] for note in frame.notes] == [
        ["was", "normalised", "after", "skull", "stripping:"] for _ in sequences
    ]


def test_a_cold_voxel_is_not_the_air_of_a_normalised_scan(volume):
    head = volume.min(axis=-1) > 20
    normalised = np.where(head[..., None], (volume.astype(np.float32) - 90.3) / 40, 0)
    cold = normalised.copy()
    cold[3, 50, 50] = -30
    expected, images = (preprocess(each, SIZE)[0] for each in (normalised, cold))
    assert ((images - expected).abs() > 1e-2).float().mean() < 1e-3, "around that voxel only"


def test_one_value_inside_the_head_is_not_background(volume):
    head = volume.min(axis=-1) > 20
    flat = change(volume, 0, lambda x: np.where(head & (x > 60) & (x < 140), 100, x))
    images, frame = preprocess(flat, SIZE)
    assert torch.equal(images[:, 1:], prepared(volume)[:, 1:])
    (note,) = frame.notes
    assert "pre-contrast has one value in" in note


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.astype(np.uint32) + 2**31,
        lambda v: v.astype(np.int64) + 10**9,
        lambda v: v.astype(np.float64) + 1e9,
        lambda v: v.astype(np.float64) * 1e-40,
    ],
)
def test_offsets_and_scales_beyond_float32_change_nothing(change):
    volume = make_volume(1, 6, 64)[0]
    wanted, _ = preprocess(volume, 48)
    torch.testing.assert_close(preprocess(change(volume), 48)[0], wanted, atol=1e-4, rtol=0)


# The order of the sequences


def head(csf: int, noise: int) -> np.ndarray:
    """Make a sequence (8, 64, 64) uint16: tissue of 500 in air, a fifth of it CSF."""
    s, y, x = np.ogrid[:8, :64, :64]
    radius = np.sqrt(((s - 3.5) / 5) ** 2 + ((y - 32) / 28) ** 2 + ((x - 31) / 24) ** 2)
    volume = np.where(radius < 1, 500, 0) + np.where(radius < 0.58, csf - 500, 0)
    return (volume + np.random.default_rng(noise).integers(0, 30, volume.shape)).astype(np.uint16)


@pytest.mark.parametrize(
    "order, said",
    [
        ((0, 1, 2), ""),
        ((2, 1, 0), ""),
        ((1, 0, 2), "or is FLAIR first?"),
        ((0, 2, 1), "or is FLAIR last?"),
        ((1, 0, 1), "or is FLAIR first?"),
        ((1, 1, 1), ""),
        ((0, 1, 1), ""),
        ((1, 1, 2), ""),
    ],
)
@pytest.mark.parametrize("scale", [1, 7])
def test_an_order_that_looks_wrong_is_said(order, said, scale):
    sequences = head(260, 0), head(90, 1) * scale, head(240, 2)
    volume = np.stack([sequences[k] for k in order], axis=3)
    notes = preprocess(volume, 32)[1].notes
    assert said in " ".join(notes)
    assert bool(said) == ("FLAIR looks like T1" in " ".join(notes))


def test_the_order_of_real_cases(lgg):
    doubted = {"right": 0, "wrong": 0}
    for case in find_cases(lgg):
        volume = case.read()
        for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1)):
            notes = preprocess(volume[..., order], 32)[1].notes
            kind = "right" if order == (0, 1, 2) else "wrong"
            doubted[kind] += any("FLAIR looks like T1" in note for note in notes)
    assert doubted["right"] == 0 and doubted["wrong"] >= 4


def test_the_looks_of_a_scan_do_not_depend_on_its_scale_but_on_its_skull(volume):
    """The fat of the scalp is among the brightest of a whole head."""
    images, frame = preprocess(volume, SIZE)
    measured = dict(zip(LOOKS, frame.looks, strict=True))
    _, scaled = preprocess(7 * volume.astype(np.float32) + 100, SIZE)
    assert scaled.looks == pytest.approx(frame.looks, abs=0.02)
    assert measured["log_slices"] == pytest.approx(np.log10(12))
    assert measured["head_share"] == pytest.approx(
        float((images[:, 1] > -1.6).float().mean()), abs=1e-3
    )
    head = ndimage.binary_fill_holes(volume.max(axis=(0, 3)) > 30)
    brain = ndimage.binary_erosion(head, iterations=12)
    _, stripped = preprocess(volume * brain[..., None], SIZE)
    bare = dict(zip(LOOKS, stripped.looks, strict=True))
    assert bare["flair_bright"] < measured["flair_bright"] - 0.5
