"""What a planner is asked. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.planning.execution import Execution, Precision
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload
from stoker.errors import Refusal
from stoker.nearest import nearest

#: What ``Problem.fixed`` may name.
FIXABLE = (
    *("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "micro_batch"),
    *("zero", "recompute", "sequence_parallel"),
)


@dataclass(frozen=True)
class Problem:
    """What is to be planned: a model, ``global_batch`` windows a step, and up to ``gpus`` devices of a machine.

    A number of GPUs that fills whole domains means just these domains; any other leaves open how many it takes.
    ``dtype``: that of the run. ``execution``: the only way to run it that is tried, in its own precision; left out, the
    engine's way and under ``what_if`` those of others.
    ``exact``: every GPU is a rank; else some may stay idle where their number or the batch does not divide.
    ``what_if``: also what the engine does not support. ``fixed``: values that are not the planner's to choose, by name
    (``FIXABLE``).
    """

    workload: Workload = field(repr=False)
    global_batch: int
    topology: HardwareTopology
    gpus: int
    dtype: Precision = "bfloat16"
    execution: Execution | None = None
    what_if: bool = False
    exact: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("global_batch", "gpus"):
            if (value := getattr(self, name)) < 1:
                raise Refusal(f"{name}={value} must be a positive integer")
        for name in self.fixed:
            refuse_unknown(name)

    def choices(self, name: str, values: Iterable[int]) -> list[int]:
        """The values to try for `name`: these, or the one that is not the planner's to choose."""
        return [self.fixed[name]] if name in self.fixed else list(values)


def refuse_unknown(name: str) -> None:
    """Raise Refusal for a name that no layout has, with the nearest that one has."""
    if name not in FIXABLE:
        guess = nearest(name, FIXABLE)
        advice = f"did you mean {guess}?" if guess else f"choose from {', '.join(FIXABLE)}"
        raise Refusal(f"layout: {name!r} is no axis and no choice of a plan: {advice}")
