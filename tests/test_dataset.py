"""Test the slices of a subset, how they are drawn, and batches from any place."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import SIZE, open_all, same
from test_train import run, same_run

import dataset
from brainseg.io.layouts import find_cases, list_cases
from brainseg.phantom import write_data_set
from brainseg.preprocess import preprocess, preprocess_mask
from brainseg.training import make_generator
from dataset import BatchLoader, BrainSegmentationDataset, train_and_validation


@pytest.fixture(scope="module")
def data(phantoms) -> BrainSegmentationDataset:
    """Return all 12 phantom cases of 8 slices."""
    return BrainSegmentationDataset(phantoms, "all", SIZE)


# Items


def test_items(data, phantoms):
    assert len(data) == 12 * 8 and data.in_channels == 3
    volume, truth = find_cases(phantoms)[3].read_pair()
    images, frame = preprocess(volume, SIZE)
    mask = preprocess_mask(truth, frame)
    for s in range(8):
        image, label = data[3 * 8 + s]
        assert image.dtype == label.dtype == torch.float32
        assert image.shape == (3, SIZE, SIZE) and label.shape == (1, SIZE, SIZE)
        assert set(label.unique().tolist()) <= {0.0, 1.0}, "masks are 0 or 1"
        torch.testing.assert_close(image, images[s], atol=2e-3, rtol=1e-3)  # half precision
        assert torch.equal(label[0], mask[s].float())
    assert np.array_equal(data.volumes[3].truth, truth) and data.volumes[3].frame == frame


def test_an_item_is_always_the_same_and_a_copy(data):
    image, mask = data[20]
    before = image.clone(), mask.clone()
    image.add_(1), mask.add_(1)
    assert same([data[20]], [before])


def test_batch_is_the_items_as_stored(data):
    indices = [5, 90, 5]
    images, masks = data.batch(indices)
    assert images.dtype == torch.float16 and masks.dtype == torch.bool
    for k, index in enumerate(indices):
        assert torch.equal(images[k].float(), data[index][0])
        assert torch.equal(masks[k].float(), data[index][1])


def test_batch_with_neighbours(data):
    """Slices 0 and 7 are the ends of a case, slice 8 the start of the next one."""
    images, masks = data.batch([0, 3, 7, 8], neighbours=1)
    assert images.shape == (4, 9, SIZE, SIZE)
    for place, seen in enumerate([(0, 0, 1), (2, 3, 4), (6, 7, 7), (8, 8, 9)]):
        expected, _ = data.batch(seen)
        assert torch.equal(images[place], expected.flatten(0, 1))
    assert torch.equal(masks, data.batch([0, 3, 7, 8])[1])


def test_locate_says_case_and_slice_number(data):
    assert data.locate(0) == ("phantom_000", 1)
    assert data.locate(7) == ("phantom_000", 8)
    assert data.locate(8) == ("phantom_001", 1)
    assert len({data.locate(index) for index in range(len(data))}) == len(data)


def test_locate_gives_the_number_of_the_file(two):
    for path in (two / "phantom_001").iterdir():
        stem, number, *rest = path.stem.rsplit("_", 2 if "mask" in path.stem else 1)
        path.rename(path.with_name("_".join([stem, str(int(number) + 40), *rest]) + ".tif"))
    data = BrainSegmentationDataset(two, "all", SIZE)
    assert [data.locate(index)[1] for index in (0, 7, 8)] == [41, 48, 1]


def test_number_of_workers_changes_nothing(two):
    one, many = (open_all(two, cache=two.parent / f"{w}", workers=w) for w in (1, 4))
    assert same(one, many)


def test_dataset_of_a_fold(phantoms, tmp_path):
    parts = train_and_validation(list_cases(phantoms), 3, 1, image_size=SIZE, cache=tmp_path)
    names = [{volume.name for volume in part.volumes} for part in parts]
    assert [len(part) for part in names] == [8, 4]
    assert not names[0] & names[1]


# Sampling


def test_sampling_weights_by_hand(data):
    """Cases are drawn uniformly, then slices by area plus a tenth of the case's mean area."""
    weights = data.sampling_weights(0.1)
    areas = np.array([data[index][1].sum().item() for index in range(len(data))]).reshape(12, 8)
    for case in range(12):
        total = sum(area + areas[case].mean() / 10 for area in areas[case])
        for s in range(8):
            expected = 1 / 12 * (areas[case, s] + areas[case].mean() / 10) / total
            assert weights[case * 8 + s].item() == pytest.approx(expected, rel=1e-6)
    assert weights.sum().item() == pytest.approx(1) and (weights > 0).all()


@pytest.mark.parametrize("background", [0, 0.5, 3])
def test_background_is_a_share_of_even_draws(data, background):
    areas = torch.tensor([data[index][1].sum().item() for index in range(len(data))]).double()
    by_area = (areas.view(12, 8) / areas.view(12, 8).sum(1, keepdim=True) / 12).flatten()
    share = background / (1 + background)
    expected = (1 - share) * by_area + share / len(data)
    torch.testing.assert_close(data.sampling_weights(background), expected)


