"""The Kimi delta attention mixer: gated delta with a decay per key channel, both gates through a low rank.

Shapes: ``N`` tokens, ``H`` heads of this rank, ``K`` key dim, ``V`` value dim, ``R`` gate rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels.epilogue.op import epilogue
from kernels.kda.op import kda
from kernels.prologue.op import prologue
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build
from pretrain.model.gated_delta import Projected, PrologueWeights
from pretrain.model.stream import Stream
from pretrain.spec import Kda


class KdaMixer(nn.Module):
    """normed stream [n, D] -> branch output on the stream [n, D].

    Every tensor rank has f_a and g_a whole, reads all N tokens through them, and goes on with its own heads: their
    gradient on a rank is a partial sum, as is that of the stream.
    """

    def __init__(self, build: Build, prefix: str, spec: Kda) -> None:
        super().__init__()
        self.spec = spec
        self.num_qk_heads = spec.num_heads // build.groups.size("tp")
        self.q, self.k, self.v, self.b, self.o = (build.parameter(f"{prefix}.{f}.weight") for f in "qkvbo")
        self.f_a, self.f_b, self.g_a, self.g_b = (
            build.parameter(f"{prefix}.{f}.weight") for f in ("f_a", "f_b", "g_a", "g_b")
        )
        self.q_conv, self.k_conv, self.v_conv = (build.parameter(f"{prefix}.{f}_conv.weight") for f in "qkv")
        self.A_log, self.dt_bias = build.parameter(f"{prefix}.A_log"), build.parameter(f"{prefix}.dt_bias")
        self.out_norm = build.parameter(f"{prefix}.out_norm.weight")
        self._eps = build.spec.norm_eps
        self._stream = Stream(build.groups)

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        x = self._stream.read(x)
        out, _ = self.mix(self.project(x), batch.cu_seqlens)
        return self._stream.write(self.finish(out, x))

    def project(self, x: torch.Tensor) -> Projected:
        """x [N, D] -> q, k [N, H*K], v [N, H*V], before their convolutions; decay gate [N, H*K]; write gate [N, H]."""
        decay = F.linear(F.linear(x, self.f_a), self.f_b)
        return F.linear(x, self.q), F.linear(x, self.k), F.linear(x, self.v), decay, F.linear(x, self.b)

    @property
    def prologue_weights(self) -> PrologueWeights:
        return self.q_conv, self.k_conv, self.v_conv, self.A_log, self.dt_bias

    def mix(self, projected: Projected, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [N, H, V] and final state [S, H, K, V] of each of the S segments."""
        return kda(*prologue(*projected, *self.prologue_weights, cu_seqlens, self.num_qk_heads), cu_seqlens)

    def finish(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """out [N, H, V] -> partial sums [N, D] of the branch's output: gated RMSNorm per head, then o."""
        gate = F.linear(F.linear(x, self.g_a), self.g_b).view_as(out)
        return F.linear(epilogue(out, gate, self.out_norm, self._eps, "sigmoid").flatten(1), self.o)
