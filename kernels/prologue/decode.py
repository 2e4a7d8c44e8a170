"""One token of the prologue for a batch of sequences, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activation import sigmoid
from kernels.precision import compute_dtype
from kernels.prologue.chunked import decay, inverse_length


@torch.no_grad()
def prologue_step(
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
    windows: tuple[Tensor, Tensor, Tensor],
    num_qk_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`kernels.prologue.op.prologue` of one more token of each of B sequences: inputs and outputs as there, with
    B rows for N, and the bits of its blocked form. ``windows``: for q, k and v the W-1 rows before this one,
    [B, C, W-1], oldest first (zeros before a sequence's first), **updated in place**. No gradient."""
    dtype = compute_dtype(q.dtype)
    num_heads = (num_qk_heads, num_qk_heads, len(A_log))
    q_, k_, v_ = (
        _convolve(x.to(dtype), weight.to(dtype), window).unflatten(-1, (heads, -1))
        for x, weight, window, heads in zip((q, k, v), (q_conv, k_conv, v_conv), windows, num_heads, strict=True)
    )
    q_, k_ = q_ * inverse_length(q_), k_ * inverse_length(k_)
    return q_.to(q.dtype), k_.to(k.dtype), v_.to(v.dtype), decay(a, A_log, dt_bias), sigmoid(b.to(dtype))


def _convolve(x: Tensor, weight: Tensor, window: Tensor) -> Tensor:
    """silu of the convolution, [B, C]; moves ``window`` one row on."""
    c = x * weight[:, -1]
    for back in range(1, weight.shape[1]):
        c.addcmul_(window[..., -back].to(x.dtype), weight[:, -1 - back])
    window.copy_(torch.cat((window, x.unsqueeze(-1).to(window.dtype)), dim=-1)[..., 1:])
    return c * sigmoid(c)
