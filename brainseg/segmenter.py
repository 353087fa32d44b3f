"""From a raw volume to its mask: the one path that training, inference and torch.hub share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .appearance import LOOKS
from .ensemble import Ensemble, open_network, run_name, weights_files
from .io.files import by
from .io.sequences import with_copies
from .metrics import components
from .onnx import OnnxNetwork
from .predictor import Predictor
from .preprocess import VERSION, Frame, preprocess, restore
from .quality import (
    FEATURES,
    FIT_OF_ENSEMBLE,
    FITTED_WITH,
    expected_dsc,
    mask_settings,
    quality,
    quality_warnings,
    unlikeness_notes,
)
from .weights import CARD_DEFAULTS, SHIPPED, Network, file_hash

SHAPES = "(slices, rows, columns) of FLAIR, or (slices, rows, columns, channels)"
VOXEL = 5.0  # mm³, see `least_voxels`
Spacing = Sequence[float] | None  # mm from slice to slice, row to row, column to column
DIFFERENT_FITS = (
    "the networks have different fits; give those of one training, or "
    "evaluate.py --fit-expected-dsc makes one for all"
)
NO_FIT = "this network has no fit; evaluate.py --fit-expected-dsc makes one"
MASK_SETTINGS = ("image_size",) + FITTED_WITH  # of the options, those that change a mask
RUN_SETTINGS = ("image_size", "neighbours", "version", "amp") + FITTED_WITH  # in `Segmenter.run`


@dataclass
class Segmentation:
    """A mask, and how good it probably is."""

    mask: np.ndarray  # (S, H, W) bool
    probabilities: np.ndarray  # (S, H, W) float32
    deviation: np.ndarray | None  # of them over the networks of an ensemble, (S, H, W) float32
    features: dict  # of `quality`
    expected: tuple[float, float, float] | None  # DSC and its 80 % interval, if known
    warnings: list[str]  # a sentence each; empty if nothing calls for a second look
    replaced: Sequence[str] = ()  # sequences that preprocessing has replaced by FLAIR
    notes: Sequence[str] = ()  # what else happened to the scan, a sentence each
    no_expected_dsc: str = ""  # why a mask that is not empty has none


class Segmenter(Predictor):
    """A network, or an `Ensemble`, with its preprocessing: a raw volume in, its mask out.

    `image_size` is the side of a resized slice, `threshold` the lowest probability of lesion;
    `largest_component` keeps the largest, `min_volume` drops smaller ones (see `least_voxels`).
    `tta` averages over a slice and its mirror image where there may be lesion; `amp` computes in
    half precision (None: if faster). `neighbours`, `version` (of the preprocessing) and
    `expected_dsc_fit` are the card's. The network is copied. Raises ValueError for a wrong option.
    """

    def __init__(
        self,
        model: Network | Ensemble | OnnxNetwork,
        image_size: int = 256,
        threshold: float = 0.5,
        largest_component: bool = True,
        tta: bool = False,
        batch_size: int = 16,
        device: torch.device | str | None = None,
        amp: bool | None = None,
        neighbours: int = 0,
        version: int = VERSION,
        min_volume: int = 0,
        expected_dsc_fit: dict | None = None,
    ):
        check_options(image_size, model.stride, threshold)
        super().__init__(model, tta, batch_size, device, amp, neighbours)
        self.image_size, self.version = image_size, version
        self.threshold, self.min_volume = threshold, min_volume
        self.largest_component, self.expected_dsc_fit = largest_component, expected_dsc_fit
        self.hashes: dict[Path, str] = {}  # the SHA-256 of each weights file
        self.card: dict = {}  # of the weights, as far as they agree
        self.reasons: dict[str, str] = {}  # where each setting is from
        self.no_expected_dsc = NO_FIT  # why there is none; empty if there is one
        self.notes: list[str] = []  # what a user should know about the weights, a sentence each

    @classmethod
    def from_weights(
        cls,
        weights: Path | str | Sequence[Path | str],
        providers: Sequence[str] | None = None,
        **options,
    ) -> Segmenter:
        """Open a weights file, an ONNX file, or several weights files or a folder as an ensemble.

        Image size, threshold, components and `tta` are those of the card unless given; if others
        are, its fit of the expected DSC is not used, and `notes` says so. `providers` are those of
        `OnnxNetwork`. Raises FileNotFoundError or ValueError, naming a file that cannot be used.
        """
        files = weights_files(weights)
        given = {name: value for name, value in options.items() if value is not None}
        model, card = open_network(files, providers, given)
        settings = settings_of_card(card)
        segmenter = cls(model, **settings | given)
        segmenter.card = card
        segmenter.hashes = {file: file_hash(file) for file in files}
        segmenter.reasons = explain_choices(segmenter, given)
        note_weights(segmenter, settings)
        return segmenter

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the settings of these names."""
        return {name: getattr(self, name) for name in names}

    @property
    def run(self) -> str:
        """Name the weights and the settings that make a mask; empty without weights files."""
        return run_name(self.hashes.values(), [*self.values(RUN_SETTINGS).values(), VOXEL])

    def __call__(self, volume: np.ndarray, aspect: float = 1.0) -> np.ndarray:
        """Segment a raw volume (S, H, W, C), or FLAIR alone (S, H, W); return its mask, bool.

        Channels are pre-contrast, FLAIR, post-contrast, of any numeric type. `aspect` is the height
        of a pixel over its width. Warns of a scan that calls for a look. Raises ValueError, as
        `as_volume` does for axes in another order.
        """
        images, frame = self.preprocess(as_volume(volume, self.channels), aspect)
        for doubt in frame.doubts:
            warnings.warn(f"unusual input: {doubt}", stacklevel=2)
        return self.mask_of(self.probabilities(images), frame)

    def preprocess(self, volume: np.ndarray, aspect: float = 1.0) -> tuple[Tensor, Frame]:
        """Make the network's input (S, C, N, N), on its device if it fits, and the frame.

        The only channel of a volume stands in for the three of a network (`with_copies`). Raises
        ValueError for a wrong channel count.
        """
        if volume.ndim == 4:
            volume = with_copies(volume, self.channels)
            self.check_channels(volume.shape[3])
        if self.device.type == "cuda":
            try:
                return preprocess(volume, self.image_size, self.version, self.device, aspect)
            except torch.OutOfMemoryError:
                pass  # its memory is free only once this block is left
        return preprocess(volume, self.image_size, self.version, aspect=aspect)

    def mask_of(self, probabilities: Tensor, frame: Frame, spacing: Spacing = None) -> np.ndarray:
        """Turn probabilities (S, K, N, N) into a mask (S, H, W), bool, in the source geometry."""
        restored = _restored(probabilities[:, 0], frame)
        least = least_voxels(self.min_volume, spacing)
        return to_mask(restored, self.threshold, self.largest_component, least)

    def segmentation_of(
        self, probabilities: Tensor, frame: Frame, spacing: Spacing = None
    ) -> Segmentation:
        """Turn probabilities into a mask, and rate it; `spacing` is the source's, if known."""
        restored = _restored(probabilities[:, 0], frame).cpu()  # (S, H, W)
        deviation = None
        if probabilities.shape[1] > self.model.settings["out_channels"]:  # see `average`
            deviation = _restored(probabilities[:, -1], frame).cpu().numpy()
        least = least_voxels(self.min_volume, spacing)
        mask = to_mask(restored, self.threshold, self.largest_component, least)
        lesion = restored.numpy()
        features = quality(lesion, mask, deviation)
        features |= dict(zip(LOOKS, frame.looks, strict=False))  # none of a blank scan
        expected = expected_dsc(features, self.expected_dsc_fit)
        warnings = quality_warnings(features, expected, frame.doubts)
        notes = [note for note in frame.notes if note not in frame.doubts]
        if expected:
            notes += unlikeness_notes(features, self.expected_dsc_fit)
        missing = ""
        if expected is None and features["voxels"]:
            missing = self.no_expected_dsc or FIT_OF_ENSEMBLE
        return Segmentation(
            mask, lesion, deviation, features, expected, warnings, frame.replaced, notes, missing
        )


