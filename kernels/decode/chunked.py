"""Decoding in closed form: the T new tokens of every sequence as one chunk (mathematics: ``kernels.delta_chunks``).

A step is bound by the traffic of the state, so the decay is put on queries and keys, which read the undecayed state
together in one product; the state is then decayed and written once, however many tokens came.

``B`` sequences, ``T`` tokens, ``Hk``/``Hv`` query-key/value heads, ``R = Hv / Hk``, ``K``/``V`` key/value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import compute_dtype

#: Tokens taken at once: the T x T x K decays between them stay below the K x V of the state.
MOST_TOKENS = 8


def decode_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """Signature and shapes of :func:`kernels.decode.op.decode`."""
    dtype = compute_dtype(torch.promote_types(q.dtype, state.dtype))
    S = state if slots is None else state.index_select(0, slots)
    S = S.to(dtype).contiguous()
    o = torch.empty_like(v)
    for start in range(0, q.shape[1], MOST_TOKENS):
        tokens = slice(start, start + MOST_TOKENS)
        q_, k_, v_, beta_ = (x[:, tokens].to(dtype).transpose(1, 2) for x in (q, k, v, beta))
        g_ = g[:, tokens].to(torch.float64).transpose(1, 2)
        o[:, tokens] = _few_tokens(q_ * scale, k_, v_, beta_, g_, S).transpose(1, 2)
    if slots is not None:
        state.index_copy_(0, slots.to(torch.int64), S.to(state.dtype))
    elif S is not state:
        state.copy_(S)
    return o


def _few_tokens(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> Tensor:
    """q, k [B, Hk, T, K]; v [B, Hv, T, V]; beta [B, Hv, T]; g [B, Hv, T] or [B, Hv, T, K]; S [B, Hv, K, V], contiguous,
    updated in place. Returns o [B, Hv, T, V]."""
    (B, Hv, T, V), (Hk, K) = v.shape, k.shape[1::2]
    Z = torch.stack((q, k), 2).unsqueeze(2)
    g = (g if g.dim() == 4 else g.unsqueeze(-1)).unflatten(1, (Hk, Hv // Hk))
    G = g.new_ones(T, T).tril_() @ g
    # Above the diagonal the exponent is positive; what comes of it is not read.
    between = (G.unsqueeze(-2) - G.unsqueeze(-3)).clamp_(max=0.0).exp_().to(q.dtype)
    N = ((Z.unsqueeze(-2) * between.unsqueeze(3)) * Z[:, :, :, 1, None, None]).sum(-1).view(B * Hv, 2, T, T)

    states = S.view(B * Hv, K, V)
    reads = ((Z * G.exp().to(q.dtype).unsqueeze(3)).view(B * Hv, 2 * T, K) @ states).view(B * Hv, 2, T, V)
    beta = beta.reshape(B * Hv, T, 1)
    errors = v.reshape(B * Hv, T, V) - reads[:, 1]
    writes = beta * torch.linalg.solve_triangular(N[:, 1] * beta.mT, errors, upper=False, unitriangular=True)
    keys = k.unsqueeze(2) * (G[..., -1:, :] - G).exp_().to(q.dtype)
    S *= G[..., -1, :].exp().to(q.dtype).reshape(B, Hv, -1, 1)
    states.baddbmm_(keys.reshape(B * Hv, T, K).mT, writes)
    return (reads[:, 0] + N[:, 0].tril() @ writes).view(B, Hv, T, V)
