"""What the page's viewer gets of a case: scan, probability and masks as small NIfTI files."""

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
SEQUENCES = {1: "flair", 0: "pre", 2: "post"}  # by channel, in the order of the page


@dataclass(frozen=True)
class Space:
    """Where the voxels (X, Y, Z) of the viewer lie: to the left, to the back and up."""

    columns: np.ndarray  # (3, 3): one voxel along X, Y, Z, in mm to the right, front and up
    origin: np.ndarray  # of the first voxel, in the same coordinates

    @classmethod
    def of(cls, case: Case, shape: tuple[int, int, int]) -> Space:
        """The space of a volume (S, H, W); without spacing, as high as a head usually is."""
        to_ras = np.diag((-1.0, -1.0, 1.0))
        if not isinstance(case, Scan):
            slices, *sides = shape
            distance = np.clip(0.65 * max(sides) / slices, 1, 10) if slices > 1 else 1
            return cls(to_ras @ np.diag((1, 1, distance)), np.zeros(3))
        grid, origin = case.grid, np.array(case.grid.offset, float)
        columns = grid.direction * grid.spacing
        columns = columns[:, grid.axes]
        for axis in grid.backward:
            origin += columns[:, axis] * (grid.shape[grid.axes[axis]] - 1)
            columns[:, axis] *= -1
        return cls(to_ras @ columns, to_ras @ origin)

    def nifti(self, voxels: np.ndarray, slope: float = 1) -> bytes:
        """Voxels (X, Y, Z) or (X, Y, Z, N), uint8, as a .nii.gz file."""
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
    """What the viewer shows of a volume (S, H, W, C); the rest is (S, H, W).

    `scan` has a frame of 0..255 for each of `sequences`; copies of FLAIR are left out.
    `labels` is 1 for voxels of the mask alone, 2 of the true mask alone, 3 of both.
    `numbers` are those of the axial slices, `focus` (mm, RAS) is the middle of the lesion.
    """
    thin = tuple(slice(None, None, math.ceil(length / SIDE)) for length in mask.shape)
    space = Space.of(case, mask.shape)
    area = mask.sum(axis=(1, 2))
    where = np.argwhere(mask[area.argmax()]) if area.any() else np.array([mask.shape[1:]]) // 2
    middle = (area.argmax() if area.any() else len(area) // 2, *where.mean(axis=0))
    steps = [each.step for each in reversed(thin)]
    small = Space(space.columns * steps, space.origin)

    def packed(array: np.ndarray, slope: float = 1) -> bytes:
        return small.nifti(array[thin].T, slope)

    channels = list(SEQUENCES) if volume.shape[3] == 3 else [min(1, volume.shape[3] - 1)]
    frames, names = [], []
    for k in channels:
        if k == 1 or len(channels) == 1 or not np.array_equal(volume[..., k], volume[..., 1]):
            frames.append(to_grey(volume[..., [k]])[thin].T)
            names.append(SEQUENCES[k] if len(channels) > 1 else "flair")
    labels = mask.astype(np.uint8)
    if truth is not None:
        labels += 2 * truth.astype(np.uint8)
    return {
        "sequences": names,
        "scan": small.nifti(np.stack(frames, axis=3)),
        "probability": packed(np.rint(255 * probabilities.clip(0, 1)).astype(np.uint8), 1 / 255),
        "labels": packed(labels),
        "numbers": case.numbers[thin[0]],
        "focus": (space.columns @ middle[::-1] + space.origin).tolist(),
    }
