"""Test train.py end to end: what a run leaves behind, resuming, and one-sentence errors.

All runs train narrow networks on small slices, on the CPU, where results repeat bit for bit.
"""

import functools
import io
import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch
from conftest import FORK, contents, traces

import cli
import train
from brainseg import training, training_files
from brainseg.segmenter import Segmenter, settings_text
from brainseg.unet import UNet
from brainseg.weights import load_state, load_tensors, model_from_state, read_card
from dataset import SliceDataset
from transform import Augmentation

SCRIPT = Path(train.__file__)
VALIDATION, TRAIN = "phantom_011", "phantom_001"  # a validation and a training case of `phantoms`


def flags(images: Path, out: Path, *more: object) -> list[str]:
    base = {
        "--images": images, "--weights": out / "weights", "--logs": out / "logs",
        "--recipe": "classic", "--preprocessing": 2, "--image-size": 32, "--features": 4,
        "--epochs": 1, "--lr": 1e-3, "--vis-freq": 0, "--device": "cpu",
    }  # fmt: skip
    return [str(word) for pair in base.items() for word in pair] + [str(word) for word in more]


def run(images: Path, out: Path, *more: object) -> Path:
    """Train, by default for one epoch; return the folder of the weights."""
    train.main(flags(images, out, *more))
    return out / "weights"


def settings(words: list[str]):
    return train.get_args(words, train.get_args_parser())


def refused(images: Path, out: Path, *more: object) -> str:
    """Return the one sentence that a run ends with; as a string it means exit status 1."""
    with pytest.raises(SystemExit) as stop:
        run(images, out, *more)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ")
    assert "\n" not in message and "Errno" not in message
    return message


@pytest.mark.parametrize("option", ["--weights", "--logs", "--cache"])
def test_nothing_is_written_among_the_cases(two, tmp_path, option):
    """Once, the case could not be read afterwards, nor any of the cohort with a cache in it."""
    before = sorted(two.rglob("*"))
    for place in (two, two / "phantom_001", two / "new"):
        said = refused(two, tmp_path, option, place)
        assert f"{place}: lies among the cases; name another place with {option}" in said
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(two / "phantom_001")
    (tmp_path / "linked" / "b").symlink_to(two / "phantom_002")
    said = refused(tmp_path / "linked", tmp_path, option, two / "phantom_001")
    assert f"phantom_001: is a source; name another place with {option}" in said
    assert sorted(two.rglob("*")) == before


def test_nothing_is_written_beside_shipped_weights(two, tmp_path, monkeypatch):
    """inference.py would average them with the new ones, or refuse them all."""
    folder = tmp_path / "shipped"
    monkeypatch.setattr(training_files, "shipped_files", lambda: [folder / "unet-0.pt"])
    said = refused(two, tmp_path, "--weights", folder)
    assert f"{folder}: holds weights that come with the project, which unet.pt would join" in said
    assert not list(folder.glob("*.pt"))


