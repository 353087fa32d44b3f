"""The slices of a subset, and training batches of them."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainseg.cache import Prepared, prepare, unless_bad
from brainseg.devices import concatenate, free_memory, in_order, to_device
from brainseg.io.files import (
    with_archives,
)
from brainseg.io.labels import doubtful_masks
from brainseg.io.layouts import Source, list_cases
from brainseg.io.slices import Case
from brainseg.patients import alike_names, count_patients, counted, names_of, patient_of
from brainseg.preprocess import VERSION, neighbourhoods
from brainseg.splits import by_subset, is_placed, outside_test, select_cases, split_folds, subset_of

FEW_TO_CHOOSE = 3  # validation patients; with fewer, the best epoch is hardly chosen
MOST = 0.5  # share of a device's free memory; a training step needs the rest


class SliceDataset(Dataset):
    """Slices of prepared cases: item i is (image (C, N, N), mask (1, N, N)), float32.

    They are not augmented. `targets`, the masks (S, N, N) of the cases, may be replaced by numbers
    from 0 to 1. Raises ValueError, naming cases, if their numbers of channels differ.
    """

    def __init__(self, volumes: Sequence[Prepared]):
        self.volumes = volumes
        self.targets = [volume.mask for volume in volumes]
        self.cases = [volume.case for volume in volumes]
        self.names = names_of(volumes)
        self.in_channels = channels_of(volumes)
        self._places = []  # the numbers of the volume and of the slice in it, of each item
        for number, volume in enumerate(volumes):
            self._places += [(number, index) for index in range(len(volume.mask))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, masks = self.batch([index])
        return images[0].float(), masks[0].float()

    def batch(self, indices: Sequence[int], neighbours: int = 0) -> tuple[Tensor, Tensor]:
        """Return several slices as stored: (B, C, N, N) float16 and (B, 1, N, N) bool or float16.

        K `neighbours` on either side add their channels: (B, (2 K + 1) C, N, N).
        """
        images, masks = [], []
        for item in indices:
            number, index = self._places[item]
            volume = self.volumes[number]
            slices = neighbourhoods([len(volume.mask)], neighbours)[index].tolist()
            images.append(np.concatenate(volume.images[slices]))
            masks.append(self.targets[number][index][None])
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))

    def locate(self, item: int) -> tuple[str, int]:
        """Return the case and the slice number of an item."""
        number, index = self._places[item]
        volume = self.volumes[number]
        return volume.name, volume.case.numbers[index]

    def sampling_weights(self, background: float) -> Tensor:
        """Compute the probability (len(self),) of drawing each slice in training.

        A case is drawn uniformly, then a slice in proportion to its mask area plus `background`
        times the case's mean area: background / (1 + background) of the draws are uniform over its
        slices, and all of them in a case without lesion.
        """
        weights = []
        for volume in self.volumes:
            area = torch.from_numpy(volume.mask.sum(axis=(1, 2))).double()
            weight = area + background * area.mean()
            if not area.any():
                weight = torch.ones_like(area)
            weights.append(weight / weight.sum() / len(self.volumes))
        return torch.cat(weights)


class BrainSegmentationDataset(SliceDataset):
    """The slices of a subset of the cases in a folder, each with its masks; see `SliceDataset`.

    Raises FileNotFoundError or ValueError, naming the file or folder, if anything cannot be used.
    `options` are those of `prepare`.
    """

    def __init__(
        self,
        images_dir: Path | str,
        subset: str = "train",
        image_size: int = 256,
        cache: Path | str | None = None,
        **options: Any,
    ):
        cases = open_cases(select_cases(list_cases(images_dir), subset))
        super().__init__(prepare(cases, image_size, cache, **options))


def train_and_validation(
    sources: Sequence[Source],
    folds: int | None = None,
    fold: int | None = None,
    skip_bad: bool = False,
    image_size: int = 256,
    version: int = VERSION,
    cache: Path | str | None = None,
    workers: int | None = None,
) -> tuple[SliceDataset, SliceDataset]:
    """Open the two subsets for training; test cases are never opened.

    With `folds`, the subsets are those of a cross-validation (`split_folds`). With `skip_bad`,
    cases that cannot be read are named on stderr and left out. What follows is for `prepare`. Says
    how large the subsets are, and on stderr what cannot be right about them.
    """
    if folds is None:
        chosen = select_cases(sources, "train") + select_cases(sources, "validation")
    else:  # every fold needs all cases except the test cases
        chosen = outside_test(sources)
    cases = open_cases(chosen, skip_bad)
    volumes = prepare(cases, image_size, cache, workers, version, skip_bad)
    cases = [volume.case for volume in volumes]
    if folds is None or fold is None:
        in_training = [case for case in cases if subset_of(case) == "train"]
    else:
        lesions = {volume.name: int(volume.truth.sum()) for volume in volumes}
        in_training, _ = split_folds(cases, folds, fold, lesions)
    names = set(names_of(in_training))
    train, validation = [], []
    for volume in volumes:
        if volume.name in names:
            train.append(volume)
        else:
            validation.append(volume)
    for verb, part in (("train", train), ("validate", validation)):
        if not part:
            raise ValueError(f"no readable case is left to {verb} on")
    channels_of(volumes)
    cases[0].labels.check()
    if not any(volume.mask.any() for volume in train):
        raise ValueError(
            f"{train[0].case.folder}: has no lesion in its mask, and neither has any other of the "
            f"{len(train)} training cases; check how the masks were exported, and --labels"
        )
    report_subsets(train, validation, sources)
    return SliceDataset(train), SliceDataset(validation)


def report_subsets(
    train: Sequence[Prepared], validation: Sequence[Prepared], sources: Sequence[Source]
) -> None:
    """Print the sizes of the subsets and, on stderr, what cannot be right about them."""
    both = list(train) + list(validation)
    for volume in both:
        for note in volume.frame.notes:
            print(with_archives(f"{volume.case.folder}: {note}"), file=sys.stderr)
    for part, volumes in (("training", train), ("validation", validation)):
        shares = {volume.name: volume.mask.mean() for volume in volumes}
        for oddity in doubtful_masks(shares, (volume.truth for volume in volumes)):
            print(f"{part}: {oddity}", file=sys.stderr)
    used = names_of(both)
    subsets = {
        "train": [volume.case for volume in train],
        "validation": [volume.case for volume in validation],
        "test": [case for case in by_subset(sources)["test"] if case.name not in used],
    }
    print(count_patients(subsets), flush=True)
    patients = set(map(patient_of, subsets["validation"]))
    if len(patients) < FEW_TO_CHOOSE:
        print(
            f"validation has {counted(len(patients), 'patient')}: its DSC says little about "
            "others; cross-validate for a score (--folds, --fold)",
            file=sys.stderr,
        )
        by_hash = {patient_of(case) for case in subsets["test"] if not is_placed(case)}
        if by_hash:
            print(
                f"test: {counted(len(by_hash), 'patient')} set aside by a hash of the name; to "
                "train on all but some of your choice: --validation NAMES",
                file=sys.stderr,
            )
    question = alike_names(sources)
    if question:
        print(question, file=sys.stderr)


def open_cases(sources: Sequence[Source], skip_bad: bool = False) -> list[Case]:
    """Open the cases; with `skip_bad`, leave out damaged ones, naming them on stderr."""
    if not skip_bad:
        return list(map(Source.open, sources))
    cases = []
    for source in sources:
        case = unless_bad(Source.open, source)
        if case is not None:
            cases.append(case)
    return cases


def channels_of(volumes: Sequence[Prepared]) -> int:
    """Return the cases' number of channels. Raises ValueError, naming cases, if it differs."""
    channels = {volume.images.shape[1]: volume.case.folder for volume in volumes}
    if len(channels) > 1:
        listed = ", ".join(f"{count} in {folder}" for count, folder in sorted(channels.items()))
        raise ValueError(f"cases differ in number of channels: {listed}; keep those of one kind")
    return next(iter(channels))


