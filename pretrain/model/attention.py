"""Causal softmax attention over packed documents, grouped-query, heads split over tensor ranks.

Shapes: ``N`` tokens, ``H`` query heads and ``G`` key/value heads of this rank, ``K`` head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.model import flash
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build, high
from pretrain.model.norm import RMSNorm
from pretrain.model.stream import Stream
from pretrain.spec import Attention


class SoftmaxAttention(nn.Module):
    """normed stream [n, D] -> branch output on the stream [n, D]."""

    def __init__(self, build: Build, prefix: str, spec: Attention) -> None:
        super().__init__()
        tp = build.groups.size("tp")
        self.spec = spec
        self.num_heads, self.num_kv_heads = spec.num_heads // tp, spec.num_kv_heads // tp
        self.q, self.k, self.v, self.o = (build.parameter(f"{prefix}.{field}.weight") for field in "qkvo")
        self.gate = build.parameter(f"{prefix}.gate.weight") if spec.output_gate else None
        if spec.qk_norm:
            eps, zero_centred = build.spec.norm_eps, build.spec.zero_centred_norm
            self.q_norm = RMSNorm(build.parameter(f"{prefix}.q_norm.weight"), eps, zero_centred)
            self.k_norm = RMSNorm(build.parameter(f"{prefix}.k_norm.weight"), eps, zero_centred)
        self._stream = Stream(build.groups)

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        x = self._stream.read(x)
        q, k, v = self.project(x, batch.positions)
        out = attend(q, k, v, batch)
        return self._stream.write(self.finish(out, x))

    def project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [N, D] -> q [N, H, K], k and v [N, G, K], normed and rotated."""
        K = self.spec.head_dim
        q = F.linear(x, self.q).unflatten(-1, (self.num_heads, K))
        k = F.linear(x, self.k).unflatten(-1, (self.num_kv_heads, K))
        v = F.linear(x, self.v).unflatten(-1, (self.num_kv_heads, K))
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope_dim:
            cos, sin = rotary(positions, self.spec, high(x.dtype))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def finish(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """out [N, H, K] -> partial sums [N, D] of the branch's output; ``x`` as in ``project``."""
        out = out.flatten(1)
        if self.gate is not None:
            out = out * torch.sigmoid(F.linear(x, self.gate))
        return F.linear(out, self.o)


def rotary(positions: torch.Tensor, spec: Attention, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [N, 1, rope_dim] of rotary embedding (arXiv 2104.09864), rotate-half convention."""
    exponents = torch.arange(0, spec.rope_dim, 2, dtype=dtype, device=positions.device) / spec.rope_dim
    angles = positions.to(dtype)[:, None] * spec.rope_theta**-exponents
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first ``cos.shape[-1]`` dims of ``x [N, H, K]``, in the precision of the angles."""
    dim = cos.shape[-1]
    turned = x[..., :dim].to(cos.dtype)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), x[..., dim:]], -1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v within each document, causal; [N, H, K].

    flash-attn where it can; else torch's SDPA with windows as a batch dimension, where a mask keeps documents apart
    inside a window, at the cost of a T x T mask per window and of scores that it throws away.
    """
    if flash.usable(q):
        return flash.attend(q, k, v, batch.cu_seqlens, longest=batch.window_tokens)
    shape, grouped, mask = (batch.windows, batch.window_tokens), q.shape[1] != k.shape[1], batch.attention_mask
    q, k, v = (tensor.unflatten(0, shape).transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)
