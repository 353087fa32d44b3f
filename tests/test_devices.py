"""Cores and threads."""

import os

import pytest

from brainseg.devices import available_cores, in_order


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
