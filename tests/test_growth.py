"""Growth of a lesion over the dated scans of a patient: sizes, errors, rates, dates."""

import datetime
import json
import math

import numpy as np
import pytest
from conftest import ROOT, read_rows

from brainseg.growth import (
    Estimate,
    Visit,
    bidimensional,
    combine,
    difference,
    estimated_volume,
    feret_diameters,
    growth_rate,
    growth_rows,
    mean_diameter,
    percent_change,
)
from brainseg.quality import coverage
from brainseg.volume_errors import (
    conformal_limits,
    fit_volume_errors,
    limits_of_agreement,
    scale,
)

TABLE = ROOT / "docs" / "volume_errors.csv"
CARDS = sorted((ROOT / "weights" / "unet-folds").glob("*.json"))


def read_errors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read expected DSC, predicted and true volumes of the 88, each out of fold."""
    rows = read_rows(TABLE)
    columns = ("expected_dsc", "predicted_voxels", "lesion_voxels")
    return tuple(np.array([float(row[name]) for row in rows]) for name in columns)


# Volume errors


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_cards_hold_the_fit_to_the_table(card):
    fitted = json.loads(card.read_text())["expected_dsc"]["volume_errors"]
    again = fit_volume_errors(*read_errors())
    assert fitted["cases"] == again["cases"] == 88
    assert fitted["interval"] == pytest.approx(again["interval"])
    assert fitted["by_size"] == again["by_size"]


def test_expected_dsc_covers_patients_left_out():
    """The DSC of the 88, each predicted by a fit to the others: within 0.75 and 0.85."""
    rows = read_rows(TABLE)
    names = ("dsc", "expected_dsc", "unlikeness")
    dsc, expected, unlike = (np.array([float(row[name]) for row in rows]) for name in names)
    residuals = (dsc - expected) / ((1.05 - expected) * unlike)
    share = coverage(residuals, np.array([row["patient"] for row in rows]))
    assert 0.75 <= share <= 0.85
    for card in CARDS:
        fit = json.loads(card.read_text())["expected_dsc"]
        assert fit["leave_one_out"]["coverage"] == pytest.approx(share)
        assert fit["interval"] == pytest.approx(conformal_limits(residuals), abs=2e-3)


def test_interval_covers_patients_left_out():
    expected, predicted, true = read_errors()
    covered = 0
    for k in range(len(true)):
        others = np.arange(len(true)) != k
        errors = fit_volume_errors(expected[others], predicted[others], true[others])
        _, low, high = estimated_volume(predicted[k], expected[k], errors)
        covered += low <= true[k] <= high
    assert 0.75 <= covered / len(true) <= 0.85


def test_interval_is_wider_for_poorer_masks():
    errors = fit_volume_errors(*read_errors())
    widths = []
    for expected in (0.95, 0.85, 0.75):
        _, low, high = estimated_volume(10.0, expected, errors)
        assert low < 10 < high
        widths.append(high - low)
    assert widths[0] < widths[1] < widths[2]


def test_interval_is_unknown_without_a_fit_or_a_lesion():
    errors = fit_volume_errors(*read_errors())
    assert np.isnan(estimated_volume(10.0, 0.9, None)[1:]).all()
    assert np.isnan(estimated_volume(0.0, None, errors)[1:]).all()


def test_conformal_limits_have_finite_sample_ranks():
    assert conformal_limits(np.arange(1.0, 20.0)) == (2, 18)  # of 19: 17 of 20 gaps between
    assert conformal_limits(np.arange(1.0, 4.0)) == (1, 3)


def test_limits_of_agreement_by_size():
    true = np.array([100.0, 200, 300, 1000, 2000, 3000])
    rows = limits_of_agreement(true * 0.9, true)
    assert [row["cases"] for row in rows] == [2, 2, 2]
    assert rows[0]["from_voxels"] == 100 and rows[2]["to_voxels"] == 3000
    expected = 200 * -0.1 / 1.9
    assert rows[0]["bias_percent"] == pytest.approx(expected, abs=0.05)
    assert rows[0]["low_percent"] == rows[0]["high_percent"] == rows[0]["bias_percent"]


def test_lesion_that_is_not_there_has_an_error():
    errors = fit_volume_errors([0.8] * 30, [100] * 30, [0] * 30)
    assert np.isfinite(errors["interval"]).all()
    assert errors["interval"][0] == pytest.approx(math.log(1 / 100) / scale(0.8))


# Diameters


def test_diameters_of_a_rectangle_are_those_of_its_corners():
    piece = np.ones((3, 4), bool)
    longest, across = feret_diameters(piece, (1.0, 1.0))
    assert longest == pytest.approx(5)
    assert across == pytest.approx(2 * 3 * 4 / 5)
    longest, across = feret_diameters(piece, (2.0, 1.5))
    assert (longest, across) == pytest.approx((math.hypot(6, 6), 6 * math.sqrt(2)))


def test_diameters_of_one_pixel():
    assert feret_diameters(np.ones((1, 1), bool), (0.5, 0.5)) == pytest.approx(
        (math.sqrt(0.5), math.sqrt(0.5))
    )


@pytest.mark.parametrize("degrees", (0, 17, 30, 45, 78))
def test_diameters_of_a_tilted_ellipse(degrees):
    """The sides of a box would be 38.6 x 22.9 mm at 30 degrees."""
    spacing = 0.25
    y, x = (np.mgrid[:240, :240] - 119.5) * spacing
    turn = math.radians(degrees)
    along, over = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    mask = ((along / 20) ** 2 + (over / 8) ** 2 <= 1)[None]
    found = bidimensional(mask, (5.0, spacing, spacing))
    assert found.longest == pytest.approx(40, abs=0.4)
    assert found.across == pytest.approx(16, abs=0.6)


def test_diameters_are_of_one_piece_in_one_slice():
    mask = np.zeros((3, 40, 40), bool)
    mask[0, 0, 0] = mask[0, 39, 39] = True  # far apart, and not one piece
    mask[1, 5:9, 5:9] = True
    mask[2, 5:8, 5:20] = True
    found = bidimensional(mask, (5.0, 1.0, 1.0))
    assert found.longest == pytest.approx(math.hypot(3, 15))
    assert bidimensional(np.zeros((3, 4, 4), bool), (5.0, 1.0, 1.0)) is None


# Changes and rates


def test_mean_diameter_is_that_of_the_literature():
    assert mean_diameter(4.0) == pytest.approx(20)  # 8 ml are twice 4: a cube of 20 mm
    sphere = (6 * 4000 / math.pi) ** (1 / 3)
    assert mean_diameter(4.0) / sphere == pytest.approx(1.0155, abs=1e-3)


def test_difference_takes_the_sides_that_count():
    change = difference(Estimate(10, 9, 12), Estimate(8, 5, 9))
    assert (change.value, change.low, change.high) == pytest.approx(
        (2, 2 - math.hypot(1, 1), 2 + math.hypot(2, 3))
    )
    turned = combine((-1, 1), (Estimate(10, 9, 12), Estimate(8, 5, 9)))
    assert (turned.low, turned.high) == pytest.approx((-change.high, -change.low))


def test_percent_change():
    change = percent_change(Estimate(15, 14, 16), Estimate(10, 9, 11))
    assert change.value == pytest.approx(50)
    assert 0 < change.low < 50 < change.high
    assert math.isnan(percent_change(Estimate(15), Estimate(0)).value)


def test_rate_of_two_scans_is_their_difference():
    rate = growth_rate([0, 365.25], [Estimate(30, 29, 31), Estimate(34, 33, 35)])
    assert (rate.value, rate.low, rate.high) == pytest.approx((4, 4 - 2**0.5, 4 + 2**0.5))


def test_rate_is_weighted_by_the_errors():
    days = [0, 365.25, 730.5]
    poor = Estimate(60, 30, 90)
    rate = growth_rate(days, [Estimate(30, 29, 31), Estimate(34, 33, 35), poor])
    assert rate.value == pytest.approx(4, abs=0.5)
    line = [Estimate(30, 29, 31), Estimate(34, 33, 35), Estimate(38, 37, 39)]
    assert growth_rate(days, line).value == pytest.approx(4)


def test_scatter_about_the_line_widens_the_interval():
    days = [0, 365.25, 730.5, 1095.75]
    line = [Estimate(v, v - 1, v + 1) for v in (30, 34, 38, 42)]
    scattered = [Estimate(v, v - 1, v + 1) for v in (30, 40, 32, 42)]
    narrow, wide = growth_rate(days, line), growth_rate(days, scattered)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_no_rate_under_90_days_and_no_interval_without_errors():
    assert math.isnan(growth_rate([0, 89], [Estimate(30, 29, 31)] * 2).value)
    rate = growth_rate([0, 365.25], [Estimate(30), Estimate(34)])
    assert rate.value == pytest.approx(4) and math.isnan(rate.low)


def test_no_growth_is_said_to_be_growth_in_1_of_10():
    """Diameters that do not change are said to grow in about 1 of 10."""
    rng = np.random.default_rng(0)
    grown = 0
    for _ in range(600):
        values = 40 + rng.normal(0, 1, 4)
        scans = [Estimate(v, v - 1.2816, v + 1.2816) for v in values]
        grown += growth_rate([0, 200, 400, 600], scans).low > 0
    assert grown / 600 <= 0.1


# The table


def visit(day: str | None, ml: float, **changed) -> Visit:
    values = {
        "case": f"p_{day}",
        "patient": "p",
        "date": datetime.date.fromisoformat(day) if day else None,
        "volume": Estimate(ml, ml * 0.9, ml * 1.1),
        "diameters": None,
        "spacing": (5.0, 1.0, 1.0),
        "sequences": "FLAIR",
        "replaced": "",
        "concern": "",
    }
    return Visit(**values | changed)


def test_rows_of_three_scans():
    rows = growth_rows(
        [visit("2014-01-01", 10), visit("2014-07-01", 10.5), visit("2015-01-01", 16)]
    )
    assert [row["days"] for row in rows] == [0, 181, 365]
    assert rows[0]["ml_since_previous"] is None and rows[0]["mm_per_year"] is None
    assert rows[1]["since_previous"] == rows[1]["since_first"] == "within the error"
    assert rows[2]["since_previous"] == rows[2]["since_first"] == "beyond the error"
    assert rows[2]["ml_since_previous"] == pytest.approx(5.5)
    assert rows[2]["percent_since_first"] == pytest.approx(60)
    assert rows[2]["mm_per_year_low"] < rows[2]["mm_per_year"] < rows[2]["mm_per_year_high"]
    assert [row["comparable"] for row in rows] == ["", "yes", "yes"]


def test_order_without_dates_gives_no_rate():
    rows = growth_rows([visit(None, 10), visit(None, 20)])
    assert rows[1]["days"] is None and rows[1]["mm_per_year"] is None
    assert rows[1]["percent_since_first"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("changed", "said"),
    (
        ({"spacing": (3.0, 1.0, 1.0)}, "slices of 3 mm, and of 5 mm"),
        ({"spacing": (5.0, 0.5, 0.5)}, "pixels of 0.5 mm, and of 1 mm"),
        ({"spacing": None}, "no pixel size"),
        ({"sequences": "pre-contrast, FLAIR"}, "sequences pre-contrast, FLAIR, and FLAIR"),
        ({"replaced": "post-contrast"}, "FLAIR stands in for post-contrast"),
        ({"concern": "the mask is empty"}, "p_2015-01-01: the mask is empty"),
        ({"apart": ("no common frame",)}, "no common frame"),
    ),
)
def test_scans_that_are_not_comparable(changed, said):
    rows = growth_rows([visit("2014-01-01", 10), visit("2015-01-01", 16, **changed)])
    assert rows[1]["comparable"] == "no" and said in rows[1]["why_not"]
    assert rows[1]["since_previous"] == rows[1]["since_first"] == "hard to compare"


def test_scans_that_are_alike_within_half_are_comparable():
    rows = growth_rows([visit("2014-01-01", 9), visit("2015-01-01", 9, spacing=(7.4, 1.4, 1.4))])
    assert rows[1]["comparable"] == "yes" and rows[1]["why_not"] == ""


def test_empty_mask_has_no_part_in_the_rate():
    empty = visit("2014-06-01", 10, volume=Estimate(0.0))
    rows = growth_rows([visit("2014-01-01", 10), empty, visit("2015-01-01", 16)])
    assert rows[1]["diameter_mm"] == 0 and rows[1]["lesion_ml_low"] is None
    assert rows[1]["percent_since_first"] is None and rows[1]["mm_per_year"] is None
    assert rows[1]["since_first"] == ""
    assert rows[2]["mm_per_year"] == pytest.approx(mean_diameter(16) - mean_diameter(10), rel=0.01)
