"""Fitting the calibration to runs that were published: damped least squares on logarithms of step time. No torch.

    observed = [Observed(work, topology, execution, step_s), ...]
    values = fit(observed)

The error of a run is ln(predicted / published), through a soft absolute value so that a misprint pulls no more than a
doubtful run; every constant has a prior, so that a class with few runs stays near its parent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from parallel.planning.execution import Execution
from parallel.planning.timing.calibration import CONSTANTS, Constant, Efficiencies, efficiencies
from parallel.planning.timing.step_time import steps_s
from parallel.planning.timing.work import StepWork, stacked
from parallel.planning.topology import HardwareTopology

#: An error of this size counts as one; larger ones count by their square root (Charbonnier's soft absolute value).
ERROR = 0.05
STEPS = 40


@dataclass(frozen=True)
class Observed:
    """A run: its work, its class and what it took; ``weight`` of its error."""

    work: StepWork
    topology: HardwareTopology
    execution: Execution
    step_s: float
    weight: float = 1.0


class Runs:
    """Runs side by side, as arrays, so that a set of constants is tried on all of them at once."""

    def __init__(self, observed: Sequence[Observed]) -> None:
        self.step_s = np.array([run.step_s for run in observed])
        self.weight = np.array([run.weight for run in observed])
        classes: dict[tuple, int] = {}
        self._class = np.array([classes.setdefault(_class(run), len(classes)) for run in observed], dtype=int)
        by_class = {index: run for run, index in zip(observed, self._class, strict=True)}
        self._examples = [by_class[index] for index in range(len(classes))]
        self._work = stacked([run.work for run in observed])

    def predict(self, values: Mapping[str, float]) -> np.ndarray:
        """Step times [runs], seconds."""
        each = [efficiencies(values, run.topology, run.execution) for run in self._examples]
        return steps_s(
            self._work,
            Efficiencies(*(np.array([getattr(e, f.name) for e in each])[self._class] for f in fields(Efficiencies))),
        )

    def errors(self, values: Mapping[str, float]) -> np.ndarray:
        """ln(predicted / published) [runs]."""
        return np.log(self.predict(values) / self.step_s)


def fit(
    observed: Sequence[Observed],
    start: Mapping[str, float] | None = None,
    constants: Sequence[Constant] = CONSTANTS,
) -> dict[str, float]:
    """The constants that explain ``observed`` best, by Levenberg's and Marquardt's method. ``constants``: with what is
    believed of them before; ``start``: where to begin, by default there."""
    runs = Runs(observed)
    prior = np.array([_coordinate(c, c.prior) for c in constants])
    width = np.array([c.width for c in constants])
    at = prior if start is None else np.array([_coordinate(c, start[c.name]) for c in constants])

    def residuals(point: np.ndarray) -> np.ndarray:
        errors = runs.errors(_values(point, constants)) / ERROR
        soft = np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1))
        return np.concatenate([soft * np.sqrt(runs.weight), (point - prior) / width])

    damping, found = 1e-2, residuals(at)
    for _ in range(STEPS):
        slope = np.stack([(residuals(at + step) - found) / 1e-4 for step in np.eye(len(at)) * 1e-4], axis=1)
        normal, gradient = slope.T @ slope, slope.T @ found
        while damping < 1e8:
            moved = at - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            tried = residuals(moved)
            if tried @ tried < found @ found:
                break
            damping *= 4
        else:
            break
        gained = 1 - (tried @ tried) / (found @ found)
        at, found, damping = moved, tried, damping / 4
        if gained < 1e-7:
            break
    return _values(at, constants)


def _coordinate(constant: Constant, value: float) -> float:
    if constant.kind == "rate":
        return math.log(value)
    return math.log(value / (1 - value)) if constant.kind == "share" else value


def _values(point: np.ndarray, constants: Sequence[Constant]) -> dict[str, float]:
    found = {}
    for constant, x in zip(constants, point.tolist(), strict=True):
        value = math.exp(min(x, 50.0)) if constant.kind == "rate" else x
        found[constant.name] = 1 / (1 + math.exp(-x)) if constant.kind == "share" else value
    return found


def _class(run: Observed) -> tuple:
    return (run.topology.device, run.execution)
