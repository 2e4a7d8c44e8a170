"""Mixture of experts: router, experts on grouped matrix products, shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from parallel.engine import collectives
from parallel.engine.experts import Exchange
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build
from pretrain.model.feed_forward import SwiGLU
from pretrain.model.router import Router, RouterStatistics
from pretrain.model.stream import Stream
from pretrain.spec import MoE


class Experts(nn.Module):
    """This rank's experts: rows [M, D] sorted by expert, counts [E] -> [M, D]."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (build.parameter(f"{prefix}.{f}.weight") for f in ("gate", "up", "down"))

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(grouped_linear(rows, self.gate, counts)) * grouped_linear(rows, self.up, counts)
        return grouped_linear(hidden, self.down, counts)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """x [M, in] sorted by expert, weight [E, out, in], counts [E] -> [M, out]: one matrix product per expert.

    ``torch.nn.functional.grouped_mm`` on every device; it refuses float64, which only parity runs use: a loop there.
    """
    if x.dtype == torch.float64:
        parts = x.split(counts.tolist())
        return torch.cat([F.linear(part, expert) for part, expert in zip(parts, weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


class MoEFeedForward(nn.Module):
    """normed stream [n, D] -> branch output on the stream [n, D], and the router's statistics.

    Each tensor rank routes its own tokens. The shared expert is a dense feed-forward over tensor ranks.
    """

    def __init__(self, build: Build, prefix: str, spec: MoE) -> None:
        super().__init__()
        self.router = Router(build, f"{prefix}.router", spec)
        self.experts = Experts(build, f"{prefix}.experts")
        self.shared = SwiGLU(build, f"{prefix}.shared") if spec.shared_hidden is not None else None
        self.shared_router = build.parameter(f"{prefix}.shared.router.weight") if spec.shared_gate else None
        self._exchange = Exchange(build.groups, spec.num_experts)
        self._stream = Stream(build.groups)
        self._tp = build.groups["tp"]

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, RouterStatistics]:
        own = self._stream.own_tokens(x)
        rows = self._stream.rows(batch.tokens.shape[0])
        weights, experts, statistics = self.router(own, rows, batch)
        out = self._exchange(own, experts, weights, batch.valid[rows], self.experts)
        if self.shared is not None:
            everywhere = collectives.gather_rows(own, self._tp)
            shared = collectives.reduce_scatter_rows(self.shared(everywhere), self._tp)
            if self.shared_router is not None:
                shared = shared * F.linear(own, self.shared_router).sigmoid()
            out = out + shared
        return self._stream.merge_tokens(out), statistics
