"""U-Net on a ResNeXt-50 32x4d encoder, for weights that were first trained on ImageNet.

Encoder: Xie et al. 2017 (https://arxiv.org/abs/1611.05431), stride 2 on the 3x3 convolution, with
torchvision's parameter names to load its published weights, but without the max-pool: layer 1
still sees half the resolution. Decoder: three convolutions per level that squeeze, upsample and
widen, and added skips, as in LinkNet (https://arxiv.org/abs/1707.03718).
"""

import pickle
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from .unet import check_input

# IMAGENET1K_V2 of torchvision's resnext50_32x4d (81.2 % top-1); the name ends in its SHA-256.
URL = "https://download.pytorch.org/models/resnext50_32x4d-1a0047aa.pth"


class ResNeXtUNet(nn.Module):
    """Four levels down to 2048 channels at 1/16 of the size, four up; skips are added.

    Height and width must be multiples of 16. `pretrained`: True downloads torchvision's
    ImageNet encoder, a path reads it from a file; see `load_imagenet` for errors.
    """

    stride = 16  # the stem and layers 2, 3 and 4 halve the size

    def __init__(
        self, in_channels: int = 3, out_channels: int = 1, pretrained: bool | str | Path = False
    ):
        super().__init__()
        self.settings = {"in_channels": in_channels, "out_channels": out_channels}
        self.encoder = ResNeXtEncoder(in_channels)
        self.decoder4 = _decoder(2048, 1024)
        self.decoder3 = _decoder(1024, 512)
        self.decoder2 = _decoder(512, 256)
        self.decoder1 = _decoder(256, 256)
        self.head = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(256, 128, 3, padding=1), relu=nn.ReLU(inplace=True))
        )
        self.conv = nn.Conv2d(128, out_channels, 3, padding=1)
        _initialise(self)
        if pretrained:
            load_imagenet(self.encoder, pretrained)

    def forward(self, x: Tensor, logits: bool = False) -> Tensor:
        """Compute probabilities (or `logits`) (N, out, H, W) of slices (N, in, H, W).

        Raises ValueError for a channel count or an image size that does not fit the network.
        """
        check_input(x, self.settings["in_channels"], self.stride)
        enc1, enc2, enc3, enc4 = self.encoder(x)  # (N, 2048, H/16, W/16) is the last
        x = self.decoder4(enc4) + enc3  # (N, 1024, H/8, W/8)
        x = self.decoder3(x) + enc2  # (N, 512, H/4, W/4)
        x = self.decoder2(x) + enc1  # (N, 256, H/2, W/2)
        x = self.decoder1(x)  # (N, 256, H, W)
        x = self.head(x)  # (N, 128, H, W)
        x = self.conv(x)  # (N, out, H, W)
        return x if logits else torch.sigmoid(x)

    @staticmethod
    def settings_of(state: dict[str, Tensor]) -> dict[str, int] | None:
        """Read the network's arguments from its state dict; None for another network's."""
        first, last = state.get("encoder.conv1.weight"), state.get("conv.weight")
        if first is None or last is None:
            return None
        return {"in_channels": first.shape[1], "out_channels": len(last)}


