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
        values = np.unique(mask[positive])
        self.note(case, [int(value) for value in values if value == int(value)])
        return np.isin(mask, self.chosen) if self.chosen else positive

    def note(self, case: str, found: Sequence[int]) -> None:
        """Remember the labels in the mask of a case; say on stderr, once, if they are several."""
        self.found[case] = list(found)
        if 1 < len(found) <= MANY and not self.chosen and not self._said:
            self._said = True
            tqdm.write(
                f"{case}: its mask holds the labels {', '.join(map(str, found))}; in every case "
                "any above 0 is taken for lesion (choose with --labels)",
                file=sys.stderr,
            )

    def check(self) -> None:
        """Raise ValueError if a chosen label is in none of the masks that have been read."""
        held = sorted(set().union(*self.found.values()))
        if self.found and (missing := sorted({*self.chosen} - {*held})):
            raise ValueError(
                f"--labels {missing[0]}: none of the {len(self.found)} masks read holds this "
                f"label; they hold {', '.join(map(str, held[:MANY])) or 'no label above 0'}"
            )
