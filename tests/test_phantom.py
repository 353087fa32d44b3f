"""Test the phantom: layout, determinism, and that a threshold does not solve it."""

import numpy as np
import pytest
import tifffile
from conftest import contents, run_main

from brainseg import phantom


@pytest.fixture(scope="module")
def volumes():
    return [phantom.make_volume((0, index)) for index in range(6)]


def run(*arguments: object) -> str | int:
    return run_main(phantom.main, *arguments)


def test_layout_is_that_of_kaggle_3m(tmp_path):
    assert run(tmp_path / "data", "--cases", 2, "--size", 48, "--slices", 11, "--seed", 3) == 0
    names = [f"phantom_{i:03d}" for i in range(2)]
    expected = {
        f"{n}/{n}_{k}{end}.tif" for n in names for k in range(1, 12) for end in ("", "_mask")
    }
    assert set(contents(tmp_path / "data")) == expected
    volume, mask = phantom.make_volume((3, 1), slices=11, size=48)
    for k in range(1, 12):
        image = tifffile.imread(tmp_path / f"data/phantom_001/phantom_001_{k}.tif")
        label = tifffile.imread(tmp_path / f"data/phantom_001/phantom_001_{k}_mask.tif")
        assert image.dtype == label.dtype == np.uint8
        assert np.array_equal(image, volume[k - 1])
        assert np.array_equal(label, mask[k - 1] * 255)


def test_shapes_dtypes_and_lesion(volumes):
    for volume, mask in volumes:
        assert volume.shape == (16, 96, 96, 3) and volume.dtype == np.uint8
        assert mask.shape == (16, 96, 96) and mask.dtype == bool
        assert mask.sum() > 100
        assert 2 <= mask.any(axis=(1, 2)).sum() <= 12, "some slices with lesion, some without"
        head = volume.mean(axis=(1, 2, 3))
        assert head[0] < head[8] > head[-1], "the head tapers"


def test_lesion_is_bright_on_flair_and_dark_before_contrast(volumes):
    for index, (volume, mask) in enumerate(volumes):
        healthy, empty = phantom.make_volume((0, index), lesion=False)
        assert not empty.any()
        change = volume[mask].astype(float).mean(axis=0) - healthy[mask].mean(axis=0)
        assert change[1] > 20 and change[0] < -5


def test_no_threshold_on_flair_finds_the_lesion(volumes):
    dsc = []  # (cases, 256): DSC of `FLAIR >= t` for every t
    for volume, mask in volumes:
        flair = volume[..., 1]
        above = np.bincount(flair.ravel(), minlength=256)[::-1].cumsum()[::-1]
        hits = np.bincount(flair[mask], minlength=256)[::-1].cumsum()[::-1]
        dsc.append(2 * hits / (above + mask.sum()))
    assert np.mean(dsc, axis=0).max() < 0.4, "one threshold for all cases"
    assert np.max(dsc, axis=1).mean() < 0.4, "the best threshold of each case"


def test_same_seed_same_bytes_whatever_the_number_of_cases(tmp_path):
    sizes = {"slices": 5, "size": 32}
    phantom.write_data_set(tmp_path / "a", cases=2, seed=7, **sizes)
    phantom.write_data_set(tmp_path / "b", cases=4, seed=7, **sizes)
    phantom.write_data_set(tmp_path / "c", cases=2, seed=8, **sizes)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == {name: b[name] for name in a}
    assert all(a[name] != c[name] for name in a if "mask" not in name)


def test_writing_again_leaves_no_stale_slice(tmp_path):
    phantom.write_data_set(tmp_path, cases=1, slices=6, size=32)
    phantom.write_data_set(tmp_path, cases=1, slices=5, size=32)
    assert len(contents(tmp_path)) == 10
    assert [f.name for f in tmp_path.iterdir()] == ["phantom_000"]


@pytest.mark.parametrize("name", ["phantom_000_1.tif", "notes.txt"])
def test_only_phantoms_are_replaced(tmp_path, name):
    """Once, any folder phantom_000 was deleted."""
    phantom.write_data_set(tmp_path, cases=1, slices=4, size=32)
    tifffile.imwrite(tmp_path / "phantom_000" / name, np.zeros((32, 32, 3), np.uint8))
    before = contents(tmp_path)
    assert run(tmp_path, "--cases", 1) == 2
    assert contents(tmp_path) == before


def test_no_lesion_makes_every_nth_case_healthy(tmp_path):
    phantom.write_data_set(tmp_path, cases=4, slices=8, size=48, no_lesion=2)
    for index in range(4):
        masks = [tifffile.imread(f) for f in tmp_path.glob(f"phantom_{index:03d}/*_mask.tif")]
        assert np.any(masks) == (index % 2 == 0)


@pytest.mark.parametrize("slices, size", [(16, 31), (3, 96)])
def test_too_small_is_refused(slices, size):
    with pytest.raises(ValueError, match="at least 4 slices of 32 x 32"):
        phantom.make_volume(0, slices, size)


def test_smallest_volume_has_a_lesion():
    for seed in range(10):
        assert phantom.make_volume(seed, phantom.MIN_SLICES, phantom.MIN_SIZE)[1].any()


def test_bad_folder_is_one_sentence(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for bad in (file, file / "below"):
        message = run(bad, "--cases", 1)
        assert isinstance(message, str) and str(bad) in message and "\n" not in message
    assert file.read_text() == "kept"


@pytest.mark.parametrize("flags", [("--size", 8), ("--cases", 0), ("--seed", -1)])
def test_bad_number_is_refused(tmp_path, flags):
    assert run(tmp_path / "data", *flags) == 2
    assert not list(tmp_path.glob("data/*"))
