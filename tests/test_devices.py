"""Cores, threads and half precision."""

import os

import pytest
import torch

import train
from brainseg import devices, training
from brainseg.devices import available_cores, half_precision, in_order
from brainseg.weights import load_tensors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_those_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores() == len(before)


@pytest.mark.parametrize("workers", [1, 6])
def test_each_thread_works_one_item_ahead(workers):
    taken = []
    results = in_order(abs, (taken.append(x) or x for x in range(100)), workers)
    next(results)
    results.close()
    assert len(taken) == workers + 1


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
    for module in (train, training):
        monkeypatch.setattr(module, "half_precision", lambda device: torch.float16)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, growth_interval=3))

    def run(name: str, epochs: int, *more: str) -> dict:
        out = tmp_path / name
        words = ["--images", phantoms, "--weights", out, "--logs", out / "logs", "--device", "cpu"]
        words += ["--image-size", 32, "--features", 2, "--amp", "--vis-freq", 0]
        train.main([str(word) for word in (*words, "--epochs", epochs, *more)])
        return load_tensors(out / "unet.ckpt")

    straight = run("straight", 2)
    first = run("resumed", 1)
    resumed = run("resumed", 2, "--resume")
    assert first["scaler"]["scale"] != straight["scaler"]["scale"], "it grew in the second epoch"
    assert resumed["scaler"] == straight["scaler"]
    for name, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
