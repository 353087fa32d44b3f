"""Soft targets for a student: the true masks, averaged with what an ensemble of teachers predicts.

One network that learns from the average of several comes close to it at the price of one: Hinton,
Vinyals and Dean 2015 (https://arxiv.org/abs/1503.02531); for ensembles in medical image
segmentation Noothout et al. 2022 (doi 10.1117/1.JMI.9.5.052407). True and predicted masks weigh the
same here. A case without lesion keeps its empty mask: there the teachers can only be wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .cache import Prepared, prepare
from .ensemble import weights_id
from .io.files import atomic_write, default_cache, save_array
from .segmenter import Segmenter


def soft_targets(
    volumes: Sequence[Prepared],
    teachers: Segmenter,
    cache: Path | None = None,
    workers: int | None = None,
) -> list[np.ndarray]:
    """Return the targets (S, N, N), float16 between 0 and 1, of each prepared case.

    The teachers see all sequences of a case at their own image size. Their predictions are kept in
    the folder `cache`. Raises ValueError if they were trained on other channels.
    """
    teachers.check_channels(volumes[0].images.shape[1])
    cases = [volume.case for volume in volumes]
    seen_by_teachers = prepare(cases, teachers.image_size, cache, workers, version=teachers.version)
    folder = (cache or default_cache()) / f"teachers-{weights_id(teachers.hashes.values())}"
    folder.mkdir(parents=True, exist_ok=True)
    targets = []
    pairs = zip(volumes, seen_by_teachers, strict=True)
    for volume, for_teachers in tqdm(pairs, "teachers", len(volumes), unit="case", disable=None):
        if not volume.mask.any():
            targets.append(np.zeros(volume.mask.shape, np.float16))
            continue
        images = np.ascontiguousarray(for_teachers.images)
        path = folder / f"{hashlib.sha256(images.data).hexdigest()[:16]}.npy"
        if path.exists():
            predicted = torch.from_numpy(np.load(path))
        else:
            predicted = teachers.probabilities(torch.from_numpy(images))[:, 0].cpu().half()
            with atomic_write(path) as temporary:
                save_array(temporary, predicted.numpy())
        size = volume.mask.shape[1:]
        resized = F.interpolate(  # from (S, T, T)
            predicted[:, None].float(), size, mode="bilinear", antialias=True
        )
        target = (resized[:, 0].numpy() + volume.mask) / 2
        targets.append(target.astype(np.float16))
    return targets
