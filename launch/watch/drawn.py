"""Pictures that are kept until what they show has changed, and then drawn again a few at each look."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from xml.etree.ElementTree import Element

#: Seconds of drawing at one look, beyond the first picture.
BUDGET_S = 0.15


@dataclass
class _Picture:
    of: Hashable
    element: Element
    took_s: float
    fresh_at: float


class Drawn:
    """A look at a run of a million steps is answered at once: of the pictures that are out of date the oldest are drawn
    again, as far as the time goes, and the others at the next looks."""

    def __init__(self) -> None:
        self._pictures: dict[str, _Picture] = {}
        self._turn: set[str] = set()

    def begin(self) -> None:
        """A look begins: decide whose turn it is."""
        self._turn, total = set(), 0.0
        for name, picture in sorted(self._pictures.items(), key=lambda item: item[1].fresh_at):
            total += picture.took_s
            if self._turn and total > BUDGET_S:
                break
            self._turn.add(name)

    def __call__(self, name: str, of: Hashable, draw: Callable[[], Element]) -> Element:
        """The picture ``name``, which shows ``of``; ``draw`` makes it where there is none or it is its turn."""
        now = time.monotonic()
        kept = self._pictures.get(name)
        if kept is not None and kept.of == of:
            kept.fresh_at = now
            return kept.element
        if kept is not None and name not in self._turn:
            return kept.element
        element = draw()
        self._pictures[name] = _Picture(of, element, time.monotonic() - now, now)
        return element