def as_volume(array: np.ndarray | Tensor, channels: int) -> np.ndarray:
    """Return an array (S, H, W), (S, H, W, 1) or (S, H, W, C) as a volume with `channels`.

    One channel is FLAIR, which stands in for the other two of three. Raises ValueError, with a
    remedy, for axes in another number or order.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError("a masked array does not say what was not scanned; give array.filled(0)")
    if isinstance(array, Tensor):
        array = array.detach().cpu().float()  # NumPy has no bfloat16
    volume = np.asarray(array)
    shape = volume.shape
    if volume.ndim not in (3, 4):
        raise ValueError(
            f"a volume is {SHAPES}, not {shape}; give one whole scan (slice[None] is one slice)"
        )
    if volume.ndim == 3 and shape[2] in (1, 3):
        raise ValueError(
            f"an array {shape} looks like one slice with its channels; a volume is {SHAPES}: give "
            "the whole scan, or slice[None]"
        )
    if volume.ndim == 4 and channels in shape[:2] and shape[3] not in (1, channels):
        raise ValueError(
            f"the channels of an array {shape} seem to come first; move them to the end, as in "
            f"numpy.moveaxis(volume, {shape.index(channels)}, -1)"
        )
    sides = shape[1:3]
    if max(sides) > 4 * min(sides):
        raise ValueError(
            f"slices of {by(sides)} pixels are too narrow for a volume (slices, rows, "
            "columns, channels); move the axis of the slices to the front"
        )
    if volume.ndim == 3:
        volume = volume[..., None]
    return with_copies(volume, channels)


def check_options(size: int, stride: int, threshold: float) -> None:
    """Raise ValueError unless `size` is a multiple of `stride`, and the threshold a probability."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold}: must be a probability between 0 and 1")
    if size < stride or size % stride:
        below = max(size // stride, 1) * stride
        raise ValueError(
            f"image size {size} is not a multiple of {stride}; try {below} or {below + stride}"
        )


def settings_of_card(card: dict) -> dict:
    """Return the options of a Segmenter that a card states, and what is assumed if it does not."""
    stated = CARD_DEFAULTS | card
    settings = {"image_size": stated["image_size"], "neighbours": stated["neighbours"]}
    settings |= {"version": stated["preprocessing"]} | mask_settings(card)
    return settings | {"expected_dsc_fit": card.get("expected_dsc") or {}}


def note_weights(segmenter: Segmenter, settings: dict) -> None:
    """Note what a user should know about the weights; drop the card's fit for other `settings`."""
    files = list(segmenter.hashes)
    if segmenter.card.keys() <= {"model", "settings"}:
        size = segmenter.image_size
        segmenter.notes.append(
            f"{files[0]}: has no card (.json); assuming preprocessing {segmenter.version} and "
            f"slices of {size} x {size}: put its card beside it"
        )
    for name in segmenter.card.get("settings_that_differ", ()):
        if segmenter.reasons.get(name) != "given":
            segmenter.notes.append(
                f"the cards of these networks differ in {name.replace('_', ' ')}: "
                f"{getattr(segmenter, name)} is used; choose with --{name.replace('_', '-')}"
            )
    folders = {file.parent for file in files}
    if len(files) > 1 and folders not in [{folder} for folder in SHIPPED.values()]:
        averaged = ", ".join(map(str, files))
        segmenter.notes.append(f"{len(files)} networks are averaged: {averaged}")
        if "fits_differ" in segmenter.card:
            segmenter.no_expected_dsc = DIFFERENT_FITS
            segmenter.notes.append(f"no expected DSC: {DIFFERENT_FITS}")
    changed = []
    for name in MASK_SETTINGS:
        if name in settings and getattr(segmenter, name) != settings[name]:
            changed.append(f"{name} {settings[name]}".replace("_", " "))
    if not settings["expected_dsc_fit"].get("features"):
        return
    segmenter.no_expected_dsc = ""
    unknown = set(settings["expected_dsc_fit"]["features"]) - FEATURES.keys()
    if unknown:
        segmenter.expected_dsc_fit = None
        segmenter.no_expected_dsc = (
            f"its fit needs {', '.join(sorted(unknown))}, which this version does not measure"
        )
    elif changed:
        segmenter.expected_dsc_fit = None
        segmenter.no_expected_dsc = f"the card's fit is for {', '.join(changed)}"
        segmenter.notes.append(
            f"no expected DSC, as {segmenter.no_expected_dsc}: leave out what changes it"
        )


def settings_text(segmenter: Segmenter) -> str:
    """Say in a line which settings are in use, and why."""
    parts = []
    for name, value in segmenter.values(segmenter.reasons).items():
        parts.append(f"{name.replace('_', ' ')} {value} ({segmenter.reasons[name]})")
    return ", ".join(parts)


def explain_choices(segmenter: Segmenter, given: dict) -> dict[str, str]:
    """Say where each option in use is from: given, of the card, by default, or why else."""
    sources: dict[str, str] = dict.fromkeys(MASK_SETTINGS, "default")
    of_card = {"image_size": segmenter.card.get("image_size")} | mask_settings(segmenter.card)
    for name, value in of_card.items():
        if value is not None:
            sources[name] = "card"
    if not isinstance(segmenter.model, OnnxNetwork):  # which has its own precision and device
        sources["amp"] = "faster here" if segmenter.amp else "no faster here"
        sources["device"] = "no accelerator" if segmenter.on_cpu else "accelerator"
    for name in sources.keys() & given.keys():
        sources[name] = "given"
    return sources


def _restored(probabilities: Tensor, frame: Frame) -> Tensor:
    """Bring one channel of the output (S, N, N) to the source geometry (S, H, W)."""
    try:
        return restore(probabilities, frame)
    except torch.OutOfMemoryError:
        return restore(probabilities.cpu(), frame)


def least_voxels(min_volume: int, spacing: Spacing) -> int:
    """Return the voxels of a scan that make up `min_volume` voxels of 1 x 1 x 5 mm.

    Such are those of the LGG data set, on which the shipped weights' minimum was chosen. Without a
    spacing, voxels are taken to be of that size.
    """
    if spacing is None:
        return min_volume
    return round(min_volume * VOXEL / math.prod(spacing))


def to_mask(probabilities: Tensor, threshold: float, largest: bool, min_volume=0) -> np.ndarray:
    """Threshold lesion probabilities (S, H, W) to a bool mask, then `keep_components`."""
    return keep_components((probabilities >= threshold).cpu().numpy(), largest, min_volume)


def keep_components(mask: np.ndarray, largest: bool = True, min_volume: int = 0) -> np.ndarray:
    """Keep the largest component (26 neighbours) of a mask, or all from `min_volume` voxels on."""
    if (not largest and min_volume <= 1) or not mask.any():
        return mask
    numbers, box = components(mask)
    sizes = np.bincount(numbers.ravel())
    sizes[0] = 0  # the background
    keep = sizes >= max(min_volume, 1)
    if largest:
        keep &= np.arange(len(sizes)) == sizes.argmax()
    result = np.zeros_like(mask)
    result[box] = keep[numbers]
    return result
