"""Seeds, files written whole, threads that keep order, and pictures that leave their data be."""

import os
import signal
import threading

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from skimage.segmentation import find_boundaries

from brainseg.devices import in_order, worker_threads
from brainseg.io.files import atomic_write
from brainseg.io.pictures import GREEN, RED, edge, outline, save_dsc_figure, save_gif, to_grey
from utils import Interruption, errors_in_one_sentence, fail, make_generator


def draws(*key: int) -> list[float]:
    return torch.rand(4, generator=make_generator(*key)).tolist()


# Seeds


def test_a_stream_can_be_made_again():
    assert draws(3, 1, 4) == draws(3, 1, 4)


def test_streams_differ():
    """Trap 1: another epoch, step or purpose must not see the same draws."""
    keys = [(s, k, e) for s in (0, 1, 2) for k in (0, 1) for e in range(20)]
    assert len({tuple(draws(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("one, other", [((0,), (0, 0)), ((7, 1), (7, 1, 0)), ((7, 0, 1), (7, 1))])
def test_streams_of_other_length_differ(one, other):
    assert draws(*one) != draws(*other)


def test_stream_leaves_the_global_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws(1, 2)
    assert torch.equal(torch.rand(3), expected)


# Files written whole


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"old", None])
def test_failed_write_keeps_the_old_file(tmp_path, old, error):
    path = tmp_path / "weights.pt"
    if old:
        path.write_bytes(old)
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_bytes(b"half of the ne")
        raise error
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_whole_write_replaces_the_old_file_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "folder" / "card.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with atomic_write(str(path)) as temporary:
            assert temporary.parent == path.parent, "renaming is atomic on one file system only"
            assert temporary.suffix == ".json", "imageio and matplotlib go by the suffix"
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_whole_write_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# Threads


@pytest.mark.parametrize("workers", [1, 3, None])
def test_in_order_keeps_the_order(workers):
    gate = threading.Event()

    def square(x: int) -> int:
        if x == 0 and workers == 3:
            gate.wait(5)  # the first is done last
        if x == 2:
            gate.set()
        return x * x

    assert list(in_order(square, range(20), workers)) == [x * x for x in range(20)]


def test_in_order_of_nothing():
    assert list(in_order(str, [])) == []


def test_in_order_gives_back_the_error_after_the_good_results():
    results = in_order(lambda x: 6 // (3 - x), range(10), workers=2)
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_in_order_takes_a_few_items_ahead_only():
    taken = []

    def items():
        for x in range(1000):
            taken.append(x)
            yield x

    results = in_order(abs, items(), workers=2)
    next(results)
    assert len(taken) <= 4
    results.close()
    assert len(taken) <= 4, "nobody works on after the reader has left"


def test_threads_leave_torch_its_cores():
    before = torch.get_num_threads()
    with worker_threads(2) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == before


def test_first_signal_is_noted_the_second_ends_the_program():
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    with Interruption() as interruption:
        assert interruption.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # asked twice
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("raised", [ValueError("x: is bad"), KeyboardInterrupt(), signal.SIGTERM])
def test_a_command_ends_in_one_sentence(raised):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, errors_in_one_sentence("stopped; run it again"):
        if isinstance(raised, signal.Signals):
            signal.raise_signal(raised)
        raise raised
    bad = isinstance(raised, ValueError)
    assert stop.value.code == ("error: x: is bad" if bad else "stopped; run it again")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "error, sentence",
    [
        (FileNotFoundError(2, "No such file or directory", "x.pt"), "x.pt: no such file or dir"),
        (ValueError("x: holds no case"), "x: holds no case"),
        ("stopped", "stopped"),
    ],
)
def test_fail_is_one_sentence(error, sentence):
    with pytest.raises(SystemExit, match=f"^error: {sentence}") as stop:
        fail(error)
    assert "\n" not in stop.value.code


# Pictures


@pytest.fixture
def masks() -> np.ndarray:
    rng = np.random.default_rng(0)
    random = rng.random((6, 20, 24)) > 0.3
    random[0], random[1] = False, True
    random[2] = False
    random[2, 5:12, 6:14] = True
    return random


def test_edge_is_that_of_scikit_image(masks):
    framed = np.pad(masks, ((0, 0), (1, 1), (1, 1)))  # the border of the picture is outside
    expected = [find_boundaries(mask, connectivity=1, mode="inner") for mask in framed]
    assert np.array_equal(edge(masks), np.stack(expected)[:, 1:-1, 1:-1])
    assert edge(masks)[2].sum() == 2 * 7 + 2 * 8 - 4


def test_outline_colours(masks):
    grey = np.random.default_rng(1).integers(0, 200, masks.shape).astype(np.uint8)
    prediction, truth = np.roll(masks, 3, axis=2), masks
    pictures = outline(grey, prediction, truth)
    assert pictures.shape == (*grey.shape, 3) and pictures.dtype == np.uint8
    red, green = edge(prediction), edge(truth) & ~edge(prediction)
    assert (pictures[red] == RED).all() and (pictures[green] == GREEN).all()
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
    """Trap 8: the pictures once changed the batch they were drawn from."""
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
    """Trap 2: nothing to show is no division by zero."""
    assert not to_grey(np.full((2, 4, 4, 3), value, dtype=np.uint8)).any()


def test_gif_has_every_slice(tmp_path):
    grey = np.arange(5 * 16 * 20, dtype=np.uint8).reshape(5, 16, 20)
    path = tmp_path / "case.gif"
    save_gif(path, outline(grey, np.zeros(grey.shape, dtype=bool)))
    frames = iio.imread(path)
    assert frames.shape == (5, 16, 20, 3)
    assert np.abs(frames.astype(int) - grey[..., None]).mean() < 8, "a GIF has 256 colours"
    assert iio.immeta(path)["loop"] == 0 and iio.immeta(path)["duration"] == 120
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("slices", [1, 4])
def test_gif_of_blank_slices_is_readable(tmp_path, slices):
    save_gif(tmp_path / "case.gif", np.zeros((slices, 16, 16, 3), dtype=np.uint8))
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
    text = path.read_text()  # holds every label as a comment
    if mean:
        assert f"mean {mean}" in text and f"median {median}" in text
    else:  # nothing is counted
        assert "mean" not in text and "median" not in text
    assert ("trained on, not counted" in text) == bool(marked)
    places = [text.index(f"<!-- {name} -->") for name in "abcd"]
    assert places == sorted(places), "from the worst to the best"


def test_montage_shows_every_picture_once_in_order():
    from brainseg.io.pictures import montage

    pictures = np.arange(1, 8, dtype=np.uint8)[:, None, None, None] * np.ones(
        (7, 4, 6, 3), np.uint8
    )
    whole = montage(pictures)
    assert whole.shape == (16, 12, 3)
    cells = whole[::4, ::6, 0].ravel()
    assert cells.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
