"""Which source the next window comes from: exact proportions by arithmetic, without history or an index.

Weights are rounded once to integers that sum to `DRAWS`. The sources are the leaves of a binary tree; a node whose left
subtree has weight a of its total t sends its first p draws to the left floor((p * a + t // 2) / t) times. Hence

* any `DRAWS` consecutive draws hold every source exactly as often as its integer weight;
* the number of draws of a source among the first d, its d-th draw, and the source of any draw are closed forms in
  O(log sources);
* a source is drawn in the order of its own windows, so a blend can end after any draw and the next one goes on. (A
  keyed permutation inside blocks of draws, the usual way to be exact, leaves holes in the block where it ends.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stoker.errors import Refusal

#: Sum of the integer weights: their resolution. It costs nothing to be fine, since nothing is stored per draw.
DRAWS = 65_536


def quantise(weights: Mapping[str, float], draws: int = DRAWS) -> dict[str, int]:
    """Integers that sum to `draws` in the proportion of `weights`, each within one of exact (largest remainders).

    Refuses weights that are not positive and finite, and a weight so small that it would become 0.
    """
    bad = [name for name, weight in weights.items() if not 0 < weight < float("inf")]
    if bad or not weights:
        raise Refusal(f"data.blend: weights must be positive numbers: {', '.join(bad) or 'there is no source'}")
    total = sum(weights.values())
    exact = {name: draws * weight / total for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: draws - sum(counts.values())]:
        counts[name] += 1
    lost = [name for name, count in counts.items() if not count]
    if lost:
        raise Refusal(
            f"data.blend: the weight of {', '.join(lost)} is below 1/{draws} of the blend and would never be drawn; "
            "raise it or remove the source"
        )
    return counts


@dataclass(frozen=True)
class Blend:
    """Integer weights of sources 0 .. n - 1, none below 1. Draws are numbered from 0."""

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise Refusal(f"data.blend: integer weights must be at least 1, not {self.counts}")

    @cached_property
    def _prefix(self) -> list[int]:
        return [0, *np.cumsum(self.counts).tolist()]

    def _split(self, low: int, high: int) -> tuple[int, int, int]:
        """(first source of the right half, weight of the left, total weight) of the node over sources [low, high)."""
        middle = (low + high) // 2
        return middle, self._prefix[middle] - self._prefix[low], self._prefix[high] - self._prefix[low]

    def count(self, source: int, draws: int) -> int:
        """How many of the first `draws` draws are of `source`."""
        low, high = 0, len(self.counts)
        while high - low > 1:
            middle, left, total = self._split(low, high)
            to_left = _to_left(draws, left, total)
            draws, low, high = (to_left, low, middle) if source < middle else (draws - to_left, middle, high)
        return draws

    def sources(self, first: int, last: int) -> NDArray[np.int16]:
        """[last - first] the source of each of the draws [first, last)."""
        out = np.empty(last - first, np.int16)
        self._fill(out, np.arange(last - first), np.arange(first, last), 0, len(self.counts))
        return out

    def _fill(
        self, out: NDArray[np.int16], rows: NDArray[np.int64], draws: NDArray[np.int64], low: int, high: int
    ) -> None:
        if not len(rows):
            return
        if high - low == 1:
            out[rows] = low
            return
        middle, left, total = self._split(low, high)
        before = _to_left(draws, left, total)
        goes_left = _to_left(draws + 1, left, total) > before
        self._fill(out, rows[goes_left], before[goes_left], low, middle)
        self._fill(out, rows[~goes_left], (draws - before)[~goes_left], middle, high)

    def draw_of(self, source: int, number: int) -> int:
        """The draw that is the `number`-th (from 0) of `source`: the inverse of ``sources`` and ``count``."""
        path, low, high = [], 0, len(self.counts)
        while high - low > 1:
            middle, left, total = self._split(low, high)
            path.append((source < middle, left, total))
            low, high = (low, middle) if source < middle else (middle, high)
        for is_left, left, total in reversed(path):
            if is_left:  # the smallest x with (x * left + total // 2) // total == number + 1 is the draw after it
                number = -(-((number + 1) * total - total // 2) // left) - 1
            else:  # the smallest x with x - (x * left + total // 2) // total == number + 1
                number = (number * total + total // 2) // (total - left)
        return number


def _to_left(draws, left: int, total: int):  # type: ignore[no-untyped-def]
    """Of a node's first `draws` draws, those of its left subtree (int, or an array of int64: draws * left < 2**63)."""
    return (draws * left + total // 2) // total
