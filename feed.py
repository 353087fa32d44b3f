"""Training batches, from where the slices lie: on the device, or in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dataset import BrainSegmentationDataset
from utils import in_order, to_device
from volume import neighbourhoods_of

MOST = 0.5  # of the free memory of a device; a training step needs the rest


class Feed:
    """Batches (images (B, C, N, N) float16, masks (B, 1, N, N) bool) of a data set, as stored.

    A GPU holds the whole data set if that takes at most half of its free memory; otherwise threads
    gather batches ahead, in memory that the GPU can fetch them from while it computes. With K
    `neighbours` on either side of each slice, there are 2 K + 1 times the channels.
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
        arrays = [array for volume in dataset.volumes for array in (volume.images, volume.mask)]
        size, free = sum(array.nbytes for array in arrays), free_memory(device)
        self.on_device = size <= MOST * free
        if self.on_device:
            self.place = f"{size / 2**30:.1f} GiB of slices on {device}"
            self.images = stacked([volume.images for volume in dataset.volumes], device)
            self.masks = stacked([volume.mask for volume in dataset.volumes], device)[:, None]
            lengths = [len(volume.mask) for volume in dataset.volumes]
            self.seen = to_device(neighbourhoods_of(lengths, neighbours), device)
        elif device.type == "cpu":
            self.place = "slices in host memory"
        else:
            self.place = f"{size / 2**30:.1f} GiB of slices in host memory, gathered ahead"
            if device.type == "cuda":
                self.place += f" ({free / 2**30:.1f} GiB free on {device})"

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, drawn: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of these slices, one by one; each of `drawn` holds indices (B,)."""
        if self.on_device:  # the indices go there in one piece, so that no step waits for them
            indices = to_device(torch.cat(list(drawn)), self.device)
            for part in indices.split([len(batch) for batch in drawn]):
                yield self.images[self.seen[part]].flatten(1, 2), self.masks[part]
        elif self.device.type == "cpu":
            yield from map(self._gathered, drawn)
        else:
            yield from in_order(self._gathered, drawn, self.workers)

    def _gathered(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        images, masks = self.dataset.batch(batch.tolist(), self.neighbours)
        if self.device.type == "cuda":
            return images.pin_memory(), masks.pin_memory()
        return images, masks


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU; 0 for a device that keeps none apart from the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def stacked(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Arrays (S, ...) one after the other on `device`, moved one by one, so that none is twice."""
    length = sum(map(len, arrays))
    first = torch.from_numpy(arrays[0])
    whole = torch.empty((length, *first.shape[1:]), dtype=first.dtype, device=device)
    start = 0
    for array in arrays:
        whole[start : start + len(array)] = torch.from_numpy(array)
        start += len(array)
    return whole
