"""Tokens to experts and back: the exchange of expert parallelism, dropless.

Shapes: ``n`` tokens of this rank, ``k`` experts a token, ``M`` (token, expert) rows that this rank's experts work on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from parallel.engine import collectives
from parallel.engine.groups import Groups


class Exchange:
    """Sends every valid (token, expert) row to the rank that holds the expert, and brings results back.

    Experts are split over ``ep`` in order; with ``etp > 1`` each expert's width is split, so the ranks of an ``etp``
    group gather each other's rows first and return partial sums.
    """

    def __init__(self, groups: Groups, num_experts: int) -> None:
        self._ep, self._etp = groups["ep"], groups["etp"]
        self.num_experts = num_experts
        self.num_local = num_experts // self._ep.size()

    def __call__(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        valid: torch.Tensor,
        work: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """x [n, D], experts [n, k], weights [n, k], valid [n] -> sum over k of weight * expert(x), [n, D].

        ``work(rows [M, D], counts [num_local])`` is this rank's experts on rows sorted by local expert. A token that
        is not valid is not sent, and gets zero.
        """
        n, k = experts.shape
        # Padding sorts behind the last expert and is cut off.
        key = torch.where(valid[:, None], experts, self.num_experts).flatten()
        order = torch.argsort(key, stable=True)
        counts = torch.bincount(key, minlength=self.num_experts + 1)[: self.num_experts]
        kept = int(counts.sum())
        place = _inverse(order)
        out = self._at_experts(_Spread.apply(x, order[:kept], place), counts, work)
        if kept < n * k:
            out = torch.cat([out, out.new_zeros(n * k - kept, out.shape[1])])
        out = _Permute.apply(out, place, order).view(n, k, -1)
        return (out * weights[..., None].to(out.dtype)).sum(1)

    def _at_experts(
        self, rows: torch.Tensor, counts: torch.Tensor, work: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ep, etp = self._ep.size(), self._etp.size()
        if ep == etp == 1:
            return work(rows, counts)
        # [source rank, local expert]: what comes from each rank of ep, then of etp.
        sent = counts.view(ep, self.num_local)
        received = collectives.exchange_counts(sent, self._ep)
        send, receive = sent.sum(1).tolist(), received.sum(1).tolist()
        rows = collectives.exchange_rows(rows, self._ep, send, receive)
        if etp > 1:
            received = collectives.all_gather_uneven(received, self._etp, [ep] * etp)
        widths = received.view(etp, -1).sum(1).tolist()
        rows = collectives.gather_rows(rows, self._etp, widths)
        # Rows lie by source, then by expert; the experts want them by expert, then by source.
        expert = torch.arange(self.num_local, device=rows.device).repeat(ep * etp)
        order = torch.argsort(expert.repeat_interleave(received.flatten()), stable=True)
        back = _inverse(order)
        out = work(_Permute.apply(rows, order, back), received.sum(0))
        out = _Permute.apply(out, back, order)
        out = collectives.reduce_scatter_rows(out, self._etp, widths)
        return collectives.exchange_rows(out, self._ep, receive, send)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``order``."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a gather too, so it is deterministic on every device."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0][ctx.saved_tensors[0]], None, None


class _Spread(torch.autograd.Function):
    """x [n, D] -> row ``order[i] // k`` of x for each (token, expert) row i that is kept; ``place [n * k]`` says where
    each row lies among all. The gradient of a token is the sum over its k rows, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.tokens = len(x)
        return x[order // (len(place) // len(x))]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (place,) = ctx.saved_tensors
        rows = gradients[0]
        if len(rows) < len(place):
            rows = torch.cat([rows, rows.new_zeros(len(place) - len(rows), rows.shape[1])])
        return rows[place].view(ctx.tokens, -1, rows.shape[1]).sum(1), None, None
