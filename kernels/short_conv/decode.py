"""One token of the short convolution for a batch of sequences, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import compute_dtype


@torch.no_grad()
def short_conv_step(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """x [B, C]; weight [C, W]; state [B, C, W-1], the tokens before x, oldest first (zeros before the first),
    **updated in place**. Returns [B, C] in x's dtype. No gradient. Definition: ``kernels.short_conv.reference``."""
    dtype = compute_dtype(x.dtype)
    window = torch.cat((state, x.unsqueeze(-1).to(state.dtype)), dim=-1)
    state.copy_(window[..., 1:])
    return torch.nn.functional.silu((window.to(dtype) * weight.to(dtype)).sum(-1)).to(x.dtype)
