"""Test exported weights: small, named by their hash, with a card, and segmenting as before."""

import json
from pathlib import Path

import pytest
import torch

import export
from brainseg.ensemble import weights_id
from brainseg.io.files import RUN
from brainseg.unet import UNet
from brainseg.weights import file_hash, load_state, model_from_state, save_weights

SEEN = "TCGA_CS_4942_19970222"
UNSEEN = "TCGA_CS_4944_20010208", "TCGA_CS_6667_20011105"
ROWS = f"case,dsc,trained_on\n{UNSEEN[0]},0.8,0\n{UNSEEN[1]},0.9,0\n{SEEN},0.99,1\n"


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "unet.pt"
    save_weights(path, UNet(init_features=4).state_dict(), {"cases": {"train": [SEEN]}})
    return path


def written(folder: Path, rows: str, weights: Path) -> Path:
    """Write a table as inference.py does, with the record of how it was made."""
    header, *lines = rows.splitlines()
    run = f"{weights_id([file_hash(weights)])}-00000000"
    lines = [f"{header},{RUN}", *(f"{line},{run}" for line in lines)]
    (folder / "metrics.csv").write_text("\n".join(lines))
    return folder / "metrics.csv"


def exported(tmp_path, *options):
    export.main([*map(str, options), "--out", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").glob("*.pt")
    return path


def test_name_card_and_size(trained, tmp_path):
    path = exported(tmp_path, "--weights", trained)
    digest = file_hash(path)
    card = json.loads(path.with_suffix(".json").read_text())
    assert path.name == f"unet-{digest[:8]}.pt" and card["sha256"] == digest
    assert card["cases"]["train"] == [SEEN] and "non-commercial" in card["licence"]
    assert path.stat().st_size < 0.7 * trained.stat().st_size


def test_a_file_of_others_at_the_place_of_the_card_stays(trained, tmp_path):
    path = exported(tmp_path, "--weights", trained)
    path.unlink()
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(SystemExit, match=f"{path.stem}.json: is in the way"):
        exported(tmp_path, "--weights", trained)
    assert path.with_suffix(".json").read_text() == "{}"


def test_half_precision_kernels_change_little(trained, tmp_path):
    path = exported(tmp_path, "--weights", trained)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before, after = (model_from_state(load_state(p), p)[1](x) for p in (trained, path))
    assert torch.allclose(before, after, atol=2e-3)


def test_scores_added_to_the_file_leave_out_training_cases(trained, tmp_path):
    path = exported(tmp_path, "--weights", trained)
    metrics = written(tmp_path, ROWS, path)
    assert exported(tmp_path, "--weights", path, "--metrics", metrics) == path
    scores = json.loads(path.with_suffix(".json").read_text())["scores"]["validation"]
    assert scores["n"] == 2 and scores["mean"] == pytest.approx(0.85)
    assert scores["cases"] == {UNSEEN[0]: 0.8, UNSEEN[1]: 0.9}


@pytest.mark.parametrize("subset, n", [("train", 0), ("validation", 2), ("test", 1), ("all", 3)])
def test_scores_are_of_the_subset_that_is_named(trained, tmp_path, subset, n):
    metrics = written(tmp_path, f"{ROWS}TCGA_CS_4941_19960909,0.5,0\n", trained)
    options = "--weights", trained, "--metrics", metrics, "--subset", subset
    if n == 0:
        with pytest.raises(SystemExit, match="has no case of subset train"):
            exported(tmp_path, *options)
        return
    card = json.loads(exported(tmp_path, *options).with_suffix(".json").read_text())
    assert card["scores"][subset]["n"] == n


def test_scores_of_one_subset_stay_with_those_of_another(trained, tmp_path):
    metrics = written(tmp_path, f"{ROWS}TCGA_CS_4941_19960909,0.5,0\n", trained)
    options = "--weights", trained, "--metrics", metrics, "--subset"
    for more in ((*options, "validation"), (*options, "test"), options[:2]):
        path = exported(tmp_path, *more)
    card = json.loads(path.with_suffix(".json").read_text())
    assert {name: scores["n"] for name, scores in card["scores"].items()} == {
        "validation": 2,
        "test": 1,
    }


def test_scores_of_other_weights_are_refused(trained, tmp_path):
    other = tmp_path / "other.pt"
    other.write_bytes(trained.read_bytes() + b"\0")
    metrics = written(tmp_path, ROWS, other)
    with pytest.raises(SystemExit, match="metrics.csv: some of its cases were segmented by other"):
        exported(tmp_path, "--weights", trained, "--metrics", metrics)


def test_scores_of_an_ensemble_are_not_those_of_a_member(trained, tmp_path):
    metrics = written(tmp_path, ROWS, trained)
    one, other = file_hash(trained), "0" * 64
    metrics.write_text(metrics.read_text().replace(weights_id([one]), weights_id([one, other])))
    with pytest.raises(SystemExit, match="segmented by other weights; run inference.py"):
        exported(tmp_path, "--weights", trained, "--metrics", metrics)


def test_scores_made_with_several_settings_are_refused(trained, tmp_path):
    metrics = written(tmp_path, ROWS, trained)
    metrics.write_text(metrics.read_text().replace("-00000000", "-00000001", 1))
    with pytest.raises(SystemExit, match="segmented with several settings"):
        exported(tmp_path, "--weights", trained, "--metrics", metrics)


def test_written_beside_the_weights_by_default(trained):
    export.main(["--weights", str(trained)])
    (path,) = trained.parent.glob("unet-*.pt")
    assert path.name == f"unet-{file_hash(path)[:8]}.pt"


def test_refuses_metrics_of_training_cases_only(trained, tmp_path):
    metrics = written(tmp_path, f"case,dsc,trained_on\n{UNSEEN[0]},0.99,1\n", trained)
    with pytest.raises(SystemExit, match="not trained on"):
        exported(tmp_path, "--weights", trained, "--metrics", metrics)


def test_weights_of_other_data_do_not_get_the_licence(tmp_path):
    model = UNet(init_features=4)
    save_weights(tmp_path / "unet.pt", model.state_dict(), {"cases": {"train": ["mine"]}})
    card = exported(tmp_path, "--weights", tmp_path / "unet.pt").with_suffix(".json")
    assert "licence" not in json.loads(card.read_text())


@pytest.mark.parametrize("content", ["", "case,trained_on\na,0\n", "case,dsc,trained_on\na,x,0\n"])
def test_refuses_other_tables(trained, tmp_path, content):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(content)
    with pytest.raises(SystemExit, match="metrics.csv"):
        exported(tmp_path, "--weights", trained, "--metrics", metrics)


@pytest.mark.parametrize("options", ["", "--format torch-export --precision float16"])
def test_refuses_weights_that_half_precision_cannot_hold(tmp_path, options):
    model = UNet(init_features=4)
    model.conv.weight.data.fill_(1e6)
    save_weights(tmp_path / "unet.pt", model.state_dict(), {})
    with pytest.raises(SystemExit, match="half precision"):
        exported(tmp_path, "--weights", tmp_path / "unet.pt", *options.split())
