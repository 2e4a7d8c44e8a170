"""The objective of a step (P1).

The main loss is the sum of -log p over every valid target of the global batch, divided by their number: each
micro-batch divides its sum by the *global* count, so sums over micro-batches and ranks are the step's loss whatever the
layout. Auxiliary losses carry their own global normaliser and are reported apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


@dataclass(frozen=True)
class Normalisers:
    """Counts over the *global* batch of a step, which divide its sums.

    ``targets``: valid targets; ``routed``: tokens that are not padding; ``windows``: windows.
    """

    targets: int
    routed: int
    windows: int


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, start: int, group: dist.ProcessGroup) -> torch.Tensor:
    """-log p of each target in nats, float32 or better, [N].

    ``logits [N, rows]`` are this rank's part of the vocabulary, which begins at id ``start``; the parts of ``group``
    make it whole and may differ in size. Equal on every rank of the group.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if group.size() == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    return _VocabularyParallelCrossEntropy.apply(logits, targets, start, group)


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, start: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        rows = logits.shape[1]
        # A rank may hold no row at all (vocabulary 5 over 4 ranks holds 2, 2, 1, 0).
        largest = logits.amax(1) if rows else logits.new_full((logits.shape[0],), -torch.inf)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest[:, None]
        local = targets - start
        mine = (local >= 0) & (local < rows)
        local = local.masked_fill(~mine, 0)
        picked = shifted.gather(1, local[:, None])[:, 0] if rows else torch.zeros_like(largest)
        exponents = shifted.exp()
        sums = torch.stack([exponents.sum(1), picked.masked_fill(~mine, 0)])
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(exponents / sums[0][:, None], local, mine)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        probabilities, local, mine = ctx.saved_tensors
        gradient = probabilities
        if gradient.shape[1]:
            at_target = gradient.gather(1, local[:, None]) - mine[:, None].to(gradient.dtype)
            gradient = gradient.scatter(1, local[:, None], at_target)
        return gradient * gradients[0][:, None], None, None, None


def with_auxiliary(x: torch.Tensor, losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """``x``, with auxiliary losses made part of the objective: each gets a gradient of one where it arises, so that no
    later pipeline stage need know of it. Their normalisers must already be global."""
    losses = [loss for loss in losses if loss.requires_grad]
    return _WithAuxiliary.apply(x, torch.stack(losses).sum()) if losses else x


class _WithAuxiliary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], ctx.saved_tensors[0]
