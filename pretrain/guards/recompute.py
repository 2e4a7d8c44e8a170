"""Recompute and compare: before a spike or a number that is not finite is believed, its step is computed again from the
same batch. Arithmetic is deterministic, hardware at fault is not: another result is the hardware's, and the second one
counts.

Nothing is computed twice without a cause, so what this finds is what raises an alarm: a spike, where ``guard.spike`` is
not ``off``, or a loss or gradient that is not finite. A small error of arithmetic passes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pretrain.checkpoint.peers import Peers
from pretrain.guards.findings import Finding
from pretrain.guards.fingerprint import checksum
from pretrain.guards.nonfinite import Examination, in_words, located
from pretrain.health import StepReport

if TYPE_CHECKING:
    from pretrain.trainer import Trainer


@dataclass(frozen=True)
class Trace:
    """What one computation of a step left on a rank: checksums of the losses and gradients that it computed alone, and
    of the gradients after they were reduced."""

    own: list[int]
    reduced: list[int]


class Recompute:
    """``enabled``: guard.recompute; ``exact``: two computations agree to the last bit. Where they need not (CUDA
    without run.deterministic), only a second result that raises no alarm is another one."""

    def __init__(self, trainer: Trainer, enabled: bool, exact: bool) -> None:
        self._trainer, self._enabled, self._exact = trainer, enabled, exact
        self._peers = Peers(trainer.groups.control)
        self._own: list[torch.Tensor] = []
        self._finite_loss = True
        self._examination: Examination | None = None

    def observe(self, losses: Sequence[torch.Tensor]) -> None:
        """After forward and backward, before any gradient of another rank is added."""
        if self._examination is not None:
            self._examination.look_at_gradients(losses)
        self._losses = list(losses)
        # A rank alone is compared by what it ends with; of several, each keeps what it did by itself.
        self._own = [checksum(tensor) for tensor in (*losses, *self._buffers())] if self._peers.size > 1 else []

    def believed(self, compute: Callable[[], StepReport]) -> StepReport:
        """The report of a step whose arithmetic is ``compute``, which may be run twice. Gradients are those of the
        report. Collective, and equal on every rank."""
        report = compute()
        doubt = self._trainer.health.doubt(report)
        if doubt is None:
            return report
        if not self._enabled:
            return replace(report, findings=(self._unexamined(report, doubt),))
        first = self._trace()
        with Examination(self._trainer) as self._examination:
            again = compute()
        found = self._examination.first
        self._examination = None
        second = self._trace()
        traces = self._peers.gather([vars(first), vars(second), found])
        findings = []
        if self._other(report, again, traces):
            text, rank = _blame(traces)
            figures = f"loss {report.loss:.6g}, then {again.loss:.6g}; gradient norm {report.grad_norm:.6g}, then "
            text = f"{doubt}, and computed again the step gave another result ({figures}{again.grad_norm:.6g}): {text}"
            values = {"loss": report.loss, "grad_norm": report.grad_norm}
            findings.append(Finding(report.step, "recompute", text, rank, values))
            aux = {"recomputed": 1.0} | ({} if rank is None else {"recomputed.rank": float(rank)})
            again = replace(again, aux={**again.aux, **aux})
        if (doubt := self._trainer.health.doubt(again)) is not None:
            findings.append(_alarm(again, doubt, [trace[2] for trace in traces]))
        return replace(again, findings=tuple(findings))

    def _other(self, report: StepReport, again: StepReport, traces: list[Any]) -> bool:
        if not self._exact:
            return self._trainer.health.doubt(again) is None
        return _bits(report) != _bits(again) or any(first != second for first, second, _ in traces)

    def _trace(self) -> Trace:
        reduced = [checksum(shard.gradient) for shard in self._trainer.replicas.shards]
        own, after = ([int(x) for x in torch.stack(sums).tolist()] if sums else [] for sums in (self._own, reduced))
        return Trace(own, after)

    def _buffers(self) -> list[torch.Tensor]:
        chunks = self._trainer.replicas.chunks
        return [buffer.grad_data for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def _unexamined(self, report: StepReport, doubt: str) -> Finding:
        """What is known without a second computation: whose own loss is not finite."""
        finite = all(bool(loss.isfinite()) for loss in self._losses)
        guilty = [rank for rank, fine in enumerate(self._peers.gather(finite)) if not fine]
        if report.finite:
            return Finding(report.step, "spike", doubt)
        text = f"{doubt}: {f'the loss of {_ranks(guilty)} is not' if guilty else 'no single loss is at fault'}"
        return Finding(report.step, "nonfinite", text, guilty[0] if len(guilty) == 1 else None)


def _alarm(report: StepReport, doubt: str, found: list[Any]) -> Finding:
    """A doubt that the second computation confirmed."""
    if report.finite:
        return Finding(report.step, "spike", doubt, None, {"loss": report.loss, "grad_norm": report.grad_norm})
    first = located(found)
    text = f"{doubt}: {in_words(first)}"
    return Finding(report.step, "nonfinite", text, first.rank, {"name": first.name, "what": first.what})


def _blame(traces: list[Any]) -> tuple[str, int | None]:
    """Whose result changed, in words and as a rank if it is one."""
    own = [rank for rank, (first, second, _) in enumerate(traces) if first["own"] != second["own"]]
    reduced = [rank for rank, (first, second, _) in enumerate(traces) if first["reduced"] != second["reduced"]]
    if len(traces) == 1:
        return "the hardware of this rank is at fault", 0
    if own:
        return f"what {_ranks(own)} computed alone differs", own[0] if len(own) == 1 else None
    if reduced:
        where = f"the gradients that {_ranks(reduced)} received differ"
        return f"every rank computed the same, and {where}: it arose in a reduction", (
            reduced[0] if len(reduced) == 1 else None
        )
    return "gradients agree, and the sums over ranks differ: it arose in a reduction", None


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _bits(report: StepReport) -> tuple[bytes, Any]:
    """The numbers of a report so that NaN equals NaN."""
    numbers = [report.loss, report.grad_norm, *(value for _, value in sorted(report.aux.items()))]
    return b"".join(struct.pack("<d", math.nan if math.isnan(x) else x) for x in numbers), report.load
