"""Pack scan, probability and masks of a case as small NIfTI files for the page's viewer."""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass

import numpy as np

from brainseg.io.pictures import to_grey
from brainseg.io.scans import Scan
from brainseg.io.slices import Case

SIDE = 384  # voxels: longer axes are thinned out for the viewer


@dataclass(frozen=True)
class Space:
    """Where voxels (X, Y, Z) lie: columns, rows and slices of an axial volume."""

    columns: np.ndarray  # (3, 3): the steps along X, Y, Z, in mm to the right, front and up
    origin: np.ndarray  # the first voxel, in the same coordinates

    @classmethod
    def of(cls, case: Case, shape: tuple[int, int, int]) -> Space:
        """Find the space of a volume (S, H, W); without a spacing, make it as high as a head."""
        to_ras = np.diag((-1.0, -1.0, 1.0))  # from left, back and up
        if not isinstance(case, Scan):
            slices, *sides = shape
            distance = np.clip(0.65 * max(sides) / slices, 1, 10) if slices > 1 else 1
            return cls(to_ras @ np.diag((1, 1, distance)), np.zeros(3))
        grid = case.grid.axial
        return cls(to_ras @ (grid.direction * grid.spacing), to_ras @ grid.offset)

    def nifti(self, voxels: np.ndarray, slope: float = 1) -> bytes:
        """Write voxels (X, Y, Z) or (X, Y, Z, N), uint8, as a .nii.gz file."""
        header = bytearray(352)
        sizes = (voxels.ndim, *voxels.shape, *[1] * (7 - voxels.ndim))
        lengths = (1, *np.linalg.norm(self.columns, axis=0), *[1] * 4)
        struct.pack_into("<i", header, 0, 348)
        struct.pack_into("<8h", header, 40, *sizes)
        struct.pack_into("<2h", header, 70, 2, 8)  # uint8
        struct.pack_into("<8f", header, 76, *lengths)
        struct.pack_into("<3f", header, 108, 352, slope, 0)
        struct.pack_into("<2f", header, 124, 255 * slope, 0)  # the window: cal_max, cal_min
        struct.pack_into("<B", header, 123, 2)  # mm
        struct.pack_into("<2h", header, 252, 0, 1)  # no qform; sform: scanner
        struct.pack_into("<12f", header, 280, *np.column_stack((self.columns, self.origin)).flat)
        header[344:348] = b"n+1\0"
        return gzip.compress(bytes(header) + voxels.tobytes(order="F"), 1, mtime=0)


def viewer_files(
    case: Case,
    volume: np.ndarray,
    probabilities: np.ndarray,
    mask: np.ndarray,
    truth: np.ndarray | None,
) -> dict:
    """Pack a volume (S, H, W, C) and what belongs to it, each (S, H, W), for the viewer.

    `scan`: a frame of 0..255 for each of `sequences`. `probability`: 0..1. `labels`: 1 for the
    mask alone, 2 for the true mask alone, 3 for both. `numbers`: of the axial slices.
    `focus`: the middle of the lesion, in mm to the right, front and up.
    """
    step = [math.ceil(length / SIDE) for length in mask.shape]
    thin = tuple(slice(None, None, k) for k in step)
    full = Space.of(case, mask.shape)
    space = Space(full.columns * step[::-1], full.origin)
    labels = mask.astype(np.uint8)
    if truth is not None:
        labels += 2 * truth.astype(np.uint8)
    percent = np.rint(255 * probabilities[thin].clip(0, 1)).astype(np.uint8)
    sequences = _sequences(volume)
    grey = [to_grey(volume[..., [channel]])[thin].T for channel in sequences.values()]
    return {
        "sequences": list(sequences),
        "scan": space.nifti(np.stack(grey, axis=3)),
        "probability": space.nifti(percent.T, slope=1 / 255),
        "labels": space.nifti(labels[thin].T),
        "numbers": case.numbers[thin[0]],
        "focus": (full.columns @ _middle(mask)[::-1] + full.origin).tolist(),
    }


def _sequences(volume: np.ndarray) -> dict[str, int]:
    """Find the channel of each sequence of a volume (S, H, W, C), leaving out copies of FLAIR."""
    if volume.shape[3] != 3:
        return {"flair": min(1, volume.shape[3] - 1)}
    pre, flair, post = np.moveaxis(volume, 3, 0)
    found = {"flair": 1, "pre": 0, "post": 2}
    for name, voxels in (("pre", pre), ("post", post)):
        if np.array_equal(voxels, flair):
            del found[name]
    return found


def _middle(mask: np.ndarray) -> np.ndarray:
    """Find slice, row and column of the middle of the largest lesion slice, or of the volume."""
    area = mask.sum(axis=(1, 2))
    if not area.any():
        return np.array(mask.shape) // 2
    return np.array([area.argmax(), *np.argwhere(mask[area.argmax()]).mean(axis=0)])
