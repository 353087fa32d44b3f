"""From the files that --weights means to one network, or several as one, ready for inference."""

import copy
import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .onnx import OnnxNetwork
from .quality import FITTED_WITH, mask_settings
from .weights import CARD_DEFAULTS, Network, load_state, model_from_state, read_card

FOLDED_ALIKE = 0.01  # of the largest logit; TF32 rounds to 0.001


class Ensemble(nn.Module):
    """Networks called as one: slices (N, in, H, W) in, probabilities out (see `average`)."""

    def __init__(self, networks: Sequence[Network]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.settings: dict[str, int] = networks[0].settings
        self.stride: int = max(network.stride for network in networks)  # powers of 2

    def forward(self, slices: Tensor) -> Tensor:
        outputs = []
        for network in self.networks:
            outputs.append(network(slices, logits=True).float().sigmoid())
        return average(outputs)


def networks_of(model: Network | Ensemble) -> list[Network]:
    """List the networks of an ensemble, or the one network."""
    if isinstance(model, Ensemble):
        return cast("list[Network]", list(model.networks))
    return [model]


def for_inference(model: Network | Ensemble) -> Ensemble:
    """Copy a network, or those of an ensemble, with batch norms folded (see `fold_batch_norm`)."""
    return Ensemble(list(map(fold_batch_norm, networks_of(model)))).eval()


def fold_batch_norm(network: Network) -> Network:
    """Copy a network for inference, its batch norms folded into the convolutions before them.

    Outputs are equal up to rounding: W x + b, then g (. - m) / s + h, is one convolution with
    W g / s and (b - m) g / s + h. Layers are paired in the order in which they are defined. If they
    are called in another, the logits of one batch differ: the copy is not folded then, and a
    warning says so.
    """
    folded = copy.deepcopy(network).eval()
    expected = _logits_of_noise(folded)
    for module in list(folded.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    change = (_logits_of_noise(folded) - expected).abs().max()
    difference = float(change / expected.abs().max().clamp(min=1e-6))
    if not difference > FOLDED_ALIKE:  # nor if it is NaN: then both are, and validation says so
        return folded
    warnings.warn(
        f"batch norm of {type(network).__name__} is not folded into its convolutions: its logits "
        f"would change by {difference:.0%}; define each norm right after its convolution",
        stacklevel=2,
    )
    return copy.deepcopy(network).eval()


@torch.inference_mode()
def _logits_of_noise(network: Network) -> Tensor:
    """Return the logits of one random slice, the same for every network of as many channels."""
    draws = torch.Generator().manual_seed(0)
    side = 2 * network.stride
    batch = torch.randn(1, network.settings["in_channels"], side, side, generator=draws)
    return network(batch.to(next(network.parameters())), logits=True)


def weights_files(weights: Path | str | Sequence[Path | str]) -> list[Path]:
    """List the files that --weights means: a file, several, or a folder (or its folders).

    Raises FileNotFoundError for a folder without any, ValueError for a file given twice, networks
    that do not belong together, or an ONNX file with others.
    """
    if isinstance(weights, (str, Path)):
        weights = [weights]
    files = []
    for path in map(Path, weights):
        if path.is_dir():
            files += _files_in(path)
        else:
            files.append(path)
    for file in files:
        if files.count(file) > 1:
            raise ValueError(f"{file}: is given twice; name each file once")
        if file.suffix == ".onnx" and len(files) > 1:
            raise ValueError(
                f"{file}: an ONNX file cannot be averaged with others; give it by itself, or "
                "export them all as one (export.py --weights FOLDER --format onnx)"
            )
    return files


def _files_in(folder: Path) -> list[Path]:
    files = _weights_among(folder.glob("*"), folder) or _weights_among(folder.glob("**/*"), folder)
    if not files:
        raise FileNotFoundError(f"{folder}: no weights (.pt) in this folder; name a file")
    _check_together(files, folder)
    return files


def _weights_among(paths: Iterable[Path], folder: Path) -> list[Path]:
    """List weights files in order, but none that is hidden; ValueError if others are among them."""
    files = []
    for path in sorted(paths):
        if "/." in f"/{path.relative_to(folder).as_posix()}":
            continue
        if path.suffix == ".pt":
            files.append(path)
        elif path.suffix in (".pth", ".safetensors", ".h5"):
            raise ValueError(
                f"{path}: is not a weights file of this project (.pt); take it out of {folder}"
            )
    return files


def _check_together(files: Sequence[Path], folder: Path) -> None:
    """Raise ValueError unless networks differ in fold and seed alone, and none is there twice."""
    cards = list(map(read_card, files))
    kinds = [card.get("settings", {}) | card.get("recipe", {}) for card in cards]
    remedy = f"the networks in {folder} are averaged: name the file, or those that belong together"
    for k, kind in enumerate(kinds):
        for name in sorted(kind.keys() & kinds[0].keys() - {"fold", "seed"}):
            here, there = kind[name], kinds[0][name]
            if here != there:
                what = name.replace("_", " ")
                raise ValueError(
                    f"{files[k]}: has {what} {here}, but {files[0].name} {there}; {remedy}"
                )
        for i in range(k):
            when = cards[k].get("started")
            if when and when == cards[i].get("started") and kind == kinds[i]:
                raise ValueError(
                    f"{files[k]}: is of the same training as {files[i].name}; {remedy}"
                )


def weights_id(hashes: Collection[str]) -> str:
    """Return eight digits that name weights files with these SHA-256; of one, its first ones."""
    if len(hashes) == 1:
        return next(iter(hashes))[:8]
    return _first_digits(" ".join(hashes))


def run_name(hashes: Collection[str], settings: Sequence[object]) -> str:
    """Name weights files, by their SHA-256, and the settings that make a mask; empty for none."""
    if not hashes:
        return ""
    return f"{weights_id(hashes)}-{_first_digits(json.dumps(settings))}"


def _first_digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def open_network(
    files: Sequence[Path], providers: Sequence[str] | None, options: Mapping[str, Any]
) -> tuple[Network | Ensemble | OnnxNetwork, dict]:
    """Open weights files as one network, or an ONNX file; return it and its card.

    Of the `options` of a Segmenter, an ONNX file needs device, batch_size and image_size. Raises
    FileNotFoundError or ValueError, naming the file, if one cannot be used.
    """
    if files[0].suffix != ".onnx":
        if providers:
            raise ValueError(f"{files[0]}: is not an ONNX file; leave out --providers, or give one")
        return load_ensemble(files)
    batch_size, size = options.get("batch_size", 16), options.get("image_size")
    model = OnnxNetwork(files[0], providers, options.get("device"), batch_size, size)
    return model, model.card


def load_ensemble(paths: Sequence[Path]) -> tuple[Network | Ensemble, dict]:
    """Load one network, or several as an `Ensemble`, and their common card (see `common_card`).

    Raises ValueError, naming the file, if one cannot be used or, of several, has no card or was
    trained for a different input from the first.
    """
    names, networks, cards = [], [], []
    for path in paths:
        name, network = model_from_state(load_state(path), path)
        names.append(name)
        networks.append(network)
        cards.append(read_card(path))
    model_and_settings = {"model": names[0], "settings": networks[0].settings}
    if len(paths) == 1:
        return networks[0], cards[0] | model_and_settings
    check_members(paths, cards, networks)
    return Ensemble(networks), common_card(cards) | model_and_settings


def common_card(cards: Sequence[dict]) -> dict:
    """Return what the cards of all members say, with the training cases and patients of each.

    Of the settings of masks, those that all agree on stay, though their fits may differ.
    """
    common = {}
    for name, value in cards[0].items():
        if all(card.get(name) == value for card in cards):
            common[name] = value
    stated = [mask_settings(card) for card in cards]
    agreed, differing = {}, []
    for name in FITTED_WITH:
        values = {settings.get(name) for settings in stated}
        if len(values) > 1:
            differing.append(name)
        elif values != {None}:
            agreed[name] = values.pop()
    if agreed:
        common["mask_settings"] = agreed
    if differing:
        common["settings_that_differ"] = differing
    if any(card.get("expected_dsc") != cards[0].get("expected_dsc") for card in cards):
        common["fits_differ"] = True
    cases: set[str] = set()
    patients: dict[str, str] = {}
    for card in cards:
        cases.update(card.get("cases", {}).get("train", ()))
        patients.update(card.get("patients", {}))
    common["cases"] = {"train": sorted(cases)}
    if patients:
        common["patients"] = patients
    return common


def check_members(
    paths: Sequence[Path], cards: Sequence[dict], networks: Sequence[Network]
) -> None:
    """Raise ValueError, naming the file, unless inputs and outputs match those of the first."""
    first = _input_and_output(cards[0], networks[0])
    for path, card, network in zip(paths, cards, networks, strict=True):
        if not card:
            raise ValueError(
                f"{path}: has no card (.json) to show that it belongs with {paths[0].name}; "
                "give it by itself, or take it out of the folder"
            )
        for name, value in _input_and_output(card, network).items():
            if value != first[name]:
                raise ValueError(
                    f"{path}: has {name} {value}, but {paths[0].name} has {first[name]}; networks "
                    "that are averaged must agree: name those that belong together"
                )


def _input_and_output(card: dict, network: Network) -> dict:
    values = {"in_channels": network.settings["in_channels"]}
    values["out_channels"] = network.settings["out_channels"]
    for name, default in CARD_DEFAULTS.items():
        values[name.replace("_", " ")] = card.get(name, default)
    return values


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
