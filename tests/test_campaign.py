"""benchmarks/campaign.py: trainings that go on where they were stopped, and what comes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

SMALL = "--image-size 32 --epochs 1 --features 2 --batch-size 8".split()


def start(images: Path, out: Path, *words: str, options: list[str] = SMALL) -> subprocess.Popen:
    script = [sys.executable, "-m", "benchmarks.campaign", "--model", "unet"]
    script += ["--images", str(images), "--out", str(out), "--folds", "2", *words]
    return subprocess.Popen(
        [*script, "--", *options, "--cache", str(out / "cache")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory) -> Path:
    """A campaign with one change, from the search to the weights."""
    out = tmp_path_factory.mktemp("campaign")
    status, said, err = finish(start(phantoms, out, "--only", "dice"))
    assert status == 0, err
    assert "The recipe goes on with" in said
    return out


def test_a_search_compares_each_change_case_by_case(whole):
    table = (whole / "campaign.md").read_text()
    assert "| recipe |" in table and "| dice | --loss dice |" in table
    models = json.loads((whole / "unet/tables/search/summary.json").read_text())["models"]
    assert list(models) == ["recipe", "dice"] and "difference" in models["dice"]
    cards = [json.loads(path.read_text()) for path in whole.glob("unet/search/dice/*/unet.json")]
    assert len(cards) == 2 and {card["recipe"]["loss"] for card in cards} == {"dice"}
    held_out = [set(card["cases"]["validation"]) for card in cards]
    assert not held_out[0] & held_out[1]


def test_the_middle_of_three_seeds_is_shipped_with_its_scores(whole):
    finals = json.loads((whole / "unet/tables/final/summary.json").read_text())["models"]
    means = {name: about["scores"]["dsc"]["mean"] for name, about in finals.items()}
    (card,) = (whole / "weights").glob("unet-*.json")
    card = json.loads(card.read_text())
    shipped = f"seed{card['recipe']['seed']}"
    assert means[shipped] == sorted(means.values())[1]
    assert card["scores"]["validation"]["mean"] == pytest.approx(means[shipped], abs=0.01)
    chosen = json.loads((whole / "unet/chosen.json").read_text())["options"]
    assert card["recipe"]["loss"] == (chosen[1] if chosen else "bce-dice")


def test_what_is_done_is_not_done_again(whole, phantoms):
    weights = {path: path.stat().st_mtime_ns for path in whole.rglob("unet.pt")}
    again = start(phantoms, whole, "--stage", "search", "--only", "dice")
    assert finish(again)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("unet.pt")} == weights


def test_other_settings_are_not_mixed_with_those_of_before(whole, phantoms):
    status, _, err = finish(start(phantoms, whole, options=[*SMALL, "--seed", "3"]))
    assert status == 1 and err.count("\n") == 1 and "name another --out" in err


def test_a_stage_that_comes_too_early_says_what_to_run_first(phantoms, tmp_path):
    status, _, err = finish(start(phantoms, tmp_path, "--stage", "final"))
    assert status == 1 and "run --stage search first" in err


def test_a_signal_stops_the_trainings_which_save(phantoms, tmp_path):
    long = [*SMALL, "--epochs", "100000"]
    process = start(phantoms, tmp_path, "--stage", "search", "--only", "dice", options=long)
    folder = tmp_path / "unet/search/recipe/fold0"
    for _ in range(600):
        if (folder / "unet.ckpt").exists():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status == 1 and err.strip().endswith("the same call goes on here")
    assert "go on with" in (folder / "log.txt").read_text().splitlines()[-1]
