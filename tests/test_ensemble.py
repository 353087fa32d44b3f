"""Test several networks as one, and the expected DSC of a mask."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_weights
from skimage.measure import label
from test_inference import infer

import evaluate
import export
from brainseg import quality as rating
from brainseg import weights as weights_module
from brainseg.appearance import LOOKS
from brainseg.ensemble import Ensemble, average, load_ensemble, weights_files
from brainseg.io.layouts import find_case
from brainseg.phantom import make_volume
from brainseg.quality import expected_dsc, fit_expected_dsc, quality, quality_warnings, recentre
from brainseg.segmenter import Segmenter, keep_components, least_voxels
from brainseg.unet import UNet
from brainseg.weights import load_pretrained, read_card, shipped_weights

NAMES = [f"phantom_{k:03d}" for k in range(12)]


def write_member(path: Path, seed: int, trained_on=(), **card) -> Path:
    """Write a narrow random network and its card."""
    torch.manual_seed(seed)
    model = UNet(card.pop("in_channels", 3), init_features=card.pop("features", 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    about = {"image_size": 32, "preprocessing": 2, "cases": {"train": list(trained_on)}}
    path.with_suffix(".json").write_text(json.dumps(about | card))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write three networks that disagree, each trained on four of the twelve phantoms."""
    folder = tmp_path_factory.mktemp("weights") / "unet-folds"
    for k in range(3):
        write_member(folder / f"fold{k}.pt", k, NAMES[4 * k : 4 * k + 4])
    make_weights(folder / "fold0.pt", trained_on=NAMES[:4])
    (folder / "README.md").write_text("Where they are from.\n")
    return folder


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return make_volume(5, slices=6, size=60)[0]


def opened(weights: object, **options) -> Segmenter:
    return Segmenter.from_weights(weights, **{"device": "cpu", "amp": False, **options})


# Several networks as one


@pytest.mark.parametrize("options", [{}, {"tta": True}], ids=str)
def test_an_ensemble_averages_probabilities(folder, volume, options):
    files = sorted(folder.glob("*.pt"))
    images, _ = opened(files[0]).preprocess(volume)
    each = torch.stack([opened(file, **options).probabilities(images) for file in files])
    for weights in (folder, files, list(map(str, files))):
        made = opened(weights, **options).probabilities(images)
        assert made.shape == (6, 2, 32, 32) and made.dtype == torch.float32
        torch.testing.assert_close(made[:, :1], each.mean(dim=0), atol=1e-6, rtol=0)
    if not options:
        spread = each.std(dim=0, correction=0)
        torch.testing.assert_close(made[:, 1:], spread, atol=1e-5, rtol=0)
    assert each.std(dim=0).max() > 0.1, "so that equality means something"


def test_a_folder_of_one_is_that_network(folder, volume, tmp_path):
    for suffix in (".pt", ".json"):
        shutil.copy(folder / f"fold0{suffix}", tmp_path)
    alone = opened(tmp_path)
    images, _ = alone.preprocess(volume)
    assert alone.probabilities(images).shape[1] == 1
    assert torch.equal(
        alone.probabilities(images), opened(folder / "fold0.pt").probabilities(images)
    )


def test_the_card_of_an_ensemble_names_every_patient(folder):
    _, card = load_ensemble(weights_files(folder))
    assert card["cases"]["train"] == NAMES and card["model"] == "unet"


def test_settings_of_mask_stay_if_only_the_fits_differ(tmp_path):
    """Once, two networks fitted one by one were averaged without mirroring, and without a word."""
    settings = {"threshold": 0.4, "tta": True, "largest_component": False, "min_volume": 9}
    files = []
    for k in range(3):
        fit = settings | {"min_volume": 9 if k < 2 else 0, "intercept": float(k)}
        files.append(write_member(tmp_path / f"{k}.pt", k, expected_dsc=fit))
    both = opened(files[:2])
    assert (both.threshold, both.tta, both.largest_component) == (0.4, True, False)
    assert both.min_volume == 9 and not any("differ in" in note for note in both.notes)
    said = "the cards of these networks differ in min volume: 0 is used"
    assert any(said in note for note in opened(files).notes)
    assert not any("differ in" in note for note in opened(files, min_volume=5).notes)


