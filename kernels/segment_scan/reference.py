"""What a segment does to the state that enters it, composed token by token: the definition.

One token of the delta rule maps the state S [K, V] of a value head affinely, and so does a whole segment::

    S <- A S + k (beta v)^T,   A = (I - beta k k^T) diag(e^g)          S_out = M S_in + B

with g a scalar (gated delta) or one decay per key channel (KDA). A pair is (M [..., K, K], B [..., K, V]).
Shapes: ``N`` packed tokens, ``S`` segments, ``P`` pieces of ``Q`` sequences, ``Hk``/``Hv`` query-key/value heads.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.precision import compute_dtype

Pair = tuple[Tensor, Tensor]


def compose(later: Pair, earlier: Pair) -> Pair:
    """The pair of ``earlier`` followed by ``later``. Associative, not commutative; any leading dims."""
    (M2, B2), (M1, B1) = later, earlier
    return M2 @ M1, M2 @ B1 + B2


def segment_pairs_reference(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> Pair:
    """Signature and shapes of :func:`kernels.segment_scan.op.segment_pairs`; differentiable by autograd."""
    dtype = compute_dtype(k.dtype)
    Hv, V, K = *v.shape[1:], k.shape[2]
    keys = k.to(dtype).repeat_interleave(Hv // k.shape[1], dim=1).unsqueeze(-1)
    writes = keys * beta.to(dtype)[..., None, None]
    decay = (g if g.dim() == 3 else g.unsqueeze(-1)).to(dtype).exp().unsqueeze(-2)
    identity = torch.eye(K, dtype=dtype, device=k.device)
    tokens = (identity - writes @ keys.mT) * decay, writes @ v.to(dtype).unsqueeze(-2)

    pairs = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        pair: Pair = identity.expand(Hv, K, K), identity.new_zeros(Hv, K, V)
        for t in range(start, stop):
            pair = compose((tokens[0][t], tokens[1][t]), pair)
        pairs.append(pair)
    return torch.stack([M for M, _ in pairs]), torch.stack([B for _, B in pairs])


def fold_reference(M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Signature and shapes of :func:`kernels.segment_scan.op.fold`; differentiable by autograd."""
    entering, final = [], []
    for sequence, (start, stop) in enumerate(pairwise(first.tolist())):
        state = B.new_zeros(B.shape[1:]) if initial is None else initial[sequence]
        for piece in range(start, stop):
            entering.append(state)
            state = M[piece] @ state + B[piece]
        final.append(state)
    return torch.stack(entering) if entering else torch.zeros_like(B), torch.stack(final)
