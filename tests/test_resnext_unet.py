"""Test the second network: torchvision's names, ImageNet weights by file or URL, odd sizes."""

import functools
import urllib.error

import pytest
import torch

from brainseg import resnext_unet
from brainseg.resnext_unet import ResNeXtEncoder, ResNeXtUNet, adapt_stem, load_imagenet
from brainseg.unet import UNet
from brainseg.weights import file_hash

BLOCKS = {1: 3, 2: 4, 3: 6, 4: 3}


def torchvision_names(in_channels: int = 3) -> dict[str, tuple[int, ...]]:
    """List every key of torchvision's resnext50_32x4d with its shape, written out by hand."""
    names = {"conv1.weight": (64, in_channels, 7, 7), "fc.weight": (1000, 2048), "fc.bias": (1000,)}

    def norm(name, features):
        for key in ("weight", "bias", "running_mean", "running_var"):
            names[f"{name}.{key}"] = (features,)
        names[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    before = 64
    for layer, blocks in BLOCKS.items():
        out, width = 128 * 2**layer, 64 * 2**layer
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            names[f"{name}.conv1.weight"] = (width, before, 1, 1)
            names[f"{name}.conv2.weight"] = (width, width // 32, 3, 3)
            names[f"{name}.conv3.weight"] = (out, width, 1, 1)
            for i, features in ((1, width), (2, width), (3, out)):
                norm(f"{name}.bn{i}", features)
            if block == 0:
                names[f"{name}.downsample.0.weight"] = (out, before, 1, 1)
                norm(f"{name}.downsample.1", out)
            before = out
    return names


@functools.cache
def imagenet_state() -> dict[str, torch.Tensor]:
    """Make a state dict as torchvision publishes it, classifier included, of made-up numbers."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(shape, generator=generator) if shape else torch.tensor(7)
        for name, shape in torchvision_names().items()
    }


@pytest.fixture(scope="module")
def model() -> ResNeXtUNet:
    torch.manual_seed(0)
    return ResNeXtUNet().eval()


@pytest.fixture(scope="module")
def encoder() -> ResNeXtEncoder:
    return ResNeXtEncoder()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Write a file as torchvision publishes it, named by its hash."""
    path = tmp_path_factory.mktemp("published") / "new.pth"
    torch.save(imagenet_state(), path)
    return path.rename(path.with_name(f"resnext50_32x4d-{file_hash(path)[:8]}.pth"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Provide an empty torch.hub cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


# The network


def test_parameter_count(model):
    """torchvision documents 25,028,904 for its network, classifier included."""
    named = sum(
        torch.Size(shape).numel()
        for name, shape in torchvision_names().items()
        if not name.endswith(("running_mean", "running_var", "tracked"))
    )
    assert named == 25_028_904
    assert sum(p.numel() for p in model.encoder.parameters()) == named - 2049 * 1000 == 22_979_904
    assert sum(p.numel() for p in model.parameters()) == 30_947_777


@pytest.mark.parametrize("in_channels", [3, 5])
def test_encoder_has_the_names_and_shapes_of_torchvision(in_channels):
    expected = torchvision_names(in_channels)
    del expected["fc.weight"], expected["fc.bias"]
    state = ResNeXtEncoder(in_channels).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_encoder_gives_what_the_figure_says(model):
    with torch.no_grad():
        features = model.encoder(torch.randn(1, 3, 32, 48))
    shapes = [tuple(x.shape[1:]) for x in features]
    assert shapes == [(256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3)]


def test_same_encoder_features_as_torchvision(model):
    try:  # with a PyTorch of another build, its import may raise any error
        models = pytest.importorskip("torchvision.models")
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    theirs = models.resnext50_32x4d(weights=None).eval()
    for module in theirs.modules():  # running statistics that make a difference
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    ours = ResNeXtEncoder().eval()
    left = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not left.missing_keys and left.unexpected_keys == ["fc.weight", "fc.bias"]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y, features = theirs.relu(theirs.bn1(theirs.conv1(x))), ours(x)
        for layer, feature in zip((1, 2, 3, 4), features, strict=True):
            y = getattr(theirs, f"layer{layer}")(y)
            assert torch.equal(y, feature), f"layer{layer}"


def test_skips_are_added_to_what_was_upsampled(model):
    seen = {}
    hooks = [
        model.encoder.register_forward_hook(lambda _, args, out: seen.update(skips=out)),
        model.decoder4.register_forward_hook(lambda _, args, out: seen.update(up=out)),
        model.decoder3.register_forward_pre_hook(lambda _, args: seen.update(joined=args[0])),
    ]
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["joined"], seen["up"] + seen["skips"][2])


def test_the_gradient_reaches_the_stem():
    model = ResNeXtUNet()
    y = model(torch.randn(2, 3, 32, 32), logits=True)
    assert 0.01 < y.std() < 2  # neither dead nor saturated at the start
    y.square().mean().backward()
    assert model.encoder.conv1.weight.grad.abs().sum() > 0


def test_an_encoder_alone_is_not_a_network():
    assert ResNeXtUNet.settings_of(imagenet_state()) is None


# ImageNet weights


def test_published_file_loads_into_the_encoder(published):
    model, state = ResNeXtUNet(pretrained=published), imagenet_state()
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.settings == {"in_channels": 3, "out_channels": 1}


def test_published_address_is_fetched_once_and_its_hash_checked(
    encoder, published, hub, monkeypatch
):
    monkeypatch.setattr(resnext_unet, "URL", published.as_uri())
    load_imagenet(encoder)
    assert torch.equal(encoder.conv1.weight, imagenet_state()["conv1.weight"])
    assert [path.name for path in hub.iterdir()] == [published.name]

    wrong = published.with_name("resnext50_32x4d-00000000.pth")
    wrong.symlink_to(published)
    monkeypatch.setattr(resnext_unet, "URL", wrong.as_uri())
    with pytest.raises(ValueError, match=f"{wrong.as_uri()}: .*does not match its hash"):
        load_imagenet(encoder)
    assert [path.name for path in hub.iterdir()] == [published.name]


def test_address_is_that_of_torchvision():
    """Its hash must be long enough for torch.hub to check it."""
    assert resnext_unet.URL == "https://download.pytorch.org/models/resnext50_32x4d-1a0047aa.pth"
    assert torch.hub.HASH_REGEX.search(resnext_unet.URL.rsplit("/")[-1])[1] == "1a0047aa"


def test_offline_says_so_and_what_to_do(hub, monkeypatch):
    def offline(*_, **how):
        assert how["check_hash"] and how["weights_only"] and how["map_location"] == "cpu"
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="cannot be fetched .offline.*download it elsewhere") as error:
        ResNeXtUNet(pretrained=True)
    assert str(error.value).startswith(f"{resnext_unet.URL}: ") and "\n" not in str(error.value)


def test_damaged_copy_in_the_cache_is_named(encoder, published, hub, monkeypatch):
    monkeypatch.setattr(resnext_unet, "URL", published.as_uri())
    hub.mkdir(parents=True)
    (hub / published.name).write_bytes(published.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"is damaged.*remove it from {hub}"):
        load_imagenet(encoder)


def test_file_that_is_missing_or_damaged_is_refused(encoder, published, tmp_path):
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(OSError, match=f"{path}: cannot be read.*give the path of"):
            load_imagenet(encoder, path)
    path = tmp_path / "short.pth"
    for share in (0, 0.001, 0.5):
        path.write_bytes(published.read_bytes()[: int(share * published.stat().st_size)])
        with pytest.raises(ValueError, match=f"{path}: is damaged"):
            load_imagenet(encoder, str(path))
    torch.save(torch.nn.Linear(2, 2), path)  # a pickled module could run code
    with pytest.raises(ValueError, match=f"{path}: .*not bare weights"):
        load_imagenet(encoder, path)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda state: [1], "does not contain a state dict"),
        (lambda state: {"state_dict": state}, "does not contain a state dict"),
        (lambda state: UNet(init_features=2).state_dict(), "does not contain a state dict"),
        (lambda state: state | {"layer5.0.conv1.weight": torch.zeros(1)}, "layer5.0.conv1"),
        (lambda state: {k: v for k, v in state.items() if "layer3" not in k}, "layer3.0.conv1"),
        (lambda state: state | {"layer1.0.conv2.weight": torch.zeros(64, 64, 3, 3)}, "size"),
    ],
    ids=["list", "wrapped", "unet", "unknown", "missing", "resnet"],
)
def test_file_of_another_network_is_refused(encoder, tmp_path, spoil, reason):
    path = tmp_path / "x.pth"
    torch.save(spoil(imagenet_state()), path)
    with pytest.raises(ValueError, match=f"{path}: .*torchvision's resnext50_32x4d") as error:
        load_imagenet(encoder, path)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("in_channels", [1, 5])
def test_stem_of_other_channel_counts_answers_as_before(published, in_channels):
    stem = ResNeXtUNet(in_channels, pretrained=published).encoder.conv1
    assert stem.weight.shape == (64, in_channels, 7, 7)
    grey = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        response = stem(grey.expand(-1, in_channels, -1, -1))
        expected = torch.nn.functional.conv2d(
            grey.expand(-1, 3, -1, -1), imagenet_state()["conv1.weight"], stride=2, padding=3
        )
    assert torch.allclose(response, expected, rtol=1e-5, atol=1e-4)


def test_stem_by_hand():
    weight = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    assert adapt_stem(weight, 3) is weight
    assert adapt_stem(weight, 1).flatten().tolist() == [9.0]
    assert adapt_stem(weight, 2).flatten().tolist() == [4.5, 4.5]
    assert adapt_stem(weight, 6).flatten().tolist() == [1.5] * 6
