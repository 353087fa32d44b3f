"""Test weights/campaign.py: trainings that continue where they stopped, and their results."""

import argparse
import contextlib
import io
import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import SimpleITK
from conftest import FORK, read_rows

import evaluate
import export
import inference
import train
from brainseg import quality
from brainseg.io.files import MARK
from brainseg.io.layouts import find_case
from brainseg.phantom import make_volume
from brainseg.splits import subset_of_patient
from brainseg.weights import read_card
from weights import campaign, negatives, trainings

SMALL = "--image-size 32 --epochs 1 --features 2 --batch-size 8".split()
FOLDS = 3  # instead of five
SCRIPTS = (train, evaluate, export, inference)
MAINS = {f"{script.__name__}.py": script.main for script in SCRIPTS}


def words_of(images: Path, out: Path, *words: str, options: list[str] = SMALL) -> list[str]:
    before = ["--images", str(images), "--out", str(out)]
    return [*before, *words, "--", *options, "--cache", str(out / "cache")]


def main_of(command: list[str], file) -> int:
    """Run the script of a command in this process, output to `file`; return its exit status."""
    k = next(k for k, word in enumerate(command) if word.endswith(".py"))
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            MAINS[Path(command[k]).name](command[k + 1 :])
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code)
            return int(stop.code is not None and stop.code != 0)
        finally:
            file.flush()  # a fork ends without it
    return 0


@pytest.fixture(scope="module", autouse=True)
def late_imports():
    """Import what train.py imports late once here, not once in every fork."""
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401


class Forked:
    """Replace subprocess.Popen by a fork, which has already imported PyTorch."""

    def __init__(self, command: list[str], stdout, **_):
        self.process = FORK.Process(target=main_of, args=(command, stdout))
        self.process.start()
        self.wait, self.terminate = self.process.join, self.process.terminate


def run_forked(command: list[str], **_) -> SimpleNamespace:
    file = io.StringIO()
    return SimpleNamespace(returncode=main_of(command, file), stderr=file.getvalue())