def test_case_without_lesion_draws_its_slices_evenly(tmp_path):
    """A healthy case of another length is used and not fatal."""
    write_data_set(tmp_path / "images", cases=2, slices=6, size=32, no_lesion=2)
    for k in (5, 6):
        (tmp_path / f"images/phantom_001/phantom_001_{k}.tif").unlink()
        (tmp_path / f"images/phantom_001/phantom_001_{k}_mask.tif").unlink()
    data = BrainSegmentationDataset(tmp_path / "images", "all", SIZE)
    weights = data.sampling_weights(0.1)
    assert len(weights) == len(data) == 6 + 4
    torch.testing.assert_close(weights[6:], torch.full((4,), 0.5 / 4).double())
    assert weights[:6].sum().item() == pytest.approx(0.5)


def test_epochs_draw_differently_and_reach_nearly_every_slice(data):
    """Once, worker seeds were reset every epoch: 100 epochs saw only 31 % of the slices."""
    weights = data.sampling_weights(0.1)

    def epoch(number: int) -> list[int]:
        generator = make_generator(7, 0, number)
        return torch.multinomial(weights, len(data), True, generator=generator).tolist()

    drawn = [epoch(number) for number in range(60)]
    assert len(set(map(tuple, drawn))) == 60
    assert epoch(31) == drawn[31], "a resumed training goes on with the same draws"
    assert len(set(sum(drawn, []))) > 0.95 * len(data)


# Refusals


def test_case_without_masks_is_refused(two):
    for path in (two / "phantom_002").glob("*_mask.tif"):
        path.unlink()
    with pytest.raises(ValueError, match=f"{two}/phantom_002: has no mask"):
        open_all(two)


def test_constant_volume_is_refused_by_name(two):
    for path in (two / "phantom_001").glob("*[0-9].tif"):
        iio.imwrite(path, np.full((64, 64, 3), 9, dtype=np.uint8))
    with pytest.raises(ValueError, match=f"{two}/phantom_001: every voxel is 9"):
        open_all(two)


def test_blank_case_is_used(two):
    for path in (two / "phantom_001").glob("*[0-9].tif"):
        iio.imwrite(path, np.zeros((64, 64, 3), dtype=np.uint8))
    data = BrainSegmentationDataset(two, "all", SIZE, cache=two.parent / "cache")
    assert not data[0][0].any() and data[8][0].any()
    assert data.volumes[0].frame.blank and torch.isfinite(data.sampling_weights(0.1)).all()


def test_cases_of_different_channels_are_refused(two):
    for path in (two / "phantom_001").glob("*[0-9].tif"):
        iio.imwrite(path, iio.imread(path)[..., 1])
    with pytest.raises(ValueError, match="1 in .*phantom_001, 3 in .*phantom_002") as stop:
        open_all(two)
    assert str(two) in str(stop.value)


def test_damaged_slice_is_refused_by_name(two):
    path = two / "phantom_002" / "phantom_002_4.tif"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"{path}: not a readable image"):
        open_all(two)


# Batches; no GPU is needed, as the CPU plays a device with its own memory

DRAWN = [torch.tensor(batch) for batch in ([3, 0, 95], [7, 7], [8, 15, 16, 40])]


def batches(loader: BatchLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(loader.batches(DRAWN))


@pytest.mark.parametrize("neighbours", [0, 2])
def test_every_place_gives_the_batches_of_the_data_set(data, monkeypatch, neighbours):
    expected = [data.batch(batch.tolist(), neighbours) for batch in DRAWN]
    places = {"host": BatchLoader(data, torch.device("cpu"), neighbours)}
    places["ahead"] = BatchLoader(data, torch.device("cpu"), neighbours, workers=2)
    places["ahead"].device = torch.device("meta")  # neither a CPU nor CUDA: threads gather
    monkeypatch.setattr(dataset, "to_device", lambda tensor, _: tensor)
    monkeypatch.setattr(dataset, "free_memory", lambda device: 1 << 40)
    places["device"] = BatchLoader(data, torch.device("cpu"), neighbours)
    assert [place.on_device for place in places.values()] == [False, False, True]
    for name, place in places.items():
        for found, wanted in zip(batches(place), expected, strict=True):
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other), name


def test_the_device_holds_data_up_to_half_of_its_memory(data, monkeypatch):
    size = len(data) * SIZE * SIZE * (3 * 2 + 1)
    for free, fits in ((2 * size, True), (2 * size - 1, False), (0, False)):
        monkeypatch.setattr(dataset, "free_memory", lambda device, free=free: free)
        assert BatchLoader(data, torch.device("cpu")).on_device == fits


def test_threads_stop_when_reading_stops(data):
    place = BatchLoader(data, torch.device("cpu"), workers=1)
    place.device = torch.device("meta")
    gathered, batch = [], data.batch
    place.dataset = type("", (), {"batch": lambda _, i, k: gathered.append(i) or batch(i, k)})()
    reading = place.batches(DRAWN * 50)
    next(reading)
    reading.close()
    assert len(gathered) < 10


def test_training_from_the_device_is_the_same_and_says_so(phantoms, tmp_path, monkeypatch, capsys):
    more = "--epochs", 2, "--neighbours", 1
    host = run(phantoms, tmp_path / "host", *more)
    assert "slices in host memory" in capsys.readouterr().out
    monkeypatch.setattr(dataset, "free_memory", lambda device: 1 << 40)
    device = run(phantoms, tmp_path / "device", *more)
    assert "MiB of slices on cpu" in capsys.readouterr().out
    assert same_run(host, device)
