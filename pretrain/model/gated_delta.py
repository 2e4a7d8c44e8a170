"""The gated delta mixer: short convolution, L2-normalised q and k, scalar decay, delta rule, gated RMSNorm.

Shapes: ``N`` tokens, ``Hk`` query/key heads and ``Hv`` value heads of this rank, ``K`` key dim, ``V`` value dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels.epilogue.op import epilogue
from kernels.gated_delta.op import gated_delta
from kernels.prologue.op import prologue
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build
from pretrain.model.stream import Stream
from pretrain.spec import GatedDelta

#: q, k, v, a, b of :func:`kernels.prologue.op.prologue`, and its weights.
Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
PrologueWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class GatedDeltaMixer(nn.Module):
    """normed stream [n, D] -> branch output on the stream [n, D]."""

    def __init__(self, build: Build, prefix: str, spec: GatedDelta) -> None:
        super().__init__()
        self.spec = spec
        self.num_qk_heads = spec.num_qk_heads // build.groups.size("tp")
        self.q, self.k, self.v, self.z, self.b, self.a = (build.parameter(f"{prefix}.{f}.weight") for f in "qkvzba")
        self.q_conv, self.k_conv, self.v_conv = (build.parameter(f"{prefix}.{f}_conv.weight") for f in "qkv")
        self.A_log, self.dt_bias = build.parameter(f"{prefix}.A_log"), build.parameter(f"{prefix}.dt_bias")
        self.out_norm = build.parameter(f"{prefix}.out_norm.weight")
        self.o = build.parameter(f"{prefix}.o.weight")
        self._eps = build.spec.norm_eps
        self._stream = Stream(build.groups)

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        x = self._stream.read(x)
        out, _ = self.mix(self.project(x), batch.cu_seqlens)
        return self._stream.write(self.finish(out, x))

    def project(self, x: torch.Tensor) -> Projected:
        """x [N, D] -> q, k [N, Hk*K] and v [N, Hv*V] before their convolutions, decay and write gates [N, Hv]."""
        return F.linear(x, self.q), F.linear(x, self.k), F.linear(x, self.v), F.linear(x, self.a), F.linear(x, self.b)

    @property
    def prologue_weights(self) -> PrologueWeights:
        return self.q_conv, self.k_conv, self.v_conv, self.A_log, self.dt_bias

    def mix(self, projected: Projected, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [N, Hv, V] and final state [S, Hv, K, V] of each of the S segments."""
        return gated_delta(*prologue(*projected, *self.prologue_weights, cu_seqlens, self.num_qk_heads), cu_seqlens)

    def finish(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """out [N, Hv, V] -> partial sums [N, D] of the branch's output: gated RMSNorm per head, then o."""
        gate = F.linear(x, self.z).view_as(out)
        return F.linear(epilogue(out, gate, self.out_norm, self._eps, "silu").flatten(1), self.o)
