"""Test weights on disk: what is opened, what is safely refused, and what a card says."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from brainseg import weights
from brainseg.ensemble import load_ensemble
from brainseg.patients import patients_of_card
from brainseg.unet import UNet
from brainseg.weights import (
    HASH,
    ROOT,
    build_model,
    file_hash,
    initialise,
    load_pretrained,
    load_state,
    load_tensors,
    model_from_state,
    read_card,
    save_weights,
    shipped_files,
    shipped_weights,
)


class Evil:
    """Run a shell command when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def narrow(seed: int = 0, **settings: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(**{"init_features": 4} | settings)


def saved(path: Path, content: object = None) -> Path:
    torch.save(narrow().state_dict() if content is None else content, path)
    return path


def shipped(folder: Path, model: UNet, card: dict | None = None) -> Path:
    """Write weights and card named like the shipped ones."""
    path = saved(folder / "new.pt", model.state_dict())
    path = path.rename(folder / f"unet-{file_hash(path)[:8]}.pt")
    path.with_suffix(".json").write_text(json.dumps(card or {"settings": model.settings}))
    return path


@pytest.mark.parametrize("settings", [(3, 1, 4), (1, 1, 4), (4, 2, 8)])
def test_architecture_is_read_from_the_weights(settings):
    names = ("in_channels", "out_channels", "init_features")
    wanted = dict(zip(names, settings, strict=True))
    model = narrow(**wanted)
    name, again = model_from_state(model.state_dict(), "x.pt")
    assert name == "unet" and again.settings == wanted and not again.training
    assert all(torch.equal(a, b) for a, b in
               zip(model.parameters(), again.parameters(), strict=True))  # fmt: skip


def test_half_precision_weights_load(tmp_path):
    full = narrow().state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in full.items()}
    file = saved(tmp_path / "half.pt", half)
    _, model = model_from_state(load_state(file), file)
    for key, value in model.state_dict().items():
        assert value.dtype == full[key].dtype
        assert torch.allclose(value.float(), full[key].float(), rtol=1e-3, atol=1e-6)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="x.pt: weights of another architecture.*known here: unet"):
        model_from_state(nn.Linear(2, 2).state_dict(), "x.pt")
    state = narrow().state_dict()
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="x.pt: does not fit unet: .*extra.weight"):
        model_from_state(state, "x.pt")
    state = narrow().state_dict()
    del state["decoder1.dec1conv1.weight"]
    with pytest.raises(ValueError, match="x.pt: does not fit unet: .*dec1conv1"):
        model_from_state(state, "x.pt")
    with pytest.raises(ValueError, match="'vnet'; known: unet"):
        build_model("vnet")


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"model": {}, "optimizer": {}}, "is a training checkpoint, for --resume"),
        ({"state_dict": {"a": torch.zeros(1)}}, "does not contain a bare state dict"),
        ({}, "does not contain a bare state dict"),
        ([torch.zeros(1)], "does not contain a state dict"),
        ({"a": torch.tensor([1.0, float("nan")])}, "NaN or infinite"),
        ({"a": torch.tensor([float("inf")])}, "NaN or infinite"),
        (nn.Linear(2, 2), "refused"),
    ],
)
def test_anything_but_sound_bare_weights_is_refused(tmp_path, content, reason):
    file = saved(tmp_path / "x.pt", content)
    with pytest.raises(ValueError, match=reason) as error:
        load_state(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"conv.weight": evil}])
@pytest.mark.parametrize("dump", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_that_would_run_code_is_refused_unopened(tmp_path, wrap, dump):
    marker, file = tmp_path / "it-ran", tmp_path / "x.pt"
    dump(wrap(Evil(marker)), file)
    with pytest.raises(ValueError, match="refused") as error:
        load_state(file)
    assert str(file) in str(error.value) and not marker.exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_cut_short_weights_are_refused(tmp_path, share):
    file = saved(tmp_path / "x.pt")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="damaged") as error:
        load_state(file)
    assert str(error.value).startswith(f"{file}: ")