def same(a, b) -> bool:
    """Tell whether two nested state dicts are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a: Path, b: Path) -> bool:
    """Tell whether two folders hold the same weights and would continue in the same way."""
    one, two = load_tensors(a / "unet.ckpt"), load_tensors(b / "unet.ckpt")
    parts = ("model", "ema", "optimizer", "epoch", "step", "best")
    kept = same(load_state(a / "unet.pt"), load_state(b / "unet.pt"))
    return kept and all(same(one[part], two[part]) for part in parts)


def interrupt(monkeypatch, step: int, number: int) -> None:
    """Send this process a real signal in the middle of the `step`-th training step from now."""
    original, done = train.train_step, []

    def train_step(*batch, **options):
        done.append(1)
        if len(done) == step:
            signal.raise_signal(number)
        return original(*batch, **options)

    monkeypatch.setattr(train, "train_step", train_step)


def nan_loss(logits, target, **_):
    return logits.sum() * float("nan")


@pytest.fixture(scope="module")
def straight(phantoms, tmp_path_factory) -> Path:
    """Train three epochs without a break, with pictures at the second and the last."""
    out = tmp_path_factory.mktemp("straight")
    run(phantoms, out, "--epochs", 3, "--vis-freq", 2)
    return out


def copied(straight: Path, out: Path) -> Path:
    """Copy the weights of a finished run, where it only matters that there are some."""
    return shutil.copytree(straight / "weights", out / "weights")


def scalars(logs: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(logs), size_guidance={"images": 0, "scalars": 0}).Reload()


# What a run leaves behind


def test_weights_load_strictly_and_carry_their_card(straight):
    weights = straight / "weights"
    assert sorted(contents(weights)) == ["unet.ckpt", "unet.json", "unet.pt"]
    UNet(init_features=4).load_state_dict(load_state(weights / "unet.pt"), strict=True)
    card = read_card(weights / "unet.pt")
    assert card["settings"] == {"in_channels": 3, "out_channels": 1, "init_features": 4}
    assert card["cases"]["validation"] == [VALIDATION]
    assert len(card["cases"]["train"]) == 8 and TRAIN in card["cases"]["train"]
    assert card["image_size"] == 32 and card["recipe"]["lr"] == 1e-3 and card["recipe"]["seed"]
    assert card["validation_dsc"]["n"] == 1
    assert 0 <= card["validation_dsc"]["mean"] <= 1
    assert str(straight) not in json.dumps(card), "no paths of the machine in what is published"


def test_arguments_versions_and_device_are_beside_the_logs(straight):
    about = json.loads((straight / "logs" / "args.json").read_text())
    assert about["recipe"]["epochs"] == 3 and about["device"] == "cpu"
    assert about["args"]["vis_freq"] == 2
    assert about["versions"]["torch"] == torch.__version__ and "commit" in about


def test_tensorboard_has_every_curve_and_picture(straight):
    events = scalars(straight / "logs")
    curves = (
        "loss/train", "loss/validation", "dsc/validation", f"dsc_by_case/{VALIDATION}",
        "learning_rate", "images_per_second",
    )  # fmt: skip
    for name in curves:
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3], name
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-3)
    pictures = events.Images(VALIDATION)
    assert [event.step for event in pictures] == [2, 3]
    picture = iio.imread(io.BytesIO(pictures[0].encoded_image_string))
    assert (picture == (0, 255, 0)).all(axis=-1).any(), "the truth is outlined in green"


def test_vis_images_limits_the_slices_drawn(phantoms, tmp_path):
    run(phantoms, tmp_path, "--vis-freq", 1, "--vis-images", 2)
    (event,) = scalars(tmp_path / "logs").Images(VALIDATION)
    assert iio.imread(io.BytesIO(event.encoded_image_string)).shape == (64, 2 * 64, 3)


def test_images_that_are_gone_cost_only_the_pictures(phantoms, tmp_path, monkeypatch, capsys):
    """A scratch disk may be cleaned in the first epoch; all that is needed is in the cache."""
    images, load = shutil.copytree(phantoms, tmp_path / "images"), train.make_state

    def then_clean(*arguments):
        loaded = load(*arguments)
        shutil.rmtree(images)
        return loaded

    monkeypatch.setattr(train, "make_state", then_clean)
    weights = run(images, tmp_path, "--vis-freq", 1)
    assert read_card(weights / "unet.pt")["epoch"] == 1
    said = capsys.readouterr().err
    assert "epoch 1 has no pictures: " in said and str(images / VALIDATION) in said


def test_every_epoch_draws_afresh(phantoms, tmp_path, monkeypatch):
    drawn, seeds = [], []
    batch, draw = SliceDataset.batch, Augmentation.draw

    def spy_batch(self, indices, neighbours):
        drawn.append(list(indices))
        return batch(self, indices, neighbours)

    def spy_draw(self, slices, generator):
        seeds.append(generator.initial_seed())
        return draw(self, slices, generator)

    monkeypatch.setattr(SliceDataset, "batch", spy_batch)
    monkeypatch.setattr(Augmentation, "draw", spy_draw)
    run(phantoms, tmp_path, "--epochs", 3)
    assert len(drawn) == 12 and len({tuple(indices) for indices in drawn}) == 12
    assert len(set(seeds)) == 12, "every step augments in another way"
    seen = [len(set().union(*drawn[: 4 * epoch])) for epoch in (1, 2, 3)]
    assert seen[0] < seen[1] < seen[2], "later epochs reach slices that earlier ones did not"


def test_command_line_takes_the_original_flags(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old = "--batch-size 8 --epochs 1 --lr 1e-4 --device cpu --workers 1 --vis-images 1 --vis-freq 1"
    old += " --weights ./w --logs ./l --image-size 32 --aug-scale 0.05 --aug-angle 15"
    train.main([*old.split(), "--images", str(phantoms), "--features", "4"])
    assert contents(Path("w")).keys() == {"unet.pt", "unet.json", "unet.ckpt"}
    assert "64 slices to train on" in capsys.readouterr().out


# Resuming


def test_interrupted_and_resumed_equals_uninterrupted(phantoms, tmp_path, monkeypatch, capsys):
    recipe = "--epochs", 2, "--schedule", "cosine", "--warmup", 3, "--ema", 0.9
    whole = run(phantoms, tmp_path / "a", *recipe)
    with monkeypatch.context() as patch:
        interrupt(patch, 6, signal.SIGINT)  # of 2 x 4 steps
        with pytest.raises(SystemExit) as stop:
            run(phantoms, tmp_path / "b", *recipe)
    assert stop.value.code == 128 + signal.SIGINT
    said = capsys.readouterr().out
    assert "stopped at epoch 2, step 2" in said
    assert f"train.py --resume --weights {tmp_path / 'b' / 'weights'}" in said
    assert load_tensors(tmp_path / "b/weights/unet.ckpt")["step"] == 2, "the step was finished"
    train.main(["--resume", "--weights", str(tmp_path / "b/weights")])  # as printed
    assert same_run(whole, tmp_path / "b/weights")
    losses = [scalars(tmp_path / x / "logs").Scalars("loss/train") for x in "ab"]
    assert [e.step for e in losses[1]] == [1, 2]
    assert losses[0][1].value == pytest.approx(losses[1][1].value, rel=1e-5)


def test_a_process_stops_saves_and_goes_on(phantoms, tmp_path, capfd):
    process = FORK.Process(target=run, args=(phantoms, tmp_path / "a", "--epochs", 10_000))
    process.start()
    while not (tmp_path / "a/weights/unet.ckpt").exists():
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    said = capfd.readouterr()
    assert process.exitcode == 128 + signal.SIGTERM and "Traceback" not in said.err
    assert "continue with: python3 train.py --resume" in said.out
    epochs = load_tensors(tmp_path / "a/weights/unet.ckpt")["epoch"] + 1
    resumed = run(phantoms, tmp_path / "a", "--resume", "--epochs", epochs)
    assert same_run(run(phantoms, tmp_path / "b", "--epochs", epochs), resumed)


def test_interrupted_while_reading_ends_without_a_traceback(phantoms, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_and_validation", stopped)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        run(phantoms, tmp_path)
    assert isinstance(stop.value, SystemExit) and stop.value.code not in (0, None)


@pytest.mark.parametrize(
    "flag, value", [("--lr", 0.1), ("--seed", 7), ("--batch-size", 8), ("--aug-angle", 0)]
)
def test_resuming_with_another_setting_is_refused(phantoms, straight, flag, value):
    message = refused(phantoms, straight, "--resume", flag, value)
    assert f"{flag} " in message and f"not {value}" in message and "unet.ckpt" in message


def test_resuming_with_other_cases_is_refused(phantoms, straight, tmp_path):
    images = shutil.copytree(phantoms, tmp_path / "images")
    shutil.rmtree(images / TRAIN)
    message = refused(images, straight, "--resume", "--epochs", 4)
    assert f"{images}: does not have the training cases" in message


def test_resuming_a_finished_run_changes_nothing(phantoms, straight, capsys):
    before = contents(straight / "weights")
    run(phantoms, straight, "--resume", "--epochs", 3)
    assert "all 3 epochs are done; raise --epochs" in capsys.readouterr().out
    assert contents(straight / "weights") == before


def test_resuming_without_a_sound_checkpoint_is_one_sentence(phantoms, straight, tmp_path):
    place = tmp_path / "weights" / "unet.ckpt"
    assert str(place) in refused(phantoms, tmp_path, "--resume")
    place.parent.mkdir()
    whole = (straight / "weights" / "unet.ckpt").read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    message = f"{place}: is not a training checkpoint, or is damaged; start without --resume"
    assert message in refused(phantoms, tmp_path, "--resume")
    shutil.copy(straight / "weights" / "unet.pt", place)
    assert f"{place}: is not a training checkpoint" in refused(phantoms, tmp_path, "--resume")
    earlier = load_tensors(straight / "weights" / "unet.ckpt") | {"ema": {"n_averaged": 3}}
    torch.save(earlier, place)  # as written before preprocessing version 2
    assert f"{place}: is not a training checkpoint" in refused(phantoms, tmp_path, "--resume")


# What is kept


@pytest.mark.parametrize("keep, epoch", [("best", 1), ("last", 2)])
def test_best_or_last_weights_are_kept(phantoms, tmp_path, monkeypatch, keep, epoch):
    scores = iter([0.9, 0.1])
    monkeypatch.setattr(train, "dsc", lambda *_: next(scores))
    weights = run(phantoms, tmp_path, "--epochs", 2, "--keep", keep)
    last = load_tensors(weights / "unet.ckpt")["model"]
    assert same(load_state(weights / "unet.pt"), last) == (keep == "last")
    card = read_card(weights / "unet.pt")
    assert card["epoch"] == epoch and card["validation_dsc"]["mean"] == (0.9, 0.1)[epoch - 1]


def test_a_run_that_never_improves_keeps_its_weights(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "dsc", lambda *_: 0.0)
    weights = run(phantoms, tmp_path, "--lr", 0, "--epochs", 2)
    model_from_state(load_state(weights / "unet.pt"), "unet.pt")
    assert read_card(weights / "unet.pt")["validation_dsc"]["mean"] == 0


def test_averaged_weights_are_the_ones_kept(phantoms, tmp_path):
    weights = run(phantoms, tmp_path, "--ema", 0.9)
    checkpoint = load_tensors(weights / "unet.ckpt")
    kept = load_state(weights / "unet.pt")
    assert same(kept, dict(checkpoint["ema"])) and not same(kept, checkpoint["model"])


def test_shipped_weights_are_never_touched(phantoms, tmp_path):
    shipped = tmp_path / "weights" / "unet-01234567.pt"
    shipped.parent.mkdir()
    for path in (shipped, shipped.with_suffix(".json")):
        path.write_text("as shipped")
    before = {path: path.stat().st_mtime_ns for path in shipped.parent.iterdir()}
    run(phantoms, tmp_path, "--epochs", 2, "--keep", "last")
    for path, changed in before.items():
        assert path.read_text() == "as shipped" and path.stat().st_mtime_ns == changed


@pytest.mark.parametrize("signalled", [False, True])
def test_nan_loss_stops_and_keeps_earlier_weights(phantoms, tmp_path, monkeypatch, signalled):
    weights = run(phantoms, tmp_path)
    before = contents(weights)
    monkeypatch.setitem(train.LOSSES, "dice", nan_loss)
    if signalled:
        interrupt(monkeypatch, 2, signal.SIGINT)
    message = refused(phantoms, tmp_path, "--resume", "--epochs", 2, "--keep", "best")
    assert "not finite" in message and "--lr" in message
    assert contents(weights) == before


def test_full_disk_leaves_the_old_file_whole(phantoms, straight, tmp_path, monkeypatch):
    recipe, write = ("--epochs", 3, "--keep", "last"), Path.write_bytes
    weights = run(phantoms, tmp_path, "--keep", "last")
    before = contents(weights)
    for suffix in (".pt", ".ckpt"):

        def full_disk(path, content, suffix=suffix):
            if path.suffix == suffix:
                write(path, b"the first bytes")
                raise OSError(28, "No space left on device")
            return write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full_disk)
            message = refused(phantoms, tmp_path, "--resume", *recipe)
        assert str(weights / f"unet{suffix}") in message
        after = contents(weights)
        assert sorted(after) == sorted(before), "no temporary file is left"
        assert after["unet.ckpt"] == before["unet.ckpt"]
        assert suffix == ".ckpt" or after == before
    run(phantoms, tmp_path, "--resume", *recipe)  # when the disk has space again
    assert same_run(weights, straight / "weights")


# Twice at once, killed, or beside the files of others


def test_two_trainings_never_write_into_one_folder(phantoms, tmp_path):
    """Once, unet.pt was one run's and unet.ckpt the other's; `srun -n 2` starts such two."""
    child = FORK.Process(target=run, args=(phantoms, tmp_path, "--epochs", 10_000))
    child.start()
    while not (tmp_path / "weights" / "unet.ckpt").exists():
        time.sleep(0.01)
    message = refused(phantoms, tmp_path, "--logs", tmp_path / "other", "--resume")
    assert f"{tmp_path / 'weights'}: another run is writing there" in message
    assert "--weights" in message
    message = refused(phantoms, tmp_path, "--weights", tmp_path / "other")
    assert f"{tmp_path / 'logs'}: another run" in message and "--logs" in message
    assert not contents(tmp_path / "other")
    child.kill()
    child.join()
    run(phantoms, tmp_path, "--resume", "--epochs", 1)


def test_a_checkpoint_is_read_when_nobody_can_write_it(
    phantoms, straight, tmp_path, monkeypatch, capsys
):
    """Once, a run that ended while the next one listed its cases had its last epochs repeated."""
    whole, list_cohort = straight / "weights", train.list_cohort
    (tmp_path / "weights").mkdir()
    earlier = load_tensors(whole / "unet.ckpt") | {"epoch": 1}
    torch.save(earlier, tmp_path / "weights" / "unet.ckpt")

    def end_the_other_run(*args, **options):
        shutil.copytree(whole, tmp_path / "weights", dirs_exist_ok=True)
        return list_cohort(*args, **options)

    monkeypatch.setattr(train, "list_cohort", end_the_other_run)
    run(phantoms, tmp_path, "--resume", "--epochs", 3)
    assert "all 3 epochs are done" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [".pt", ".json"])
def test_a_checkpoint_without_its_weights_is_refused(phantoms, straight, tmp_path, lost, capsys):
    """Once, the run ended well and named weights that did not exist."""
    weights = shutil.copytree(straight / "weights", tmp_path / "weights")
    (weights / f"unet{lost}").unlink()
    if lost == ".json":  # it is in the checkpoint as well
        run(phantoms, tmp_path, "--resume")
        assert read_card(weights / "unet.pt") == read_card(straight / "weights" / "unet.pt")
        return
    message = refused(phantoms, tmp_path, "--resume")
    assert f"{weights / 'unet.pt'}: is missing" in message and "copy it" in message
    assert "weights:" not in capsys.readouterr().out


def test_weights_of_another_run_are_not_resumed(phantoms, straight, tmp_path):
    weights = shutil.copytree(straight / "weights", tmp_path / "a" / "weights")
    card = read_card(weights / "unet.pt")
    other = run(phantoms, tmp_path / "b", "--seed", 1, "--epochs", 3)
    assert not same(load_state(other / "unet.pt"), load_state(weights / "unet.pt"))
    for suffix, said in ((".pt", "is not the file that unet.json"), (".json", "of the same")):
        shutil.copy(other / f"unet{suffix}", weights)
        if suffix == ".json":  # a whole pair, of a later start
            about = read_card(weights / "unet.pt") | {"started": "2001-01-01"}
            (weights / "unet.json").write_text(json.dumps(about))
        assert said in refused(phantoms, tmp_path / "a", "--resume", "--epochs", 4)
    assert card == load_tensors(weights / "unet.ckpt")["card"]


def kill_at(number: int, work) -> None:
    """Do `work` in a process that is killed just before it moves its n-th file into place."""

    def until_killed() -> None:
        moved, replace = [], Path.replace

        def move(path, target):
            moved.append(1)
            if len(moved) == number:
                assert Path(target).suffix == ".ckpt"
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        Path.replace = move
        work()

    child = FORK.Process(target=until_killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("number", [4, 7])
def test_a_killed_run_is_put_right(phantoms, straight, tmp_path, number):
    """Kill it between the weights and the checkpoint of the first or the second epoch."""
    kill_at(number, lambda: run(phantoms, tmp_path, "--epochs", 3, "--keep", "last"))
    weights = tmp_path / "weights"
    resume = ["--resume"] * (weights / "unet.ckpt").exists()
    run(phantoms, tmp_path, "--epochs", 3, "--keep", "last", *resume)
    assert same_run(weights, straight / "weights") and read_card(weights / "unet.pt")["epoch"] == 3
    assert not list(tmp_path.glob("*/.brainseg-*/owner.json")), "nothing is left behind"
    run(phantoms, tmp_path, "--resume")


@pytest.mark.parametrize("name", ["weights/unet.pt", "weights/unet.json", "weights/unet.ckpt",
                                  "logs/args.json"])  # fmt: skip
def test_files_of_other_programs_stay(phantoms, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir()
    if path.suffix == ".json":
        path.write_text('{"args": {"lr": 1}, "model": "unet"}')
    else:
        torch.save({"state_dict": UNet(init_features=4).state_dict()}, path)
    before = path.read_bytes()
    message = refused(phantoms, tmp_path)
    assert f"{path}: is in the way, and was not written by" in message
    assert path.read_bytes() == before


def test_weights_put_in_place_of_ours_are_not_overwritten(phantoms, straight, tmp_path):
    weights = copied(straight, tmp_path)
    before = saved(UNet(init_features=8), weights / "unet.pt").read_bytes()
    assert f"{weights / 'unet.pt'}: is in the way" in refused(phantoms, tmp_path)
    assert (weights / "unet.pt").read_bytes() == before


# Data, folds and weights to start from


def test_cases_without_lesion_are_used_but_not_they_alone(phantoms, tmp_path, capsys):
    images = shutil.copytree(phantoms, tmp_path / "images")
    for path in images.glob("*/*_mask.tif"):
        if path.parent.name in (TRAIN, VALIDATION):
            tifffile.imwrite(path, np.zeros((64, 64), np.uint8))
    weights = run(images, tmp_path / "a")
    assert "validation: none of the 1 true masks has a lesion" in capsys.readouterr().err
    assert TRAIN in read_card(weights / "unet.pt")["cases"]["train"]
    assert all(torch.isfinite(value).all() for value in load_state(weights / "unet.pt").values())
    for path in images.glob("*/*_mask.tif"):
        tifffile.imwrite(path, np.zeros((64, 64), np.uint8))
    message = refused(images, tmp_path / "b")
    assert "has no lesion in its mask, and neither has any other of the 8 training" in message
    assert not contents(tmp_path / "b" / "weights")


def test_masks_that_cannot_be_right_are_said(phantoms, tmp_path, capsys):
    images = shutil.copytree(phantoms, tmp_path / "images")
    brain = np.zeros((64, 64), np.uint8)
    brain[8:56, 8:56] = 255
    for path in images.glob("*/*_mask.tif"):
        tifffile.imwrite(path, brain)
    run(images, tmp_path)
    said = capsys.readouterr().err
    assert "training: the masks of 8 of 8 cases cover more than an eighth" in said
    assert "training: all 8 cases have the same mask" in said
    assert "validation: the masks of 1 of 1 cases" in said
    run(phantoms, tmp_path)
    assert "mask" not in capsys.readouterr().err


def saved(model: UNet, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def test_weight_decay_is_decoupled_from_the_gradient(phantoms, tmp_path):
    """Each of the 4 steps subtracts lr * decay of every weight before Adam's own step."""
    file = saved(UNet(init_features=4), tmp_path / "start.pt")
    options = "--epochs", 1, "--init-weights", file
    plain, decayed = (
        load_state(
            run(phantoms, tmp_path / str(decay), *options, "--weight-decay", decay) / "unet.pt"
        )
        for decay in (0, 100)
    )
    key = "bottleneck.bottleneckconv2.weight"
    shrunk = (1 - 1e-3 * 100) ** 4
    assert decayed[key].norm() / plain[key].norm() == pytest.approx(shrunk, rel=0.02)


