"""Test the path from a raw volume to its mask: geometry, refusals, an unchanged network."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from brainseg import phantom
from brainseg.ensemble import fold_batch_norm
from brainseg.preprocess import preprocess
from brainseg.resnext_unet import ResNeXtUNet
from brainseg.segmenter import Segmenter, keep_components
from brainseg.unet import UNet


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """Make a phantom cropped to 64 x 50, (6, 64, 50, 3) uint8."""
    return phantom.make_volume(0, slices=6, size=64)[0][:, :, 5:55]


@pytest.fixture
def model(volume) -> UNet:
    torch.manual_seed(0)
    model = UNet(init_features=2)
    for module in model.modules():  # statistics that make batch norm more than an identity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(model.conv.weight)
    with torch.no_grad():  # call half of the voxels lesion
        logits = model.eval()(preprocess(volume, 48)[0], logits=True)
        model.conv.bias -= logits.median()
    return model


def segmenter(model: nn.Module, **options) -> Segmenter:
    options = {"image_size": 48, "device": "cpu", "amp": False, **options}
    return Segmenter(model, **options)


def always(model: UNet, lesion: bool) -> UNet:
    """Make a network call everything lesion, or nothing."""
    nn.init.zeros_(model.conv.weight)
    nn.init.constant_(model.conv.bias, 20 if lesion else -20)
    return model


# The network


@pytest.mark.parametrize("network", [UNet(init_features=4), ResNeXtUNet()], ids=["unet", "resnext"])
def test_folded_batch_norm_gives_the_same_logits(network):
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor, 1, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded, images = fold_batch_norm(network), torch.randn(2, 3, 64, 64)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        expected = network.eval()(images, logits=True)
        error = (folded(images, logits=True) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "left as it was"


def test_batch_norm_over_processes_is_folded_too():
    torch.manual_seed(0)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(UNet(init_features=4)).eval()
    network(images := torch.randn(2, 3, 32, 32))
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(images), network(images), atol=1e-5, rtol=1e-4)


class PreActivation(nn.Module):
    """A network whose norm is called before the convolution that is defined before it."""

    stride, settings = 16, {"in_channels": 3, "out_channels": 1}

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 1, 1)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, x: torch.Tensor, logits: bool = False) -> torch.Tensor:
        x = self.last(self.conv(self.norm(x).relu()))
        return x if logits else x.sigmoid()


def test_norms_that_cannot_be_folded_are_left(volume):
    """Layers are paired as they are defined: folded, this network gave other masks, silently."""
    torch.manual_seed(0)
    network = PreActivation()
    with pytest.warns(UserWarning, match="PreActivation is not folded .* would change by"):
        folded = fold_batch_norm(network)
    images = preprocess(volume, 48)[0]
    assert torch.equal(folded(images), network.eval()(images))


def test_a_network_that_sees_neighbours_gets_them(volume):
    torch.manual_seed(0)
    network = UNet(9, init_features=2).eval()
    images = preprocess(volume, 48)[0]  # (6, 3, 48, 48)
    before, after = (images[[0, 0, 1, 2, 3, 4]], images[[1, 2, 3, 4, 5, 5]])
    with torch.inference_mode():
        expected = network(torch.cat((before, images, after), dim=1))
    segment = segmenter(network, neighbours=1)
    torch.testing.assert_close(segment.probabilities(images), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"2 channel\(s\), but the model was trained on 3"):
        segment(volume[..., :2])


# Masks


@pytest.mark.parametrize("dtype, factor", [(np.uint8, 1), (np.uint16, 250), (np.float32, 0.1)])
def test_mask_has_the_shape_of_its_source(model, volume, dtype, factor):
    mask = segmenter(model)((volume * factor).astype(dtype))
    assert mask.dtype == bool and mask.shape == volume.shape[:3]


def test_mask_does_not_depend_on_the_brightness_or_the_batch(model, volume):
    expected = segmenter(model, batch_size=16)(volume)
    assert expected.any() and not expected.all()
    assert np.array_equal(segmenter(model, batch_size=4)(volume), expected)
    assert (segmenter(model)(volume * np.float64(3)) != expected).mean() < 1e-3


def test_a_network_that_sees_lesion_everywhere_fills_the_crop(model, volume):
    frame = preprocess(volume, 48)[1]
    top, bottom, left, right = frame.box
    expected = np.zeros(frame.shape, dtype=bool)
    expected[:, top:bottom, left:right] = True
    assert not expected.all()
    assert np.array_equal(segmenter(always(model, True))(volume), expected)


@pytest.mark.parametrize("largest", [True, False])
def test_nothing_found_is_an_empty_mask(model, volume, largest):
    """Once, a prediction without a voxel crashed."""
    mask = segmenter(always(model, False), largest_component=largest)(volume)
    assert mask.shape == volume.shape[:3] and not mask.any()


@pytest.mark.parametrize("tta", [True, False])
def test_blank_volume_has_an_empty_mask(model, volume, tta):
    mask = segmenter(always(model, True), tta=tta)(np.zeros_like(volume))
    assert mask.dtype == bool and mask.shape == volume.shape[:3] and not mask.any()


def test_one_channel_model(volume):
    model = UNet(in_channels=1, init_features=2)
    assert segmenter(model)(volume[..., 1:2]).shape == volume.shape[:3]


def test_threshold_and_largest_component_only_take_away(model, volume):
    whole = segmenter(model, largest_component=False)(volume)
    assert not (segmenter(model)(volume) & ~whole).any()
    strict = segmenter(model, largest_component=False, threshold=0.6)(volume)
    assert not (strict & ~whole).any() and strict.sum() < whole.sum()


def test_bfloat16_finds_nearly_the_same(model, volume):
    images, _ = preprocess(volume, 48)
    exact, rough = (segmenter(model, amp=amp).probabilities(images) for amp in (False, True))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0)


# The network is left unchanged


def test_a_network_in_training_mode_segments_the_same(model, volume):
    """Once, an example left the network in training mode, and its mask was wrong."""
    expected = segmenter(model)(volume)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    segment = segmenter(model.train())
    assert np.array_equal(segment(volume), expected)
    segment.model.train()  # changing the segmenter's own copy does not matter either
    assert np.array_equal(segment(volume), expected)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# Test-time augmentation


def test_tta_answers_a_mirrored_slice_with_the_mirrored_mask(model, volume):
    images, _ = preprocess(volume, 48)
    with_tta, without = segmenter(model, tta=True), segmenter(model)
    mirrored = with_tta.probabilities(images.flip(-1)).flip(-1)
    torch.testing.assert_close(mirrored, with_tta.probabilities(images), atol=1e-5, rtol=0)
    plain = without.probabilities(images)
    assert (without.probabilities(images.flip(-1)).flip(-1) - plain).abs().max() > 1e-3
    average = (plain + without.probabilities(images.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(with_tta.probabilities(images), average, atol=1e-5, rtol=0)


def test_tta_mirrors_only_slices_that_may_have_lesion(model, volume):
    images, _ = preprocess(volume, 48)
    highest = segmenter(model).probabilities(images).amax((1, 2, 3))
    with torch.no_grad():  # the highest of half of the slices is under 0.05
        model.conv.bias -= highest.logit().median() + 0.01 - torch.tensor(0.05).logit()
    plain, average = (segmenter(model, tta=tta).probabilities(images) for tta in (False, True))
    low = plain.amax((1, 2, 3)) < 0.05
    assert low.sum() == 3
    assert torch.equal(average[low], plain[low])
    assert (average != plain)[~low].flatten(1).any(1).all()


def test_one_channel_stands_in_for_three(model, volume):
    alone = segmenter(model).preprocess(volume[..., 1:2])[0]
    assert torch.equal(alone, segmenter(model).preprocess(volume[..., [1, 1, 1]])[0])


# Refusals


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_refused(model, channels):
    volume = np.random.default_rng(0).integers(0, 255, (2, 32, 32, channels)).astype(np.uint8)
    with pytest.raises(ValueError, match=rf"{channels} channel\(s\), but the model .* on 3"):
        segmenter(model)(volume)


@pytest.mark.parametrize("size", [0, -16, 8, 15, 100, 250])
def test_image_size_that_16_does_not_divide_is_refused(model, size):
    """This is reported at once, with sizes that fit."""
    with pytest.raises(ValueError, match=f"image size {size} is not a multiple of 16; try") as stop:
        segmenter(model, image_size=size)
    below, above = (int(word) for word in str(stop.value).split("try ")[1].split(" or "))
    assert below % 16 == above % 16 == 0 and 0 < below < above


# Weights


def test_from_weights_takes_the_image_size_of_the_card(tmp_path, model, volume):
    path = tmp_path / "unet.pt"
    torch.save(model.state_dict(), path)
    assert Segmenter.from_weights(path, device="cpu").image_size == 256
    path.with_suffix(".json").write_text(json.dumps({"image_size": 48, "preprocessing": 2}))
    loaded = Segmenter.from_weights(path, device="cpu", amp=False)
    assert loaded.image_size == 48
    assert np.array_equal(loaded(volume), segmenter(model)(volume))
    assert Segmenter.from_weights(path, image_size=64, device="cpu").image_size == 64


# Largest component


def test_largest_component_by_hand():
    mask = np.zeros((3, 6, 8), dtype=bool)
    mask[0, 1, 1:4] = True  # three voxels ...
    mask[1, 2, 4] = True  # ... and two more joined at corners: 26 neighbours
    mask[2, 3, 5] = True
    small = mask.copy()
    mask[0, 4:, :2] = True  # four voxels alone
    before = mask.copy()
    assert np.array_equal(keep_components(mask), small)
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("value", [False, True])
def test_largest_component_of_an_empty_or_full_mask(value):
    mask = np.full((2, 4, 4), value)
    kept = keep_components(mask)
    assert kept.dtype == bool and np.array_equal(kept, mask)


def test_largest_of_two_equal_components_is_one_of_them():
    mask = np.zeros((1, 5, 5), dtype=bool)
    mask[0, 0, :2] = mask[0, 4, 3:] = True
    kept = keep_components(mask)
    assert kept.sum() == 2 and not (kept & ~mask).any()
    assert np.array_equal(keep_components(mask), kept)


def test_an_array_with_slices_last_is_refused(model):
    volume = np.ones((96, 96, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="move the axis of the slices to the front"):
        segmenter(model)(volume)
