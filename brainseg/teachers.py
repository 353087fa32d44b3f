"""The teachers of a student: what they are, and what it learns from them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .cache import Prepared, prepare
from .ensemble import common_card, load_ensemble, weights_files, weights_id
from .io.files import atomic_write, clear_leftovers, default_cache, save_array
from .origins import UNKNOWN
from .predictor import Predictor
from .weights import CARD_DEFAULTS, file_hash, read_card


class Teachers:
    """An ensemble of weights files, which a student learns from beside the true masks.

    Raises FileNotFoundError or ValueError if a file cannot be used, or if the `student` (.pt) would
    replace one of them or, in their folder, join them.
    """

    def __init__(self, path: Path, student: Path | None = None):
        self.path = path
        self.files = weights_files(path)
        if student:
            joins = student.parent.resolve().is_relative_to(path.resolve())
            if joins or student.resolve() in map(Path.resolve, self.files):
                raise ValueError(
                    f"{student}: would replace or join the teachers; name another folder with "
                    "--weights"
                )
        self.network, card = load_ensemble(self.files)
        self.card = CARD_DEFAULTS | card
        self.hashes = {file.name: file_hash(file) for file in self.files}  # SHA-256

    def check_resumed(self, checkpoint: dict) -> None:
        """Raise ValueError unless the checkpoint, if it names its teachers, learned from these."""
        hashes = checkpoint.get("teachers")  # checkpoints of earlier versions have none
        if hashes and hashes != self.hashes:
            raise ValueError(
                f"{self.path}: holds other networks than when the checkpoint was started; put "
                f"{', '.join(hashes)} there, or start a new run in another --weights folder"
            )

    def origin(self) -> dict:
        """Return the files, training cases and patients; say so if a card names no cases."""
        cards = list(map(read_card, self.files))
        if not all(card.get("cases") for card in cards):
            print(f"{self.path}: {UNKNOWN}")
        card = common_card(cards)
        return {"files": self.hashes, "cases": card["cases"], "patients": card.get("patients", {})}

    def soft_targets(
        self,
        volumes: Sequence[Prepared],
        device: torch.device,
        cache: Path | None = None,
        workers: int | None = None,
    ) -> list[np.ndarray]:
        """Return the targets (S, N, N), float16 between 0 and 1, of each prepared case.

        They are the true masks, averaged with what the teachers predict: one network that learns
        from the average of several comes close to it at the price of one. Hinton, Vinyals and Dean
        2015 (https://arxiv.org/abs/1503.02531); for ensembles in medical image segmentation
        Noothout et al. 2022 (doi 10.1117/1.JMI.9.5.052407). True and predicted masks weigh the same
        here. A case without lesion keeps its empty mask: there the teachers can only be wrong.

        The teachers see all sequences of a case at their own image size. Their predictions are kept
        in the folder `cache`. Raises ValueError if they were trained on other channels.
        """
        card = self.card
        predictor = Predictor(self.network, tta=True, device=device, neighbours=card["neighbours"])
        try:
            predictor.check_channels(volumes[0].images.shape[1])
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        size, version = card["image_size"], card["preprocessing"]
        cases = [volume.case for volume in volumes]
        seen_by_teachers = prepare(cases, size, cache, workers, version)
        name = f"teachers-{weights_id(self.hashes.values())}"
        if predictor.amp:
            name += "-half"
        folder = (cache or default_cache()) / name
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        targets = []
        pairs = zip(volumes, seen_by_teachers, strict=True)
        for volume, for_teachers in tqdm(pairs, "teachers", len(cases), unit="case", disable=None):
            if not volume.mask.any():
                targets.append(np.zeros(volume.mask.shape, np.float16))
                continue
            predicted = kept_prediction(predictor, for_teachers.images, folder)
            resized = F.interpolate(  # from (S, T, T)
                predicted[:, None].float(), volume.mask.shape[1:], mode="bilinear", antialias=True
            )
            target = (resized[:, 0].numpy() + volume.mask) / 2
            targets.append(target.astype(np.float16))
        return targets


def kept_prediction(predictor: Predictor, images: np.ndarray, folder: Path) -> Tensor:
    """Predict the lesion (S, N, N), float16, in images (S, C, N, N), or read it from `folder`."""
    images = np.ascontiguousarray(images)
    path = folder / f"{hashlib.sha256(images.data).hexdigest()[:16]}.npy"
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError):  # missing, or damaged
        pass
    predicted = predictor.probabilities(torch.from_numpy(images))[:, 0].cpu().half()
    with atomic_write(path) as temporary:
        save_array(temporary, predicted.numpy())
    return predicted
