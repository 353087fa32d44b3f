"""Test that pictures show what they should and do not change their data."""

import os
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT
from skimage.segmentation import find_boundaries

from brainseg.io.pictures import (
    GREEN,
    RED,
    edge,
    montage,
    outline,
    outline_in_palette,
    save_dsc_figure,
    save_gif,
    to_grey,
)


@pytest.fixture
def masks() -> np.ndarray:
    rng = np.random.default_rng(0)
    random = rng.random((6, 20, 24)) > 0.3
    random[0], random[1] = False, True
    random[2] = False
    random[2, 5:12, 6:14] = True
    return random


def test_edge_is_that_of_scikit_image(masks):
    framed = np.pad(masks, ((0, 0), (1, 1), (1, 1)))  # beyond the picture is outside the mask
    expected = [find_boundaries(mask, connectivity=1, mode="inner") for mask in framed]
    assert np.array_equal(edge(masks), np.stack(expected)[:, 1:-1, 1:-1])
    assert edge(masks)[2].sum() == 2 * 7 + 2 * 8 - 4


def test_outline_colours(masks):
    grey = np.random.default_rng(1).integers(0, 200, masks.shape).astype(np.uint8)
    prediction, truth = np.roll(masks, 3, axis=2), masks
    pictures = outline(grey, prediction, truth)
    assert pictures.shape == (*grey.shape, 3) and pictures.dtype == np.uint8
    red, green = edge(prediction), edge(truth) & ~edge(prediction)
    dashes = (pictures[green] == GREEN).all(axis=-1)
    assert (pictures[red] == RED).all() and 0.3 < dashes.mean() < 0.7
    assert not pictures[green][~dashes].any(), "black between the dashes"
    rest = ~(red | green)
    assert (pictures[rest] == grey[rest][:, None]).all()
    assert not (outline(grey, prediction) == GREEN).all(axis=-1).any(), "no truth, no green"


def test_small_slices_are_drawn_large():
    grey = np.arange(2 * 6 * 9, dtype=np.uint8).reshape(2, 6, 9)
    mask = np.zeros(grey.shape, dtype=bool)
    mask[:, 2:4, 3:5] = True
    pictures = outline(grey, mask, side=26)
    assert pictures.shape == (2, 18, 27, 3)
    assert (pictures[:, ::3, ::3][~mask] == grey[~mask][:, None]).all()
    red = (pictures == RED).all(axis=-1)
    assert red.sum() == 2 * (4 * 5), "the border of 6 by 6 pixels, one pixel wide"
    assert outline(grey, mask, side=4).shape == (2, 6, 9, 3), "never made smaller"
    assert outline(grey[:, :1], mask[:, :1], side=26).shape == (2, 3, 27, 3), "nor blown up"


def test_drawing_does_not_change_what_it_draws(masks):
    """Once, the pictures changed the batch they were drawn from."""
    volume = np.random.default_rng(1).integers(0, 200, (*masks.shape, 3)).astype(np.uint8)
    prediction = masks[::-1].copy()
    arrays = volume, prediction, masks
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    grey = to_grey(volume)
    grey.flags.writeable = False
    outline(grey, prediction, masks)
    to_grey(volume[..., :1]), edge(masks)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_grey_is_flair():
    volume = np.zeros((2, 8, 8, 3), dtype=np.uint16)
    volume[0, 2:4, 2:4, 1] = 4000
    volume[1, 5:7, 5:7, 0] = 4000
    grey = to_grey(volume)
    assert grey.dtype == np.uint8 and grey.shape == (2, 8, 8)
    assert (grey[0, 2:4, 2:4] == 255).all() and grey.sum() == 4 * 255
    assert np.array_equal(to_grey(volume[..., 1:2]), grey), "the only channel of one"


@pytest.mark.parametrize("value", [0, 7])
def test_grey_of_a_blank_volume(value):
    """A blank volume must not cause a division by zero."""
    assert not to_grey(np.full((2, 4, 4, 3), value, dtype=np.uint8)).any()


def test_gif_has_every_slice(tmp_path):
    grey = np.arange(5 * 16 * 20, dtype=np.uint8).reshape(5, 16, 20)
    path = tmp_path / "case.gif"
    mask = np.zeros(grey.shape, dtype=bool)
    mask[1:4, 4:9, 5:12] = True
    save_gif(path, outline_in_palette(grey, mask, mask[::-1]))
    frames = iio.imread(path)
    assert np.array_equal(frames, outline(grey, mask, mask[::-1]))
    assert iio.immeta(path)["loop"] == 0 and iio.immeta(path)["duration"] == 120
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("slices", [1, 4])
def test_gif_of_blank_slices_is_readable(tmp_path, slices):
    save_gif(tmp_path / "case.gif", np.zeros((slices, 16, 16), dtype=np.uint8))
    assert not iio.imread(tmp_path / "case.gif").any()


@pytest.mark.parametrize("cases", [1, 12])
def test_dsc_figure_is_a_readable_picture(tmp_path, cases):
    scores = {f"case_{k:02d}": k / cases for k in range(cases)}
    path = tmp_path / "dsc.png"
    save_dsc_figure(path, scores)
    picture = iio.imread(path)[..., :3]
    assert picture.shape[0] > 100 and picture.std() > 10
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "marked, mean, median",
    [((), "0.500", "0.550"), (("d",), "0.367", "0.400"), ("abcd", None, None)],
)
def test_dsc_figure_keeps_training_cases_out_of_its_mean(tmp_path, marked, mean, median):
    path = tmp_path / "dsc.svg"
    save_dsc_figure(path, {"b": 0.4, "d": 0.9, "a": 0.0, "c": 0.7}, marked)
    text = path.read_text()  # contains every label as a comment
    if mean:
        assert f"mean {mean}" in text and f"median {median}" in text
    else:  # nothing is counted
        assert "mean" not in text and "median" not in text
    assert ("trained on, not counted" in text) == bool(marked)
    places = [text.index(f"<!-- {name} -->") for name in "abcd"]
    assert places == sorted(places), "from the worst to the best"


def test_montage_shows_every_picture_once_in_order():
    pictures = np.arange(1, 8, dtype=np.uint8)[:, None, None, None] * np.ones(
        (7, 4, 6, 3), np.uint8
    )
    assert np.array_equal(montage(pictures[..., 0]), montage(pictures)[..., 0])
    whole = montage(pictures)
    assert whole.shape == (16, 12, 3)
    cells = whole[::4, ::6, 0].ravel()
    assert cells.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]


def test_figures_need_no_backend_of_a_notebook(tmp_path):
    """A notebook's own is handed on to the programs that it starts."""
    code = "from brainseg.io.pictures import save_dsc_figure; save_dsc_figure(%r, {'a': 0.5})"
    command = [sys.executable, "-c", code % str(tmp_path / "dsc.png")]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    assert (tmp_path / "dsc.png").stat().st_size > 1000
