"""Masks: which of their labels or greys are lesion; and masks that cannot be right."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

NEAR = 0.1  # a label stored with a scale is off by less than this
FEW, SMALL = 2, 21  # at most so many values, or all below this: whole numbers are labels
AREAS, BLENDED = 0.02, 0.005  # shares of voxels that touch no other value: less in greys
FULL = 0.9  # a mask of a larger share of the scan is inverted, or white all over
MOST = 1 / 8  # of a volume: brains are larger; of 88 cases of LGG, the largest lesion is 1 / 20
LISTED = 20  # labels named in a sentence


class Labels:
    """The labels that count as lesion in a run (`chosen`, or all), and those in masks so far."""

    def __init__(self, chosen: Iterable[int] | None = None):
        self.chosen = tuple(sorted(set(chosen or ())))
        self.by_case: dict[str, list[int] | None] = {}  # None: grey edges instead of labels
        self._said: set[str] = set()

    def lesion(self, mask: np.ndarray, case: str, path: Path) -> np.ndarray:
        """Return where a mask (S, H, W) is lesion: bool; see `find_labels` for what it may hold.

        A mask with grey edges is cut at half of its maximum. Raises ValueError, naming `path`, if
        it has no labels to choose from, if they are blended, or if nearly every voxel is lesion.
        """
        labels = find_labels(mask, path)
        if labels is None and self.chosen:
            raise ValueError(
                f"{path}: holds fractions or grey edges, not labels; leave out --labels, or "
                "resize the labels by nearest neighbour"
            )
        self.note(case, labels)
        if self.chosen:
            lesion = np.isin(np.rint(mask), self.chosen)
        elif labels is None:
            lesion = mask >= mask.max() / 2
        else:
            lesion = mask > NEAR
        if lesion.mean() > FULL:
            raise ValueError(
                f"{path}: calls {lesion.mean():.0%} of the scan lesion; save it with lesion above "
                "0 (white) and all else 0 (black)"
            )
        return lesion

    def note(self, case: str, labels: list[int] | None) -> None:
        """Record the labels in the mask of a case (None: grey edges); say once what follows."""
        self.by_case[case] = labels
        if labels is None:
            text = "its mask has grey edges; such masks are cut at half of their maximum"
            self._say_once("grey", f"{case}: {text}")
        elif len(labels) > 1 and not self.chosen:
            text = (
                f"its mask holds the labels {_listed(labels)}; in every case any label above 0 "
                "counts as lesion (choose with --labels)"
            )
            self._say_once("labels", f"{case}: {text}")

    def _say_once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            tqdm.write(text, file=sys.stderr)

    def check(self) -> None:
        """Raise ValueError if a chosen label is in none of the masks read so far."""
        held = set()
        for labels in self.by_case.values():
            held.update(labels or ())
        missing = sorted(set(self.chosen) - held)
        if self.by_case and missing:
            raise ValueError(
                f"--labels {missing[0]}: none of the {len(self.by_case)} masks read holds this "
                f"label; they hold {_listed(sorted(held)) or 'no label above 0'}"
            )


def find_labels(mask: np.ndarray, path: Path) -> list[int] | None:
    """List the labels above 0 in a mask (S, H, W); None if its values are greys instead.

    Whole numbers, to a tenth, are labels if they are few or small, or if some of their voxels
    touch no other value above 0. Greys, which JPEG, an interpolation or a network leaves, differ
    from voxel to voxel. Raises ValueError, naming `path`, for labels that an interpolation has
    blended, and for values below a half.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    values = np.unique(mask[mask > 0])
    if len(values) == 0:
        return []
    largest = values[-1]
    if largest < 0.5:
        raise ValueError(f"{path}: its values end at {largest:.2g}; save it with lesion as 1")
    rounded = np.rint(values)
    are_whole = bool((np.abs(values - rounded) < NEAR).all())
    labels = sorted({int(value) for value in rounded if value > 0})
    if are_whole and (len(values) <= FEW or largest < SMALL):
        return labels
    low, high = (0.3, 0.7) if are_whole else (0.1, 0.9)  # JPEG rings beyond the former
    middle = (mask > low * largest) & (mask < high * largest)
    lowest_around = minimum_filter(np.where(mask > NEAR, mask, largest), 3)
    amid = middle & (maximum_filter(mask, 3) == lowest_around)
    if are_whole:  # of a few voxels, one may be so by chance
        return labels if amid.sum() > AREAS * max(middle.sum(), 500) else None
    if largest > 1 + NEAR and amid.sum() > BLENDED * middle.sum():
        raise ValueError(f"{path}: its labels are blended; resize them by nearest neighbour")
    return None


def painted(colours: np.ndarray, opacity: np.ndarray, path: Path) -> np.ndarray:
    """Return colours (S, H, W, C), 0 where they are see-through; ValueError if they are black."""
    opaque = opacity > opacity.max() / 2
    visible = colours * opaque
    if opaque.any() and not opaque.all() and not visible.any():
        raise ValueError(f"{path}: its masks are painted in black; paint the lesion in white")
    return visible


NO_LESION = (
    "none of the {} true masks has a lesion, so a DSC says nothing here; check how they were "
    "exported, and --labels"
)


def doubtful_masks(shares: Mapping[str, float], masks: Iterable[np.ndarray] = ()) -> list[str]:
    """Say what cannot be right about `masks`, or the `shares` of their volumes that are lesion."""
    sentences = []
    count = len(shares)
    if count and not any(shares.values()):
        return [NO_LESION.format(count)]
    large = [case for case, share in shares.items() if share > MOST]
    if large:
        sentences.append(
            f"the masks of {len(large)} of {count} cases cover more than an eighth of the volume "
            f"({large[0]}), as that of a brain, not of a lesion; check them"
        )
    masks = iter(masks)
    first = next(masks, None)
    if count > 1 and first is not None and all(np.array_equal(first, mask) for mask in masks):
        sentences.append(f"all {count} cases have the same mask; give each its own")
    return sentences


def _listed(labels: Sequence[int]) -> str:
    more = ", ..." if len(labels) > LISTED else ""
    return ", ".join(map(str, labels[:LISTED])) + more
