"""Test scores on masks with known answers, empty masks, and the interval of a cohort."""

import math
import tracemalloc

import numpy as np
import pytest
from medpy.metric import binary
from scipy.ndimage import gaussian_filter

from brainseg.metrics import (
    FEW,
    METRICS,
    count_missed,
    distances,
    dsc,
    iou,
    lesion_precision,
    lesion_recall,
    mean_interval,
    mean_text,
    precision,
    recall,
    score,
    summarise,
    volume_error,
)
from brainseg.reports.scores import distance_text, dsc_text


def cube(*slices: slice, shape=(6, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[slices] = True
    return mask


EMPTY = cube(slice(0, 0))
TRUTH = cube(slice(1, 3), slice(2, 6), slice(2, 6))  # 2 x 4 x 4 = 32 voxels
HALF = cube(slice(1, 3), slice(2, 6), slice(4, 10))  # 48 voxels, 16 of them in TRUTH
BEST = {name: 0 if name == "volume_error" else 1 for name in METRICS} | {"hd95_px": 0, "assd_px": 0}


def test_known_answer():
    scores = score(HALF, TRUTH)
    assert scores["dsc"] == pytest.approx(2 * 16 / (48 + 32))
    assert scores["iou"] == pytest.approx(16 / (48 + 32 - 16))
    assert scores["precision"] == pytest.approx(16 / 48)
    assert scores["recall"] == pytest.approx(16 / 32)
    assert scores["hd95_px"] == pytest.approx(binary.hd95(HALF, TRUTH))
    assert scores["assd_px"] == pytest.approx(binary.assd(HALF, TRUTH))
    assert scores["volume_error"] == pytest.approx(48 / 32 - 1)
    assert scores["lesion_recall"] == scores["lesion_precision"] == 1
    assert list(scores) == [*METRICS, "hd95_px", "assd_px"]


def test_perfect_and_disjoint():
    assert score(TRUTH, TRUTH) == BEST
    other = cube(slice(1, 3), slice(2, 6), slice(8, 12))
    assert [metric(other, TRUTH) for metric in (dsc, iou, precision, recall)] == [0, 0, 0, 0]


def test_both_empty_count_1():
    """Once, two empty masks gave a crash or NaN."""
    assert score(EMPTY, EMPTY) == BEST


@pytest.mark.parametrize("prediction, truth", [(EMPTY, TRUTH), (TRUTH, EMPTY)])
def test_one_empty_counts_0_and_is_as_far_as_the_diagonal(prediction, truth):
    """Cover a prediction without a voxel and a case without lesion."""
    scores = score(prediction, truth)
    assert count_missed([scores, score(HALF, TRUTH), score(EMPTY, EMPTY)]) == 1
    assert scores.pop("hd95_px") == scores.pop("assd_px") == math.hypot(6, 12, 12)
    assert distances(prediction, truth, (5, 1, 0.5))["hd95"] == math.hypot(30, 12, 6)
    flat = distances(prediction[:1] | True, truth[:1] & False, (5, 1, 0.5))
    assert flat["hd95"] == flat["assd"] == math.hypot(12, 6)
    error = scores.pop("volume_error")
    assert error == -1 if truth.any() else math.isnan(error)
    assert set(scores.values()) == {0}


def test_scores_are_symmetric_where_they_should_be():
    assert dsc(HALF, TRUTH) == dsc(TRUTH, HALF) and iou(HALF, TRUTH) == iou(TRUTH, HALF)
    assert precision(HALF, TRUTH) == recall(TRUTH, HALF)
    assert distances(HALF, TRUTH) == distances(TRUTH, HALF)
    assert lesion_precision(HALF, TRUTH) == lesion_recall(TRUTH, HALF)


def test_hd95_of_a_shift_by_three_voxels():
    point = cube(slice(2, 3), slice(4, 5), slice(4, 5))
    moved = cube(slice(2, 3), slice(4, 5), slice(7, 8))
    assert distances(point, moved) == {"hd95": 3, "assd": 3}
    assert distances(point, moved, spacing=(5, 1, 0.5)) == {"hd95": 1.5, "assd": 1.5}


@pytest.mark.parametrize("spacing", [None, (5.0, 0.9, 0.5)])
def test_one_slice_is_scored_in_two_dimensions(spacing):
    """In 3-D, every voxel would be surface, and those inside the other mask 0 mm from it."""
    a, b = cube(0, slice(1, 9), slice(1, 9))[:1], cube(0, slice(3, 12), slice(1, 9))[:1]
    plane = spacing and spacing[1:]
    found = distances(a, b, spacing)
    assert found["hd95"] == binary.hd95(a[0], b[0], voxelspacing=plane)
    assert found["assd"] == binary.assd(a[0], b[0], voxelspacing=plane)
    assert found["assd"] > binary.assd(a, b, voxelspacing=spacing)


def test_missed_lesions_are_counted_beside_the_mean():
    text = distance_text([score(HALF, TRUTH), score(EMPTY, TRUTH), score(TRUTH, EMPTY)], "hd95_px")
    assert "n = 3, 2 of them" in text and f"median {math.hypot(6, 12, 12):.1f}" in text


def test_lesions_are_counted_not_their_voxels():
    """There are four lesions, one found, and two predicted components, one right."""
    truth = cube(0, slice(0, 2)) | cube(5, 0, 0) | cube(3, slice(5, 7), slice(5, 7))
    truth[0, :, 6] = False  # a gap that splits the first block in two
    prediction = cube(0, 0, slice(0, 2)) | cube(5, slice(9, 12), slice(9, 12))
    assert lesion_recall(prediction, truth) == pytest.approx(1 / 4)
    assert lesion_precision(prediction, truth) == pytest.approx(1 / 2)


def test_voxels_that_touch_by_a_corner_are_one_lesion():
    corner = cube(2, 4, 4) | cube(3, 5, 5)
    assert lesion_recall(cube(2, 4, 4), corner) == 1


def test_volume_error_is_signed():
    assert volume_error(TRUTH, HALF) == pytest.approx(-1 / 3)
    assert volume_error(HALF, TRUTH) == pytest.approx(1 / 2)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [None, (3.0, 1.0, 0.7)])
def test_distances_on_the_cropped_masks_are_those_of_the_whole(seed, spacing):
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.standard_normal((2, 8, 40, 36)), (0, 1, 3, 3))
    a, b = noise > np.quantile(noise, 0.93 - 0.02 * seed, axis=(1, 2, 3), keepdims=True)
    if seed % 2:  # also with lesions that do not touch the border of the volume
        a[:, :6] = a[:, -9:] = b[:, :, :8] = False
    for name, found in distances(a, b, spacing).items():
        expected = getattr(binary, name)(a, b, voxelspacing=spacing)
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_overlaps_are_those_of_medpy(seed):
    a, b = np.random.default_rng(seed).random((2, 6, 12, 12)) < 0.2 + 0.1 * seed
    assert dsc(a, b) == pytest.approx(binary.dc(a, b))
    assert iou(a, b) == pytest.approx(binary.jc(a, b))
    assert precision(a, b) == pytest.approx(binary.precision(a, b))
    assert recall(a, b) == pytest.approx(binary.recall(a, b))
    assert volume_error(a, b) == pytest.approx(binary.ravd(a, b))