@pytest.mark.parametrize(
    "card, said",
    [
        ({"preprocessing": 1}, "has preprocessing 1, but fold0.pt has 2"),
        ({"image_size": 48}, "has image size 48, but fold0.pt has 32"),
        ({"neighbours": 1}, "has neighbours 1, but fold0.pt has 0"),
        ({"in_channels": 1}, "has in_channels 1, but fold0.pt has 3"),
    ],
    ids=str,
)
def test_members_that_disagree_are_refused(folder, tmp_path, card, said):
    other = write_member(tmp_path / "other.pt", 9, **card)
    with pytest.raises(ValueError, match=said) as error:
        opened([folder / "fold0.pt", other])
    assert str(other) in str(error.value)


def test_a_foreign_file_in_the_folder_is_refused(phantoms, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "folds")
    for name, content, said in [
        ("x.pt", b"<html>", "is not a weights file, or is damaged"),
        ("x.pth", b"PK", "is not a weights file of this project"),
    ]:
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=said) as error:
            opened(copy)
        assert str(copy / name) in str(error.value)
        (copy / name).unlink()
    (copy / "fold1.json").unlink()
    with pytest.raises(ValueError, match="fold1.pt: has no card"):
        opened(copy)
    empty = tmp_path / "empty"
    empty.mkdir()
    message = infer(phantoms, tmp_path, empty)
    assert message.startswith(f"error: {empty}: no weights (.pt) in this folder")


ONE = {"model": "unet", "loss": "bce-dice", "fold": 0, "seed": 42}


def test_a_minimum_volume_is_the_same_on_every_grid(folder):
    """It was the number of voxels, whatever their size: 0.1 ml on a fine grid."""
    assert least_voxels(200, None) == least_voxels(200, (5, 1, 1)) == 200
    assert least_voxels(200, (1, 1, 1)) == 1000 and least_voxels(200, (6, 2, 1)) == 83
    segmenter = opened(folder, threshold=0.3, largest_component=False)
    images, frame = segmenter.preprocess(make_volume(1, 8, 64)[0])
    probabilities = segmenter.probabilities(images)
    sizes = np.bincount(label(segmenter.mask_of(probabilities, frame)).ravel())[1:]
    segmenter.min_volume = int(sizes.max())
    assert segmenter.mask_of(probabilities, frame).sum() >= sizes.max()
    assert not segmenter.mask_of(probabilities, frame, (5, 0.5, 0.5)).any()
    assert not segmenter.segmentation_of(probabilities, frame, (5, 0.5, 0.5)).mask.any()


def test_networks_with_different_fits_have_no_expected_dsc_and_say_so(folder, tmp_path):
    """They were used with the defaults, silently: as where one network joins those of folds."""
    copy = shutil.copytree(folder, tmp_path / "folds")
    for k, threshold in enumerate((0.4, 0.4, 0.6)):
        path = copy / f"fold{k}.json"
        fit = fit_expected_dsc(*masks_of(40)) | {"threshold": threshold}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"expected_dsc": fit}))
    segmenter = opened(copy)
    assert segmenter.threshold == 0.5 and not segmenter.expected_dsc_fit
    assert "have different fits" in segmenter.no_expected_dsc
    assert segmenter.no_expected_dsc in segmenter.notes[-1]
    (copy / "fold2.pt").unlink()
    assert opened(copy).threshold == 0.4 and opened(copy).no_expected_dsc == ""


def test_a_folder_means_its_own_files_or_those_of_its_folders(folder, tmp_path):
    """After one training into weights/, seven networks were averaged without a note."""
    shutil.copytree(folder, tmp_path / "unet-folds")
    shutil.copytree(folder, tmp_path / ".ipynb_checkpoints")
    files = [tmp_path / "unet-folds" / f"fold{k}.pt" for k in range(3)]
    assert weights_files(tmp_path) == files
    (said,) = opened(tmp_path).notes
    assert said == "3 networks are averaged: " + ", ".join(map(str, files))
    trained = write_member(tmp_path / "unet.pt", 7)
    assert weights_files(tmp_path) == [trained] and not opened(tmp_path).notes


