"""benchmarks/campaign.py: trainings that go on where they were stopped, and what comes of them."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FORK, ROOT

import evaluate
import export
import inference
import train
from benchmarks import campaign, trainings

SMALL = "--image-size 32 --epochs 1 --features 2 --batch-size 8".split()
MAINS = {
    "train.py": train.main, "evaluate.py": evaluate.main, "export.py": export.main,
    "inference.py": inference.main,
}  # fmt: skip


def words_of(images: Path, out: Path, *words: str, options: list[str] = SMALL) -> list[str]:
    before = ["--model", "unet", "--images", str(images), "--out", str(out), "--folds", "2"]
    return [*before, *words, "--", *options, "--cache", str(out / "cache")]


def main_of(command: list[str], file) -> int:
    """Run the script of a command in this process; its exit status, its words in `file`."""
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            MAINS[Path(command[1]).name](command[2:])
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code)
            return int(stop.code is not None and stop.code != 0)
    return 0


# What train.py imports late is imported once here, and not once in every fork.
for name in ("torch._dynamo", "torch.utils.tensorboard"):
    importlib.import_module(name)


class Forked:
    """Stands for subprocess.Popen: a fork, which has imported PyTorch already."""

    def __init__(self, command: list[str], stdout, **_):
        self.process = FORK.Process(target=main_of, args=(command, stdout))
        self.process.start()
        self.wait, self.terminate = self.process.join, self.process.terminate


def run_forked(command: list[str], **_) -> SimpleNamespace:
    file = io.StringIO()
    return SimpleNamespace(returncode=main_of(command, file), stderr=file.getvalue())


def run(*arguments, **options) -> tuple[int, str, str]:
    """A campaign in this process: exit status, stdout, stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "subprocess", SimpleNamespace(Popen=Forked, run=run_forked))
        patch.setattr(sys, "argv", ["campaign", *words_of(*arguments, **options)])
        patch.setattr(signal, "signal", lambda *_: None)  # the process goes on afterwards
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                campaign.main()
            except SystemExit as stop:
                status = 1
                print(stop.code, file=err)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory) -> Path:
    """A campaign with one change, from the search to the weights."""
    out = tmp_path_factory.mktemp("campaign")
    status, said, err = run(phantoms, out, "--only", "dice")
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
    assert run(phantoms, whole, "--stage", "search", "--only", "dice")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("unet.pt")} == weights


def test_other_settings_are_not_mixed_with_those_of_before(whole, phantoms):
    status, _, err = run(phantoms, whole, options=[*SMALL, "--seed", "3"])
    assert status == 1 and err.count("\n") == 1 and "name another --out" in err


def test_a_stage_that_comes_too_early_says_what_to_run_first(phantoms, tmp_path):
    status, _, err = run(phantoms, tmp_path, "--stage", "final")
    assert status == 1 and "run --stage search first" in err


def test_a_signal_stops_the_trainings_which_save(phantoms, tmp_path):
    """Real processes, as a shell starts them."""
    long = [*SMALL, "--epochs", "100000"]
    words = words_of(phantoms, tmp_path, "--stage", "search", "--only", "dice", options=long)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.campaign", *words],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    folder = tmp_path / "unet/search/recipe/fold0"
    for _ in range(600):
        if (folder / "unet.ckpt").exists():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=900)[1]
    assert process.returncode == 1
    assert err.strip().endswith("the same call goes on here")
    assert "go on with" in (folder / "log.txt").read_text().splitlines()[-1]