class ResNeXtEncoder(nn.Module):
    """ResNeXt-50 32x4d without max-pool, pooling and classifier; torchvision's parameter names."""

    def __init__(self, in_channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(64, 256, blocks=3, stride=1)
        self.layer2 = _layer(256, 512, blocks=4, stride=2)
        self.layer3 = _layer(512, 1024, blocks=6, stride=2)
        self.layer4 = _layer(1024, 2048, blocks=3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the outputs of layers 1 to 4 for slices (N, in, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 64, H/2, W/2)
        enc1 = self.layer1(x)  # (N, 256, H/2, W/2)
        enc2 = self.layer2(enc1)  # (N, 512, H/4, W/4)
        enc3 = self.layer3(enc2)  # (N, 1024, H/8, W/8)
        enc4 = self.layer4(enc3)  # (N, 2048, H/16, W/16)
        return enc1, enc2, enc3, enc4


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution, each with batch norm, beside a shortcut.

    The middle has half of `out_channels` in 32 groups: 4 per group in layer 1, 32 in layer 4.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        width = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Identity()  # has no parameter, so adds no name to the state dict
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        shortcut = self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x + shortcut)


def _layer(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Stack bottlenecks; the first changes channels and size."""
    first = Bottleneck(in_channels, out_channels, stride)
    layer = nn.Sequential(first)
    for _ in range(blocks - 1):
        layer.append(Bottleneck(out_channels, out_channels, stride=1))
    return layer


def _decoder(in_channels: int, out_channels: int) -> nn.Sequential:
    """Squeeze to a quarter of the channels, double height and width, widen: (N, out, 2H, 2W)."""
    quarter = in_channels // 4
    return nn.Sequential(
        OrderedDict(
            squeeze=nn.Conv2d(in_channels, quarter, 1),
            relu1=nn.ReLU(inplace=True),
            upconv=nn.ConvTranspose2d(quarter, quarter, kernel_size=4, stride=2, padding=1),
            widen=nn.Conv2d(quarter, out_channels, 1),
            relu2=nn.ReLU(inplace=True),
        )
    )


def _initialise(model: ResNeXtUNet) -> None:
    """Draw the weights of convolutions before a ReLU with variance 2 / fan-in; biases are 0.

    He et al. 2015 (https://arxiv.org/abs/1502.01852). The transposed convolutions and the last
    one, which no ReLU follows, keep PyTorch's smaller weights: the decoder has no batch norm, and
    at full scale its sums grow from level to level (initial logits of 1.6 instead of 0.2).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module is not model.conv:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def load_imagenet(encoder: ResNeXtEncoder, source: bool | str | Path = True) -> None:
    """Load torchvision's resnext50_32x4d into `encoder`: fetched (True) or from a local file.

    Its classifier `fc` is left out, its stem adapted to the encoder's channels. Raises OSError if
    the file cannot be fetched or read, ValueError if it is damaged or contains another network.
    """
    name = URL if source is True else str(source)
    state = _open_imagenet(name)
    if not isinstance(state, dict) or getattr(state.get("conv1.weight"), "ndim", 0) != 4:
        raise ValueError(
            f"{name}: does not contain a state dict of torchvision's resnext50_32x4d; give its "
            ".pth file"
        )
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    state["conv1.weight"] = adapt_stem(state["conv1.weight"], encoder.conv1.in_channels)
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()
        raise ValueError(f"{name}: is not torchvision's resnext50_32x4d: {reason}") from error


def _open_imagenet(name: str) -> object:
    """Load the file at `URL` (kept in torch.hub's cache) or a local one."""
    fetched = name == URL
    try:
        if fetched:  # the hash in its name is checked when it is fetched
            return torch.hub.load_state_dict_from_url(
                URL, map_location="cpu", weights_only=True, check_hash=True
            )
        return torch.load(name, map_location="cpu", weights_only=True)
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error}); give the path of"
        if fetched:
            problem = "cannot be fetched (offline?); download it elsewhere and give the path of"
        raise OSError(f"{name}: {problem} a resnext50_32x4d .pth file") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        remedy = "fetch it again"
        if fetched:
            remedy = f"remove it from {torch.hub.get_dir()}/checkpoints and try again"
        raise ValueError(
            f"{name}: is damaged, is not bare weights, or does not match its hash; {remedy}"
        ) from error


def adapt_stem(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt the stem's weight (64, 3, 7, 7) to n `in_channels`: repeat the RGB mean, times 3 / n.

    The weights of each output keep their sum: n equal images get the response that three of them
    had in training. Three channels are left as they are.
    """
    if in_channels == weight.shape[1]:
        return weight
    mean = weight.mean(dim=1, keepdim=True)  # (64, 1, 7, 7)
    return mean.repeat(1, in_channels, 1, 1) * (weight.shape[1] / in_channels)