def test_masks_are_not_modified():
    a, b = HALF.copy(), TRUTH.copy()
    score(a, b)
    assert np.array_equal(a, HALF) and np.array_equal(b, TRUTH)


@pytest.mark.parametrize("shape", [(6, 12, 11), (5, 12, 12), (12, 12), (1, 12, 12)])
def test_other_shape_is_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        score(np.ones(shape, dtype=bool), TRUTH)


def test_every_metric_is_a_float():
    assert all(isinstance(value, float) for value in score(HALF, TRUTH).values())


def test_distances_are_in_mm_where_the_spacing_is_known():
    scores = score(HALF, TRUTH, (5.0, 1.0, 0.5))
    assert scores["hd95_mm"] == distances(HALF, TRUTH, (5.0, 1.0, 0.5))["hd95"]
    assert scores["hd95_px"] == distances(HALF, TRUTH)["hd95"]
    assert "hd95_mm" not in score(HALF, TRUTH)


def test_summary_by_hand():
    summary = summarise([0.2, 0.9, 0.7, 0.6])
    assert summary.pop("n") == 4
    expected = {"mean": 0.6, "median": 0.65, "min": 0.2, "max": 0.9}
    assert summary == pytest.approx(expected)


def test_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).normal(0.8, 0.1, 100)
    summary = summarise(values)
    expected = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert summary["high"] - summary["low"] == pytest.approx(expected, rel=0.1)


def test_interval_is_that_of_resampled_patients():
    """Draw patients by hand, each with all values; a batch does not change what is drawn."""
    rng = np.random.default_rng(3)
    values, patients = rng.random(70), rng.integers(0, 25, 70)
    names = np.unique(patients)
    draws = np.random.default_rng(0).choice(len(names), size=(10_000, len(names)))
    sums = np.array([values[patients == name].sum() for name in names])
    counts = np.array([(patients == name).sum() for name in names])
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), (2.5, 97.5))
    summary = summarise(values, patients)
    assert (summary["low"], summary["high"]) == pytest.approx((low, high), abs=1e-12)


def test_interval_of_equal_values(recwarn):
    summary = summarise([0.5] * FEW)
    assert summary["low"] == summary["high"] == 0.5 and not recwarn.list


def test_a_large_cohort_fits_into_memory():
    ones = np.ones(20_000)
    tracemalloc.start()
    mean_interval(ones, ones, resamples=200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**27


def test_few_patients_have_a_range_and_no_interval():
    values = [0.4] + [0.8] * (FEW - 2)
    assert "low" not in summarise(values) and "low" in summarise([*values, 0.8])
    assert "low" not in summarise([*values, *values], [f"p{k}" for k in range(FEW - 1)] * 2)
    assert mean_text(summarise([0.4, 0.8])) == "0.600 [0.400 to 0.800]"
    assert mean_text(summarise([0.4, -0.8]), "+") == "-0.200 [-0.800 to +0.400]"
    assert mean_text(summarise([0.4])) == "0.400" and mean_text(summarise([])) == "none"
    assert mean_text(summarise([0.5] * FEW)) == "0.500 (0.500 to 0.500)"


def test_nan_is_left_out():
    assert summarise([0.5, math.nan, 0.7]) == summarise([0.5, 0.7])


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_nothing_to_summarise_does_not_crash(values, recwarn):
    summary = summarise(values)
    assert summary.pop("n") == 0
    assert all(math.isnan(value) for value in summary.values())
    assert not recwarn.list


def test_printed_line_has_everything():
    def line(values: list[float]) -> str:
        return dsc_text([{"patient": f"p{k}", "dsc": value} for k, value in enumerate(values)])

    assert line([0.5, 0.6, 0.9] * 7).startswith("DSC mean 0.667 (95 % interval 0.")
    assert line([0.5, 0.6, 0.9] * 7).endswith("), median 0.600, n = 21")
    assert line([0.5, 0.7, 0.9]) == (
        "DSC mean 0.700 (lowest 0.500, highest 0.900), median 0.700, n = 3"
    )
    assert line([0.5]) == "DSC mean 0.500, median 0.500, n = 1"