def test_missing_weights_are_named(tmp_path):
    for path in (tmp_path / "x.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
            load_state(path)


def test_hash_in_the_name_of_shipped_weights_is_checked(tmp_path, monkeypatch):
    path = shipped(tmp_path, narrow())
    saved(path, narrow(seed=1).state_dict())
    assert load_state(path).keys() == narrow().state_dict().keys(), "it is not one of ours"
    monkeypatch.setattr(weights, "PUBLISHED", {"unet": Path("/x") / path.name})
    with pytest.raises(ValueError, match=f"{path}: its SHA-256 is not the one in its name"):
        load_tensors(path)


@pytest.mark.parametrize("name", ["unet-48213377.pt", "unet-20240131.pt", "unet-7bf2103a.pt"])
def test_digits_in_a_name_may_mean_anything(tmp_path, name):
    """A job's number, a date, a commit."""
    path = saved(tmp_path / name, narrow().state_dict())
    assert load_state(path).keys() == narrow().state_dict().keys()


@pytest.mark.parametrize(
    "stem, digits",
    [("unet-48213377", None), ("unet-20240131", None), ("unet-2024013a", "2024013a")],
)
def test_digits_alone_are_no_hash(stem, digits):
    found = HASH.search(stem)
    assert (found[1] if found else None) == digits


def test_saving_gives_weights_and_card_and_no_more(tmp_path):
    path = tmp_path / "weights" / "unet.pt"
    save_weights(path, narrow().state_dict(), {"image_size": 32})
    assert read_card(path) == {"image_size": 32, "sha256": file_hash(path)}
    assert model_from_state(load_state(path), path)[0] == "unet"
    assert sorted(p.name for p in path.parent.iterdir()) == ["unet.json", "unet.pt"]


def test_equal_weights_are_equal_files(tmp_path):
    """Once, the name of a temporary file went into the archive."""
    paths = [tmp_path / name for name in ("a/unet.pt", "b/unet.pt", "other.pt")]
    for path in paths:
        save_weights(path, narrow().state_dict(), {})
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_card_of_other_weights_is_refused(tmp_path):
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    save_weights(one, narrow().state_dict(), {"image_size": 32})
    save_weights(other, narrow(seed=1).state_dict(), {"image_size": 64})
    other.with_suffix(".json").replace(one.with_suffix(".json"))
    with pytest.raises(ValueError, match=f"^{one}: is not the file that one.json.*copy both again"):
        load_ensemble([one])


def test_card_is_optional_but_must_be_json(tmp_path):
    path = saved(tmp_path / "x.pt")
    assert read_card(path) == {}
    odd = b'{"cases": {"train": 5}}', b'{"cases": {"train": "TCGA_CS_4944"}}', b"[1]"
    for content in (b"{'image_size': 32}", b"\xff\xfe\x00", b"", *odd):
        path.with_suffix(".json").write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.with_suffix('.json')}: is not the JSON card"):
            read_card(path)


@pytest.mark.parametrize("part", ["mean", "deviation", "weights", "intercept", "interval", "looks"])
def test_a_card_whose_fit_lacks_a_part_is_refused(tmp_path, part):
    """Once, a KeyError ended the run when the first mask was rated."""
    path = saved(tmp_path / "x.pt")
    fit = {"features": ["kept"], "mean": [0.9], "deviation": [0.1], "weights": [0.1]}
    looks = {"names": ["head_share"], "mean": [0.4], "deviation": [0.1], "usual": 1.4}
    fit |= {"intercept": 0.8, "interval": [-0.4, 0.3], "looks": looks}
    path.with_suffix(".json").write_text(json.dumps({"expected_dsc": fit}))
    assert read_card(path)["expected_dsc"] == fit
    if part == "looks":
        looks["deviation"] = []
    else:
        del fit[part]
    path.with_suffix(".json").write_text(json.dumps({"expected_dsc": fit}))
    with pytest.raises(ValueError, match="is not the JSON card of x.pt"):
        read_card(path)


