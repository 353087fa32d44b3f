"""Test the torch.hub entries, from this repository and from anywhere else."""

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from brainseg import weights
from brainseg.phantom import make_volume
from brainseg.unet import UNet

ROOT = Path(weights.__file__).resolve().parents[1]


def load(entry: str, **settings):
    return torch.hub.load(str(ROOT), entry, source="local", **settings)


@pytest.fixture
def own_weights(tmp_path, monkeypatch) -> Path:
    """Replace the shipped weights by narrow ones: (3, 1, 4), 32 x 32."""
    torch.manual_seed(0)
    model = UNet(init_features=4)
    torch.save(model.state_dict(), tmp_path / "new.pt")
    digits = hashlib.sha256((tmp_path / "new.pt").read_bytes()).hexdigest()[:8]
    path = (tmp_path / "new.pt").rename(tmp_path / f"unet-{digits}.pt")
    path.with_suffix(".json").write_text(json.dumps({"settings": model.settings, "image_size": 32}))
    for which in ("SHIPPED", "PUBLISHED"):
        monkeypatch.setattr(weights, which, {"unet": path})
    return path


def test_only_the_entries_are_listed_and_explained(monkeypatch):
    # `list` and `help` do not support a local source: replace only the download.
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *_, **__: str(ROOT))
    assert sorted(torch.hub.list("owner/repository")) == ["resnext_unet", "segmenter", "unet"]
    for entry, words in {"unet": "pretrained", "segmenter": "boolean mask"}.items():
        assert words in torch.hub.help("owner/repository", entry)


def test_the_bare_network_needs_only_torch():
    code = (
        "import sys; sys.modules['numpy'] = None; import hubconf\n"
        "hubconf.unet(pretrained=True); print(hubconf.dependencies)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['torch']\n", done.stderr


def test_bare_network():
    model = load("unet", pretrained=False, init_features=4, in_channels=1, out_channels=2)
    assert model(torch.zeros(2, 1, 32, 48)).shape == (2, 2, 32, 48)
    standard = load("unet", in_channels=3, out_channels=1, init_features=32, pretrained=False)
    assert sum(p.numel() for p in standard.parameters()) == 7_763_041


STRANGERS = sorted(
    {path.stem for folder in (ROOT, ROOT / "brainseg") for path in folder.glob("[!_]*.py")}
)
ORDERS = ["strangers ours", "ours strangers", "second ours", "ours second"]
# Somebody's program: `ours` loads both entries, `strangers` modules of that program, `second`
# another hub repository. Each must get its own modules, whatever the order. Every order runs in a
# separate process, forked before any of them is loaded, so PyTorch is imported only once.
PROGRAM = f"""
import importlib, os, pickle, sys, traceback
import numpy as np, torch, torch.hub, scipy.ndimage

def ours():
    model = torch.hub.load({str(ROOT)!r}, "unet", source="local", init_features=4)
    options = {{"device": "cpu", "image_size": 32}}
    return model, torch.hub.load({str(ROOT)!r}, "segmenter", source="local", **options)

def strangers():
    for name in {STRANGERS}:
        assert importlib.import_module(name).OWN, name

def second():
    assert torch.hub.load("second", "entry", source="local") == ("their unet", "their utils")

def check(steps):
    for step in steps:
        loaded = globals()[step]()
        if step == "ours":
            model, segmenter = loaded
    assert {str(ROOT)!r} not in sys.path
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32)
    again, (network, *_) = pickle.loads(pickle.dumps(model)), segmenter.model.networks
    assert type(again) is type(model) is type(network)
    volume = np.random.default_rng(0).integers(0, 255, (2, 48, 40, 3), np.uint8)
    assert segmenter(volume).shape == (2, 48, 40)

for order in {ORDERS}:
    child = os.fork()
    if child == 0:
        try:
            check(order.split())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(order)
"""


def test_loads_beside_other_modules_of_the_same_names(tmp_path):
    for name in STRANGERS:
        (tmp_path / f"{name}.py").write_text("OWN = True\n")
    repository = tmp_path / "second"
    repository.mkdir()
    for name in ("unet", "utils"):
        (repository / f"{name}.py").write_text(f"NAME = 'their {name}'\n")
    (repository / "hubconf.py").write_text(
        "import unet, utils\n\n\ndef entry():\n    return unet.NAME, utils.NAME\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-u", "-c", PROGRAM],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line in ORDERS] == ORDERS, done.stderr


