"""Test the training of a student on the predictions of teachers, beside the true masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import export
import train
from brainseg import predictor
from brainseg.cache import prepare
from brainseg.devices import has_bfloat16
from brainseg.io.layouts import find_case
from brainseg.segmenter import Segmenter
from brainseg.teachers import Teachers
from brainseg.unet import UNet
from brainseg.weights import read_card, save_weights
from dataset import SliceDataset


def test_a_student_learns_from_masks_and_teachers(phantoms, tmp_path, monkeypatch):
    """Its targets lie between both; its card counts what the teachers have seen."""
    shared = ["--image-size", 32, "--features", 2, "--epochs", 1, "--vis-freq", 0, "--keep", "last"]
    shared += ["--images", phantoms, "--cache", tmp_path / "c", "--logs", tmp_path / "l"]
    for seed in (1, 2):
        words = ["--weights", tmp_path / f"t{seed}", "--seed", seed, "--folds", 2, "--fold", 0]
        train.main([str(word) for word in (*shared, *words)])
    teachers = tmp_path / "teachers"
    for seed in (1, 2):
        words = ["--weights", tmp_path / f"t{seed}" / "unet.pt", "--out", teachers]
        export.main([str(word) for word in words])
    words = [*shared, "--teachers", teachers, "--flair-alone", "--weights", tmp_path / "s"]
    words += ["--folds", 2, "--fold", 1]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="no weights"):
        patch.setattr(train, "train_and_validation", None)  # before anything is read
        train.main([str(word) for word in (*words, "--teachers", phantoms)])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "unet.pt").symlink_to(next(teachers.glob("*.pt")))
    for place, taught_by in (
        (teachers, teachers),
        (teachers / "new", teachers),
        (tmp_path / "links", next(teachers.glob("*.pt"))),
    ):
        more = "--weights", place, "--teachers", taught_by
        with pytest.raises(SystemExit, match="unet.pt: would replace or join the teachers; name"):
            train.main([str(word) for word in (*words, *more)])
    with pytest.raises(SystemExit, match="teachers saw patients of . validation cases"):
        train.main([str(word) for word in words])
    train.main([str(word) for word in (*words, "--allow-seen")])
    card = read_card(tmp_path / "s" / "unet.pt")
    assert sorted(card["teachers"]["files"]) == sorted(path.name for path in teachers.glob("*.pt"))
    assert card["recipe"]["teachers"] == "teachers" and len(card["cases"]["train"]) == 12
    kept = list((tmp_path / "c").glob("teachers-*/*.npy"))
    assert len(kept) == 6, "the predictions of each training case"
    words = ["--resume", "--weights", tmp_path / "s", "--epochs", "2"]
    moved = teachers.rename(tmp_path / "moved")
    train.main([str(word) for word in (*words, "--teachers", moved)])
    next(moved.glob("*.pt")).unlink()
    with pytest.raises(SystemExit, match="moved: holds other networks than when the checkpoint"):
        train.main([str(word) for word in (*words[:-1], "9", "--teachers", moved)])


def test_soft_targets_are_half_mask_and_half_prediction(phantoms, tmp_path, monkeypatch):
    case = find_case(phantoms / "phantom_001")
    (volume,) = prepare([case], 32, tmp_path)
    weights, device = tmp_path / "unet.pt", torch.device("cpu")
    save_weights(weights, UNet(init_features=2).state_dict(), {"image_size": 48})
    (target,) = Teachers(weights).soft_targets([volume], device, tmp_path)
    (larger,) = prepare([case], 48, tmp_path, version=1)
    teacher = Segmenter.from_weights(weights, tta=True, device="cpu")
    predicted = teacher.probabilities(torch.from_numpy(larger.images))[:, :1]
    predicted = F.interpolate(predicted, (32, 32), mode="bilinear", antialias=True)[:, 0]
    assert np.allclose(2 * target - volume.mask, predicted.numpy(), atol=2e-3)
    (kept,) = tmp_path.glob("teachers-*/*.npy")
    kept.write_bytes(b"")
    (again,) = Teachers(weights).soft_targets([volume], device, tmp_path)
    assert np.array_equal(again, target), "what is damaged is made again"
    monkeypatch.setattr(predictor.Predictor, "probabilities", None)
    (again,) = Teachers(weights).soft_targets([volume], device, tmp_path)
    assert np.array_equal(again, target), "it was kept"
    monkeypatch.undo()
    monkeypatch.setattr(predictor, "has_bfloat16", lambda device: not has_bfloat16(device))
    Teachers(weights).soft_targets([volume], device, tmp_path)
    assert len(list(tmp_path.glob("teachers-*/*.npy"))) == 2, "each precision is apart"
    data = SliceDataset([volume])
    data.targets = [target]
    lesion = int(volume.mask.sum(axis=(1, 2)).argmax())
    assert data.batch([lesion])[1].dtype == torch.float16
    assert torch.equal(data.sampling_weights(0.1), SliceDataset([volume]).sampling_weights(0.1))