def test_fine_tuning_says_what_it_could_not_use(phantoms, tmp_path, monkeypatch, capsys):
    start = UNet(in_channels=1, init_features=4)
    file = saved(start, tmp_path / "start.pt")
    weights = run(phantoms, tmp_path, "--init-weights", file, "--lr", 0)
    said = capsys.readouterr().out
    key = "encoder1.enc1conv1.weight"
    assert f"{file}: not used: {key}; left at random: {key}" in said
    trained = load_state(weights / "unet.pt")
    assert torch.equal(trained["conv.weight"], start.conv.weight)
    assert torch.equal(trained["bottleneck.bottleneckconv2.weight"],
                       start.bottleneck.bottleneckconv2.weight)  # fmt: skip
    assert trained[key].shape == (4, 3, 3, 3)
    file.unlink()
    run(phantoms, tmp_path, "--resume", "--lr", 0, "--epochs", 2)  # no longer needs them


def test_fine_tuning_takes_over_size_and_preprocessing(tmp_path, capsys):
    file = saved(UNet(init_features=4), tmp_path / "start.pt")
    args = settings(["--init-weights", str(file)])
    assert (args.features, args.image_size, args.preprocessing) == (4, 256, 1)  # it has no card
    file.with_suffix(".json").write_text('{"image_size": 96, "preprocessing": 2, "neighbours": 1}')
    parser = train.get_args_parser()
    args = train.get_args(["--init-weights", str(file), "--image-size", "64"], parser)
    assert (args.image_size, args.preprocessing, args.neighbours) == (64, 2, 1)
    lines = cli.summary(parser, args).splitlines()
    assert "image size 64 (given)" in lines
    assert f"preprocessing 2, features 4, neighbours 1 (from the card of {file})" in lines
    assert "model unet, batch size 16, lr 0.002" in lines[-1] and "(by default)" in lines[-1]