def test_a_second_checkout_is_refused(tmp_path):
    """Its hubconf.py would otherwise run with the package, and the weights, of the first."""
    for name in ("hubconf.py", "brainseg"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert torch.hub.load(str(tmp_path), "unet", source="local", init_features=4), "the same files"
    (tmp_path / "hubconf.py").unlink()
    shutil.copy(ROOT / "hubconf.py", tmp_path)
    said = f"{tmp_path} cannot be loaded: .* of {ROOT} is loaded already; restart Python"
    with pytest.raises(ImportError, match=said):
        torch.hub.load(str(tmp_path), "unet", source="local", init_features=4)
    assert str(tmp_path) not in sys.path


def test_pretrained_checks_the_hash_and_the_channels(own_weights):
    model = load("unet", pretrained=True, init_features=4)
    assert not model.training
    expected = torch.load(own_weights, weights_only=True)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="in_channels=3, not 1"):
        load("unet", pretrained=True, init_features=4, in_channels=1)
    own_weights.write_bytes(own_weights.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="SHA-256"):
        load("unet", pretrained=True, init_features=4)


def check_segmenter(segmenter) -> None:
    volume, _ = make_volume(0, slices=6, size=48)
    before = volume.copy()
    mask = segmenter(volume[:, :, :40])
    assert mask.dtype == bool and mask.shape == (6, 48, 40)
    assert not segmenter.model.training, "batch norm must not learn from what it segments"
    segmenter.model.train()
    assert np.array_equal(segmenter(volume[:, :, :40]), mask), "whatever mode it was left in"
    assert np.array_equal(volume, before)
    assert not segmenter(np.zeros_like(volume)).any()
    with pytest.raises(ValueError, match="2 channel.*trained on 3"):
        segmenter(volume[..., :2])


def test_segmenter_takes_a_raw_volume(own_weights):
    segmenter = load("segmenter", device="cpu", threshold=0.4)
    assert segmenter.image_size == 32 and segmenter.threshold == 0.4
    volume, _ = make_volume(0, slices=4, size=48)
    assert np.array_equal(segmenter(torch.from_numpy(volume)), segmenter(volume.tolist()))
    learned = torch.from_numpy(volume).bfloat16().requires_grad_()
    assert np.array_equal(segmenter(learned), segmenter(learned.detach().float().numpy()))
    with pytest.raises(ValueError, match=r"masked array .* give array.filled\(0\)"):
        segmenter(np.ma.masked_less(volume, 5))
    with pytest.raises(ValueError, match="threshold 50: "):
        load("segmenter", device="cpu", threshold=50)
    with pytest.raises(FileNotFoundError, match="'resnext_unet', only for unet"):
        load("segmenter", network="resnext_unet")
    check_segmenter(segmenter)


def test_flair_alone_stands_in_for_the_others(own_weights):
    segmenter = load("segmenter", device="cpu", threshold=0.4)
    volume, _ = make_volume(0, slices=4, size=48)
    flair = volume[..., 1]
    mask = segmenter(volume[..., [1, 1, 1]])
    assert mask.any() and not mask.all()
    for alone in (flair, flair[..., None], torch.from_numpy(flair)):
        assert np.array_equal(segmenter(alone), mask)


def test_assess_gives_all_that_is_known_of_a_volume(own_weights):
    fit = {"features": ["confidence"], "mean": [0.5], "deviation": [0.5], "weights": [0.1]}
    fit |= {"intercept": 0.5, "interval": [-0.2, 0.2], "threshold": 0.4, "min_volume": 0}
    card = json.loads(own_weights.with_suffix(".json").read_text())
    own_weights.with_suffix(".json").write_text(json.dumps(card | {"expected_dsc": fit}))
    segmenter = load("segmenter", device="cpu")
    volume, _ = make_volume(0, slices=4, size=48)
    result = segmenter.assess(volume, spacing=(5, 0.5, 0.5))
    assert np.array_equal(result.mask, segmenter(volume)) and result.mask.any()
    assert result.ml == pytest.approx(result.mask.sum() * 5 * 0.25 / 1000)
    assert result.probabilities.shape == volume.shape[:3]
    assert result.probabilities.dtype == np.float32
    assert (result.probabilities[result.mask] >= 0.4).all()
    assert 0 <= result.expected_dsc_low < result.expected_dsc < result.expected_dsc_high <= 1
    assert any("probably poor" in warning for warning in result.warnings)
    assert not any("confined" in warning for warning in result.warnings)
    bare = segmenter.assess(volume[..., 1])
    assert bare.ml is None and bare.mask.any()
    wide = segmenter.assess(volume, spacing=torch.tensor([5, 1, 0.5]))
    assert np.array_equal(wide.mask, segmenter(volume, aspect=2))
    other = load("segmenter", device="cpu", threshold=0.45).assess(volume)
    assert other.expected_dsc is None and other.expected_dsc_low is None


