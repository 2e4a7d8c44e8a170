"""Router of a mixture of experts: scores, choice, and the two auxiliary losses with their global normalisers.

Shapes: ``n`` tokens of this rank, ``E`` experts, ``k`` experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from parallel.engine.groups import Group
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build, high
from pretrain.spec import MoE


@dataclass(frozen=True)
class RouterStatistics:
    """Of one layer and micro-batch, this rank's tokens only: sums over ranks and micro-batches are global values.

    ``load`` int64 [E]: valid tokens that chose each expert. ``balance`` and ``z``: this rank's share of the auxiliary
    losses, coefficient and global normaliser applied (scalars with a gradient).
    """

    load: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor

    def detach(self) -> RouterStatistics:
        return RouterStatistics(self.load, self.balance.detach(), self.z.detach())


class Router(nn.Module):
    """tokens [n, D] -> weights [n, k], experts [n, k], statistics. Logits and probabilities in float32 or better."""

    def __init__(self, build: Build, prefix: str, spec: MoE) -> None:
        super().__init__()
        self.spec = spec
        self.weight = build.parameter(f"{prefix}.weight")
        # Plain attributes: a module's buffers would be cast with it. They move only when a step is applied.
        self.bias = build.buffer(f"{prefix}.bias") if spec.bias_update_rate is not None else None
        self.load = build.buffer(f"{prefix}.load")
        self._tp: Group = build.groups["tp"]

    def forward(
        self, x: torch.Tensor, rows: slice, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, RouterStatistics]:
        """``rows``: which of the micro-batch's tokens ``x`` are."""
        spec, dtype = self.spec, high(x.dtype)
        logits = F.linear(x.to(dtype), self.weight.to(dtype))
        scores = logits.softmax(-1) if spec.router == "softmax" else logits.sigmoid()
        ranking = scores.detach() if self.bias is None else scores.detach() + self.bias
        experts = ranking.topk(spec.top_k, dim=-1, sorted=True).indices
        weights = scores.gather(1, experts)
        if spec.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        statistics = self._statistics(logits, scores, experts, rows, batch)
        return weights * spec.route_scale, experts, statistics

    def _statistics(
        self, logits: torch.Tensor, scores: torch.Tensor, experts: torch.Tensor, rows: slice, batch: MicroBatch
    ) -> RouterStatistics:
        spec, valid = self.spec, batch.valid[rows]
        window = torch.arange(rows.start, rows.stop, device=logits.device) // batch.window_tokens
        # Counts [windows, E]: a padded token is counted in a row of its own, which is dropped.
        cell = torch.where(valid, window, batch.windows)[:, None] * spec.num_experts + experts
        counts = torch.bincount(cell.flatten(), minlength=(batch.windows + 1) * spec.num_experts)
        counts = counts.view(batch.windows + 1, spec.num_experts)[:-1]
        nothing = logits.new_zeros(())
        balance = self._balance_loss(scores, counts, window, batch, valid) if spec.balance_loss else nothing
        z = nothing
        if spec.z_loss:
            z = (logits.logsumexp(-1).square() * valid).sum() * (spec.z_loss / max(batch.normalisers.routed, 1))
        return RouterStatistics(counts.sum(0), balance, z)

    def _balance_loss(
        self, scores: torch.Tensor, counts: torch.Tensor, window: torch.Tensor, batch: MicroBatch, valid: torch.Tensor
    ) -> torch.Tensor:
        """Mean over the global batch's windows of E / (k n^2) * sum_e counts_e * sum_t p_te, n valid tokens of the
        window (arXiv 2101.03961, section 2.2, for top-k, with tokens of one window only so that the value does not
        depend on micro-batches). The counts are those of the whole window; the sum over t is this rank's."""
        spec = self.spec
        if self._tp.size() > 1:
            counts = counts.clone()
            dist.all_reduce(counts, group=self._tp)
        probabilities = scores if spec.router == "softmax" else scores / scores.sum(-1, keepdim=True)
        mass = scores.new_zeros(counts.shape).index_add(0, window, probabilities * valid[:, None])
        tokens = batch.valid.view(batch.windows, -1).sum(1).clamp(min=1).to(scores.dtype)
        per_window = (counts * mass).sum(1) * spec.num_experts / (spec.top_k * tokens.square())
        return per_window.sum() * (spec.balance_loss / batch.normalisers.windows)


@torch.no_grad()
def update_router(router: Router, load: torch.Tensor) -> None:
    """After an applied step: the cumulative load, and the bias one step towards even load (arXiv 2408.15664).
    ``load`` int64 [E] is the step's, over the global batch."""
    router.load += load
    if router.bias is not None:
        assert router.spec.bias_update_rate is not None
        mean = load.sum().to(router.bias.dtype) / load.numel()
        router.bias += router.spec.bias_update_rate * torch.sign(mean - load)
