"""evaluate.py: the same cases for every model, scores as inference.py's, folds, the report."""

import csv
import json
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import TRAINED_ON, make_weights

import evaluate
import inference
from cases import find_case
from metrics import dsc, summarise
from report import SETTINGS, Table, case_table, compare, tables
from segmentation import Segmenter, keep_largest_component
from unet import UNet

NAMES = [f"phantom_{k:03d}" for k in range(12)]


def run(images: Path, out: Path, *more: object) -> dict:
    """Evaluate to the end; the summary that was written."""
    words = ["--images", images, "--out", out, "--device", "cpu", *more]
    evaluate.main([str(word) for word in words])
    return json.loads((out / "summary.json").read_text())


def refused(*arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def scores(out: Path) -> list[dict]:
    with open(out / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def blank_weights(path: Path, trained_on: list[str]) -> Path:
    """A network that finds nothing anywhere, and its card."""
    model = UNet(init_features=4)
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.bias.fill_(-9)
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(
        json.dumps({"image_size": 32, "cases": {"train": trained_on}})
    )
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "narrow.pt")


@pytest.fixture(scope="module")
def done(phantoms, weights, tmp_path_factory) -> Path:
    """Two models and the report; phantom_001 and _002 were trained on."""
    out = tmp_path_factory.mktemp("evaluation")
    blank = blank_weights(weights.with_name("blank.pt"), [])
    models = f"narrow={weights}", f"blank={blank}"
    run(phantoms, out, "--subset", "all", "--report", out / "r.html", "--weights", *models)
    return out


# Scores


def test_scores_are_those_of_inference(phantoms, weights, done, tmp_path):
    words = ["--images", phantoms, "--weights", weights, "--predictions", tmp_path / "p"]
    with pytest.raises(SystemExit) as stop:
        inference.main([*map(str, words), "--figure", str(tmp_path / "dsc.png"), "--device", "cpu"])
    assert stop.value.code == 0
    with open(tmp_path / "p" / "metrics.csv", newline="") as file:
        theirs = {row["case"]: row for row in csv.DictReader(file)}
    ours = [row for row in scores(done) if row["model"] == "narrow"]
    assert [row["case"] for row in ours] == [name for name in NAMES if name not in TRAINED_ON]
    for row in ours:
        for name in theirs[row["case"]].keys() - {"trained_on"}:
            assert row[name] == theirs[row["case"]][name], name
    assert any(float(row["dsc"]) > 0.1 for row in ours), "so that it means something"


def test_cases_that_one_model_has_seen_count_for_none(done):
    summary = json.loads((done / "summary.json").read_text())
    assert summary["left out"] == TRAINED_ON
    assert [about["scores"]["dsc"]["n"] for about in summary["models"].values()] == [10, 10]


def test_settings_by_hand(phantoms, weights, done):
    segmenter = Segmenter.from_weights(weights, device="cpu")
    row = next(row for row in scores(done) if row["case"] == "phantom_004")
    volume, truth = find_case(phantoms / "phantom_004").read_pair()
    probabilities = segmenter.probability_map(volume).numpy()
    for name, (threshold, largest) in SETTINGS.items():
        mask = probabilities >= threshold
        mask = keep_largest_component(mask) if largest else mask
        assert float(row[name]) == pytest.approx(dsc(mask, truth), rel=1e-5), name
    assert row["dsc"] == row["dsc_0.5_largest"]
    assert len({row[name] for name in SETTINGS}) > 3, "the settings differ"


def test_the_same_arguments_give_the_same_files(phantoms, done, weights, tmp_path):
    models = f"narrow={weights}", f"blank={weights.with_name('blank.pt')}"
    run(phantoms, tmp_path, "--subset", "all", "--weights", *models)
    for name in ("scores.csv", "scores.png", "gallery.png"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes(), name


def test_fingerprint_is_of_the_voxels(phantoms, weights, tmp_path):
    case = tmp_path / "images" / "phantom_004"
    shutil.copytree(phantoms / "phantom_004", case)
    options = "--subset", "all", "--weights", weights
    key = "SHA-256 of the voxels and masks"
    first = run(case, tmp_path / "a", *options)
    case.rename(case.with_name("another name"))
    second = run(case.with_name("another name"), tmp_path / "b", *options)
    path = case.with_name("another name") / "phantom_004_3_mask.tif"
    iio.imwrite(path, 255 - iio.imread(path))
    third = run(case.with_name("another name"), tmp_path / "c", *options)
    assert first[key] == second[key] != third[key]


# Folds and tables


def test_a_folder_of_folds_scores_each_case_by_the_network_that_has_not_seen_it(phantoms, tmp_path):
    """One fold finds something, the other nothing: it shows which of them was asked."""
    for fold in "01":
        (tmp_path / "cv" / fold).mkdir(parents=True)
    make_weights(tmp_path / "cv" / "0" / "unet.pt", trained_on=NAMES[6:])
    blank_weights(tmp_path / "cv" / "1" / "unet.pt", NAMES[:6])
    summary = run(phantoms, tmp_path, "--subset", "all", "--weights", f"cv={tmp_path / 'cv'}")
    found = {row["case"]: int(row["predicted_voxels"]) > 0 for row in scores(tmp_path)}
    assert summary["left out"] == [] and len(summary["weights"]["cv"]) == 2
    assert any(found[name] for name in NAMES[:6]) and not any(found[name] for name in NAMES[6:])


def test_a_fold_without_a_card_is_refused(phantoms, tmp_path, weights):
    for fold in "01":
        (tmp_path / "cv" / fold).mkdir(parents=True)
        shutil.copy(weights, tmp_path / "cv" / fold / "unet.pt")
    message = refused(phantoms, tmp_path, "--weights", tmp_path / "cv")
    assert str(tmp_path / "cv" / "0" / "unet.pt") in message and "card" in message


@pytest.fixture
def table(phantoms, weights, tmp_path) -> Path:
    """metrics.csv of four cases, one of them trained on."""
    words = ["--images", phantoms, "--weights", weights, "--predictions", tmp_path / "p"]
    words += ["--figure", tmp_path / "dsc.png", "--device", "cpu", "--cases", *NAMES[2:6]]
    with pytest.raises(SystemExit):
        inference.main([str(word) for word in words])
    return tmp_path / "p" / "metrics.csv"


def test_a_table_of_scores_is_a_model(phantoms, weights, table, tmp_path):
    options = "--cases", *NAMES[2:6], "--subset", "all", "--weights"
    summary = run(phantoms, tmp_path / "out", *options, f"table={table}", f"net={weights}")
    assert summary["left out"] == ["phantom_002"]
    assert summary["models"]["net"]["difference"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "settings" not in summary["models"]["table"] and "settings" in summary["models"]["net"]


def test_a_table_of_other_cases_is_refused_by_name(phantoms, weights, table, tmp_path):
    message = refused(phantoms, tmp_path, "--subset", "all", "--weights", weights, table)
    assert str(table) in message and "no score of phantom_000" in message


def test_a_file_that_is_no_table_is_refused(phantoms, tmp_path):
    for content in (b"", b"case,dsc\na,1\n", b"\xff\xfe\0" * 9):
        (tmp_path / "metrics.csv").write_bytes(content)
        message = refused(phantoms, tmp_path / "out", "--weights", tmp_path / "metrics.csv")
        assert "metrics.csv: is not a metrics.csv that inference.py wrote" in message


# Statistics


def made_up(values: dict[str, list[float]], **columns: list) -> dict[str, list[dict]]:
    """Rows a model with these DSCs; of other columns, a value a case."""
    blank = dict.fromkeys(("iou", "precision", "recall", "hd95_px", "assd_px"), 0.0)
    blank |= dict.fromkeys(("volume_error", "lesion_recall", "lesion_precision"), 0.0)
    return {
        model: [
            blank
            | {"model": model, "case": f"case_{k}", "site": "", "missing": "none", "slices": 9}
            | {"subset": "test", "lesion_voxels": 10 * k, "dsc": value}
            | {name: column[k] for name, column in columns.items()}
            for k, value in enumerate(dscs)
        ]
        for model, dscs in values.items()
    }


def test_differences_are_case_by_case():
    a, b = [0.1, 0.5, 0.9, 0.7], [0.2, 0.6, 0.8, 0.7]
    summary = compare(made_up({"a": a, "b": b}))
    assert "difference" not in summary["a"]
    expected = summarise(np.subtract(b, a)) | {"better": 2, "worse": 1}
    assert summary["b"]["difference"] == expected
    assert summary["b"]["difference"]["mean"] == pytest.approx(0.025)
    assert summary["b"]["scores"]["dsc"] == summarise(b)


def test_groups_divide_the_cases():
    rows = made_up(
        {"a": [0.1, 0.2, 0.6, 0.8], "b": [0.2, 0.2, 0.6, 0.7]},
        site=["CS", "DU", "CS", "DU"],
        missing=["none", "post-contrast", "none", "none"],
    )
    groups = compare(rows)["b"]["groups"]
    assert groups["hospital"]["CS"]["dsc"] == summarise([0.2, 0.6])
    assert groups["hospital"]["DU"]["difference"] == summarise([0.0, 0.7 - 0.8])
    assert groups["missing"]["post-contrast"]["dsc"]["n"] == 1
    assert sum(value["dsc"]["n"] for value in groups["lesion voxels"].values()) == 4


def test_the_setting_is_chosen_on_validation_cases_and_scored_on_the_others():
    settings = {name: [0.5] * 4 for name in SETTINGS}
    settings["dsc_0.3_all"] = [0.9, 0.8, 0.1, 0.3]  # best on the first two, worst on the others
    settings["dsc_0.7_all"] = [0.6, 0.6, 0.9, 0.9]
    subset = ["validation", "validation", "test", "test"]
    summary = compare(made_up({"a": [0.5] * 4}, subset=subset, **settings))
    chosen = summary["a"]["chosen"]
    assert chosen["setting"] == "dsc_0.3_all"
    assert chosen["validation"]["mean"] == pytest.approx(0.85)
    assert chosen["others"]["mean"] == pytest.approx(0.2)
    assert chosen["others_difference"]["mean"] == pytest.approx(-0.3)
    (note,) = (table.note for table in tables(summary) if "threshold" in table.title)
    assert "0.3, every component, 0.850 there; on the 2 other cases 0.200" in note


def test_a_choice_on_the_very_cases_says_so(done):
    summary = compare(made_up({"a": [0.5, 0.6]}, subset=["validation"] * 2,
                              **{name: [0.5, 0.5] for name in SETTINGS}))  # fmt: skip
    assert "too good" in tables(summary)[-1].note
    assert compare(made_up({"a": [0.5]}, **{n: [0.5] for n in SETTINGS}))["a"]["chosen"] is None


def test_text_table_is_aligned():
    table = Table("Title", ["name", "value"], [["a", "1"], ["longer", "1000"]], "A note.")
    assert table.as_text() == "Title\nname    value\na           1\nlonger   1000\nA note."


def test_cases_are_listed_worst_first():
    rows = case_table(made_up({"a": [0.7, 0.2], "b": [0.1, 0.3]})).rows
    assert [row[0] for row in rows] == ["case_1", "case_0"]
    assert rows[0][-2:] == ["0.200", "0.300"]


# What is written


def test_report_is_one_page_that_needs_no_network(done):
    page = (done / "r.html").read_text()
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]?([^'\" >]{0,30})", page)
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "http" not in page and "@import" not in page and "url(" not in page
    for text in (
        "narrow",
        "blank",
        "phantom_004",
        "SHA-256",
        "not a medical device",
        "lesions found",
    ):
        assert text in page, text


def test_report_escapes_names(phantoms, weights, tmp_path):
    report = tmp_path / "report.html"
    options = "--cases", NAMES[4], "--subset", "all", "--report", report
    run(phantoms, tmp_path, *options, "--weights", f"<script>&={weights}")
    assert "<script>" not in report.read_text() and "&lt;script&gt;&amp;" in report.read_text()


def test_pictures(done):
    assert iio.imread(done / "scores.png").ndim == 3
    gallery = iio.imread(done / "gallery.png")
    assert gallery.shape[1] > 900 and len(np.unique(gallery)) > 50


def test_nothing_predicted_is_null_in_json(done):
    """Trap 2: no distance is defined then, and JSON knows no NaN."""
    text = (done / "summary.json").read_text()
    blank = json.loads(text)["models"]["blank"]["scores"]
    assert "NaN" not in text and blank["hd95_px"] == {
        "mean": None, "median": None, "low": None, "high": None, "n": 0
    }  # fmt: skip
    assert blank["dsc"]["mean"] == 0


# Refusals


def test_two_models_of_one_name_are_refused(phantoms, weights, tmp_path):
    message = refused(phantoms, tmp_path, "--weights", f"a={weights}", f"a={weights}")
    assert "two models are called a" in message


def test_models_that_have_seen_every_case_are_refused(phantoms, weights, tmp_path):
    options = "--cases", *TRAINED_ON, "--subset", "all", "--weights", weights
    assert "trained on all 2 cases" in refused(phantoms, tmp_path, *options)


def test_missing_weights_and_empty_folder_are_refused(phantoms, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.pt", tmp_path / "empty"):
        assert str(path) in refused(phantoms, tmp_path / "out", "--weights", path)
    assert not (tmp_path / "out").exists()


def test_a_case_without_masks_is_refused_by_name(phantoms, weights, tmp_path):
    shutil.copytree(phantoms / NAMES[4], tmp_path / NAMES[4])
    for path in (tmp_path / NAMES[4]).glob("*_mask.tif"):
        path.unlink()
    message = refused(tmp_path / NAMES[4], tmp_path / "o", "--subset", "all", "--weights", weights)
    assert str(tmp_path / NAMES[4]) in message and "mask" in message


def test_images_of_other_channels_are_refused_by_name(phantoms, tmp_path):
    single = make_weights(tmp_path / "single.pt", in_channels=1)
    options = "--cases", NAMES[4], "--subset", "all", "--weights", single
    message = refused(phantoms, tmp_path / "out", *options)
    assert str(phantoms / NAMES[4]) in message and "3 channel(s)" in message