@pytest.mark.parametrize(
    "card, said",
    [
        ({"settings": {"init_features": 32}}, "has init features 32, but unet.pt 16"),
        ({"recipe": {"model": "resnext_unet"}}, "has model resnext_unet, but unet.pt unet"),
        ({"recipe": {"loss": "dice"}}, "has loss dice, but unet.pt bce-dice"),
        ({"recipe": {"fold": 1, "seed": 43}, "started": "2026-01-01"}, None),
        ({"recipe": ONE, "started": "2026-01-01"}, "is of the same training as unet.pt"),
    ],
    ids=str,
)
def test_networks_of_two_kinds_in_a_folder_are_not_averaged(tmp_path, card, said):
    """An export beside its weights is the same network once more."""
    about = {"settings": {"init_features": 16}, "recipe": ONE, "started": "2026-01-01"}
    first = write_member(tmp_path / "unet.pt", 0, **about)
    other = write_member(tmp_path / "zzz.pt", 1, **about | card)
    assert weights_files([first, other]) == [first, other], "who names them wants them"
    if said:
        with pytest.raises(ValueError, match=f"^{other}: {said}; .*: name the file"):
            weights_files(tmp_path)
    else:
        assert weights_files(tmp_path) == [first, other]


def test_a_file_given_twice_is_refused(folder):
    with pytest.raises(ValueError, match="fold0.pt: is given twice"):
        opened([folder / "fold0.pt", folder])


def test_small_components_are_dropped(folder, volume):
    mask = np.zeros((2, 8, 8), dtype=bool)
    mask[0, 0, :2] = mask[0, 4, :3] = True
    assert keep_components(mask, largest=False, min_volume=3).sum() == 3
    assert keep_components(mask, largest=False).sum() == 5
    assert not keep_components(mask, largest=True, min_volume=4).any()
    assert not opened(folder, threshold=0.3, min_volume=10**6)(volume).any()


@pytest.mark.parametrize(
    "name, fitted, given", [("threshold", 0.4, 0.3), ("min_volume", 9, 0), ("tta", True, False)]
)
def test_masks_are_made_like_those_of_the_fit_by_default(tmp_path, name, fitted, given):
    file = write_member(tmp_path / "a.pt", 0, expected_dsc={name: fitted})
    assert getattr(opened(file), name) == getattr(opened(file, **{name: None}), name) == fitted
    assert getattr(opened(file, **{name: given}), name) == given


# What comes with the project


def test_the_folder_is_shipped_but_unet_stays_one(folder, monkeypatch):
    monkeypatch.setattr(weights_module, "SHIPPED", {"unet": folder})
    assert shipped_weights("unet") == folder
    settings = {"settings": {"in_channels": 3, "out_channels": 1, "init_features": 4}}
    monkeypatch.setattr(weights_module, "read_card", lambda _: settings)
    assert isinstance(load_pretrained("unet", **settings["settings"]), UNet)


# Export


def test_every_member_is_exported_with_its_card(folder, tmp_path):
    export.main(["--weights", str(folder), "--out", str(tmp_path / "out")])
    files = sorted((tmp_path / "out").glob("unet-*.pt"))
    assert len(files) == 3
    seen = [read_card(file)["cases"]["train"] for file in files]
    assert sorted(seen) == [NAMES[:4], NAMES[4:8], NAMES[8:]]
    assert isinstance(opened(tmp_path / "out").model, Ensemble)


# Expected DSC


def masks_of(cases: int, seed: int = 0) -> tuple[list[dict], list[float]]:
    """Return features and DSC of masks whose DSC follows their confidence within 0.03."""
    rng, features, dsc = np.random.default_rng(seed), [], []
    for _ in range(cases):
        certain = rng.uniform(0.5, 1)
        probabilities = np.full((4, 16, 16), 0.01, dtype=np.float32)
        probabilities[1:3, 4:10, 4:10] = certain
        features.append(quality(probabilities, probabilities >= 0.5))
        dsc.append(float(np.clip(certain - 0.05 + rng.normal(0, 0.03), 0, 1)))
    return features, dsc


def test_quality_by_hand():
    probabilities = np.zeros((2, 4, 5), dtype=np.float32)
    probabilities[0, 0, :4] = 1, 1, 0.5, 0.5
    made = quality(probabilities, probabilities > 0.5)
    assert made["overlap"] == pytest.approx(2 * 2 / (2.5 + 2)) and made["confidence"] == 1
    assert made["log_share"] == pytest.approx(np.log10(2 / 40)) and made["kept"] == 0.5
    assert made["voxels"] == 2 and made["disagreement"] is None


