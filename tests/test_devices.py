"""Devices are picked or refused by name; threads keep the order of their items."""

import threading

import pytest
import torch
from brainseg.unet import UNet

from brainseg.devices import in_order, pick_device, worker_threads
from brainseg.segmenter import Segmenter


def test_a_device_that_is_there():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")
    assert torch.zeros(1, device=pick_device()).sum() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_without_cuda_is_an_error():
    with pytest.raises(ValueError, match="'cuda' is not there"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="'cuda' is not there"):
        Segmenter(UNet(init_features=1), device="cuda")


@pytest.mark.parametrize("name", ["nonsense", "cuda:999", ""])
def test_nonsense_is_no_device(name):
    with pytest.raises(ValueError, match=f"{name!r} is not there"):
        pick_device(name)


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
