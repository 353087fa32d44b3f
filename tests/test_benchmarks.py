"""Test benchmarks that will be run again, at their smallest."""

import numpy as np
import pytest
import SimpleITK
from conftest import make_weights

from benchmarks import gpu, robustness, student
from benchmarks.timing import Measured
from brainseg.io.layouts import list_cases
from brainseg.phantom import make_volume
from brainseg.splits import outside_test


def test_gpu_benchmark_goes_on_after_a_failure(phantoms, tmp_path, monkeypatch, capsys):
    def measure(command):
        if "--compile" in command:
            raise ValueError("train.py failed; see above")
        return Measured(1, 0, "epoch 1/2  9.0 images/s\nepoch 2/2  12.5 images/s\n")

    monkeypatch.setattr(gpu, "measure", measure)
    weights = make_weights(tmp_path / "unet.pt", trained_on=[])
    monkeypatch.setattr(gpu, "shipped_weights", lambda model: weights)
    monkeypatch.setattr(gpu, "PROVIDERS", {})
    words = ["--images", phantoms, "--device", "cpu", "--shapes", "2x32", "--cache", tmp_path]
    gpu.main([str(word) for word in words])
    rows = capsys.readouterr().out.splitlines()
    assert "| train.py, 2x32, --amp | 12.5 |" in rows
    assert "| train.py, 2x32, --amp --compile | failed: train.py failed; see above |" in rows
    (speed,) = [row.split("|")[2] for row in rows if row.startswith("| PyTorch, float32 |")]
    assert float(speed) > 0


def test_robustness(phantoms, tmp_path, monkeypatch, capsys):
    weights = make_weights(tmp_path / "unet.pt", trained_on=[])
    words = ["x", "--images", phantoms, "--weights", weights, "--device", "cpu"]
    words += ["--subset", "validation", "--only", "skull taken away"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    robustness.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[-2:]] == ["| as published", "| skull taken away"]


def test_a_student_and_its_teachers_are_compared_on_patients_that_none_has_seen(
    phantoms, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(student.CHANGES, "skull taken away", np.copy)  # little is left of phantoms
    (tmp_path / "teachers").mkdir()
    names = [source.name for source in outside_test(list_cases(phantoms))]
    train = names[:-3]
    make_weights(tmp_path / "teachers" / "one.pt", trained_on=train)
    make_weights(tmp_path / "teachers" / "two.pt", trained_on=train[:5])
    make_weights(tmp_path / "unet.pt", trained_on=train)
    flair = SimpleITK.GetImageFromArray(make_volume(1, 8, 96, False)[0][..., 1])
    (tmp_path / "healthy").mkdir()
    for name in ("mary", "martha"):
        SimpleITK.WriteImage(flair, str(tmp_path / "healthy" / f"{name}.nii.gz"))
    words = ["x", "--images", phantoms, "--teachers", tmp_path / "teachers"]
    words += ["--student", tmp_path / "unet.pt"]
    words += ["--healthy", tmp_path / "healthy", "--hold-back", "martha"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    student.main()
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "3 patients" and rows[4].startswith("| as published | ")
    assert rows[-1].startswith("| people without a tumour | ") and " of 1 empty" in rows[-1]
    make_weights(tmp_path / "unet.pt", trained_on=names)
    with pytest.raises(ValueError, match="every case was seen by a network"):
        student.main()


def test_a_mask_without_the_skull_is_compared_with_what_is_left(monkeypatch):
    """A mask of all that is bright finds all that is left, and nothing of what was taken away."""
    volume, truth = np.ones((4, 8, 8, 3)), np.zeros((4, 8, 8), bool)
    truth[:, 2:6] = True
    halved = volume.copy()
    halved[:, 4:] = 0
    monkeypatch.setattr(student, "without_skull", lambda volume: halved)
    monkeypatch.setitem(student.CHANGES, "skull taken away", lambda volume: halved)
    monkeypatch.setattr(student, "segment", lambda _, volume: volume.any(axis=-1) & truth)
    scores = student.scores_of(None, volume, truth)
    assert scores["as published"] == scores[student.LEFT] == scores[student.CUT] == 1
    assert scores["skull taken away"] == pytest.approx(2 / 3)
