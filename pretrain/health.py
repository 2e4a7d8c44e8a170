"""Verdict on a step: apply, skip or stop, decided identically on every rank from values that are equal on every rank.

Everything a step changes moves only after ``apply``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["apply", "skip", "stop"]


@dataclass(frozen=True)
class StepReport:
    """What a step measured, over the global batch; equal on every rank.

    ``loss`` in nats per valid target; ``grad_norm`` L2 before clipping; ``aux`` the auxiliary losses by name, each with
    its coefficient and global normaliser applied; ``load`` int tokens each expert got, by layer index; ``preempted``:
    some rank was asked to end.
    """

    step: int
    loss: float
    grad_norm: float
    valid_targets: int
    tokens: int
    aux: Mapping[str, float] = field(default_factory=dict)
    load: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    preempted: bool = False

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.grad_norm, *self.aux.values()))


class Health:
    """Skips a step whose loss or gradient is not finite, and stops when more than ``skip_limit`` follow one another;
    skips a batch without a target. Loss spikes and going back (``rewind``) are the numeric guards', not built yet.

    Its state is part of the checkpoint, so that a resumed run judges as the run would have.
    """

    def __init__(self, skip_limit: int) -> None:
        self.skip_limit = skip_limit
        self.skipped_in_a_row = 0
        self.skipped: list[int] = []

    def judge(self, report: StepReport) -> Verdict:
        if not report.valid_targets:
            return "skip"  # nothing to learn, and momentum alone shall not move a weight; no sign of ill health
        if report.finite:
            self.skipped_in_a_row = 0
            return "apply"
        self.skipped_in_a_row += 1
        self.skipped.append(report.step)
        return "stop" if self.skipped_in_a_row > self.skip_limit else "skip"

    def describe(self) -> str:
        """Why it stops, for the person who reads ``exit.json``."""
        return (
            f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite "
            f"(train.skip_limit={self.skip_limit}); the first was step {self.skipped[-self.skipped_in_a_row]}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_in_a_row": self.skipped_in_a_row, "skipped": list(self.skipped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self.skipped = [int(step) for step in state["skipped"]]