def test_networks_that_differ_are_no_less_sure():
    network, other = np.zeros((2, 1, 4, 5), dtype=np.float32)
    network[0, 0, :4], other[0, 1, :4] = 1, 1  # each marks four voxels elsewhere
    made = average([torch.from_numpy(each)[:, None] for each in (network, other)]).numpy()
    found = quality(made[:, 0], made[:, 0] >= 0.5, made[:, 1])
    assert found["overlap"] == found["confidence"] == found["disagreement"] == 1
    alone = quality(network, network >= 0.5)
    assert found["overlap"] == alone["overlap"] and found["confidence"] == alone["confidence"]


def test_a_fit_predicts_cases_it_has_not_seen():
    fit = fit_expected_dsc(*masks_of(40))
    fit = json.loads(json.dumps(fit))  # as stored in a card
    inside, errors = [], []
    for features, dsc in zip(*masks_of(40, seed=1), strict=True):
        value, low, high = expected_dsc(features, fit)
        assert 0 <= low <= value <= high <= 1
        inside.append(low <= dsc <= high)
        errors.append(abs(value - dsc))
    assert np.mean(errors) < 0.05 and 0.6 < np.mean(inside) < 0.95
    assert fit["leave_one_out"]["spearman"] > 0.9 and fit["leave_one_out"]["warned"] > 0


def test_an_interval_is_wider_for_a_scan_that_looks_unlike_those_of_the_fit():
    features, dsc = masks_of(40)
    rng = np.random.default_rng(0)
    for each in features:
        each |= dict(zip(LOOKS, rng.normal(size=len(LOOKS)), strict=True))
    fit = json.loads(json.dumps(fit_expected_dsc(features, dsc)))
    assert 0.75 <= fit["leave_one_out"]["coverage"] <= 0.85
    usual = features[0] | dict.fromkeys(LOOKS, 0.0)
    value, low, high = expected_dsc(usual, fit)
    same, lower, higher = expected_dsc(usual | {"flair_bright": 9.0}, fit)
    assert same == value and lower < low and (higher > high or high == 1)
    assert expected_dsc({k: v for k, v in usual.items() if k not in LOOKS}, fit)[1] == low


def test_a_fit_leaves_out_all_cases_of_a_patient():
    """With each case twice, one per patient would let it predict itself."""
    features, dsc = masks_of(20)
    once = fit_expected_dsc(features, dsc)["leave_one_out"]
    patients = [str(k) for k in range(20)] * 2
    twice = fit_expected_dsc(features * 2, dsc * 2, patients)["leave_one_out"]
    alone = fit_expected_dsc(features * 2, dsc * 2)["leave_one_out"]
    assert alone["mean_error"] < twice["mean_error"]
    assert twice["mean_error"] == pytest.approx(once["mean_error"], rel=0.05)


def test_a_fit_moves_to_a_network_that_is_surer_than_it_should_be():
    """Of masks like those of the fit, each 0.1 worse."""
    fit = fit_expected_dsc(*masks_of(40))
    features, dsc = masks_of(20, seed=1)
    worse = [value - 0.1 for value in dsc]
    patients = [str(k) for k in range(20)]
    moved = json.loads(json.dumps(recentre(fit, features, worse, patients)))
    assert moved["weights"] == fit["weights"] and moved["cases"] == 20
    assert moved["intercept"] - fit["intercept"] == pytest.approx(-0.1, abs=0.02)
    assert moved["leave_one_out"]["mean_error"] < 0.05
    inside = 0
    for each, value in zip(*masks_of(100, seed=2), strict=True):
        _, low, high = expected_dsc(each, moved)
        inside += low <= value - 0.1 <= high
    assert 65 <= inside <= 95
    with pytest.raises(ValueError, match="at least two patients"):
        recentre(fit, features, worse, ["one"] * 20)


def test_weights_of_a_fit_point_the_right_way():
    features, dsc = masks_of(20)
    worse = fit_expected_dsc(features, [1 - value for value in dsc])
    assert max(worse["weights"]) == 0, "surer masks are never expected to be worse"


