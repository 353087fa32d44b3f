"""Several networks as one, and one network ready for inference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .weights import CARD_DEFAULTS, load_state, model_from_state, read_card


class Ensemble(nn.Module):
    """Networks that are called as one: slices (N, in, H, W) in, probabilities out.

    The output is the average (N, out, H, W); several networks add a channel (see `average`).
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.settings = networks[0].settings
        self.stride = max(network.stride for network in networks)  # powers of 2

    def forward(self, slices: Tensor) -> Tensor:
        return average([net(slices, logits=True).float().sigmoid() for net in self.networks])


def networks_of(model: nn.Module) -> list[nn.Module]:
    """List the networks of an ensemble, or the one network."""
    return list(model.networks) if isinstance(model, Ensemble) else [model]


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Copy a network for inference, its batch norms folded into the convolutions before them.

    Outputs are equal up to rounding: W x + b, then g (. - m) / s + h, is one convolution with
    W g / s and (b - m) g / s + h.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model


def load_ensemble(paths: Sequence[Path]) -> tuple[nn.Module, dict]:
    """Load one network, or several as an `Ensemble`, and their common card.

    The card has the training cases and patients of all members, and drops what differs between
    them, such as the epoch. Raises ValueError, naming the file, if one cannot be used or, of
    several, has no card or was trained for a different input from the first.
    """
    named = [model_from_state(load_state(path), path) for path in paths]
    cards = [read_card(path) for path in paths]
    networks = [network for _, network in named]
    about = {"model": named[0][0], "settings": networks[0].settings}
    if len(paths) == 1:
        return networks[0], cards[0] | about
    check_members(paths, cards, networks)
    common = {k: v for k, v in cards[0].items() if all(card.get(k) == v for card in cards)}
    seen = sorted({case for card in cards for case in card.get("cases", {}).get("train", ())})
    common["cases"] = {"train": seen}
    if patients := {k: v for card in cards for k, v in card.get("patients", {}).items()}:
        common["patients"] = patients
    return Ensemble(networks), common | about


def check_members(
    paths: Sequence[Path], cards: Sequence[dict], networks: Sequence[nn.Module]
) -> None:
    """Raise ValueError, naming the file, unless inputs and outputs match those of the first."""
    wanted: dict[str, object] = {}
    for path, card, network in zip(paths, cards, networks, strict=True):
        if not card:
            raise ValueError(
                f"{path}: has no card (.json) to show that it belongs with {paths[0].name}; "
                "give it by itself, or take it out of the folder"
            )
        has = {k.replace("_", " "): card.get(k, default) for k, default in CARD_DEFAULTS.items()}
        has |= {k: network.settings[k] for k in ("in_channels", "out_channels")}
        wanted = wanted or has
        for name, value in has.items():
            if value != wanted[name]:
                raise ValueError(
                    f"{path}: has {name} {value}, but {paths[0].name} has {wanted[name]}; networks "
                    "that are averaged must agree: name those that belong together"
                )


def average(outputs: Sequence[Tensor]) -> Tensor:
    """Average probabilities (N, K, H, W) of several networks.

    With more than one, a last channel holds the standard deviation of their first channels.
    """
    if len(outputs) == 1:
        return outputs[0]
    stacked = torch.stack(tuple(outputs))  # (networks, N, K, H, W)
    mean = stacked.mean(dim=0)
    deviation = (stacked[:, :, :1] - mean[:, :1]).square().mean(dim=0).sqrt()
    return torch.cat((mean, deviation), dim=1)