def test_fine_tuned_weights_are_used_as_their_start_was(phantoms, tmp_path, capsys):
    """Of the start's fit they have the settings alone, also when resumed and fine-tuned again."""
    file = saved(UNet(init_features=4), tmp_path / "start.pt")
    used = {"threshold": 0.4, "largest_component": False, "min_volume": 200, "tta": True}
    fit = {"features": ["overlap"], "mean": [0.5], "deviation": [1.0], "weights": [0.1]}
    fit |= {"intercept": 0.5, "interval": [-1.0, 1.0]}
    card = {"image_size": 32, "preprocessing": 2, "expected_dsc": used | fit}
    file.with_suffix(".json").write_text(json.dumps(card))
    weights = run(phantoms, tmp_path, "--init-weights", file, "--keep", "last")
    run(phantoms, tmp_path, "--resume", "--epochs", 2)
    again = run(phantoms, tmp_path / "b", "--init-weights", weights / "unet.pt", "--allow-seen")
    for folder in (weights, again):
        card = read_card(folder / "unet.pt")
        assert card["mask_settings"] == used and "expected_dsc" not in card
        assert "mask_settings" not in card["initialised_from"]
        segmenter = Segmenter.from_weights(folder / "unet.pt", device="cpu")
        assert {name: getattr(segmenter, name) for name in used} == used
        assert "this network has no fit" in segmenter.no_expected_dsc
        assert "threshold 0.4" in settings_text(segmenter)
    assert Segmenter.from_weights(weights / "unet.pt", min_volume=0, device="cpu").min_volume == 0
    assert "mask_settings" not in read_card(run(phantoms, tmp_path / "c") / "unet.pt")