def test_no_fit_an_empty_mask_or_too_few_cases():
    features, dsc = masks_of(20)
    fit = fit_expected_dsc(features, dsc)
    empty = quality(np.zeros((2, 4, 4)), np.zeros((2, 4, 4), dtype=bool))
    assert expected_dsc(features[0], None) is None and expected_dsc(empty, fit) is None
    assert fit_expected_dsc([*features, empty], [*dsc, 0.0])["empty"] == 1
    with pytest.raises(ValueError, match=r"^19 case\(s\) with a mask, but 20 are needed"):
        fit_expected_dsc([*features[:19], empty], [*dsc[:19], 0.0])
    same = fit_expected_dsc([features[0]] * 20, dsc)  # identical features
    assert expected_dsc(features[0], same)[0] == pytest.approx(np.mean(dsc), abs=0.05)


def test_warnings_in_words():
    features, _ = masks_of(1)
    assert quality_warnings(features[0], (0.9, 0.8, 1.0)) == []
    assert quality_warnings(features[0], None) == []
    (poor,) = quality_warnings(features[0], (0.6, 0.4, 0.7))
    assert "expected DSC 0.60 (0.40 to 0.70)" in poor and "may be no tumour" in poor
    (huge,) = quality_warnings(features[0] | {"log_share": np.log10(0.6)}, (0.9, 0.8, 1.0))
    assert huge == "the mask fills 60% of the scan, more than a lesion can"
    odd, empty = quality_warnings({"voxels": 0, "certain": 0}, None, ["FLAIR is saturated"])
    assert odd == "unusual input: FLAIR is saturated" and "mask is empty" in empty


def test_one_missed_lesion_does_not_bend_the_fit():
    features, dsc = masks_of(40)
    one_missed = fit_expected_dsc(features, [0.0, *dsc[1:]])
    fit = fit_expected_dsc(features, dsc)
    change = [expected_dsc(f, one_missed)[0] - expected_dsc(f, fit)[0] for f in features]
    assert np.abs(change).max() < 0.04


@pytest.mark.usefixtures("no_pictures")
def test_fitting_writes_the_cards(phantoms, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rating, "LEAST_CASES", 12)
    copy = shutil.copytree(folder, tmp_path / "folds")
    for k in range(3):  # each scores the cases it has not seen
        others = [name for name in NAMES if name not in NAMES[4 * k : 4 * k + 4]]
        make_weights(copy / f"fold{k}.pt", trained_on=others)
    words = "--images", phantoms, "--subset", "all", "--weights", copy, "--out", tmp_path / "out"
    words = [*map(str, words), "--device", "cpu", "--fit-expected-dsc"]
    evaluate.main(words)
    said = capsys.readouterr().out
    assert "expected DSC, fitted on 12 cases" in said and "in the card of 3 file(s)" in said
    assert (tmp_path / "out" / "expected_dsc.png").stat().st_size > 1000
    segmenter = opened(copy)
    fit = segmenter.expected_dsc_fit
    assert fit["cases"] == 12 and fit["threshold"] == 0.5
    images, frame = segmenter.preprocess(find_case(phantoms / NAMES[0]).read())
    made = segmenter.segmentation_of(segmenter.probabilities(images), frame)
    assert made.expected and made.mask.any() and made.expected[0] < 0.7 and made.warnings


def test_fitting_is_refused_when_it_is_meaningless(phantoms, folder, tmp_path):
    words = ["--images", phantoms, "--subset", "all", "--out", tmp_path, "--fit-expected-dsc"]
    bare = shutil.copy(folder / "fold0.pt", tmp_path / "bare.pt")
    for models, said in [
        (["a=" + str(folder), "b=" + str(folder)], "is for one model"),
        ([bare], "bare.pt: no card says what it was trained on"),
        ([folder / "fold0.pt", "--cases", *NAMES[4:9]], "case.s. with a mask, but 20 are needed"),
        ([folder, "--image-size", 64], "was trained on slices of 32 x 32"),
    ]:
        with pytest.raises(SystemExit, match=said):
            evaluate.main([str(word) for word in (*words, "--weights", *models)])
    assert not (tmp_path / "scores.csv").exists(), "said before the long work"


def test_a_mask_emptied_by_the_minimum_volume_says_so():
    probabilities = np.zeros((2, 8, 8), np.float32)
    empty = np.zeros(probabilities.shape, bool)
    (said,) = quality_warnings(quality(probabilities, empty), None)
    assert "there may be no tumour in this scan" in said
    probabilities[0, :2, :3] = 0.9
    (said,) = quality_warnings(quality(probabilities, empty), None)
    assert "components of 6 voxels in all are smaller than the minimum volume" in said
