"""The number that a run is judged by, from its steps. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from launch.sweep.definition import MetricSection
from pretrain.events import METRICS, StepEvent

#: Longer than a line of the metrics.
TAIL_BYTES = 1 << 16


def measured(events: Sequence[StepEvent], name: str) -> tuple[list[int], list[float]]:
    """Steps at which ``name`` was measured, and what it was; the loss of a step that was not applied is none."""
    found = [(event.step, _of(event, name)) for event in events]
    known = [(step, value) for step, value in found if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def metric(events: Sequence[StepEvent], section: MetricSection, before: int | None = None) -> float | None:
    """The mean of the last measurements, of steps below ``before`` where it is given; None where there is none. NaN and
    infinities are not passed over: a run that ends in them is not a good one."""
    steps, values = measured(events, section.name)
    kept = [value for step, value in zip(steps, values) if before is None or step < before][-section.averaged :]
    return math.fsum(kept) / len(kept) if kept and all(map(math.isfinite, kept)) else (math.nan if kept else None)


def steps_done(run_dir: Path) -> int:
    """Steps that the metrics of a run have reached, from their last line alone: for a look at a run under way."""
    try:
        with open(run_dir / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) + 1
    except (FileNotFoundError, IndexError, KeyError, ValueError):
        return 0


def _of(event: StepEvent, name: str) -> float | None:
    if name in ("loss", "grad_norm"):
        value: float = getattr(event, name)
        return value if event.applied or not math.isfinite(value) else None
    if name == "tokens_per_s":
        return event.timing.tokens_per_s
    return event.aux.get(name)
