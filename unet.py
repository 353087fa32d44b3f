"""U-Net with batch normalisation for FLAIR-abnormality segmentation.

Architecture: Ronneberger, Fischer and Brox 2015 (https://arxiv.org/abs/1505.04597), with batch
normalisation and padded convolutions as in Buda, Saha and Mazurowski 2019
(https://doi.org/10.1016/j.compbiomed.2019.05.002). Parameter names are those of the published
checkpoint, which loads with ``strict=True``.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Four levels down and up, `init_features` channels at the top; sides are multiples of 16."""

    stride = 16  # four poolings by 2

    def __init__(self, in_channels: int = 3, out_channels: int = 1, init_features: int = 32):
        super().__init__()
        f = init_features
        self.encoder1 = _block(in_channels, f, "enc1")
        self.encoder2 = _block(f, 2 * f, "enc2")
        self.encoder3 = _block(2 * f, 4 * f, "enc3")
        self.encoder4 = _block(4 * f, 8 * f, "enc4")
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.bottleneck = _block(8 * f, 16 * f, "bottleneck")
        self.upconv4 = nn.ConvTranspose2d(16 * f, 8 * f, kernel_size=2, stride=2)
        self.decoder4 = _block(16 * f, 8 * f, "dec4")
        self.upconv3 = nn.ConvTranspose2d(8 * f, 4 * f, kernel_size=2, stride=2)
        self.decoder3 = _block(8 * f, 4 * f, "dec3")
        self.upconv2 = nn.ConvTranspose2d(4 * f, 2 * f, kernel_size=2, stride=2)
        self.decoder2 = _block(4 * f, 2 * f, "dec2")
        self.upconv1 = nn.ConvTranspose2d(2 * f, f, kernel_size=2, stride=2)
        self.decoder1 = _block(2 * f, f, "dec1")
        self.conv = nn.Conv2d(f, out_channels, kernel_size=1)
        self.settings = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "init_features": init_features,
        }

    def forward(self, x: Tensor, logits: bool = False) -> Tensor:
        """Compute probabilities (or `logits`) (N, out, H, W) of slices (N, in, H, W).

        Raises ValueError for a channel count or an image size that does not fit the network.
        """
        check_input(x, self.settings["in_channels"], self.stride)
        enc1 = self.encoder1(x)  # (N, f, H, W)
        enc2 = self.encoder2(self.pool(enc1))  # (N, 2f, H/2, W/2)
        enc3 = self.encoder3(self.pool(enc2))  # (N, 4f, H/4, W/4)
        enc4 = self.encoder4(self.pool(enc3))  # (N, 8f, H/8, W/8)
        x = self.bottleneck(self.pool(enc4))  # (N, 16f, H/16, W/16)
        x = self.decoder4(torch.cat((self.upconv4(x), enc4), dim=1))  # (N, 8f, H/8, W/8)
        x = self.decoder3(torch.cat((self.upconv3(x), enc3), dim=1))  # (N, 4f, H/4, W/4)
        x = self.decoder2(torch.cat((self.upconv2(x), enc2), dim=1))  # (N, 2f, H/2, W/2)
        x = self.decoder1(torch.cat((self.upconv1(x), enc1), dim=1))  # (N, f, H, W)
        x = self.conv(x)  # (N, out, H, W)
        return x if logits else torch.sigmoid(x)

    @staticmethod
    def settings_of(state: dict[str, Tensor]) -> dict[str, int] | None:
        """Read the network's arguments from its state dict; None for another network's."""
        first, last = state.get("encoder1.enc1conv1.weight"), state.get("conv.weight")
        if first is None or last is None or first.ndim != 4 or last.ndim != 4:
            return None
        features, channels = first.shape[:2]
        return {"in_channels": channels, "out_channels": len(last), "init_features": features}


def _block(in_channels: int, features: int, name: str) -> nn.Sequential:
    """Stack 3x3 convolution, batch norm, ReLU, twice; names as in the published checkpoint."""
    layers = OrderedDict()
    for i, channels in ((1, in_channels), (2, features)):
        layers[f"{name}conv{i}"] = nn.Conv2d(channels, features, 3, padding=1, bias=False)
        layers[f"{name}norm{i}"] = nn.BatchNorm2d(features)
        layers[f"{name}relu{i}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def check_input(x: Tensor, in_channels: int, stride: int) -> None:
    """Raise ValueError unless `x` is (N, in_channels, H, W) with H and W multiples of `stride`."""
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f"the network takes (N, {in_channels}, H, W), not {tuple(x.shape)}; "
            "build it with the in_channels of your images"
        )
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ValueError(
            f"image size {x.shape[2]} x {x.shape[3]} is not a multiple of {stride}; "
            "resize or pad the slices first"
        )
