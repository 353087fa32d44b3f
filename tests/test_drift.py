"""Test that shipped weights give the same output as when they were shipped.

tests/pairs holds, for each of them, a raw volume and its output then: the lesion probabilities in
its geometry, and the mask. `PYTHONPATH=. python3 tests/test_drift.py` writes the pairs of new
weights and removes those of deleted weights.
"""

from pathlib import Path

import numpy as np
import pytest

from brainseg.metrics import dsc
from brainseg.phantom import make_volume
from brainseg.segmenter import Segmenter
from brainseg.weights import shipped_files

PAIRS = Path(__file__).parent / "pairs"
WEIGHTS = shipped_files()


def outputs(weights: Path, volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute probabilities (S, H, W) and mask (S, H, W), in float32 on the CPU."""
    segmenter = Segmenter.from_weights(weights, device="cpu", amp=False, min_volume=0, tta=False)
    images, frame = segmenter.preprocess(volume)
    probabilities = segmenter.assess(segmenter.probabilities(images), frame).probabilities
    return probabilities, segmenter(volume)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda path: path.stem)
def test_the_same_as_when_they_were_shipped(weights):
    pair = np.load(PAIRS / f"{weights.stem}.npz")
    probabilities, mask = outputs(weights, pair["volume"])
    assert np.abs(probabilities - pair["probabilities"]).max() < 2e-3
    assert pair["mask"].any() and dsc(mask, pair["mask"]) > 0.99


def test_the_pairs_are_those_of_the_shipped_weights():
    assert {path.stem for path in PAIRS.glob("*.npz")} == {path.stem for path in WEIGHTS}


if __name__ == "__main__":
    PAIRS.mkdir(exist_ok=True)
    for pair in PAIRS.glob("*.npz"):
        if pair.stem not in {weights.stem for weights in WEIGHTS}:
            pair.unlink()
    volume, _ = make_volume(seed=0, slices=6, size=96)
    for weights in WEIGHTS:
        if (PAIRS / f"{weights.stem}.npz").exists():
            continue
        probabilities, mask = outputs(weights, volume)
        np.savez_compressed(
            PAIRS / f"{weights.stem}.npz",
            volume=volume,
            probabilities=probabilities.astype(np.float16),
            mask=mask,
        )
        print(f"{weights.stem}: {mask.sum()} voxels of lesion")