def test_an_odd_volume_is_warned_of(own_weights):
    segmenter = load("segmenter", device="cpu", version=2)
    volume, _ = make_volume(0, slices=8, size=64)
    volume[..., 0] = np.roll(volume[..., 0], 30, axis=1)
    with pytest.warns(UserWarning, match="unusual input: ") as warned:
        segmenter(volume)
    said = " ".join(str(warning.message) for warning in warned)
    assert "pre-contrast covers a different region from FLAIR" in said


def test_assess_warns_of_a_mask_at_an_end_of_the_scan(own_weights, monkeypatch):
    volume, _ = make_volume(0, slices=4, size=48)
    mask = np.zeros(volume.shape[:3], bool)
    mask[-1, 20:24, 20:24] = True
    monkeypatch.setattr("brainseg.segmenter.to_mask", lambda *_: mask)
    warnings = load("segmenter", device="cpu").assess(volume).warnings
    assert "the mask is confined to the last slices of the scan; look at it" in warnings


@pytest.mark.parametrize(
    "shape, said",
    [((48, 40), r"one whole scan \(slice\[None\]"), ((1, 4, 48, 40, 3), "one whole scan"),
     ((48, 40, 3), r"looks like one slice with its channels.* slice\[None\]"),
     ((4, 3, 48, 40), r"numpy.moveaxis\(volume, 1, -1\)"),
     ((3, 4, 48, 40), r"numpy.moveaxis\(volume, 0, -1\)"),
     ((48, 40, 4), "move the axis of the slices to the front"),
     ((4, 48, 40, 4), "4 channel.*trained on 3.*--channels")],
)  # fmt: skip
def test_other_shapes_are_refused_with_the_remedy(own_weights, shape, said):
    segmenter = load("segmenter", device="cpu")
    for call in (segmenter, segmenter.assess):
        with pytest.raises(ValueError, match=said):
            call(np.ones(shape, np.uint8))


@pytest.mark.parametrize("spacing", [5, (1, 1), (5, 0, 1), (5, 1, float("nan"))])
def test_a_spacing_that_is_none_is_refused(own_weights, spacing):
    with pytest.raises(ValueError, match="must be three lengths in mm"):
        load("segmenter", device="cpu").assess(np.ones((4, 48, 40)), spacing)


def test_growth_of_arrays(own_weights):
    segmenter = load("segmenter", device="cpu", threshold=0.4)
    volume, _ = make_volume(0, slices=4, size=48)
    first, later = ("20200302", volume, (5, 1, 1)), (datetime.date(2021, 4, 12), volume, (5, 1, 1))
    with pytest.warns(UserWarning, match="scan 1 and scan 3 are both of 2020-03-02"):
        rows = segmenter.growth([first, later, first])
    assert [row["days"] for row in rows] == [0, 0, 406]
    assert rows[2]["lesion_ml"] > 0 and rows[2]["percent_since_first"] == pytest.approx(0)
    assert rows[2]["mm_per_year"] == pytest.approx(0, abs=1e-9)
    for scans, said in [
        ([first], "two scans or more, not 1"),
        ([first, ("2021-02-30", volume, (5, 1, 1))], "not in the calendar"),
        ([first, ("2021-02-03", volume)], "a scan is not .date, volume, spacing."),
        ([first, ("2021-02-03", volume, None)], "scan 2: has no spacing"),
        ([first, ("2021-02-03", volume, (5, 1))], "three lengths"),
    ]:
        with pytest.raises(ValueError, match=said):
            segmenter.growth(scans)


def test_without_shipped_weights_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", {})
    monkeypatch.setattr(weights, "PUBLISHED", {})
    for entry, settings in (("unet", {"pretrained": True}), ("segmenter", {})):
        with pytest.raises(FileNotFoundError, match="no pretrained weights for 'unet'"):
            load(entry, **settings)


def test_shipped_weights_through_the_hub():
    model = load("unet", in_channels=3, out_channels=1, init_features=32, pretrained=True)
    assert not model.training
    with pytest.raises(ValueError, match="in_channels=3, not 1"):
        load("unet", in_channels=1, pretrained=True)
    segmenter = load("segmenter", device="cpu")
    assert segmenter(make_volume(0, slices=4, size=48)[0]).shape == (4, 48, 48)