class BatchLoader:
    """Batches (images (B, C, N, N) float16, masks (B, 1, N, N) bool) of a data set, as stored.

    A CUDA GPU holds the data set if it takes at most half of its free memory; otherwise threads
    gather batches ahead. K `neighbours` on either side make 2 K + 1 times the channels.
    """

    def __init__(
        self,
        dataset: SliceDataset,
        device: torch.device,
        neighbours: int = 0,
        workers: int | None = None,
    ):
        self.dataset, self.device = dataset, device
        self.neighbours, self.workers = neighbours, workers
        volumes = dataset.volumes
        size = sum(volume.images.nbytes for volume in volumes)
        size += sum(target.nbytes for target in dataset.targets)
        around = neighbourhoods([len(volume.mask) for volume in volumes], neighbours)
        self.on_device = size <= MOST * free_memory(device)
        if self.on_device:
            self.place = f"{size / 2**20:,.0f} MiB of slices on {device}"
            self.images = concatenate([volume.images for volume in volumes], device)
            self.masks = concatenate(dataset.targets, device)[:, None]
            self.slices = to_device(around, device)
        else:
            self.place = f"{size / 2**20:,.0f} MiB of slices in host memory"

    def batches(self, drawn: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch, on the device, for each item of `drawn`, slice indices (B,)."""
        if self.on_device:  # indices are copied all at once, so no step waits for them
            indices = to_device(torch.cat(list(drawn)), self.device)
            for part in indices.split([len(batch) for batch in drawn]):
                yield self.images[self.slices[part]].flatten(1, 2), self.masks[part]
        elif self.device.type == "cpu":
            yield from map(self._gathered, drawn)
        else:
            for images, masks in in_order(self._gathered, drawn, self.workers):
                yield to_device(images, self.device), to_device(masks, self.device)

    def _gathered(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        images, masks = self.dataset.batch(batch.tolist(), self.neighbours)
        if self.device.type == "cuda":
            return images.pin_memory(), masks.pin_memory()
        return images, masks
