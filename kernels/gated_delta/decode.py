"""One token of the gated delta rule for a batch of sequences, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import compute_dtype


@torch.no_grad()
def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    """q, k [B, Hk, K]; v [B, Hv, V]; g, beta [B, Hv]; state [B, Hv, K, V], **updated in place** (any float dtype; the
    step is computed in float32, or float64). Returns o [B, Hv, V] in v's dtype. No gradient. Definition:
    ``kernels.gated_delta.reference``."""
    B, Hv, V = v.shape
    Hk, K = k.shape[1:]
    dtype = compute_dtype(torch.promote_types(q.dtype, state.dtype))
    scale = K**-0.5 if scale is None else scale
    k_ = k.to(dtype).unsqueeze(2)
    S = state.to(dtype).view(B, Hk, Hv // Hk, K, V) * g.to(dtype).exp().view(B, Hk, -1, 1, 1)
    written = beta.to(dtype).view(B, Hk, -1, 1) * (v.to(dtype).view(B, Hk, -1, V) - (k_.unsqueeze(-2) @ S).squeeze(-2))
    S.addcmul_(k_.unsqueeze(-1), written.unsqueeze(-2))
    state.copy_(S.view_as(state))
    return ((q.to(dtype) * scale).view(B, Hk, 1, 1, K) @ S).view(B, Hv, V).to(v.dtype)
