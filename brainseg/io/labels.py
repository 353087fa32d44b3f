"""Masks with several labels: which of them are lesion."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

MANY = 20  # more values than this are the grey edges of a drawing, not labels


class Labels:
    """Which labels of the masks of a run are lesion, and which labels each mask read so far holds.

    All labels above 0 are lesion unless some are `chosen`. One object is shared by all cases of a
    run, so that what holds for all of them is said once.
    """

    def __init__(self, chosen: Iterable[int] | None = None):
        self.chosen = tuple(sorted(set(chosen or ())))
        self.found: dict[str, list[int]] = {}
        self._said = False

    def lesion(self, mask: np.ndarray, case: str) -> np.ndarray:
        """Where a mask is lesion, bool, in its shape."""
        positive = mask > 0
        self.note(case, labels_in(mask[positive]))
        return np.isin(mask, self.chosen) if self.chosen else positive

    def note(self, case: str, found: Sequence[int]) -> None:
        """Remember the labels in the mask of a case; say on stderr, once, if they are several."""
        self.found[case] = list(found)
        if 1 < len(found) <= MANY and not self.chosen and not self._said:
            self._said = True
            tqdm.write(
                f"{case}: its mask holds the labels {_listed(found)}; in every case any above 0 is "
                "taken for lesion (choose with --labels)",
                file=sys.stderr,
            )

    def check(self) -> None:
        """Raise ValueError if a chosen label is in none of the masks that have been read."""
        held = set().union(*self.found.values())
        if self.found and (missing := sorted(set(self.chosen) - held)):
            raise ValueError(
                f"--labels {missing[0]}: none of the {len(self.found)} masks read holds this "
                f"label; they hold {_listed(sorted(held)[:MANY]) or 'no label above 0'}"
            )


def labels_in(values: np.ndarray) -> list[int]:
    """The different whole numbers among values above 0."""
    return [int(value) for value in np.unique(values) if value == int(value)]


def _listed(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels))
