"""Test that shipped weights make the same masks as in the last release.

tests/pairs holds, for each of them and two phantoms, a raw volume and its output then: the lesion
probabilities in its geometry, and the mask. A voxel may move only if its probability was within
`ROUNDING` of `THRESHOLD`, as processors round differently.

To write missing pairs with the code of a commit, and remove those of deleted weights:

    git worktree add --detach /tmp/release COMMIT
    PYTHONPATH=/tmp/release python3 tests/test_drift.py
"""

from pathlib import Path

import numpy as np
import pytest

from brainseg.phantom import make_volume
from brainseg.preprocess import restore
from brainseg.segmenter import Segmenter
from brainseg.weights import PUBLISHED, SHIPPED

PAIRS = Path(__file__).parent / "pairs"
WEIGHTS = {path.stem: path for path in (*SHIPPED.values(), *PUBLISHED.values())}
PHANTOMS = {"phantom1": 1, "phantom2": 2}  # their seeds
NAMES = {f"{weights}-{phantom}" for weights in WEIGHTS for phantom in PHANTOMS}
THRESHOLD, ROUNDING = 0.5, 2e-3


def outputs(weights: Path, volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute probabilities (S, H, W) and mask (S, H, W), in float32 on the CPU."""
    segmenter = Segmenter.from_weights(weights, device="cpu", amp=False)
    images, frame = segmenter.preprocess(volume)
    probabilities = segmenter.probabilities(images)
    return restore(probabilities[:, 0], frame).numpy(), segmenter.mask_of(probabilities, frame)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_voxel_moved_since_the_last_release(name):
    weights, _, _ = name.rpartition("-")
    pair = np.load(PAIRS / f"{name}.npz")
    probabilities, mask = outputs(WEIGHTS[weights], pair["volume"])
    assert pair["mask"].any()
    close = np.abs(pair["probabilities"] - THRESHOLD) < ROUNDING
    gained = np.argwhere(mask & ~pair["mask"] & ~close).tolist()
    lost = np.argwhere(~mask & pair["mask"] & ~close).tolist()
    assert not gained and not lost, (
        f"voxels (slice, row, column): {len(gained)} gained, {gained[:20]}; "
        f"{len(lost)} lost, {lost[:20]}"
    )
    assert np.abs(probabilities - pair["probabilities"]).max() < ROUNDING


def test_the_pairs_are_those_of_the_shipped_weights():
    assert {path.stem for path in PAIRS.glob("*.npz")} == NAMES


def write_missing() -> None:
    for path in PAIRS.glob("*.npz"):
        if path.stem not in NAMES:
            path.unlink()
    for weights, path in WEIGHTS.items():
        for phantom, seed in PHANTOMS.items():
            pair = PAIRS / f"{weights}-{phantom}.npz"
            if pair.exists():
                continue
            volume, _ = make_volume(seed, slices=6, size=128)
            probabilities, mask = outputs(path, volume)
            probabilities = np.round(probabilities, 3).astype(np.float16)
            np.savez_compressed(pair, volume=volume, probabilities=probabilities, mask=mask)
            print(f"{pair.stem}: {mask.sum()} voxels of lesion")


if __name__ == "__main__":
    PAIRS.mkdir(exist_ok=True)
    write_missing()
