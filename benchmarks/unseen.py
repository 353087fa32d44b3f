"""Segment a volume with the networks of an ensemble that have not seen its patient."""

import numpy as np

from brainseg.evaluation.scoring import Model
from brainseg.segmenter import Segmentation


def segment_unseen(model: Model, case: str, volume: np.ndarray) -> Segmentation:
    """Segment a raw volume (S, H, W, C) made from the case named `case`, as evaluate.py does."""
    if not model.unseen(case):
        raise SystemExit(f"error: {model.path}: trained on {case}; choose another --subset")
    segmenter = model.segmenter_for(case)
    images, frame = segmenter.preprocess(volume)
    return segmenter.assess(segmenter.probabilities(images), frame)
