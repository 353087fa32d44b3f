"""Test evaluate.py: the same cases for all models, inference.py's scores, folds, the report."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
import torch
from conftest import TRAINED_ON, make_weights, read_rows

import evaluate
import inference
from brainseg.evaluation.report import case_table, pick, tables
from brainseg.evaluation.scoring import open_models
from brainseg.evaluation.statistics import SETTINGS, compare
from brainseg.io.files import locked
from brainseg.io.layouts import find_case
from brainseg.metrics import dsc, summarise
from brainseg.phantom import make_volume
from brainseg.reports.page import Table
from brainseg.segmenter import Segmenter, keep_components
from brainseg.unet import UNet

NAMES = [f"phantom_{k:03d}" for k in range(12)]


def run(images: Path, out: Path, *more: object) -> dict:
    """Run an evaluation to the end; return the summary it wrote."""
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
    return read_rows(out / "scores.csv")


@pytest.mark.parametrize("name", ["scores.csv", "summary.json", "scores.png"])
def test_files_of_others_are_not_replaced(phantoms, weights, tmp_path, name):
    (tmp_path / name).write_text("of another tool")
    said = refused(
        phantoms, tmp_path, "--weights", weights, "--subset", "all", "--cases", "phantom_003"
    )
    assert f"{tmp_path / name}: is in the way" in said
    assert (tmp_path / name).read_text() == "of another tool"


def test_an_evaluation_keeps_others_out_of_its_folder(phantoms, weights, tmp_path):
    with locked(tmp_path, "--out"):
        said = refused(
            phantoms, tmp_path, "--weights", weights, "--subset", "all", "--cases", "phantom_003"
        )
    assert said.endswith(
        "another run is writing there; wait for it, or name another folder with --out"
    )


def blank_weights(path: Path, trained_on: list[str]) -> Path:
    """Write a network that finds nothing anywhere, and its card."""
    model = UNet(init_features=4)
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.bias.fill_(-9)
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(
        json.dumps({"image_size": 32, "preprocessing": 2, "cases": {"train": trained_on}})
    )
    return path


@pytest.fixture(scope="module")
def done(phantoms, weights, tmp_path_factory) -> Path:
    """Evaluate two models, with the report; phantom_001 and _002 were trained on."""
    out = tmp_path_factory.mktemp("evaluation")
    blank = blank_weights(out / "blank.pt", [])
    models, handler = (f"narrow={weights}", f"blank={blank}"), signal.getsignal(signal.SIGTERM)
    run(phantoms, out, "--subset", "all", "--report", out / "r.html", "--weights", *models)
    assert signal.getsignal(signal.SIGTERM) == handler, "nothing is left behind in a notebook"
    return out


# Scores


def test_scores_are_those_of_inference(phantoms, weights, done, tmp_path):
    words = ["--images", phantoms, "--weights", weights, "--predictions", tmp_path / "p"]
    words += ["--figure", tmp_path / "dsc.png", "--device", "cpu", "--no-pictures"]
    inference.main([*map(str, words)])
    theirs = {row["case"]: row for row in read_rows(tmp_path / "p" / "metrics.csv")}
    ours = [row for row in scores(done) if row["model"] == "narrow"]
    assert [row["case"] for row in ours] == [name for name in NAMES if name not in TRAINED_ON]
    for row in ours:
        for name in theirs[row["case"]].keys() - {"trained_on"}:
            assert row[name] == theirs[row["case"]][name], name
    assert any(float(row["dsc"]) > 0.1 for row in ours), "so that it means something"


def test_cases_seen_by_one_model_are_left_out_for_all(done):
    summary = json.loads((done / "summary.json").read_text())
    assert summary["left out"] == TRAINED_ON and summary["settings that differ"] == {}
    assert [about["scores"]["dsc"]["n"] for about in summary["models"].values()] == [10, 10]


def test_settings_by_hand(phantoms, weights, done):
    segmenter = Segmenter.from_weights(weights, device="cpu")
    row = next(row for row in scores(done) if row["case"] == "phantom_004")
    volume, truth = find_case(phantoms / "phantom_004").read_pair()
    images, frame = segmenter.preprocess(volume)
    probabilities = segmenter.segmentation_of(segmenter.probabilities(images), frame).probabilities
    for name, (threshold, largest) in SETTINGS.items():
        mask = probabilities >= threshold
        mask = keep_components(mask) if largest else mask
        assert float(row[name]) == pytest.approx(dsc(mask, truth), rel=1e-5), name
    assert row["dsc"] == row["dsc_0.5_largest"]
    assert len({row[name] for name in SETTINGS}) > 3, "the settings differ"


def test_the_same_arguments_give_the_same_files(phantoms, done, weights, tmp_path):
    models = f"narrow={weights}", f"blank={done / 'blank.pt'}"
    run(phantoms, tmp_path, "--subset", "all", "--weights", *models)
    for name in ("scores.csv", "scores.png", "gallery.png"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes(), name


@pytest.mark.usefixtures("no_pictures")
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


# Settings


@pytest.fixture
def twins(weights, tmp_path) -> tuple[str, str]:
    """Give one network twice: with a fit to other settings, and with the defaults."""
    card = json.loads(weights.with_suffix(".json").read_text())
    fit = {"features": ["overlap"], "mean": [0.0], "deviation": [1.0], "weights": [0.5]}
    fit |= {"intercept": 0.4, "interval": [-0.1, 0.1], "threshold": 0.45, "min_volume": 200}
    fitted = card | {"expected_dsc": fit | {"tta": True, "largest_component": True}}
    for name, content in (("fitted", fitted), ("plain", card)):
        shutil.copy(weights, tmp_path / f"{name}.pt")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return f"fitted={tmp_path / 'fitted.pt'}", f"plain={tmp_path / 'plain.pt'}"


def test_models_are_compared_at_the_settings_of_the_first(phantoms, twins, tmp_path, capsys):
    options = "--subset", "all", "--cases", *NAMES[3:6], "--report", tmp_path / "r.html"
    summary = run(phantoms, tmp_path / "out", *options, "--weights", *twins)
    said = capsys.readouterr().out
    assert said.startswith("Settings that differ between the models")
    assert "(that of fitted)" in said and "plain: image size 32 (" in said
    assert re.search(r"minimum volume, voxels +200 +0 +200\n", said)
    assert re.search(r"mirroring +yes +no +yes\n", said)
    assert "Settings that differ" in (tmp_path / "r.html").read_text()
    difference = summary["models"]["plain"]["difference"]
    assert (difference["mean"], difference["better"], difference["worse"]) == (0, 0, 0)
    assert summary["settings that differ"]["min_volume"] == {"fitted": 200, "plain": 0}
    assert summary["compared at"] == "settings of the first"
    (used,) = summary["weights"]["plain"].values()
    assert (used["threshold"], used["min_volume"], used["tta"]) == (0.45, 200, True)
    rows = scores(tmp_path / "out")
    for fitted, plain in zip(rows[:3], rows[3:], strict=True):
        assert fitted["dsc"] == plain["dsc"] and fitted["brainseg_run"] == plain["brainseg_run"]


@pytest.mark.usefixtures("no_pictures")
def test_the_fit_of_another_setting_is_dropped(phantoms, twins, tmp_path):
    options = "--subset", "all", "--cases", *NAMES[3:6], "--weights", *reversed(twins)
    run(phantoms, tmp_path / "out", *options)
    rows = scores(tmp_path / "out")
    assert rows[0]["dsc"] == rows[3]["dsc"] and not any(row["expected_dsc"] for row in rows)


@pytest.mark.usefixtures("no_pictures")
def test_own_settings_are_used_if_asked_for(phantoms, twins, tmp_path, capsys):
    options = "--subset", "all", "--cases", *NAMES[3:6], "--own-settings", "--weights", *twins
    summary = run(phantoms, tmp_path / "out", *options)
    assert "leave out --own-settings" in capsys.readouterr().out
    assert summary["compared at"] == "own settings"
    (used,) = summary["weights"]["plain"].values()
    assert (used["threshold"], used["min_volume"], used["tta"]) == (0.5, 0, False)
    rows = scores(tmp_path / "out")
    assert rows[0]["brainseg_run"] != rows[3]["brainseg_run"]


# Folds and tables


@pytest.mark.usefixtures("no_pictures")
def test_a_patients_file_counts_against_cards(phantoms, tmp_path, weights):
    """The weights have seen phantom_001, and so the patient that only the file names."""
    patients = dict(zip(NAMES, NAMES, strict=True)) | {"phantom_001": "anna", "phantom_003": "anna"}
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\n" + "".join(f"{k},{v}\n" for k, v in patients.items()))
    options = "--subset", "all", "--weights", weights, "--patients", table
    assert run(phantoms, tmp_path / "out", *options)["left out"] == [*TRAINED_ON, "phantom_003"]


@pytest.mark.usefixtures("no_pictures")
def test_each_case_is_scored_by_the_fold_that_left_it_out(phantoms, tmp_path):
    """One fold finds something, the other nothing, so the result shows which one was used."""
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


@pytest.mark.usefixtures("no_pictures")
def test_patients_unseen_by_all_folds_get_the_ensemble(phantoms, tmp_path):
    """The scores are those of inference.py with the folder."""
    (tmp_path / "cv").mkdir()
    make_weights(tmp_path / "cv" / "a.pt", trained_on=NAMES[8:])
    blank_weights(tmp_path / "cv" / "b.pt", NAMES[6:8])
    options = "--cases", *NAMES[4:8], "--weights", tmp_path / "cv", "--threshold", "0.3"
    run(phantoms, tmp_path, "--subset", "all", *options)
    by = [row["weights"] for row in scores(tmp_path)]
    assert by[:2] == [f"2 in {tmp_path / 'cv'}"] * 2 and by[2] == str(tmp_path / "cv" / "a.pt")
    words = "--images", phantoms, "--predictions", tmp_path / "p", "--figure", tmp_path / "f.png"
    inference.main([str(word) for word in (*words, *options, "--device", "cpu")])
    theirs = read_rows(tmp_path / "p" / "metrics.csv")
    for here, there in zip(scores(tmp_path)[:2], theirs, strict=False):
        assert here["dsc"] == there["dsc"] and float(here["disagreement"]) > 0
    assert [row["trained_on"] for row in theirs] == ["0", "0", "1", "1"]


@pytest.mark.usefixtures("no_pictures")
def test_a_single_file_without_a_card_is_used_and_reported(phantoms, weights, tmp_path, capsys):
    bare = shutil.copy(weights, tmp_path / "bare.pt")
    options = "--cases", *TRAINED_ON, "--subset", "all", "--image-size", 32, "--weights", bare
    assert run(phantoms, tmp_path / "out", *options)["left out"] == []
    assert f"{bare}: no card says what it was trained on" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_hidden_files_are_not_folds(phantoms, tmp_path):
    (tmp_path / "cv" / "0").mkdir(parents=True)
    blank_weights(tmp_path / "cv" / "0" / "unet.pt", NAMES[6:])
    (tmp_path / "cv" / "0" / ".unet-x.pt").write_bytes(b"half a file")
    options = "--cases", NAMES[0], "--subset", "all", "--weights", tmp_path / "cv"
    assert run(phantoms, tmp_path / "out", *options)["models"]


@pytest.mark.parametrize(
    "text, name",
    [("dice=./a/unet.pt", "dice"), ("x=cv/", "x"), ("./a/unet.pt", "a/unet"), ("cv/", "cv"),
     ("n=a//unet.pt", "n"), ("lr=1e-4/unet.pt", "lr=1e-4/unet"), ("m=lr=1e-4/unet.pt", "m")],
)  # fmt: skip
def test_names_and_paths(weights, tmp_path, monkeypatch, text, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "cv", "lr=1e-4"):
        Path(folder).mkdir()
        for path in (weights, weights.with_suffix(".json")):
            shutil.copy(path, Path(folder) / f"unet{path.suffix}")
    assert [model.name for model in open_models([text], {"device": "cpu"})] == [name]


def test_missing_file_is_named_as_it_was_given(phantoms, tmp_path):
    message = refused(phantoms, tmp_path, "--weights", "runs/lr=1e-4/unet.pt")
    assert message.startswith("error: runs/lr=1e-4/unet.pt: no such file")
    assert "needs a name" in refused(phantoms, tmp_path, "--weights", f"={phantoms}")


@pytest.fixture(scope="module")
def predictions(phantoms, weights, tmp_path_factory) -> Path:
    """Segment four cases, one of them trained on; return the folder."""
    folder = tmp_path_factory.mktemp("predictions")
    words = ["--images", phantoms, "--weights", weights, "--predictions", folder]
    words += ["--figure", folder / "dsc.png", "--device", "cpu", "--no-pictures"]
    words += ["--cases", *NAMES[2:6]]
    inference.main([str(word) for word in words])
    return folder


@pytest.fixture
def table(predictions, tmp_path) -> Path:
    """Return metrics.csv of `predictions`, as a copy that may be changed."""
    return shutil.copy(predictions / "metrics.csv", tmp_path / "metrics.csv")


def test_a_table_of_scores_is_a_model(phantoms, weights, table, tmp_path, capsys):
    page = tmp_path / "page.html"
    options = "--cases", *NAMES[2:6], "--subset", "all", "--report", page, "--weights"
    summary = run(phantoms, tmp_path / "out", *options, f"table={table}", f"net={weights}")
    said = "table: scores of an earlier run, at the settings of that run; a difference in DSC"
    assert said in capsys.readouterr().out and said in page.read_text()
    assert summary["left out"] == ["phantom_002"]
    difference = summary["models"]["net"]["difference"]
    assert (difference["mean"], difference["better"], difference["worse"]) == (0, 0, 0)
    assert "settings" not in summary["models"]["table"] and "settings" in summary["models"]["net"]


def test_a_table_of_other_data_is_refused_by_name(phantoms, weights, table, tmp_path):
    """Cases of the same name may still differ."""
    lines = table.read_text().splitlines()
    column = lines[0].split(",").index("lesion_voxels")
    cells = lines[3].split(",")
    cells[column] = "7"
    table.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]) + "\n")
    options = "--cases", *NAMES[2:6], "--subset", "all", "--weights", weights, table
    message = refused(phantoms, tmp_path / "out", *options)
    assert f"{table}: {cells[0]} has lesion_voxels 7 there, but " in message


@pytest.mark.parametrize("damage", ["twice", "True", "column"])
def test_a_damaged_table_is_refused_by_name(phantoms, weights, table, tmp_path, damage):
    lines = table.read_text().splitlines()
    if damage == "twice":
        lines.append(lines[-1])
        said = f"{table}: scores phantom_005 twice"
    elif damage == "True":
        lines[1] = lines[1].replace(",0,", ",True,")
        said = f"{table}: its line of phantom_002 is damaged"
    else:
        lines[0] = lines[0].replace("assd_px", "assd")
        said = f"{table}: has no column assd_px; run inference.py again"
    table.write_text("\n".join(lines) + "\n")
    assert said in refused(phantoms, tmp_path / "out", "--weights", table)


def test_a_table_of_other_cases_is_refused_by_name(phantoms, weights, table, tmp_path):
    message = refused(phantoms, tmp_path, "--subset", "all", "--weights", weights, table)
    assert str(table) in message and "no score of phantom_000" in message


def test_a_file_that_is_not_a_table_is_refused(phantoms, tmp_path):
    for content in (b"", b"case,dsc\na,1\n", b"\xff\xfe\0" * 9, b"case,trained_on\n"):
        (tmp_path / "metrics.csv").write_bytes(content)
        message = refused(phantoms, tmp_path / "out", "--weights", tmp_path / "metrics.csv")
        assert "metrics.csv: is not a metrics.csv that inference.py wrote" in message


@pytest.mark.usefixtures("no_pictures")
def test_volume_files_are_scored_in_millimetres(pair_of_scans, weights, tmp_path):
    words = ["--images", pair_of_scans, "--weights", weights, "--predictions", tmp_path / "p"]
    words += ["--figure", tmp_path / "dsc.png", "--device", "cpu"]
    inference.main([str(word) for word in words])
    options = "--subset", "all", "--weights", weights, f"table={tmp_path / 'p' / 'metrics.csv'}"
    run(pair_of_scans, tmp_path / "out", *options)
    theirs = {row["case"]: row for row in read_rows(tmp_path / "p" / "metrics.csv")}
    for row in scores(tmp_path / "out")[:2]:
        assert row["assd_mm"] == theirs[row["case"]]["assd_mm"] != row["assd_px"]


@pytest.fixture
def pair_of_scans(tmp_path) -> Path:
    """Write two NIfTI files with masks, with voxels 5 mm high."""
    (tmp_path / "scans").mkdir()
    for seed in (1, 2):
        volume, truth = make_volume(seed, 6, 48)
        for array, name in ((volume, f"s{seed}"), (truth.astype("u1"), f"s{seed}_mask")):
            voxels = array.transpose(2, 1, 0, *range(3, array.ndim))
            image = nibabel.Nifti1Image(voxels, np.diag([-0.9, -0.9, 5, 1]))
            nibabel.save(image, tmp_path / "scans" / f"{name}.nii.gz")
    return tmp_path / "scans"


# Statistics


def made_up(values: dict[str, list[float]], **columns: list) -> dict[str, list[dict]]:
    """Make the rows of each model from its DSCs, and other columns from one value per case."""
    blank = dict.fromkeys(("iou", "precision", "recall", "hd95_px", "assd_px"), 0.0)
    blank |= dict.fromkeys(("volume_error", "lesion_recall", "lesion_precision"), 0.0)
    return {
        model: [
            blank
            | {
                "model": model,
                "case": f"case_{k}",
                "patient": f"case_{k}",
                "site": "",
                "missing": "none",
                "slices": 9,
            }
            | {"subset": "test", "lesion_voxels": 10 * k, "dsc": value}
            | {name: column[k] for name, column in columns.items()}
            for k, value in enumerate(dscs)
        ]
        for model, dscs in values.items()
    }


def test_differences_are_case_by_case():
    a, b = [0.1, 0.5, 0.9, 0.7] * 6, [0.2, 0.6, 0.8, 0.7] * 6
    summary = compare(made_up({"a": a, "b": b}))
    assert "difference" not in summary["a"]
    difference = summary["b"]["difference"]
    assert (difference["better"], difference["worse"]) == (12, 6)
    assert difference["low"] == pytest.approx(summarise(np.subtract(b, a))["low"])
    assert summary["b"]["difference"]["mean"] == pytest.approx(0.025)
    assert summary["b"]["scores"]["dsc"] == summarise(b)
    assert "If the interval contains 0" in tables(summary)[1].note


def test_the_note_says_that_few_patients_have_no_interval():
    summary = compare(made_up({"a": [0.1, 0.5], "b": [0.2, 0.6]}))
    assert tables(summary)[1].note.startswith("Under 20 patients there is no interval")


def test_groups_divide_the_cases():
    rows = made_up(
        {"a": [0.1, 0.2, 0.6, 0.8], "b": [0.2, 0.2, 0.6, 0.7]},
        site=["CS", "DU", "CS", "DU"],
        missing=["none", "post-contrast", "none", "none"],
    )
    groups = compare(rows)["b"]["groups"]
    assert groups["hospital"]["CS"]["dsc"] == summarise([0.2, 0.6])
    assert groups["hospital"]["DU"]["difference"]["mean"] == pytest.approx(-0.05)
    assert groups["missing"]["post-contrast"]["dsc"] == summarise([0.2])
    sizes = groups["lesion voxels"]  # 0, 10, 20 and 30 voxels: the thirds end at 10 and 20
    assert list(sizes) == ["under 10", "10 to 20", "over 20"]
    assert [about["dsc"]["mean"] for about in sizes.values()] == pytest.approx([0.2, 0.4, 0.7])


def test_a_single_value_makes_no_groups():
    assert "hospital" not in compare(made_up({"a": [0.1, 0.2, 0.3]}))["a"]["groups"]


def test_intervals_are_over_patients():
    """Forty scans of 20 patients are not forty independent values."""
    values, patients = [0.9] * 20 + [0.1] * 20, [f"p{k // 2}" for k in range(40)]
    rows = made_up({"a": values}, patient=patients)
    dsc = compare(rows)["a"]["scores"]["dsc"]
    assert dsc == summarise(values, patients)
    assert dsc["low"] < summarise(values)["low"] - 0.03, "wider than if each were a patient's"
    assert summarise(values, [f"p{k:02d}" for k in range(40)]) == summarise(values)


def test_a_score_whose_epoch_was_chosen_on_the_cases_says_so():
    rows = made_up({"a": [0.5] * 6, "b": [0.6] * 6}, chose_epoch=[1, 1, 0, 0, 0, 0])
    assert (
        "a: the epoch of its weights was chosen on 2 of these cases"
        in tables(compare(rows))[0].note
    )
    assert "chosen" not in tables(compare(made_up({"a": [0.5] * 6})))[0].note


def test_few_cases_have_no_interval_and_partial_scores_their_n():
    (row,) = tables(compare(made_up({"a": [0.5, 0.6, 0.7]}, hd95_px=[1.0, np.nan, 3.0])))[0].rows
    assert row[1:3] == ["3", "0.600 [0.500 to 0.700]"] and "2.000 (2)" in row
    (row,) = tables(compare(made_up({"a": [0.5, 0.6]}, hd95_px=[np.nan] * 2)))[0].rows
    assert "none" in row


def test_text_table_is_aligned():
    table = Table("Title", ["name", "value"], [["a", "1"], ["longer", "1000"]], "A note.")
    assert table.as_text() == "Title\nname    value\na           1\nlonger   1000\nA note."


def test_cases_are_listed_worst_first():
    rows = case_table(made_up({"a": [0.7, 0.2], "b": [0.1, 0.3]})).rows
    assert [row[0] for row in rows] == ["case_1", "case_0"]
    assert rows[0][-2:] == ["0.200", "0.300"]


def test_worst_median_and_best():
    (rows,) = made_up({"a": [0.5, 0.1, 0.9, 0.7, 0.3]}).values()
    assert {which: row["dsc"] for which, row in pick(rows).items()} == {
        "worst": 0.1, "median": 0.5, "best": 0.9
    }  # fmt: skip


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
    run(phantoms, tmp_path, *options, "--weights", rf"<script>&$\foo$={weights}")
    assert "<script>" not in report.read_text() and "&lt;script&gt;&amp;$" in report.read_text()


def test_pictures(done):
    assert iio.imread(done / "scores.png").ndim == 3
    gallery = iio.imread(done / "gallery.png")
    assert gallery.shape[1] > 900 and len(np.unique(gallery)) > 50


def test_an_empty_prediction_is_as_far_as_the_diagonal(done):
    """Once, such cases had no distance, and the mean left them out."""
    text = (done / "summary.json").read_text()
    blank = json.loads(text)["models"]["blank"]
    n = blank["scores"]["dsc"]["n"]
    assert "NaN" not in text and blank["scores"]["dsc"]["mean"] == 0
    assert blank["scores"]["hd95_px"]["mean"] == pytest.approx(math.hypot(8, 64, 64))
    assert blank["scores"]["hd95_px"]["n"] == n == blank["missed"]


# Refusals


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


def test_models_cases_and_places_that_do_not_fit_are_refused(phantoms, weights, tmp_path):
    out = tmp_path / "out"
    twice = f"a={weights}", f"a={weights}"
    assert f"a={weights}: needs a name" in refused(phantoms, out, "--weights", *twice)
    only = "--weights", weights, "--cases"
    said = refused(phantoms, out, *only, *TRAINED_ON, "--subset", "all")
    assert "trained on all 2 cases" in said
    said = refused(phantoms, out, *only, NAMES[0])
    assert "none of its 1 cases is in validation; choose another --subset" in said
    said = refused(phantoms, out, "--weights", weights, "--report", tmp_path)
    assert f"{tmp_path}: is a folder" in said and not (out / "scores.csv").exists()
    said = refused(phantoms, phantoms / NAMES[0], "--weights", weights)
    assert f"{phantoms / NAMES[0]}: lies among the cases; name another place with --out" in said


def test_images_of_other_channels_are_refused_by_name(phantoms, tmp_path):
    single = make_weights(tmp_path / "single.pt", in_channels=1)
    options = "--cases", NAMES[4], "--subset", "all", "--weights", single
    message = refused(phantoms, tmp_path / "out", *options)
    assert str(phantoms / NAMES[4]) in message and "3 channel(s)" in message
