"""Test both networks: shapes, errors, settings, and the U-Net's published names and shapes."""

import pytest
import torch
from torch import nn

from brainseg.resnext_unet import ResNeXtUNet
from brainseg.unet import UNet


def published_names(in_channels=3, out_channels=1, f=32) -> dict[str, tuple[int, ...]]:
    """List every key of the published checkpoint with its shape, written out by hand."""
    names = {}

    def block(module, prefix, channels, features):
        for i, c in ((1, channels), (2, features)):
            names[f"{module}.{prefix}conv{i}.weight"] = (features, c, 3, 3)
            for key in ("weight", "bias", "running_mean", "running_var"):
                names[f"{module}.{prefix}norm{i}.{key}"] = (features,)
            names[f"{module}.{prefix}norm{i}.num_batches_tracked"] = ()

    for level in (1, 2, 3, 4):
        wide = f * 2 ** (level - 1)
        block(f"encoder{level}", f"enc{level}", in_channels if level == 1 else wide // 2, wide)
        block(f"decoder{level}", f"dec{level}", 2 * wide, wide)
        names[f"upconv{level}.weight"] = (2 * wide, wide, 2, 2)
        names[f"upconv{level}.bias"] = (wide,)
    block("bottleneck", "bottleneck", 8 * f, 16 * f)
    names["conv.weight"], names["conv.bias"] = (out_channels, f, 1, 1), (out_channels,)
    return names


SMALL = {"unet": (UNet, {"init_features": 4}), "resnext_unet": (ResNeXtUNet, {})}
networks = pytest.mark.parametrize("network, settings", SMALL.values(), ids=SMALL)


@pytest.fixture(scope="module", params=SMALL.values(), ids=SMALL)
def model(request) -> nn.Module:
    network, settings = request.param
    return network(**settings).eval()


def test_parameter_count():
    assert sum(p.numel() for p in UNet().parameters()) == 7_763_041


@pytest.mark.parametrize("settings", [(3, 1, 32), (1, 2, 4), (4, 1, 3)])
def test_state_dict_has_the_published_names_and_shapes(settings):
    state = UNet(*settings).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == published_names(*settings)


def test_upsampled_half_comes_first_in_the_concatenation():
    """The published decoders were trained on (upsampled, skipped) in this order."""
    model = UNet(init_features=2).eval()
    seen = {}
    model.upconv1.register_forward_hook(lambda _, args, output: seen.update(upsampled=output))
    model.encoder1.register_forward_hook(lambda _, args, output: seen.update(skipped=output))
    model.decoder1.register_forward_pre_hook(lambda _, args: seen.update(joined=args[0]))
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    assert torch.equal(seen["joined"], torch.cat((seen["upsampled"], seen["skipped"]), dim=1))


# Both networks


@networks
@pytest.mark.parametrize(
    "n, channels, out, height, width", [(1, 3, 1, 16, 48), (2, 1, 2, 32, 16), (1, 5, 3, 48, 80)]
)
def test_shapes(network, settings, n, channels, out, height, width):
    model = network(channels, out, **settings).eval()
    with torch.no_grad():
        y = model(torch.randn(n, channels, height, width))
    assert y.shape == (n, out, height, width)
    assert y.min() >= 0 and y.max() <= 1


def test_logits_are_the_probabilities_before_the_sigmoid(model):
    x = 3 * torch.randn(2, 3, 32, 32)
    before = x.clone()
    with torch.no_grad():
        logits, probabilities = model(x, logits=True), model(x)
    assert torch.equal(torch.sigmoid(logits), probabilities)
    assert not torch.equal(logits, probabilities)
    assert torch.equal(x, before), "the input is not modified"


@networks
def test_every_parameter_gets_a_gradient(network, settings):
    model = network(**settings)
    model(torch.randn(2, 3, 32, 32), logits=True).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("height, width", [(250, 250), (16, 24), (8, 16), (33, 32)])
def test_size_that_16_does_not_divide_is_refused(model, height, width):
    """Once, it failed deep inside a concatenation or a sum."""
    with pytest.raises(ValueError, match=rf"{height} x {width} is not a multiple of 16"):
        model(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("shape", [(1, 2, 32, 32), (1, 4, 32, 32), (3, 32, 32)])
def test_wrong_channels_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\)"):
        model(torch.zeros(shape))


@networks
@pytest.mark.parametrize("channels, out", [(3, 1), (1, 2)])
def test_settings_are_read_off_a_state_dict(network, settings, channels, out):
    model = network(channels, out, **settings)
    expected = {"in_channels": channels, "out_channels": out, **settings}
    assert network.settings_of(model.state_dict()) == model.settings == expected


@networks
def test_settings_of_another_network_is_none(network, settings):
    others = [kind(**more) for kind, more in SMALL.values() if kind is not network]
    for state in (others[0].state_dict(), torch.nn.Conv2d(3, 1, 1).state_dict(), {}):
        assert network.settings_of(state) is None
