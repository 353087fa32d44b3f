"""From a raw volume to its mask: the one path that training, inference and torch.hub share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .devices import half_precision, has_bfloat16, pick_device
from .ensemble import Ensemble, fold_batch_norm, load_ensemble, networks_of
from .io.files import by
from .onnx import OnnxNetwork
from .preprocess import VERSION, Frame, neighbourhoods, preprocess, restore
from .quality import FITTED_WITH, assess
from .weights import CARD_DEFAULTS, file_hash, shipped_files, weights_files

MIRROR_ABOVE = 0.05  # probability; a slice without any as high is not mirrored


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


class Segmenter:
    """A network, or an `Ensemble`, with its preprocessing: a raw volume in, its mask out.

    `image_size` is the side of a resized slice, `threshold` the lowest probability that counts as
    lesion. `largest_component` keeps only the largest one, `min_volume` drops those of fewer
    voxels. `tta` averages over a slice and its mirror image where the slice may have lesion; `amp`
    computes in half precision (None: if bfloat16 is faster); `batch_size` limits the slices at
    once. `neighbours` (slices seen on either side), preprocessing `version` and `expected_dsc_fit`
    are those of the card. The network is copied. An ONNX network has its own device and precision.
    Raises ValueError for a wrong option.
    """

    def __init__(
        self,
        model: nn.Module | OnnxNetwork,
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
        stride = model.stride
        if image_size < stride or image_size % stride:
            below = max(image_size // stride, 1) * stride
            raise ValueError(
                f"image size {image_size} is not a multiple of {stride}; "
                f"try {below} or {below + stride}"
            )
        if not 0 < threshold < 1:
            raise ValueError(f"threshold {threshold}: must be a probability between 0 and 1")
        if isinstance(model, OnnxNetwork):  # its input and output are in host memory
            if amp:
                raise ValueError(
                    f"{model.path}: computes in the precision it was exported in; leave out "
                    "--amp, or export it again with --precision float16"
                )
            self.model, self.device, self.amp = model, torch.device("cpu"), False
            self.on_cpu, self.runtime = model.provider == "cpu", f"ONNX Runtime ({model.provider})"
        else:
            self.device = pick_device(device)
            model = Ensemble(networks_of(fold_batch_norm(model))).eval()
            self.model = model.to(self.device, memory_format=torch.channels_last)
            self.amp = has_bfloat16(self.device) if amp is None else amp
            self.on_cpu, self.runtime = self.device.type == "cpu", f"PyTorch ({self.device})"
        self.image_size, self.neighbours, self.version = image_size, neighbours, version
        self.threshold, self.min_volume, self.tta = threshold, min_volume, tta
        self.largest_component, self.expected_dsc_fit = largest_component, expected_dsc_fit
        self.notes: list[str] = []  # to be said once
        self.hashes: dict[Path, str] = {}  # the SHA-256 of each weights file
        # Small batches stay in the cache of a CPU and take a fifth less time.
        self.batch_size = min(batch_size, 4) if self.on_cpu else batch_size

    @classmethod
    def from_weights(
        cls,
        weights: Path | str | Sequence[Path | str],
        providers: Sequence[str] | None = None,
        **options,
    ) -> Segmenter:
        """Open a weights file, an ONNX file, or several weights files or a folder as an ensemble.

        Image size, threshold, components and `tta` are those of the card unless given; if others
        are, its fit of the expected DSC is not used, and `notes` says so. For `providers`, see
        `OnnxNetwork`. Raises FileNotFoundError or ValueError, naming the file, if one cannot be
        used.
        """
        files = weights_files(weights)
        if files[0].suffix == ".onnx":
            names = options.keys() & {"device", "batch_size", "image_size"}
            model = OnnxNetwork(files[0], providers, **{name: options[name] for name in names})
            card = model.card
        elif providers:
            raise ValueError(f"{files[0]}: is not an ONNX file; leave out --providers, or give one")
        else:
            model, card = load_ensemble(files)
        card, fit = CARD_DEFAULTS | card, card.get("expected_dsc") or {}
        own = {"image_size": card["image_size"]} | {k: fit[k] for k in FITTED_WITH if k in fit}
        segmenter = cls(
            model,
            neighbours=card["neighbours"],
            version=card["preprocessing"],
            expected_dsc_fit=fit,
            **own | {name: value for name, value in options.items() if value is not None},
        )
        segmenter.hashes = {file: file_hash(file) for file in files}
        if len(files) > 1 and not set(files) <= set(shipped_files()):
            averaged = ", ".join(map(str, files))
            segmenter.notes.append(f"{len(files)} networks are averaged: {averaged}")
        changed = [f"{k} {own[k]}" for k in own if getattr(segmenter, k) != own[k]]
        if changed and fit.get("features"):
            segmenter.expected_dsc_fit = None
            fitted = ", ".join(changed).replace("_", " ")
            segmenter.notes.append(
                f"no expected DSC, as the card's fit is for {fitted}: leave out what changes it"
            )
        return segmenter

    @property
    def run(self) -> str:
        """Name the weights and the settings that make a mask: eight digits of each one's SHA-256.

        Those of a single weights file are its own. Empty if the network is not from files.
        """
        if not self.hashes:
            return ""
        names = ("image_size", "neighbours", "version", "amp", *FITTED_WITH)
        settings = json.dumps([getattr(self, name) for name in names])
        return f"{weights_id(self.hashes.values())}-{_sha256(settings)[:8]}"

    def __call__(self, volume: np.ndarray, aspect: float = 1.0) -> np.ndarray:
        """Segment a raw volume (S, H, W, C); return its mask (S, H, W), bool.

        Channels are pre-contrast, FLAIR, post-contrast, of any numeric type. `aspect` is the height
        of a pixel over its width. Raises ValueError, also for slices more than four times as long
        as wide, a sign that the axes are in another order.
        """
        volume = np.asarray(volume)
        sides = volume.shape[1:3]
        if volume.ndim == 4 and max(sides) > 4 * min(sides):
            raise ValueError(
                f"slices of {by(sides)} pixels are too narrow for a volume (slices, rows, "
                "columns, channels); move the axis of the slices to the front"
            )
        images, frame = self.preprocess(volume, aspect)
        return self.finish(self.probabilities(images), frame)

    def preprocess(self, volume: np.ndarray, aspect: float = 1.0) -> tuple[Tensor, Frame]:
        """Make the network's input (S, C, N, N), on its device if it fits, and the frame.

        Raises ValueError for a wrong channel count.
        """
        if volume.ndim == 4:
            self.check_channels(volume.shape[3])
        return preprocess_near(volume, self.image_size, self.version, self.device, aspect)

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless the network takes this number of channels."""
        wanted = self.model.settings["in_channels"] // (2 * self.neighbours + 1)
        if channels != wanted:
            raise ValueError(
                f"{channels} channel(s), but the model was trained on {wanted}; "
                "give the sequences it was trained on, with FLAIR in place of a missing one"
            )

    def finish(self, probabilities: Tensor, frame: Frame) -> np.ndarray:
        """Turn probabilities (S, K, N, N) into a mask (S, H, W), bool, in the source geometry."""
        return self._to_mask(_restored(probabilities, frame))

    def assess(self, probabilities: Tensor, frame: Frame) -> Segmentation:
        """Turn probabilities (S, K, N, N) into a mask, and estimate how good it is."""
        restored = _restored(probabilities, frame).cpu()
        mask, maps = self._to_mask(restored), (restored.numpy(), None)
        if probabilities.shape[1] > self.model.settings["out_channels"]:  # see `average`
            maps = maps[0], _restored(probabilities[:, -1:], frame).cpu().numpy()
        found = assess(maps[0], mask, maps[1], self.expected_dsc_fit, frame.notes)
        return Segmentation(mask, *maps, *found, frame.replaced)

    def _to_mask(self, restored: Tensor) -> np.ndarray:
        return to_mask(restored, self.threshold, self.largest_component, self.min_volume)

    @torch.inference_mode()
    def probabilities(
        self,
        images: Tensor,
        progress: Callable[[int, int], None] = lambda done, of: None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the network: slices (S, C, N, N) in, probabilities (S, K, N, N), float32, out.

        An ensemble adds a channel with the standard deviation (see `average`). `progress` is called
        after each batch with the numbers of slices done and in all. `lengths` are the numbers
        of slices of consecutive volumes, if there are several.
        """
        parts, done = [], 0
        seen = neighbourhoods(lengths or [len(images)], self.neighbours)
        seen = seen.to(images.device, non_blocking=True)
        for slices in seen.split(self.batch_size):
            batch = images[slices].flatten(1, 2).to(self.device, torch.float32)
            parts.append(self._network(batch))
            if self.tta and len(some := _may_have_lesion(parts[-1])):
                mirrored = self._network(batch[some].flip(-1)).flip(-1)
                parts[-1][some] = (parts[-1][some] + mirrored) / 2
            done += len(slices)
            progress(done, len(images))
        return torch.cat(parts)

    def _network(self, batch: Tensor) -> Tensor:
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, half_precision(self.device), enabled=self.amp):
            return self.model(batch)


def _may_have_lesion(probabilities: Tensor) -> Tensor:
    """Return the indices of the slices (N, K, H, W) in which lesion is not all but excluded."""
    return (probabilities[:, 0].amax((1, 2)) >= MIRROR_ABOVE).nonzero()[:, 0]


def _restored(probabilities: Tensor, frame: Frame) -> Tensor:
    """Bring the first channel of the output (S, K, N, N) to the source geometry (S, H, W)."""
    try:
        return restore(probabilities[:, 0], frame)
    except torch.OutOfMemoryError:
        return restore(probabilities[:, 0].cpu(), frame)


def preprocess_near(
    volume: np.ndarray, image_size: int, version: int, device: torch.device, aspect: float = 1.0
) -> tuple[Tensor, Frame]:
    """Call `preprocess` on the GPU if it fits there, else on the CPU."""
    if device.type == "cuda":
        try:
            return preprocess(volume, image_size, version, device, aspect)
        except torch.OutOfMemoryError:
            pass  # its memory is free only once this block is left
    return preprocess(volume, image_size, version, aspect=aspect)


def to_mask(probabilities: Tensor, threshold: float, largest: bool, min_volume=0) -> np.ndarray:
    """Threshold lesion probabilities (S, H, W) to a bool mask, then `keep_components`."""
    return keep_components((probabilities >= threshold).cpu().numpy(), largest, min_volume)


def keep_components(mask: np.ndarray, largest: bool = True, min_volume: int = 0) -> np.ndarray:
    """Keep the largest connected component (26 neighbours) of a bool mask (S, H, W), or all.

    Components of fewer than `min_volume` voxels are dropped.
    """
    if not largest and min_volume <= 1:
        return mask
    from skimage.measure import label

    labels = label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the background
    keep = sizes >= max(min_volume, 1)
    if largest:
        keep &= np.arange(len(sizes)) == sizes.argmax()
    return keep[labels]


def weights_id(hashes: Collection[str]) -> str:
    """Return the eight digits that name the weights files with these SHA-256 in `Segmenter.run`."""
    if len(hashes) == 1:
        return next(iter(hashes))[:8]
    return _sha256(" ".join(hashes))[:8]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
