"""The gated delta mixer: short convolution, L2-normalised q and k, scalar decay, delta rule, gated RMSNorm.

Shapes: ``N`` tokens, ``Hk`` query/key heads and ``Hv`` value heads of this rank, ``K`` key dim, ``V`` value dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels.gated_delta.op import gated_delta
from kernels.short_conv.op import short_conv
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build, high
from pretrain.model.norm import rms_norm
from pretrain.model.stream import Stream
from pretrain.spec import GatedDelta

#: Added to the squared norm of q and k, as Gated DeltaNet and Qwen3-Next do.
L2_EPS = 1e-6


class GatedDeltaMixer(nn.Module):
    """normed stream [n, D] -> branch output on the stream [n, D]."""

    def __init__(self, build: Build, prefix: str, spec: GatedDelta) -> None:
        super().__init__()
        tp = build.groups.size("tp")
        self.spec = spec
        self.num_qk_heads, self.num_v_heads = spec.num_qk_heads // tp, spec.num_v_heads // tp
        self.q, self.k, self.v, self.z, self.b, self.a = (build.parameter(f"{prefix}.{f}.weight") for f in "qkvzba")
        self.q_conv, self.k_conv, self.v_conv = (build.parameter(f"{prefix}.{f}_conv.weight") for f in "qkv")
        self.A_log, self.dt_bias = build.parameter(f"{prefix}.A_log"), build.parameter(f"{prefix}.dt_bias")
        self.out_norm = build.parameter(f"{prefix}.out_norm.weight")
        self.o = build.parameter(f"{prefix}.o.weight")
        self._eps = build.spec.norm_eps
        self._stream = Stream(build.groups)

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        x = self._stream.read(x)
        q, k, v = (F.linear(x, weight) for weight in (self.q, self.k, self.v))
        q = short_conv(q, self.q_conv, batch.cu_seqlens)
        k = short_conv(k, self.k_conv, batch.cu_seqlens)
        v = short_conv(v, self.v_conv, batch.cu_seqlens)
        q, k, v = self.split_heads(q, k, v)
        g, beta = self.gates(x)
        out, _ = gated_delta(q, k, v, g, beta, batch.cu_seqlens)
        return self._stream.write(self.finish(out, x))

    def split_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, heads * dim] -> q, k [N, Hk, K] of unit length, v [N, Hv, V]."""
        q, k = (l2_normalise(tensor.unflatten(-1, (self.num_qk_heads, self.spec.key_dim))) for tensor in (q, k))
        return q, k, v.unflatten(-1, (self.num_v_heads, self.spec.value_dim))

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log decay g <= 0 and write strength beta in (0, 1), both [N, Hv], float32 or better."""
        dtype = high(x.dtype)
        g = -self.A_log.exp() * F.softplus(F.linear(x, self.a).to(dtype) + self.dt_bias)
        return g, F.linear(x, self.b).to(dtype).sigmoid()

    def finish(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """out [N, Hv, V] -> partial sums [N, D] of the branch's output: gated RMSNorm per head, then o."""
        z = F.linear(x, self.z).view_as(out)
        gated = rms_norm(out, self.out_norm, self._eps, zero_centred=False) * F.silu(z.to(high(z.dtype))).to(z.dtype)
        return F.linear(gated.flatten(1), self.o)


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(high(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
