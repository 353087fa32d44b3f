"""Masks with several labels: which of them are lesion; and masks that cannot be right."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

MANY = 20  # more values than this are the grey edges of a drawing, not labels
MOST = 1 / 8  # of a volume: brains are larger; of 88 cases of LGG, the largest lesion is 1 / 20


class Labels:
    """The labels that count as lesion in a run, and the labels in each mask read so far.

    All labels above 0 are lesion unless some are `chosen`. All cases of a run share one object,
    which reports only once what applies to all of them.
    """

    def __init__(self, chosen: Iterable[int] | None = None):
        self.chosen = tuple(sorted(set(chosen or ())))
        self.found: dict[str, list[int]] = {}
        self._said = False

    def lesion(self, mask: np.ndarray, case: str) -> np.ndarray:
        """Return where a mask is lesion: bool, in the mask's shape."""
        positive = mask > 0
        values = np.unique(mask[positive])
        self.note(case, [int(value) for value in values if value == int(value)])
        return np.isin(mask, self.chosen) if self.chosen else positive

    def note(self, case: str, found: Sequence[int]) -> None:
        """Record the labels in the mask of a case; if there are several, say so once on stderr."""
        self.found[case] = list(found)
        if 1 < len(found) <= MANY and not self.chosen and not self._said:
            self._said = True
            tqdm.write(
                f"{case}: its mask holds the labels {', '.join(map(str, found))}; in every case "
                "any label above 0 counts as lesion (choose with --labels)",
                file=sys.stderr,
            )

    def check(self) -> None:
        """Raise ValueError if a chosen label is in none of the masks read so far."""
        held = sorted(set().union(*self.found.values()))
        if self.found and (missing := sorted({*self.chosen} - {*held})):
            raise ValueError(
                f"--labels {missing[0]}: none of the {len(self.found)} masks read holds this "
                f"label; they hold {', '.join(map(str, held[:MANY])) or 'no label above 0'}"
            )


NO_LESION = (
    "none of the {} true masks has a lesion, so a DSC says nothing here; check how they were "
    "exported, and --labels"
)


def odd_masks(shares: Mapping[str, float], masks: Iterable[np.ndarray] = ()) -> list[str]:
    """Say, in a sentence each, what cannot be right about the masks of a cohort.

    `shares` are the shares of the volume that are lesion, by case. `masks` (S, H, W) are those of
    the same cases, as read: they are compared until two differ.
    """
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
