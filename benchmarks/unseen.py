"""Segment a volume by those networks of an ensemble that have not seen its patient."""

import numpy as np

from brainseg.evaluation.scoring import Model, segment
from brainseg.segmenter import Segmentation, preprocess_near


def segment_unseen(model: Model, case: str, volume: np.ndarray) -> Segmentation:
    """Segment a raw volume (S, H, W, C), made of the case called `case`, as evaluate.py does."""
    networks = model.networks_for(case)
    if not networks:
        raise SystemExit(f"error: {model.path}: trained on {case}; choose another --subset")
    segmenters = [network.segmenter for network in networks]
    ways = {(s.image_size, s.version, s.device) for s in segmenters}
    return segment(networks, {way: preprocess_near(volume, *way) for way in ways})