def run(*arguments, **options) -> tuple[int, str, str]:
    """Run a campaign in this process; return exit status, stdout and stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "subprocess", SimpleNamespace(Popen=Forked, run=run_forked))
        patch.setattr(signal, "signal", lambda *_: None)  # the process goes on afterwards
        patch.setattr(quality, "LEAST_CASES", 3)
        for name in ("save_scores", "save_gallery"):  # which take longest
            patch.setattr(evaluate.report, name, lambda path, *_: path.write_text(MARK))
        patch.setattr(campaign, "SEARCH_FOLDS", 2)
        patch.setattr(campaign, "INNER_FOLDS", 2)
        patch.setattr(campaign, "FOLDS", FOLDS)
        patch.setattr(campaign, "COMMON", [*campaign.COMMON, "--folds", str(FOLDS)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                campaign.main(words_of(*arguments, **options))
            except SystemExit as stop:
                status = 1
                print(stop.code, file=err)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory) -> Path:
    """Run a campaign with one change, from the search to the weights; return its folder."""
    out = tmp_path_factory.mktemp("campaign")
    status, _, err = run(phantoms, out, "--only", "dice")
    assert status == 0, err
    return out


def test_a_search_compares_each_change_case_by_case(whole):
    table = (whole / "campaign.md").read_text()
    assert "| defaults |" in table and "| dice | `--loss dice` |" in table
    models = json.loads((whole / "search/scores/summary.json").read_text())["models"]
    assert list(models) == ["defaults", "dice"] and "difference" in models["dice"]
    cards = [json.loads(path.read_text()) for path in whole.glob("search/dice/*/unet.json")]
    assert len(cards) == 2 and {card["recipe"]["loss"] for card in cards} == {"dice"}
    held_out = [set(card["cases"]["validation"]) for card in cards]
    assert not held_out[0] & held_out[1]
    assert models["dice"]["scores"]["dsc"]["n"] == len(set().union(*held_out))


def test_one_network_per_fold_is_shipped_with_a_fit(whole):
    files = sorted((whole / "weights").glob("unet-*.pt"))
    cards = [read_card(file) for file in files]
    assert sorted(card["recipe"]["fold"] for card in cards) == [*range(FOLDS)]
    assert len({json.dumps(card["expected_dsc"]) for card in cards}) == 1
    (about,) = json.loads((whole / "ship/scores/summary.json").read_text())["models"].values()
    held_out = [case for card in cards for case in card["cases"]["validation"]]
    assert about["scores"]["dsc"]["n"] == len(held_out) == len(set(held_out))


def test_finished_trainings_are_not_repeated(whole, phantoms):
    weights = {path: path.stat().st_mtime_ns for path in whole.rglob("unet.pt")}
    assert run(phantoms, whole, "--stage", "search", "--only", "dice")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("unet.pt")} == weights


def test_start_continues_from_the_network_of_the_fold(whole, phantoms, tmp_path):
    words = "--stage", "search", "--only", "dice", "--start", whole / "weights"
    status, _, err = run(phantoms, tmp_path, *map(str, words))
    assert status == 0, err
    networks = {read_card(path)["recipe"]["fold"]: path for path in whole.glob("weights/*.pt")}
    for k in range(2):
        options = json.loads((tmp_path / f"search/dice/fold{k}/options.json").read_text())
        assert str(networks[k]) in options["options"]
        card = read_card(tmp_path / f"search/dice/fold{k}/unet.pt")
        assert "validation_seen" not in card


def test_start_without_a_network_of_each_fold_is_refused(whole, phantoms, tmp_path):
    one = next(whole.glob("search/dice/fold0"))
    status, _, err = run(phantoms, tmp_path, "--stage", "search", "--start", str(one))
    assert status == 1 and err.count("\n") == 1 and "no network of fold 1 of 3" in err


def test_changed_settings_need_another_folder(whole, phantoms):
    status, _, err = run(phantoms, whole, options=[*SMALL, "--seed", "3"])
    assert status == 1 and err.count("\n") == 1 and "name another --out" in err


def test_a_signal_stops_the_trainings_which_save(phantoms, tmp_path):
    long = [*SMALL, "--epochs", "100000"]
    words = words_of(phantoms, tmp_path, "--stage", "search", "--only", "dice", options=long)

    def work() -> None:
        trainings.subprocess = SimpleNamespace(Popen=Forked)
        with open(tmp_path / "err", "w") as file, contextlib.redirect_stderr(file):
            try:
                campaign.main(words)
            except SystemExit as stop:
                print(stop.code, file=file)
                raise

    process = FORK.Process(target=work)
    process.start()
    folder = tmp_path / "search/defaults/fold0"
    for _ in range(600):
        if (folder / "unet.ckpt").exists():
            break
        time.sleep(0.2)
    process.terminate()
    process.join(900)
    assert process.exitcode == 1
    assert (tmp_path / "err").read_text().endswith("run the same command to resume\n")
    assert "continue with" in (folder / "log.txt").read_text().splitlines()[-1]


def test_a_student_is_compared_with_its_teachers(phantoms, tmp_path):
    """On the patients of a fold that none of them has seen."""
    healthy = tmp_path / "healthy" / "mary"
    healthy.mkdir(parents=True)
    flair = SimpleITK.GetImageFromArray(make_volume(1, 16, 96, False)[0][..., 1])
    SimpleITK.WriteImage(flair, str(healthy / "flair.nii.gz"))
    shutil.copytree(healthy, tmp_path / "healthy" / "martha")
    more = ["--negatives", str(tmp_path / "healthy"), "--hold-back", "martha"]
    words = ["--stage", "nested", "student", "one", "--outer", "1", *more]
    teachers = ["--start", str(tmp_path / "nested/fold1/weights")]
    status, out, err = run(phantoms, tmp_path, *words, *teachers)
    assert status == 0, err
    folder = tmp_path / "nested" / "fold1"
    rows = read_rows(folder / "student-masks" / "metrics.csv")
    held_out = {row["case"] for row in rows}
    for card in map(read_card, [*(folder / "weights").glob("*.pt"), folder / "student/unet.pt"]):
        assert held_out and not held_out & set(card["cases"]["train"])
    card = read_card(folder / "student" / "unet.pt")
    assert card["recipe"]["flair_alone"] is True and card["recipe"]["strip_skulls"] == 0.33
    trained_on = card["cases"]["train"]
    assert "healthy_mary" in trained_on and "healthy_martha" not in trained_on
    assert any(name.endswith("_mirrored") for name in trained_on)
    (weights,) = (tmp_path / "one" / "weights").glob("*.pt")
    card = read_card(weights)
    assert held_out < set(card["cases"]["train"])
    fit = card["expected_dsc"]
    fitted = [name for name in held_out if subset_of_patient(name) != "test"]
    assert fit["cases"] + fit["empty"] == len(fitted) > 1 and fit["tta"] is False
    assert "| 1 | " in (tmp_path / "student.md").read_text()


def test_the_last_row_of_students_is_over_all_folds(tmp_path, monkeypatch):
    """Each patient counts once, whatever the sizes of the folds."""
    folds = [["a", "b", "c"], ["d"]]
    before, after = (
        {"a": 0.5, "b": 0.7, "c": 0.9, "d": 0.1},
        {"a": 0.6, "b": 0.7, "c": 0.9, "d": 0.6},
    )

    def scored(args, names, weights, out, masks):
        scores = before if out.name == "teachers-masks" else after
        return [{"patient": name, "dsc": scores[name]} for name in names]

    cases = [[SimpleNamespace(name=name) for name in names] for names in folds]
    monkeypatch.setattr(campaign, "split_cases", lambda images, outer: ([], cases[outer]))
    monkeypatch.setattr(campaign, "train_student", lambda *_: tmp_path / "unet.pt")
    monkeypatch.setattr(campaign, "scored", scored)
    args = argparse.Namespace(images=tmp_path, out=tmp_path, outer=[0, 1])
    last = campaign.student(args, campaign.Pool(1)).splitlines()[-1]
    assert last.split(" | ")[0] == "| all"
    assert "0.550" in last and "0.700" in last and "+0.150" in last and last.count("n = 4") == 2


def test_a_missing_student_is_named_before_the_last_training(phantoms, tmp_path, capsys):
    status, _, err = run(phantoms, tmp_path, "--stage", "one", "--outer", "0")
    missing = tmp_path / "nested" / "fold0" / "student" / "unet.pt"
    assert status == 1 and f"{missing}: is missing for the fit; run --stage student first" in err


def test_a_head_without_lesion_is_written_whole_or_not_at_all(phantoms, tmp_path, monkeypatch):
    """Once, a campaign that was killed meanwhile trained on the first slices of a head."""
    case, saved = find_case(phantoms / "phantom_001"), []

    def save_tiff(path, *_, **__):
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(negatives, "without_lesion", lambda volume, mask: volume)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(negatives, "save_tiff", save_tiff)
        negatives.write_mirrored([case], tmp_path)
    assert not list(tmp_path.iterdir())
    negatives.write_mirrored([case], tmp_path)
    assert len(list(tmp_path.glob("phantom_001_mirrored/*.tif"))) == 16
