"""Verdict on a step: apply, skip, rewind or stop, decided identically on every rank from values that are equal on every
rank.

Everything a step changes moves only after ``apply``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.config_sections import GuardSection
from pretrain.guards.findings import Finding
from pretrain.guards.spikes import Spikes

Verdict = Literal["apply", "skip", "rewind", "stop"]


@dataclass(frozen=True)
class StepReport:
    """What a step measured, over the global batch; equal on every rank.

    ``loss`` in nats per valid target; ``grad_norm`` L2 before clipping; ``aux`` the auxiliary losses by name, each with
    its coefficient and global normaliser applied; ``load`` int tokens each expert got, by layer index; ``preempted``:
    some rank was asked to end; ``findings``: what the guards have to say of it.
    """

    step: int
    loss: float
    grad_norm: float
    valid_targets: int
    tokens: int
    aux: Mapping[str, float] = field(default_factory=dict)
    load: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    preempted: bool = False
    findings: tuple[Finding, ...] = ()

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.grad_norm, *self.aux.values()))


class Health:
    """Skips a step whose loss or gradient is not finite, and one without a target; does with a spike what
    ``guard.spike`` says; stops when more than ``skip_limit`` steps in a row were skipped for their numbers, or the run
    would go back more than ``guard.max_rewinds`` times without a new checkpoint.

    Its state is part of the checkpoint, so that a resumed run judges as the run would have. ``rewinds`` since the
    newest checkpoint is not: the data log has them, and whoever loads or saves a checkpoint counts them there.
    """

    def __init__(self, skip_limit: int, guard: GuardSection | None = None) -> None:
        self.skip_limit, self.guard = skip_limit, guard or GuardSection()
        self.skipped_in_a_row = 0
        self.skipped: list[int] = []
        self.rewinds = 0
        self.spikes = Spikes(self.guard.spike_score, self.guard.spike_window)
        self._why = ""

    def doubt(self, report: StepReport) -> str | None:
        """What speaks against the numbers of a step, in words; None where nothing does. Changes nothing."""
        if not report.valid_targets:
            return None  # nothing was measured, and nothing is learned
        if not report.finite:
            return "the loss or gradient is not finite"
        return None if self.guard.spike == "off" else self.spikes.judge(report.loss, report.grad_norm)

    def judge(self, report: StepReport) -> Verdict:
        if not report.valid_targets:
            return "skip"  # momentum alone shall not move a weight; no sign of ill health
        doubt = self.doubt(report)
        if doubt is None:
            self.skipped_in_a_row = 0
            self.spikes.add(report.loss, report.grad_norm)
            return "apply"
        return self._answer(report, doubt)

    def _answer(self, report: StepReport, doubt: str) -> Verdict:
        policy = self.guard.spike if report.finite else "skip"
        self._why = doubt
        if policy == "rewind":
            if self.rewinds < self.guard.max_rewinds:
                return "rewind"
            self._why += (
                f", after {self.rewinds} rewinds without a new checkpoint (guard.max_rewinds={self.guard.max_rewinds})"
            )
            return "stop"
        if policy != "skip":
            return "stop"
        self.skipped_in_a_row += 1
        self.skipped.append(report.step)
        if self.skipped_in_a_row <= self.skip_limit:
            return "skip"
        self._why = (
            f"{self.skipped_in_a_row} steps in a row were skipped for their numbers (train.skip_limit="
            f"{self.skip_limit}), the first was step {self.skipped[-self.skipped_in_a_row]}; of the last one, {doubt}"
        )
        return "stop"

    def describe(self) -> str:
        """Why it stops, for the person who reads ``exit.json``."""
        return self._why

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped": list(self.skipped),
            "spikes": self.spikes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of this release or of an earlier one, which did not know of spikes."""
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self.skipped = [int(step) for step in state["skipped"]]
        self.spikes.load_state_dict(state.get("spikes", {}))
