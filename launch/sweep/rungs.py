"""Who goes on at a rung: asynchronous successive halving (Li et al., arXiv 1810.05934), decided when a run arrives.

A run that arrives early meets few others and goes on; one that arrives late meets all. So which runs are stopped
depends on which came first, and with that on the machine: a sweep with the rule repeats its runs bit by bit, not its
choice of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from launch.sweep.definition import MetricSection, StopSection
from launch.sweep.history import Cut


class Rungs:
    """What every run measured at every rung that it has come to."""

    def __init__(self, stop: StopSection, metric: MetricSection, steps: int) -> None:
        self.steps = stop.rungs(steps)
        self._factor, self._metric = stop.factor, metric
        self._values: dict[int, dict[int, float | None]] = {rung: {} for rung in self.steps}

    def next(self, number: int) -> int | None:
        """Steps of the rung that a run comes to next; None where it has passed them all."""
        return next((rung for rung in self.steps if number not in self._values[rung]), None)

    def arrive(self, number: int, rung: int, value: float | None) -> Cut | None:
        """A run comes to a rung with this value; how it is stopped there, or None: it goes on.

        It goes on among the best 1/factor, rounded up, of those that came so far; the first ones always, until there
        are ``factor`` of them; not with a value that is no finite number.
        """
        at = self._values[rung]
        at[number] = value
        place = self._place(at, number)
        lost = value is not None and not math.isfinite(value)
        if lost or (len(at) >= self._factor and place > math.ceil(len(at) / self._factor)):
            return Cut(rung, value if value is not None and math.isfinite(value) else None, place, len(at))
        return None

    def _place(self, at: Mapping[int, float | None], number: int) -> int:
        """From 1; of equals, the one with the lower number is the better."""
        mine = (self._metric.order(at[number]), number)
        return 1 + sum((self._metric.order(value), other) < mine for other, value in at.items())
