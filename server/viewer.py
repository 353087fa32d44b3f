"""Pack scan, probability and masks of a case as small NIfTI files for the page's viewer."""

import gzip
import math
from collections.abc import Sequence

import nibabel
import numpy as np

from brainseg.io.grid import Grid
from brainseg.io.pictures import to_grey
from brainseg.io.scans import Scan
from brainseg.io.slices import Case
from brainseg.metrics import components
from brainseg.preprocess import copies_of_flair
from brainseg.segmenter import Segmentation

SIDE = 384  # voxels: longer axes are thinned out for the viewer
MOST = 12  # components that the page lists


def viewer_files(
    case: Case,
    volume: np.ndarray,
    flair: np.ndarray,
    segmentation: Segmentation,
    truth: np.ndarray | None,
) -> dict:
    """Pack a volume (S, H, W, C), its segmentation and the truth (S, H, W) for the viewer.

    `flair` is that of the volume in grey (`to_grey`).
    `scan` has a frame of 0..255 for each of `sequences`, `probability` is 0..255, `labels` 1 for
    the mask, 2 for the truth, 3 for both. Each `focus` is in mm to the right, front and up.
    """
    mask = segmentation.mask
    steps = [math.ceil(length / SIDE) for length in mask.shape]
    thin = tuple(slice(None, None, step) for step in steps)
    grid = case.grid.axial if isinstance(case, Scan) else _head(mask.shape)
    spacing = tuple(np.multiply(grid.spacing, steps[::-1]))
    shown = Grid(mask[thin].shape[::-1], spacing, grid.offset, grid.direction)
    labels = mask.astype(np.uint8)
    if truth is not None:
        labels += 2 * truth.astype(np.uint8)
    probability = np.rint(255 * segmentation.probabilities[thin].clip(0, 1)).astype(np.uint8)
    sequences = _sequences(volume)
    scan = [flair[thin]]
    for channel in list(sequences.values())[1:]:
        scan.append(to_grey(volume[..., [channel]])[thin])
    return {
        "sequences": list(sequences),
        "scan": _nifti(shown, scan),
        "probability": _nifti(shown, [probability]),
        "labels": _nifti(shown, [labels[thin]]),
        "numbers": case.numbers[thin[0]],
        "focus": _place(grid, _middle(mask)),
        "components": _components(case, mask, grid),
    }


def _components(case: Case, mask: np.ndarray, grid: Grid) -> list[dict]:
    """List the components (26 neighbours) of a mask (S, H, W), the largest first."""
    if not mask.any():
        return []
    numbers, box = components(mask)
    corner = [places.start for places in box]
    sizes = np.bincount(numbers.ravel())[1:]
    listed = []
    for k in np.argsort(-sizes, kind="stable")[:MOST]:
        middle = _middle(numbers == k + 1) + corner
        component = {"voxels": int(sizes[k]), "ml": None, "focus": _place(grid, middle)}
        if case.spacing:
            component["ml"] = component["voxels"] * math.prod(case.spacing) / 1000
        component["slice"] = case.numbers[round(middle[0])]
        listed.append(component)
    return listed


def _place(grid: Grid, voxel: np.ndarray) -> list[float]:
    """Return where a voxel (slice, row, column) is, in mm to the right, front and up."""
    left, back, up = grid.direction * grid.spacing @ voxel[::-1] + grid.offset
    return [-left, -back, up]


def _head(shape: tuple[int, int, int]) -> Grid:
    """Make a grid for slices (S, H, W) without a spacing: about as tall as a head."""
    slices, height, width = shape
    distance = 1.0
    if slices > 1:
        distance = np.clip(0.65 * max(height, width) / slices, 1, 10)
    return Grid((width, height, slices), (1, 1, distance), (0, 0, 0), np.eye(3))


def _nifti(grid: Grid, frames: Sequence[np.ndarray]) -> bytes:
    """Write frames (S, H, W) on the grid of an axial volume as one .nii.gz file."""
    voxels = frames[0].T
    if len(frames) > 1:
        voxels = np.stack([frame.T for frame in frames], axis=3)
    image = nibabel.Nifti1Image(voxels, grid.affine)
    return gzip.compress(image.to_bytes(), 1, mtime=0)


def _sequences(volume: np.ndarray) -> dict[str, int]:
    """Find the channels of a volume (S, H, W, C): FLAIR, then what is not a copy of it."""
    if volume.shape[3] != 3:
        return {"flair": min(1, volume.shape[3] - 1)}
    sequences = {"flair": 1, "pre": 0, "post": 2}
    copies = copies_of_flair(volume)
    return {name: channel for name, channel in sequences.items() if channel not in copies}


def _middle(mask: np.ndarray) -> np.ndarray:
    """Find slice, row and column of the middle of the largest lesion slice, or of the volume."""
    areas = mask.sum(axis=(1, 2))
    if not areas.any():
        return np.array(mask.shape) // 2
    k = areas.argmax()
    row, column = np.argwhere(mask[k]).mean(axis=0)
    return np.array([k, row, column])