def test_the_classic_recipe_is_the_published_one():
    args = settings(["--recipe", "classic", "--loss", "bce-dice"])
    assert (args.features, args.image_size, args.preprocessing, args.lr) == (32, 256, 1, 1e-4)
    assert (args.schedule, args.ema, args.aug_scale, args.loss) == ("constant", 0, 0.05, "bce-dice")
    args = settings([])
    assert (args.features, args.image_size, args.schedule) == (16, 192, "cosine")


def test_classic_recipe_wins_over_a_file_but_not_over_a_card(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("lr: 0.5\nrecipe: classic\n")
    args = settings(["--config", str(file)])
    assert (args.lr, args.loss, args.features) == (0.5, "dice", 32)
    args = settings(["--config", str(file), "--recipe", "classic"])
    assert args.lr == 1e-4
    file = saved(UNet(init_features=4), tmp_path / "start.pt")
    file.with_suffix(".json").write_text('{"image_size": 96, "preprocessing": 2}')
    args = settings(["--recipe", "classic", "--init-weights", str(file)])
    assert (args.features, args.image_size, args.preprocessing) == (4, 96, 2)


def test_a_checkpoint_from_before_the_recipes_is_resumed(straight, tmp_path):
    weights = copied(straight, tmp_path)
    checkpoint = torch.load(weights / "unet.ckpt", weights_only=True)
    checkpoint["args"] |= {"features": None}
    del checkpoint["args"]["recipe"]
    torch.save(checkpoint, weights / "unet.ckpt")
    args = settings(["--resume", "--weights", str(weights), "--epochs", "4"])
    assert (args.features, args.recipe) == (32, None)


def test_start_weights_that_do_not_fit_are_refused(phantoms, tmp_path):
    file = saved(UNet(init_features=8), tmp_path / "wide.pt")
    assert f"{file}: no weight in it fits" in refused(phantoms, tmp_path, "--init-weights", file)
    missing = tmp_path / "missing.pt"
    assert str(missing) in refused(phantoms, tmp_path, "--init-weights", missing)


# Bad input


@pytest.mark.parametrize(
    "more, known",
    [
        (("--loss", "hinge"), ["hinge", "dice", "bce-dice"]),
        (("--model", "vnet"), ["vnet", "unet"]),
        (("--epochs", "0"), ["--epochs"]),
        (("--folds", "5"), ["--fold "]),
        (["--image-size", 40], ["--image-size 40 is not a multiple of 16"]),
        (["--image-size", 16], ["argument --image-size: must be at least 32"]),
        (["--seed", -1], ["--seed"]),
        (["--aug-scale", 1], ["--aug-scale"]),
        (["--drop-sequences", 2], ["--drop-sequences"]),
        (["--weight-decay", -1], ["--weight-decay"]),
        (["--weights", "x.pt"], ["must be a folder"]),
        (["--model", "resnext_unet"], ["--features is for --model unet"]),
    ],
)
def test_unknown_names_and_odd_numbers_are_refused(phantoms, tmp_path, capsys, more, known):
    with pytest.raises(SystemExit) as stop:
        run(phantoms, tmp_path, *more)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in last for word in known)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_refused_before_the_data_are_read(tmp_path):
    message = refused(tmp_path / "nowhere", tmp_path, "--device", "cuda")
    assert "'cuda' is not available" in message


