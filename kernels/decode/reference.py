"""Decoding, token by token: the definition that every other implementation is held to.

The step is that of ``kernels.gated_delta.reference`` or, with a decay per key channel, of ``kernels.kda.reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import compute_dtype


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Signature and shapes of :func:`kernels.decode.op.decode`."""
    dtype = compute_dtype(torch.promote_types(q.dtype, state.dtype))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    group = v.shape[2] // k.shape[2]
    decay = g.to(dtype).exp() if g.dim() == 4 else g.to(dtype).exp().unsqueeze(-1)
    q_, k_ = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    v_, beta_, o = v.to(dtype), beta.to(dtype), torch.empty_like(v)
    for sequence, slot in enumerate(range(len(q)) if slots is None else slots.tolist()):
        S = state[slot].to(dtype)
        for t in range(q.shape[1]):
            at = sequence, t
            S = S * decay[at].unsqueeze(-1)
            error = v_[at] - torch.einsum("hkv,hk->hv", S, k_[at])
            S = S + torch.einsum("hk,hv->hkv", k_[at], beta_[at].unsqueeze(-1) * error)
            o[at] = scale * torch.einsum("hkv,hk->hv", S, q_[at])
        state[slot] = S
    return o
