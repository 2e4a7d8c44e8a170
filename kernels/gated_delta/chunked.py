"""The gated delta rule in closed form over chunks: the decay of ``kernels.delta_chunks`` shared by all key channels.

Then N = (Z K^T) * [D; D below the diagonal] with D_ri = e^(G_r - G_i) for i <= r: products of queries and keys serve
all value heads of a group, and only their C x C matrices are decayed. With E = dN * D, dN being the cotangent of N, the
gradients of Z and K inside the chunk are E K and E^T Z.

Every exponent that is used is <= 0 for g <= 0. Sums of g are held in float64: a float32 sum of a chunk with one decay
of -1000 would lose 4 digits of every later ratio. The gradient of g_j adds what crosses token j (pairs
r >= j > i, reads of S0 from j on, writes to S1 before j) instead of subtracting two sums of all pairs: it stays exact
when it is tiny.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import delta_chunks
from kernels.chunks import Group
from kernels.precision import compute_dtype


def _running_sum(x: Tensor) -> Tensor:
    """cumsum over the last dim; on CUDA a product with a triangle of ones, since torch's own cumsum of floats there is
    not deterministic and refuses to run in deterministic mode (documentation of ``use_deterministic_algorithms``)."""
    if x.device.type == "cpu":
        return x.cumsum(-1)
    return x @ x.new_ones(x.shape[-1], x.shape[-1]).triu()


class _Chunks:
    """:class:`kernels.delta_chunks.Algebra` of one decay per head."""

    def __init__(self, group: Group, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, scale: float):
        X, Hk, R, C, K = self.shape = len(group), k.shape[1], beta.shape[1] // k.shape[1], group.size, k.shape[2]
        dtype = compute_dtype(q.dtype)
        self.Z = q.new_empty((X, Hk, 2, C, K), dtype=dtype)
        self.q, self.k = self.Z[:, :, 0], self.Z[:, :, 1]
        self.q.copy_(group.cut(q)).mul_(scale)
        self.k.copy_(group.cut(k))
        self.beta = group.cut(beta).to(dtype, memory_format=torch.contiguous_format)
        G = _running_sum(group.cut(g).to(torch.float64))
        # Above the diagonal the exponent is positive and may give inf; tril_ overwrites it.
        self.D = (G.unsqueeze(-1) - G.unsqueeze(-2)).to(dtype).exp_().tril_()
        self.from_start = G.exp().to(dtype)
        self.to_end = (G[..., -1:] - G).exp().to(dtype)
        self.whole = self.from_start[..., -1:, None]
        products = (self.Z.flatten(2, 3) @ self.k.mT).view(X, Hk, 1, 2, C, C)
        self.N = (products * self.D.view(X, Hk, R, 1, C, C)).flatten(1, 2)

    def grouped(self, x: Tensor) -> Tensor:
        """[X, Hv, ...] -> [X, Hk, R, ...]"""
        return x.unflatten(1, self.shape[1:3])

    def read_queries(self) -> Tensor:
        return (self.q.unsqueeze(2) * self.grouped(self.from_start).unsqueeze(-1)).flatten(1, 2)

    def read_keys(self, T: Tensor) -> Tensor:
        """The decay scales T's columns, so one product serves the heads of a group."""
        X, Hk, R, C, K = self.shape
        return ((T * self.from_start.unsqueeze(-2)).view(X, Hk, R * C, C) @ self.k).view(X, Hk * R, C, K)

    def write_keys(self) -> Tensor:
        return (self.k.unsqueeze(2) * self.grouped(self.beta * self.to_end).unsqueeze(-1)).flatten(1, 2)

    def gradients(
        self, dY: Tensor, dN: Tensor, e: Tensor, states: Tensor, dleaving: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        X, Hk, R, C, K = self.shape
        from_start, to_end, beta = self.from_start.unsqueeze(-1), self.to_end.unsqueeze(-1), self.beta.unsqueeze(-1)

        # Inside the chunk.
        pairs = (dN * self.N).sum(2)
        dbeta = pairs.sum(-2)
        from_here_on = torch.ones(C, C, dtype=e.dtype, device=e.device).triu_()
        dg = ((from_here_on @ pairs).tril_(-1) @ beta).squeeze(-1)
        dN *= (self.D * self.beta.unsqueeze(-2)).unsqueeze(2)
        E = self.grouped(dN).sum(2).flatten(2, 3)
        dZ = (E @ self.k).view_as(self.Z)
        dk = E.mT @ self.Z.flatten(2, 3)

        # Through the entering state.
        dread = (dY.flatten(2, 3) @ states.mT).view(X, Hk * R, 2, C, K).mul_(from_start.unsqueeze(2))
        along_z = (self.grouped(dread) * self.Z.unsqueeze(2)).sum(-1).flatten(1, 2).sum(2)
        dg += _running_sum(along_z.flip(-1)).flip(-1)
        dZ += self.grouped(dread).sum(2)

        # Through the leaving state.
        dwrite = (e @ dleaving.mT).mul_(to_end)
        along_k = (self.grouped(dwrite) * self.k.unsqueeze(2)).sum(-1).flatten(1, 2)
        dbeta += along_k
        dg[..., 1:] += _running_sum(along_k * self.beta)[..., :-1]
        dg += (dleaving * states).sum((-2, -1)).unsqueeze(-1) * self.whole.squeeze(-1)
        dk += self.grouped(dwrite.mul_(beta)).sum(2)
        return dZ[:, :, 0], dk.add_(dZ[:, :, 1]), dg, dbeta


forward = partial(delta_chunks.forward, _Chunks)
backward = partial(delta_chunks.backward, _Chunks)