@pytest.mark.parametrize(
    "part, value",
    [("weights", float("nan")), ("weights", "0.1"), ("deviation", 0.0), ("interval", None)],
)
def test_a_card_whose_fit_has_no_numbers_is_refused(tmp_path, part, value):
    """An expected DSC of NaN would be below no limit, and warn of nothing."""
    path = saved(tmp_path / "x.pt")
    fit = {"features": ["kept"], "mean": [0.9], "deviation": [0.1], "weights": [0.1]}
    fit |= {"intercept": 0.8, "interval": [-0.4, 0.3]}
    fit[part][0] = value
    path.with_suffix(".json").write_text(json.dumps({"expected_dsc": fit}))
    with pytest.raises(ValueError, match="is not the JSON card of x.pt"):
        read_card(path)


def test_initialise_names_what_it_did_not_load():
    model = narrow(in_channels=1)
    before = model.state_dict()["encoder1.enc1conv1.weight"].clone()
    with pytest.MonkeyPatch.context() as patch:
        start = narrow(seed=1).state_dict() | {"head.weight": torch.zeros(2)}
        patch.setattr(weights, "load_state", lambda _: start)
        unused, untouched = initialise(model, "x.pt")
    assert unused == ["encoder1.enc1conv1.weight", "head.weight"]
    assert untouched == ["encoder1.enc1conv1.weight"]
    assert torch.equal(model.state_dict()["encoder1.enc1conv1.weight"], before)
    assert torch.equal(model.state_dict()["conv.weight"], start["conv.weight"])


def test_shipped_weights_are_found_by_name_and_hash(tmp_path, monkeypatch):
    path = shipped(tmp_path, narrow())
    for which in ("SHIPPED", "PUBLISHED"):
        monkeypatch.setattr(weights, which, {"unet": path})
    assert shipped_weights("unet") == path
    with pytest.raises(FileNotFoundError, match="no pretrained weights for 'resnext_unet'"):
        shipped_weights("resnext_unet")
    model = load_pretrained("unet", in_channels=3, out_channels=1, init_features=4)
    assert not model.training
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path}: is missing; fetch"):
        shipped_weights("unet")


def test_shipped_weights_leave_the_folder_of_trainings_to_these():
    """Else `--weights weights/` would be another network than the one that train.py wrote there."""
    folders = {path.parent.relative_to(ROOT / "weights") for path in shipped_files()}
    assert len(folders) == 3 and Path() not in folders


@pytest.mark.parametrize("odd", [{"in_channels": 1}, {"out_channels": 2}, {"init_features": 8}])
def test_pretrained_of_another_shape_is_refused_before_loading(tmp_path, monkeypatch, odd):
    def opened(*_, **__):
        raise AssertionError("weights were opened")

    monkeypatch.setattr(weights, "PUBLISHED", {"unet": shipped(tmp_path, narrow())})
    for name in ("load_state", "load_tensors"):
        monkeypatch.setattr(weights, name, opened)
    monkeypatch.setattr(torch, "load", opened)
    ((key, value),) = odd.items()
    with pytest.raises(ValueError, match=f"{key}=.*not {value}.*pretrained=False"):
        load_pretrained("unet", **{"in_channels": 3, "out_channels": 1, "init_features": 4} | odd)


def test_weights_that_come_with_the_project_are_sound():
    paths = weights.shipped_files()
    for path in paths:
        name, model = model_from_state(load_state(path), path)
        card = read_card(path)
        assert path.name.startswith(f"{name}-") and card["settings"] == model.settings
        assert card["cases"]["train"] and card["image_size"] % 16 == 0
    settings = {"in_channels": 3, "out_channels": 1, "init_features": 32}
    assert load_pretrained("unet", **settings).settings == settings
    assert sum(path.stat().st_size for path in paths) < 40 << 20


def test_no_card_names_a_patient_as_any_cohort_may():
    """A patient01 of another cohort would count as trained on, and be left out of scores."""
    for file in weights.shipped_files():
        patients = patients_of_card(read_card(file), "train")
        assert patients and not [name for name in patients if name.startswith("patient")]
