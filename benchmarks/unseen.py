"""Segment a volume with the networks of an ensemble that have not seen its patient."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainseg.evaluation.scoring import NetworkModel
from brainseg.io.layouts import Source, list_cases
from brainseg.segmenter import Segmentation
from brainseg.splits import select_cases


def cases_of(images: Path, subsets: Sequence[str]) -> list[Source]:
    """List the cases of several subsets, one subset after the other."""
    return [s for subset in subsets for s in select_cases(list_cases(images), subset)]


def segment_unseen(model: NetworkModel, source: Source, volume: np.ndarray) -> Segmentation:
    """Segment a raw volume (S, H, W, C) made from a case, as evaluate.py does."""
    if not model.unseen(source):
        raise SystemExit(f"error: {model.path}: trained on {source.name}; choose another --subset")
    segmenter = model.segmenter_for(source)
    images, frame = segmenter.preprocess(volume)
    return segmenter.rate(segmenter.probabilities(images), frame)
