"""Spikes of the loss and of the gradient norm: a robust z-score against the applied steps before. No torch.

Loss and the logarithm of the gradient norm are each judged by themselves. Over the last ``window`` applied steps a line
is drawn through the medians of the first and the last third (Tukey's resistant line, Exploratory Data Analysis 1977,
chapter 10): loss falls, and a norm may rise, and neither is a spike. What is expected of the next step is the line
continued or the level of the last third, whichever is higher, since a loss that flattens out lies above its line. The
deviation is 1.4826 MAD of the residuals (Hampel 1974), but no less than ``FLOORS``, nor than a third of the furthest
residual above, the newest apart, which may be the climb to a spike: of 128 normal ones that lies at 2.7 deviations, so
it counts where tails are heavy. They are for the gradient norm: of 800 clean steps of the demo, at 2,048 tokens a step,
11 had a norm of 1.5 to 3 times the usual, each with an unremarkable loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: MAD of a normal distribution, times this, is its standard deviation.
MAD_TO_DEVIATION = 1.4826
#: Smallest deviation that is believed: 0.01 nats a token, and 0.2 of the logarithm of the gradient norm, which makes a
#: spike at the default score of 8 at least five times the usual norm.
FLOORS = {"loss": 0.01, "gradient norm": 0.2}
#: Deviations at which the furthest of a window may lie, its ``NEWEST`` steps apart.
FURTHEST, NEWEST = 3.0, 3
#: A norm of zero has no logarithm.
_SMALLEST = 1e-30


class Spikes:
    """``score``: deviations above what is expected from which a step is a spike; ``window``: applied steps compared
    with, none being found in the first quarter of a window. State is part of the checkpoint, so that a resumed run
    judges as the run would have."""

    def __init__(self, score: float, window: int) -> None:
        self.score, self.window = score, window
        self._history: dict[str, list[float]] = {name: [] for name in FLOORS}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What speaks against a step, in words; None for one that is like those before."""
        for name, value in _measures(loss, grad_norm).items():
            history = self._history[name]
            if len(history) < self.window // 4:
                continue
            expected, deviation = forecast(history, FLOORS[name])
            if (score := (value - expected) / deviation) >= self.score:
                return _in_words(name, value, expected, score)
        return None

    def add(self, loss: float, grad_norm: float) -> None:
        """Remember a step that was applied."""
        for name, value in _measures(loss, grad_norm).items():
            history = self._history[name]
            history.append(value)
            del history[: -self.window]

    def forget(self) -> None:
        """The steps so far are no measure of those to come: the data change."""
        for history in self._history.values():
            history.clear()

    def state_dict(self) -> dict[str, Any]:
        return {name: list(history) for name, history in self._history.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """A window that has become shorter since keeps its newest steps."""
        self._history = {name: [float(value) for value in state.get(name, ())][-self.window :] for name in FLOORS}


def forecast(history: Sequence[float], floor: float) -> tuple[float, float]:
    """What the value after ``history`` (at least four) is expected to be at most, and the deviation from it."""
    values: NDArray[np.float64] = np.asarray(history, np.float64)
    n = len(values)
    third = max(1, n // 3)
    early, late = float(np.median(values[:third])), float(np.median(values[-third:]))
    slope = (late - early) / (n - third)
    centre = n - (third + 1) / 2
    residuals = values - (late + slope * (np.arange(n) - centre))
    middle = float(np.median(residuals))
    deviation = MAD_TO_DEVIATION * float(np.median(np.abs(residuals - middle)))
    furthest = float(residuals[:-NEWEST].max()) - middle
    return max(late, late + slope * (n - centre)), max(deviation, floor, furthest / FURTHEST)


def _measures(loss: float, grad_norm: float) -> dict[str, float]:
    return {"loss": loss, "gradient norm": math.log(max(grad_norm, _SMALLEST))}


def _in_words(name: str, value: float, expected: float, score: float) -> str:
    shown, usual = (value, expected) if name == "loss" else (math.exp(value), math.exp(expected))
    return f"the {name} is {shown:.4g} where {usual:.4g} was expected: {score:.1f} deviations above"