def test_missing_empty_or_unpaired_images_are_refused(phantoms, tmp_path):
    assert f"{tmp_path / 'nowhere'}: no such folder" in refused(tmp_path / "nowhere", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: holds no case" in refused(empty, tmp_path)
    assert not (tmp_path / "weights").exists(), "no folder is made"
    images = shutil.copytree(phantoms, tmp_path / "images")
    for path in images.glob(f"{TRAIN}/*_mask.tif"):
        path.unlink()
    assert f"{images / TRAIN}: has no mask" in refused(images, tmp_path)
    assert not contents(tmp_path / "weights")


def test_a_file_in_place_of_an_output_folder_is_refused(phantoms, tmp_path):
    for name in ("weights", "logs"):
        (tmp_path / name / name).parent.mkdir()
        (tmp_path / name / name).write_text("kept")
        assert str(tmp_path / name / name) in refused(phantoms, tmp_path / name)
        assert (tmp_path / name / name).read_text() == "kept"


def test_resumes_where_the_checkpoint_is_now(straight, tmp_path):
    """A folder of weights may be moved to another place or machine between two runs."""
    moved = copied(straight, tmp_path).rename(tmp_path / "moved")
    before = contents(straight)
    train.main(["--resume", "--weights", str(moved), "--logs", str(tmp_path), "--epochs", "4"])
    assert torch.load(moved / "unet.ckpt")["epoch"] == 4
    assert not (tmp_path / "weights").exists() and contents(straight) == before


def test_fine_tuning_remembers_whom_the_start_was_trained_on(phantoms, tmp_path, capsys):
    run(phantoms, tmp_path / "a", "--epochs", 1, "--folds", 2, "--fold", 0)
    first = tmp_path / "a" / "weights" / "unet.pt"
    second = "--folds", 2, "--fold", 1, "--init-weights", first
    assert "--allow-seen" in refused(phantoms, tmp_path / "b", *second)
    assert not (tmp_path / "b/weights/unet.pt").exists()
    run(phantoms, tmp_path / "b", *second, "--allow-seen")
    assert "the validation DSC is too high" in capsys.readouterr().out
    cards = [json.loads((tmp_path / n / "weights" / "unet.json").read_text()) for n in "ab"]
    assert set(cards[0]["cases"]["train"]) < set(cards[1]["cases"]["train"])
    assert cards[1]["initialised_from"]["recipe"] == cards[0]["recipe"]
    seen = cards[1]["validation_seen"]
    assert sorted(seen) == sorted(cards[0]["cases"]["train"])
    assert cards[1]["validation_dsc"]["seen_by_start_weights"] == len(seen)
    assert "validation_seen" not in cards[0]


def test_first_weights_are_not_overwritten(phantoms, straight, tmp_path, capsys):
    copied(straight, tmp_path)
    with pytest.raises(SystemExit):
        run(phantoms, tmp_path, "--init-weights", tmp_path / "weights" / "unet.pt")
    assert "would be overwritten" in capsys.readouterr().err


def test_weights_that_no_longer_give_a_finite_loss_are_not_kept(phantoms, straight, tmp_path):
    copied(straight, tmp_path)
    before = (tmp_path / "weights" / "unet.ckpt").read_bytes()
    message = refused(phantoms, tmp_path, "--epochs", 1, "--lr", 1e30, "--batch-size", 64)
    assert "not finite" in message
    assert (tmp_path / "weights" / "unet.ckpt").read_bytes() == before


# Compiling, and memory


@pytest.fixture
def graphs(monkeypatch) -> list[str]:
    """Record when the network is compiled, by a compiler that changes nothing and is instant."""
    found, ahead = [], []
    compile_ahead = training.compile_ahead

    def spy(*args):
        ahead.append(1)
        compile_ahead(*args)
        ahead.clear()

    def backend(graph, _):
        found.append("ahead" if ahead else "in a step")
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(training, "compile_ahead", spy)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def test_compiled_ahead_of_the_first_step_and_the_same_weights(phantoms, tmp_path, capsys, graphs):
    """With 64 slices in steps of 24, the last step has 16, compiled ahead as well."""
    more = "--batch-size", 24, "--epochs", 2
    run(phantoms, tmp_path / "plain", *more)
    assert not graphs and "compiled in" not in capsys.readouterr().out
    run(phantoms, tmp_path / "ahead", *more, "--compile")
    assert graphs and set(graphs) == {"ahead"}
    assert re.search(r"^compiled in \d+\.\d s$", capsys.readouterr().out, re.M)
    assert same_run(tmp_path / "plain" / "weights", tmp_path / "ahead" / "weights")


def test_a_compiler_that_fails_is_one_sentence(phantoms, tmp_path, monkeypatch):
    def backend(*_):
        raise RuntimeError("no C++ compiler\nin any of these places")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    message = refused(phantoms, tmp_path, "--compile")
    assert "--compile fails here (no C++ compiler)" in message and "leave it out" in message


def test_out_of_memory_says_what_to_lower(phantoms, straight, tmp_path, monkeypatch):
    weights = copied(straight, tmp_path)
    before = contents(weights)

    def small(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(UNet, "forward", small)
    message = refused(phantoms, tmp_path, "--epochs", 2)
    assert "out of memory at --batch-size 16" in message and "--image-size" in message
    assert contents(weights) == before


# From a notebook


def test_a_run_leaves_nothing_behind_in_its_process(phantoms, straight, tmp_path):
    before = traces()
    assert train.main(flags(phantoms, tmp_path)) is None
    assert train.main(flags(phantoms, straight, "--resume", "--epochs", 3)) is None
    refused(phantoms, tmp_path / "none", "--folds", 50, "--fold", 0)
    assert traces() == before


def test_same_seed_same_weights_in_a_thread_and_without_pictures(phantoms, straight, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(run, phantoms, tmp_path, "--epochs", 3).result()
    assert same_run(again, straight / "weights")
    assert (again / "unet.pt").read_bytes() == (straight / "weights" / "unet.pt").read_bytes()


# What a resumed run takes over and reports


def test_resumes_with_its_own_args_json_as_config(phantoms, straight, tmp_path):
    """Values are compared, not their spelling: 0 in the file equals 0.0 in the checkpoint."""
    shutil.copytree(straight / "weights", tmp_path / "weights")
    config = straight / "logs" / "args.json"
    words = "--resume", "--config", config, "--epochs", 4
    weights = run(phantoms, tmp_path, *words)
    assert load_tensors(weights / "unet.ckpt")["epoch"] == 4


def test_resuming_says_what_else_has_changed(phantoms, tmp_path, capsys):
    run(phantoms, tmp_path, "--schedule", "cosine")
    images = shutil.copytree(phantoms, tmp_path / "images")
    for path in [*images.glob(f"{VALIDATION}/*"), images / VALIDATION]:
        path.rename(path.with_name(path.name.replace(VALIDATION, f"{VALIDATION}_20010101")))
    run(images, tmp_path, "--resume", "--epochs", 2)
    said = capsys.readouterr().out
    assert f"validation cases have changed (new: {VALIDATION}_20010101; gone: {VALIDATION})" in said
    assert "the learning rate jumps from 0 to 0.0005, then falls to 0 at epoch 2" in said


def test_a_setting_newer_than_the_checkpoint_has_its_default(phantoms, straight, tmp_path):
    shutil.copytree(straight / "weights", tmp_path / "weights")
    path = tmp_path / "weights" / "unet.ckpt"
    checkpoint = load_tensors(path)
    del checkpoint["args"]["background"], checkpoint["validation_cases"]
    torch.save(checkpoint, path)
    message = refused(phantoms, tmp_path, "--resume", "--background", 0.5)
    assert "--background 0.1, not 0.5" in message
    run(phantoms, tmp_path, "--resume", "--epochs", 4)


def test_validates_every_few_epochs_and_after_the_last(phantoms, tmp_path):
    weights = run(phantoms, tmp_path, "--epochs", 3, "--validate-every", 2, "--keep", "last")
    events = scalars(tmp_path / "logs")
    assert [event.step for event in events.Scalars("dsc/validation")] == [2, 3]
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3]
    assert read_card(weights / "unet.pt")["epoch"] == 3


def test_log_dir_is_a_name_that_torchrun_leaves_alone(phantoms):
    from torch.distributed.run import parse_args

    words = parse_args(["--nproc-per-node=2", "train.py", "--log-dir", "x"]).training_script_args
    assert train.get_args_parser().parse_args(words).logs == Path("x")
