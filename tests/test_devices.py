"""Test devices by name, ordered threads, cores and half precision."""

import os
import threading

import pytest
import torch

import train
from brainseg import devices, training
from brainseg.devices import (
    available_cores,
    half_precision,
    in_order,
    pick_device,
    worker_threads,
)
from brainseg.segmenter import Segmenter
from brainseg.unet import UNet
from brainseg.weights import load_tensors


def test_an_available_device_is_picked():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")
    assert torch.zeros(1, device=pick_device()).sum() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_without_cuda_is_an_error():
    with pytest.raises(ValueError, match="'cuda' is not available"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="'cuda' is not available"):
        Segmenter(UNet(init_features=1), device="cuda")


@pytest.mark.parametrize("name", ["nonsense", "cuda:999", ""])
def test_a_nonsense_device_is_refused(name):
    with pytest.raises(ValueError, match=f"{name!r} is not available"):
        pick_device(name)


# Threads


@pytest.mark.parametrize("workers", [1, 3, None])
def test_in_order_keeps_the_order(workers):
    gate = threading.Event()

    def square(x: int) -> int:
        if x == 0 and workers == 3:
            gate.wait(5)  # the first item finishes last
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


def test_threads_leave_torch_its_cores():
    before = torch.get_num_threads()
    with worker_threads(2) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [1, 6])
def test_each_thread_works_one_item_ahead(workers):
    taken = []
    results = in_order(abs, (taken.append(x) or x for x in range(100)), workers)
    next(results)
    results.close()
    assert len(taken) == workers + 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_those_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores() == len(before)


# Half precision


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("cuda", (7, 5), torch.float16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cpu", None, torch.bfloat16),
    ],
)
def test_old_cards_compute_in_float16(monkeypatch, name, capability, expected):
    monkeypatch.setattr(devices.torch.cuda, "get_device_capability", lambda device: capability)
    assert half_precision(torch.device(name)) == expected


def test_float16_resumes_with_its_gradient_scale(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "half_precision", lambda device: torch.float16)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, growth_interval=3))

    def run(name: str, epochs: int, *more: str) -> dict:
        out = tmp_path / name
        words = ["--images", phantoms, "--weights", out, "--logs", out / "logs", "--device", "cpu"]
        words += ["--image-size", 32, "--features", 2, "--amp", "--recipe", "classic"]
        train.main([str(word) for word in (*words, "--epochs", epochs, *more)])
        return load_tensors(out / "unet.ckpt")

    straight = run("straight", 2)
    first = run("resumed", 1)
    resumed = run("resumed", 2, "--resume")
    assert first["scaler"]["scale"] != straight["scaler"]["scale"], "it grew in the second epoch"
    assert resumed["scaler"] == straight["scaler"]
    for name, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
