"""The slices of a subset, and training batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainseg.cache import Prepared, prepare, unless_bad
from brainseg.devices import concatenate, free_memory, in_order, to_device
from brainseg.io.layouts import Source, list_cases
from brainseg.io.slices import Case
from brainseg.preprocess import neighbourhoods
from brainseg.splits import check_folds, outside_test, select_cases, split_folds

MOST = 0.5  # share of a device's free memory; a training step needs the rest


def check_channels(volumes: Sequence[Prepared]) -> int:
    """Return the cases' number of channels. Raises ValueError, naming cases, if it differs."""
    channels = {volume.images.shape[1]: volume.case.folder for volume in volumes}
    if len(channels) > 1:
        listed = ", ".join(f"{count} in {folder}" for count, folder in sorted(channels.items()))
        raise ValueError(f"cases differ in number of channels: {listed}; keep those of one kind")
    return next(iter(channels))


def open_cases(sources: Sequence[Source], skip_bad: bool = False) -> list[Case]:
    """Open the cases; with `skip_bad`, leave out damaged ones, naming them on stderr."""
    opened = (unless_bad(Source.open, s) if skip_bad else s.open() for s in sources)
    return [case for case in opened if case is not None]


class BrainSegmentationDataset(Dataset):
    """Slices of a subset: item i is (image (C, N, N), mask (1, N, N)), float32, not augmented.

    `images_dir` has one folder per case, with masks. Raises FileNotFoundError or ValueError,
    naming the file or folder, if anything cannot be used. `how` are options of `prepare`.
    """

    def __init__(self, images_dir: Path | str, subset="train", image_size=256, cache=None, **how):
        cases = open_cases(select_cases(list_cases(images_dir), subset))
        self._hold(prepare(cases, image_size, cache, **how))

    def _hold(self, volumes: list[Prepared]) -> BrainSegmentationDataset:
        self.volumes, self.names = volumes, [volume.name for volume in volumes]
        self.in_channels = check_channels(volumes)
        self._place = [(v, s) for v, vol in enumerate(volumes) for s in range(len(vol.mask))]
        return self

    @classmethod
    def of(cls, volumes: list[Prepared]) -> BrainSegmentationDataset:
        """Make a data set from prepared volumes."""
        return cls.__new__(cls)._hold(volumes)

    @classmethod
    def train_and_validation(
        cls,
        images: Path | str | Sequence[Source],
        folds: int | None = None,
        fold: int | None = None,
        skip_bad: bool = False,
        **how,
    ) -> tuple[BrainSegmentationDataset, BrainSegmentationDataset]:
        """Open the two subsets for training, from a folder or from listed cases.

        Test cases are never opened. With `folds`, the subsets are those of a cross-validation
        (`split_folds`). With `skip_bad`, cases that cannot be read are named on stderr and left
        out. `how` are options of `prepare`.
        """
        sources = list_cases(images) if isinstance(images, (str, Path)) else images
        if folds is None:
            train, validation = (select_cases(sources, part) for part in ("train", "validation"))
        else:  # every fold needs all cases except the test cases
            check_folds(sources, folds, fold)
            train, validation = outside_test(sources), []
        cases = open_cases([*train, *validation], skip_bad)
        volumes = prepare(cases, skip_bad=skip_bad, progress=True, **how)
        if folds is not None:
            voxels = {volume.name: int(volume.truth.sum()) for volume in volumes}
            readable = [volume.case for volume in volumes]
            train, _ = split_folds(readable, folds, fold, voxels=lambda c: voxels[c.name])
        names = {case.name for case in train}
        parts = {
            "train": [volume for volume in volumes if volume.name in names],
            "validate": [volume for volume in volumes if volume.name not in names],
        }
        for verb, part in parts.items():
            if not part:
                raise ValueError(f"no readable case is left to {verb} on")
        check_channels(volumes)
        cases[0].labels.check()
        return tuple(map(cls.of, parts.values()))

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, masks = self.batch([index])
        return images[0].float(), masks[0].float()

    def batch(self, indices: Sequence[int], neighbours: int = 0) -> tuple[Tensor, Tensor]:
        """Return several slices as stored: (B, C, N, N) float16 and (B, 1, N, N) bool.

        K `neighbours` on either side add their channels: (B, (2 K + 1) C, N, N).
        """
        images, masks = [], []
        for v, s in (self._place[index] for index in indices):
            volume = self.volumes[v]
            seen = neighbourhoods([len(volume.mask)], neighbours)[s].tolist()
            images.append(np.concatenate(volume.images[seen]))
            masks.append(volume.mask[s][None])
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))

    def locate(self, index: int) -> tuple[str, int]:
        """Return the case and the slice number of an item."""
        v, s = self._place[index]
        return self.volumes[v].name, self.volumes[v].case.numbers[s]

    def sampling_weights(self, background: float) -> Tensor:
        """Compute the probability (len(self),) of drawing each slice in training.

        A case is drawn uniformly, then a slice in proportion to its mask area plus `background`
        times the case's mean area: background / (1 + background) of the draws are uniform over its
        slices, and all of them in a case without lesion.
        """
        weights = []
        for volume in self.volumes:
            area = torch.from_numpy(volume.mask.sum(axis=(1, 2))).double()
            weight = area + background * area.mean() if area.any() else torch.ones_like(area)
            weights.append(weight / weight.sum() / len(self.volumes))
        return torch.cat(weights)


class BatchLoader:
    """Batches (images (B, C, N, N) float16, masks (B, 1, N, N) bool) of a data set, as stored.

    A CUDA GPU holds the whole data set if that takes at most half of its free memory; otherwise
    threads gather batches ahead, in memory that it can fetch them from while it computes. On a CPU,
    each batch is gathered when it is needed. K `neighbours` on either side of each slice make
    2 K + 1 times the channels.
    """

    def __init__(
        self,
        dataset: BrainSegmentationDataset,
        device: torch.device,
        neighbours: int = 0,
        workers: int | None = None,
    ):
        self.dataset, self.device = dataset, device
        self.neighbours, self.workers = neighbours, workers
        size = sum(volume.images.nbytes + volume.mask.nbytes for volume in dataset.volumes)
        self.on_device = size <= MOST * free_memory(device)
        if self.on_device:
            self.place = f"{size / 2**20:,.0f} MiB of slices on {device}"
            self.images = concatenate([volume.images for volume in dataset.volumes], device)
            self.masks = concatenate([volume.mask for volume in dataset.volumes], device)[:, None]
            lengths = [len(volume.mask) for volume in dataset.volumes]
            self.seen = to_device(neighbourhoods(lengths, neighbours), device)
        else:
            self.place = f"{size / 2**20:,.0f} MiB of slices in host memory"

    def batches(self, drawn: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch for each item of `drawn`, a tensor of slice indices (B,)."""
        if self.on_device:  # indices are copied all at once, so no step waits for them
            indices = to_device(torch.cat(list(drawn)), self.device)
            for part in indices.split([len(batch) for batch in drawn]):
                yield self.images[self.seen[part]].flatten(1, 2), self.masks[part]
        elif self.device.type == "cpu":
            yield from map(self._gathered, drawn)
        else:
            yield from in_order(self._gathered, drawn, self.workers)

    def _gathered(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.dataset.batch(batch.tolist(), self.neighbours)
        return tuple(p.pin_memory() for p in parts) if self.device.type == "cuda" else parts
