"""Test that values which fill what was not scanned are not taken for air."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from scipy import ndimage
from test_hospital_files import LESION, VOXELS, flair
from test_sequences import image_of

from brainseg.fill import percentile, without_fill
from brainseg.io.grid import Grid
from brainseg.io.layouts import find_case
from brainseg.io.pictures import to_grey
from brainseg.io.registration import register, resample
from brainseg.levels import measure
from brainseg.metrics import dsc
from brainseg.phantom import make_volume
from brainseg.preprocess import preprocess, preprocess_mask
from brainseg.segmenter import Segmenter

SIZE = 64
ROWS, COLUMNS = np.mgrid[-1:1:96j, -1:1:96j]
CORNERS = np.abs(ROWS) + np.abs(COLUMNS) > 1.35
CIRCLE = np.hypot(ROWS, COLUMNS) > 1
FRAME = np.maximum(np.abs(ROWS), np.abs(COLUMNS)) > 0.97


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """Make a phantom (12, 96, 96, 3), float32, with air at 50 to 100 and tissue up to 1300."""
    return 5 * make_volume(3, slices=12, size=96)[0].astype(np.float32) + 50


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32])
def test_percentiles_are_those_of_numpy(dtype):
    values = np.random.default_rng(0).normal(50, 30, 1001).clip(0, 120).astype(dtype)
    for percent in (0, 1, 33.3, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    far = np.array([-100] * 50 + [100] * 50, np.int8)
    assert percentile(far, 50) == 0, "not out of the range of the type"


def fill(volume: np.ndarray, where, value: float) -> np.ndarray:
    changed = volume.copy()
    changed[where] = value
    return changed


def in_slices(where: np.ndarray) -> tuple:
    return (slice(None), where)


FILLS = {  # places, value, factor
    "one blank end slice": ([0], -1000, 1),
    "one blank end slice at 0": ([0], 0, 1),
    "two blank end slices": ([0, -1], -1000, 1),
    "blank slices in the middle": ([3, 7], 0, 1),
    "a blank slice as bright as tissue": ([0], 500, 1),
    "a blank slice at 32767": ([4], 32767, 1),
    "corners": (in_slices(CORNERS), -1000, 1),
    "corners at 0": (in_slices(CORNERS), 0, 1),
    "corners at -1": (in_slices(CORNERS), -1, 1 / 1300),
    "corners at 4095": (in_slices(CORNERS), 4095, 1),
    "corners at 32767": (in_slices(CORNERS), 32767, 1),
    "corners as bright as tissue": (in_slices(CORNERS), 500, 1),
    "a round field of view": (in_slices(CIRCLE), -2000, 1),
    "a thin frame": (in_slices(FRAME), 4095, 1),
    "a box over the face": (np.s_[:5, :18], -1000, 1),
}


@pytest.mark.parametrize("places, value, factor", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("sequences", [[0, 1, 2], [0]], ids=["all", "pre-contrast"])
def test_fill_changes_no_level(volume, places, value, factor, sequences):
    changed = factor * volume
    for k in sequences:
        changed[..., k] = fill(changed[..., k], places, value)
    images, frame = preprocess(changed, SIZE)
    expected, before = preprocess(volume, SIZE)
    assert frame.box == before.box
    filled = fill(np.zeros(volume.shape[:3], bool), places, True)
    far = preprocess_mask(~ndimage.binary_dilation(filled, np.ones((1, 9, 9))), frame)
    inside = preprocess_mask(ndimage.binary_erosion(filled, np.ones((1, 9, 9))), frame)
    difference = (images - expected).abs().amax(dim=1)
    assert difference[far].max() < 0.1
    for k in sequences:
        assert (images[:, k][inside] < -1.9).all()
    names = ("pre-contrast", "FLAIR", "post-contrast")
    share = f"{filled.mean():.0%}"
    said = [note for note in frame.notes if "outside the scan" in note]
    assert said == [
        f"{share} of the voxels of {names[k]} hold one value outside the scan ({value}); they are "
        "treated as background"
        for k in sequences
    ]


def check_offset_where_above_0(volume: np.ndarray, sequences: list[int]) -> None:
    """Check that an offset wherever there is tissue does not change the network's input."""
    changed = volume.astype(np.float32)
    for k in sequences:
        changed[..., k] = np.where(volume[..., k] > 0, 3.7 * changed[..., k] + 50, 0)
    images, frame = preprocess(changed, SIZE)
    expected, before = preprocess(volume, SIZE)
    assert frame.box == before.box
    torch.testing.assert_close(images, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("sequences", [[1], [0, 1, 2]])
def test_an_offset_where_above_0_changes_nothing(sequences):
    check_offset_where_above_0(make_volume(3, slices=12, size=96)[0], sequences)


@pytest.mark.parametrize("value", [-1000, 0, 4095])
def test_fill_mixed_with_air_changes_no_level(volume, value):
    def turned(outside: float, order: int) -> np.ndarray:
        return ndimage.rotate(volume, 20, (1, 2), reshape=False, order=order, cval=outside)

    images, frame = preprocess(turned(value, order=1), SIZE)
    expected, before = preprocess(turned(volume.min(), order=1), SIZE)
    assert frame.box == before.box
    assert (images - expected).abs().mean() < 0.05
    assert re.search(rf"outside the scan \({value}\)", frame.notes[0])


def test_two_kinds_of_fill(volume):
    both = fill(fill(volume, in_slices(CORNERS), -1000), [0], 32767)
    images, frame = preprocess(both, SIZE)
    assert "hold one value outside the scan (-1000 and 32767)" in frame.notes[0]
    assert (images[0] == -2).all()
    assert measure(both[..., 1]).median == pytest.approx(measure(volume[..., 1]).median, rel=0.02)


def stripped(volume: np.ndarray, depth: int) -> np.ndarray:
    head = ndimage.binary_fill_holes(volume.max(-1) > 300)
    brain = ndimage.binary_erosion(head, np.ones((1, 3, 3)), iterations=depth)
    return np.where(brain[..., None], volume - 50, 0)


SOUND: dict[str, Callable] = {
    "a whole head": lambda v: v,
    "without air": lambda v: np.where(v < 150, 0, v - 50),
    "stripped": lambda v: stripped(v, 8),
    "stripped deep": lambda v: stripped(v, 14),
    "stripped, with slices that hold no brain": lambda v: np.pad(
        stripped(v, 8), [(3, 3)] + 3 * [(0, 0)]
    ),
    "saturated": lambda v: np.minimum(v, 400),
}


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_air_is_not_fill(volume, change):
    for k in range(3):
        sequence = change(volume)[..., k]
        voxels, values = without_fill(sequence)
        assert voxels is sequence and not values


def test_a_lesion_with_the_value_of_fill_is_kept():
    sequence = fill(flair(), in_slices(CORNERS), 1000)
    voxels, values = without_fill(sequence)
    assert values == [1000]
    assert np.array_equal(voxels > 700, flair() > 700)


# What uses it


def test_a_moved_sequence_does_not_mix_fill_with_air(volume):
    grid = Grid((96, 96, 12), (3.0, 3.0, 6.0), (0.0, 0.0, 2.0), np.eye(3))
    moved = resample(image_of(fill(volume[..., 0], [0, -1], 4095)), grid)
    expected = resample(image_of(volume[..., 0]), grid)
    np.testing.assert_allclose(moved[..., 1:10], expected[..., 1:10], atol=0.1)
    assert (moved[..., [0, -1]] == 4095).all()
    assert moved[..., 10].max() < 1500
    assert measure(moved.T).fill == (4095,)


def test_fill_does_not_disturb_registration(volume):
    fixed = image_of(volume[..., 1])
    shifted = np.roll(volume[..., 2], 3, axis=2)
    expected = register(image_of(shifted), fixed, Path("post"))
    found = register(image_of(fill(shifted, in_slices(CORNERS), 32767)), fixed, Path("post"))
    assert expected.distance == pytest.approx(9, abs=0.5)
    assert found.distance == pytest.approx(expected.distance, abs=0.5)


@pytest.mark.parametrize("value", [-9000, 32767])
def test_pictures_keep_their_contrast(volume, value):
    shown = to_grey(fill(volume, [0], value))
    difference = shown.astype(int) - to_grey(volume)
    assert np.abs(difference[1:]).max() < 12


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    weights = ROOT / "weights" / "unet-folds" / "unet-a5f30600.pt"
    return Segmenter.from_weights(weights, device="cpu", tta=False)


@pytest.mark.parametrize(
    "places, value",
    [([0], -1000), ([0, -1], -1000), (in_slices(CORNERS), -1000), (in_slices(CORNERS), 32767)],
)
def test_the_lesion_is_found_beside_fill(segmenter, places, value):
    """Once, these files gave 84 ml in the wrong place, 968 ml and 1,005 ml."""
    sequence = fill(flair().astype(np.int16), places, value)
    mask = segmenter(np.stack([sequence] * 3, axis=-1))
    expected = np.zeros(mask.shape, bool)
    expected[LESION] = True
    assert mask.sum() == pytest.approx(VOXELS, rel=0.1)
    assert dsc(mask, expected) > 0.9


# Real scans


def lgg_volume(path: Path) -> np.ndarray:
    """Read a case (S, H, W, 3) from its folder, or from an archive of images."""
    if path.is_dir():
        return find_case(path).read()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "_mask" not in name]
        return np.stack([iio.imread(archive.read(name), plugin="pillow") for name in names])


