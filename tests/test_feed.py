"""Batches are the same from wherever the slices lie; which place that is goes by their size.

No GPU is needed: the CPU plays a device with memory of its own.
"""

import pytest
import torch
from conftest import SIZE
from test_train import run, same_run

import dataset
from dataset import BrainSegmentationDataset, Feed

DRAWN = [torch.tensor(batch) for batch in ([3, 0, 95], [7, 7], [8, 15, 16, 40])]


@pytest.fixture(scope="module")
def data(phantoms) -> BrainSegmentationDataset:
    """All 12 phantom cases of 8 slices."""
    return BrainSegmentationDataset(phantoms, "all", SIZE)


def batches(feed: Feed) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(feed.batches(DRAWN))


@pytest.mark.parametrize("neighbours", [0, 2])
def test_every_place_gives_the_batches_of_the_data_set(data, monkeypatch, neighbours):
    expected = [data.batch(batch.tolist(), neighbours) for batch in DRAWN]
    places = {"host": Feed(data, torch.device("cpu"), neighbours)}
    places["ahead"] = Feed(data, torch.device("cpu"), neighbours, workers=2)
    places["ahead"].device = torch.device("meta")  # neither a CPU nor CUDA: threads gather
    monkeypatch.setattr(dataset, "free_memory", lambda device: 1 << 40)
    places["device"] = Feed(data, torch.device("cpu"), neighbours)
    assert [place.on_device for place in places.values()] == [False, False, True]
    for name, place in places.items():
        for found, wanted in zip(batches(place), expected, strict=True):
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other), name


def test_the_device_holds_what_takes_half_of_its_memory_at_most(data, monkeypatch):
    size = len(data) * SIZE * SIZE * (3 * 2 + 1)
    for free, fits in ((2 * size, True), (2 * size - 1, False), (0, False)):
        monkeypatch.setattr(dataset, "free_memory", lambda device, free=free: free)
        assert Feed(data, torch.device("cpu")).on_device == fits


def test_threads_stop_when_nobody_reads_on(data):
    place = Feed(data, torch.device("cpu"), workers=1)
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
    assert "GiB of slices on cpu" in capsys.readouterr().out
    assert same_run(host, device)
