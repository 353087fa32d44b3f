"""Values that fill what was not scanned: blank slices, padding, the corners that a rotation leaves.

Fill is not air: taken for it, a value far below air turns all of the air into tissue. The rule
needs no header. Version 2 of the preprocessing depends on it, and trained weights on that.
"""

import numpy as np

SAMPLE = 48  # rows and columns of a slice that are searched
COMMON = 0.01  # least share of the edges of the slices that fill has
GAP = 0.04  # least distance of fill from the darkest air, as a share of the contrast
DARK = 0.1  # share of the contrast up to which air reaches
HEAD = 0.1  # least share of a scan that is brighter than air
SQUARE = np.ones((1, 3, 3), bool)  # a voxel and its neighbours in the slice
CUBE = np.ones((3, 3, 3), bool)


def without_fill(voxels: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Turn the fill of a sequence (S, H, W) into background; return the voxels and its values.

    Everything darker than the 1st percentile of the rest becomes that percentile, and so does
    brighter fill that is connected to the edges of the slices. Without fill, `voxels` itself is
    returned.
    """
    from scipy import ndimage

    height, width = voxels.shape[1:]
    rows = np.linspace(0, height - 1, min(height, SAMPLE)).astype(int)
    columns = np.linspace(0, width - 1, min(width, SAMPLE)).astype(int)
    sample = voxels[:, rows[:, None], columns]
    values = _find_values(sample)
    if not values:
        return voxels, []
    scanned = ~np.isin(sample, values)
    # Interpolation may have mixed blocks of fill with what they touch.
    blocks = ndimage.binary_opening(~scanned, SQUARE)
    unmixed = scanned & np.logical_not(ndimage.binary_dilation(blocks, CUBE))
    if unmixed.sum() > 0.5 * scanned.sum():
        scanned = unmixed
    background = np.percentile(sample[scanned], 1, method="lower")
    changed = np.maximum(voxels, background)
    if max(values) > background:
        filled = np.isin(voxels, values) & (voxels > background)
        edges = filled.copy()
        edges[:, 1:-1, 1:-1] = False
        outside = ndimage.binary_propagation(edges, SQUARE, filled)
        blocks = ndimage.binary_opening(outside, SQUARE)
        mixed = ndimage.binary_dilation(blocks, SQUARE, iterations=2)
        changed[np.logical_or(outside, mixed)] = background
    # There may be more, e.g. blank slices at 0 beside corners at -1000.
    changed, others = without_fill(changed)
    values += [value for value in others if value != background]
    return changed, values


def percentile(values: np.ndarray, percent: float) -> float:
    """Return what np.percentile does; of integers, several times as fast."""
    # NumPy finds one place among numbers of 16 bits by vector instructions, but not two at once.
    if values.dtype.itemsize == 1:
        values = values.astype(np.int16)
    if values.dtype.kind in "iu":
        lower = float(np.percentile(values, percent, method="lower"))
        higher = float(np.percentile(values, percent, method="higher"))
        return lower + (percent / 100 * (values.size - 1) % 1) * (higher - lower)
    return float(np.percentile(values, percent))


def _find_values(sample: np.ndarray) -> list[float]:
    """List values of fill in a sample (S, H, W) of the voxels.

    The value of a blank slice is fill unless it is near that of air. So is the lowest or the
    highest value that is common on the edges of the slices, whichever has the higher `_score`, if
    that is above a half.
    """
    blank = sample.min(axis=(1, 2)) == sample.max(axis=(1, 2))
    slices = sample[~blank]
    if not len(slices):
        return []
    edges = np.concatenate([slices[:, [0, -1]].ravel(), slices[:, :, [0, -1]].ravel()])
    values, counts = np.unique(edges, return_counts=True)
    candidates = values[counts >= COMMON * edges.size].tolist()
    lowest = slices.min().item()
    if (slices == lowest).mean() >= COMMON:
        candidates.insert(0, lowest)
    fill, best = [], 0.5
    for value in set(candidates[:1] + candidates[-1:]):
        score = _score(slices, value)
        if score > best:
            fill, best = [value], score
    if blank.any():
        low, high = np.percentile(slices[~np.isin(slices, fill)], (1, 99))
        for value in np.unique(sample[blank]).tolist():
            if abs(value - low) > GAP * (high - low) and value not in fill:
                fill.append(value)
    return fill


def _score(slices: np.ndarray, value: float) -> float:
    """Say how surely one value in a sample of slices (S, H, W) is fill: above a half if it is.

    The contrast is that between the 1st and 99th percentile of the other voxels, and air is what
    is within DARK of it. The score is the share of air in what the value touches: the 0 around a
    skull-stripped head touches tissue. It is 0 if the value is that of air (within GAP), if the
    others are not a head in air, or if the value is bright and not in blocks. It is high if the
    value is further from all others than the contrast.
    """
    from scipy import ndimage

    filled = slices == value
    others = slices[~filled]
    low, high = np.percentile(others, (1, 99)).tolist()
    contrast = high - low
    dark = low + DARK * contrast
    if abs(value - low) <= GAP * contrast or (others > dark).mean() < HEAD:
        return 0.0
    if value > high + contrast:
        return 2.0
    if value > low and ndimage.binary_opening(filled, SQUARE).sum() < 0.5 * filled.sum():
        return 0.0
    touched = ndimage.binary_dilation(filled, SQUARE) & ~filled
    air = float((slices[touched] <= dark).mean())
    if value < low - contrast:
        return max(air, 0.6)
    return air