def test_no_real_scan_has_fill():
    """Then nothing is changed, and preprocessing is what it was, bit for bit."""
    cases = sorted(SHARED.glob("cases/*.zip")) or sorted(SHARED.glob("TCGA_*"))
    scans = sorted((SHARED.parent / "ms").glob("*/*.nii.gz"))
    if not cases:
        pytest.skip(f"no real cases in {SHARED}; set LGG to the folder kaggle_3m")
    for path in cases[::4]:  # a sample, as reading takes time
        volume = lgg_volume(path)
        for k in range(3):
            sequence = volume[..., k]
            assert without_fill(sequence)[0] is sequence, f"{path}: sequence {k}"
    for path in scans:
        voxels = np.asanyarray(nibabel.load(path).dataobj).T
        assert without_fill(voxels)[0] is voxels, path


LEVELS = {  # before fill was known: threshold and median of each sequence
    "TCGA_CS_4944_20010208": [(19.0809, 66), (15.6843, 73), (16.3836, 62)],
    "TCGA_HT_7692_19960724": [(18.981, 74), (16.1838, 65), (15.4845, 78)],
    "TCGA_CS_4942_19970222": [(19.5804, 62), (22.378600000000002, 68), (9.99, 53)],
}


@pytest.mark.parametrize("case", LEVELS)
def test_levels_of_real_scans_are_what_they_were(lgg, case):
    volume = find_case(lgg / case).read()
    found = [measure(volume[..., k]) for k in range(3)]
    assert [(levels.threshold, levels.median) for levels in found] == LEVELS[case]


@pytest.mark.parametrize("sequences", [[1], [0, 1, 2]])
def test_a_real_scan_with_an_offset_where_it_is_above_0(lgg, sequences):
    """Once, the DSC fell from 0.96 to 0.00."""
    check_offset_where_above_0(find_case(lgg / "TCGA_CS_4944_20010208").read(), sequences)
