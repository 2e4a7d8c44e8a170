"""The prologue of a linear-attention mixer, token by token: the definition.

With ``conv(x, w)_t = sum_j w[:, W-1-j] * x_{t-j}`` over ``0 <= j < W`` with ``t-j`` in the segment of ``t`` (the last
column of the weight meets the current token, as in ``torch.nn.Conv1d`` with ``W - 1`` zeros left of every segment)::

    q <- unit(silu(conv(q, q_conv)));   k <- unit(silu(conv(k, k_conv)));   v <- silu(conv(v, v_conv))
    g = -e^A_log softplus(a + dt_bias);   beta = sigmoid(b);   unit(x) = x / sqrt(|x|^2 + 1e-6), per head

(Gated DeltaNet, arXiv 2412.06464, section 3.4, with the gate of Mamba-2; Kimi Linear, arXiv 2510.26692, has one decay
per key channel.)
Shapes: ``N`` packed tokens, ``Hk``/``Hv`` query-key/value heads, ``K``/``V`` key/value dim, ``W`` taps.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.precision import compute_dtype

#: Added to the squared length of q and k, as Gated DeltaNet, Qwen3-Next and Kimi Linear do.
UNIT_EPS = 1e-6


def prologue_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    num_qk_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Signature and shapes of :func:`kernels.prologue.op.prologue`; differentiable by autograd."""
    dtype = compute_dtype(q.dtype)
    num_v_heads = len(A_log)

    def convolved(x: Tensor, weight: Tensor, num_heads: int) -> Tensor:
        y = _convolve(x.to(dtype), weight.to(dtype), cu_seqlens.tolist())
        return torch.nn.functional.silu(y).unflatten(-1, (num_heads, -1))

    def unit(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)

    q_, k_ = unit(convolved(q, q_conv, num_qk_heads)), unit(convolved(k, k_conv, num_qk_heads))
    v_ = convolved(v, v_conv, num_v_heads)
    step = a.to(dtype) + dt_bias.to(dtype)
    rate = A_log.to(dtype).exp().repeat_interleave(a.shape[1] // num_v_heads)
    g = -rate * torch.logaddexp(step, torch.zeros_like(step))
    if a.shape[1] != num_v_heads:
        g = g.unflatten(-1, (num_v_heads, -1))
    return q_.to(q.dtype), k_.to(k.dtype), v_.to(v.dtype), g, b.to(dtype).sigmoid()


def _convolve(x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """x [N, C], weight [C, W] -> [N, C]."""
    width = weight.shape[1]
    rows = []
    for start, stop in pairwise(bounds):
        for t in range(start, stop):
            first = max(start, t - width + 1)
            rows.append((x[first : t + 1] * weight[:, width - (t + 1 - first) :].T).sum(0))
    return torch.stack(rows) if rows else x * weight[:, -1]
