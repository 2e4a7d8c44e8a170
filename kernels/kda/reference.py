"""Kimi Delta Attention, token by token: the definition that every other implementation is held to.

Per value head, with state ``S`` [K, V], a decay ``e^g`` for each key channel (``g <= 0``) and write strength ``beta``::

    S <- diag(e^g_t) S;   S <- S + k_t (beta_t (v_t - S^T k_t))^T;   o_t = scale * S^T q_t

(Kimi Linear, arXiv 2510.26692, equation 1: decay first, then the delta rule on the decayed state.)
Shapes: ``N`` packed tokens, ``S`` segments, ``Hk``/``Hv`` query-key/value heads, ``K``/``V`` key/value dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.precision import compute_dtype


def kda_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Signature and shapes of :func:`kernels.kda.op.kda`; differentiable by autograd."""
    dtype = compute_dtype(q.dtype)
    num_v_heads, value_dim = v.shape[1:]
    key_dim = k.shape[2]
    group = num_v_heads // k.shape[1]
    scale = key_dim**-0.5 if scale is None else scale
    q_, k_ = (x.to(dtype).repeat_interleave(group, dim=1) for x in (q, k))
    v_, decay, beta_ = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)

    outputs, final_states = [], []
    for segment, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        if initial_state is None:
            state = q_.new_zeros(num_v_heads, key_dim, value_dim)
        else:
            state = initial_state[segment].to(dtype)
        for t in range(start, stop):
            state = state * decay[t, :, :, None]
            error = v_[t] - torch.einsum("hkv,hk->hv", state, k_[t])
            state = state + torch.einsum("hk,hv->hkv", k_[t], beta_[t, :, None] * error)
            outputs.append(scale * torch.einsum("hkv,hk->hv", state, q_[t]))
        final_states.append(state)
    o = torch.stack(outputs) if outputs else torch.zeros_like(v_)
    return o.to(v.dtype), torch.stack(final_states)
