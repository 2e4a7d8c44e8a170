"""Kimi Delta Attention in closed form over chunks: a decay per key channel for ``kernels.delta_chunks``.

N_ri = sum over channels of z_r k_i e^(G_r - G_i) needs the decay inside the dot product. The triangle is halved: in a
block of 2m tokens every row of the later half reads every key of the earlier half across the boundary b between them,
e^(G_r - G_i) = e^(G_r - G_b) e^(G_b - G_i), so this square is one product of decayed rows and decayed keys. What is
left are two triangles of m tokens, halved in turn: log2(C) levels, down to single tokens.

Both exponents are sums of g over the tokens between the boundary and the row or key. They are <= 0 for g <= 0 and never
a difference of two sums, so nothing overflows or cancels however far apart decays are, and sums in the compute dtype
are exact enough: with relative rounding r a sum s errs by r |s|, its power e^s by r |s| e^s < 0.4 r. The sums of a
level are those of the level below plus the total of one half. No row's factor depends on a later token.

The backward walks the levels down: each adds its squares' share to the gradients of rows and keys and to the cotangents
of its sums, and hands the cotangents to the sums of the level below. So the gradient of g_j adds what crosses token j
and subtracts nothing: it stays exact when it is tiny.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import delta_chunks
from kernels.chunks import Group
from kernels.precision import compute_dtype


class _Chunks:
    """:class:`kernels.delta_chunks.Algebra` of a decay per channel. Decays are [X, Hk, R, C, K], Z [X, Hk, 1, 2, C, K].

    ``levels``: for m = 1, 2, 4... below C, the decay between each token and the middle of its block of 2m."""

    def __init__(self, group: Group, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, scale: float):
        X, Hk, R, C, K = self.shape = len(group), k.shape[1], beta.shape[1] // k.shape[1], group.size, k.shape[2]
        dtype = compute_dtype(q.dtype)
        self.Z = q.new_empty((X, Hk, 1, 2, C, K), dtype=dtype)
        self.q, self.k = self.Z[:, :, :, 0], self.Z[:, :, :, 1]
        self.q[:, :, 0].copy_(group.cut(q)).mul_(scale)
        self.k[:, :, 0].copy_(group.cut(k))
        self.beta = group.cut(beta).to(dtype, memory_format=torch.contiguous_format)
        # Sums of g from the start of a block to the token, and from after the token to the end of the block.
        to_here = g.new_empty((X, Hk, R, C, K), dtype=dtype).copy_(group.cut(g).unflatten(1, (Hk, R)))
        from_here = torch.zeros_like(to_here)
        self.N = q.new_zeros((X, Hk * R, 2, C, C), dtype=dtype)
        self.N[:, :, 0].diagonal(dim1=-2, dim2=-1).unflatten(1, (Hk, R)).copy_((self.q * self.k).sum(-1))
        self.levels: list[Tensor] = []
        for m in _halves(C):
            (before, after), (rest, _) = _split(to_here, m), _split(from_here, m)
            decay = torch.empty_like(to_here)
            to_middle, from_middle = _split(decay, m)
            torch.exp(rest, out=to_middle)
            torch.exp(after, out=from_middle)
            self.levels.append(decay)
            rows, keys = self._factors(decay, m)
            _squares(self.N, m).copy_((rows @ keys.mT).view(X, Hk * R, -1, 2, m, m))
            rest += after[..., -1:, :]
            after += before[..., -1:, :]
        self.from_start, self.to_end = to_here.exp_(), from_here.exp_()
        self.whole = self.from_start[..., -1, :].flatten(1, 2).unsqueeze(-1)

    def _factors(self, decay: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Rows [X, Hk, R, C / 2m, 2m, K] of the later halves, queries above keys, and keys [..., m, K] of the earlier
        halves, both decayed across the boundary."""
        X, Hk, R, C, K = self.shape
        factors = decay.new_empty(X, Hk, R, C // (2 * m), 3, m, K)
        (_, z), (key, _), (to_middle, from_middle) = _split(self.Z, m), _split(self.k, m), _split(decay, m)
        torch.mul(z.transpose(3, 4), from_middle.unsqueeze(4), out=factors[..., :2, :, :])
        torch.mul(key, to_middle, out=factors[..., 2, :, :])
        return factors[..., :2, :, :].flatten(-3, -2), factors[..., 2, :, :]

    def read_queries(self) -> Tensor:
        return (self.q * self.from_start).flatten(1, 2)

    def read_keys(self, T: Tensor) -> Tensor:
        return T @ (self.k * self.from_start).flatten(1, 2)

    def write_keys(self) -> Tensor:
        return (self.k * self.to_end).flatten(1, 2) * self.beta.unsqueeze(-1)

    def gradients(
        self, dY: Tensor, dN: Tensor, e: Tensor, states: Tensor, dleaving: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        X, Hk, R, C, K = self.shape
        beta = self.beta.view(X, Hk, R, C, 1)
        dbeta = (dN * self.N).sum((2, 3))
        dN *= self.beta[:, :, None, None]

        # Through the entering state: cotangents of rows, then of the sums of g from the start.
        dZ = (dY.flatten(2, 3) @ states.mT).view(X, Hk, R, 2, C, K).mul_(self.from_start.unsqueeze(3))
        dq, dk = dZ.unbind(3)
        dto_here = (dq * self.q).addcmul_(dk, self.k)
        dto_here[..., -1, :] += ((dleaving * states).sum(-1) * self.whole.squeeze(-1)).view(X, Hk, R, K)

        # Through the leaving state: cotangents of keys and of the sums to the end.
        dkey = (e @ dleaving.mT).view(X, Hk, R, C, K).mul_(self.to_end)
        dfrom_here = dkey * self.k
        dbeta += dfrom_here.sum(-1).flatten(1, 2)
        dfrom_here *= beta
        dk.addcmul_(dkey, beta)

        # Inside the chunk: every token with itself, then the squares, largest first.
        diagonal = dN[:, :, 0].diagonal(dim1=-2, dim2=-1).reshape(X, Hk, R, C, 1)
        dq.addcmul_(diagonal, self.k)
        dk.addcmul_(diagonal, self.q)
        for m, decay in reversed(list(zip(_halves(C), self.levels, strict=True))):
            (dbefore, dafter), (drest, _) = _split(dto_here, m), _split(dfrom_here, m)
            dbefore[..., -1, :] += dafter.sum(-2)
            dafter[..., -1, :] += drest.sum(-2)
            square = _squares(dN, m).reshape(X, Hk, R, -1, 2 * m, m)
            rows, keys = self._factors(decay, m)
            to_middle, from_middle = _split(decay, m)
            # A BLAS call for the product of two numbers costs more than the product.
            drows = square * keys if m == 1 else square @ keys
            dkeys = square.mT @ rows
            drest.addcmul_(dkeys, keys)
            _split(dk, m)[0].addcmul_(dkeys, to_middle)
            for dz, drow, row in zip((dq, dk), _two(drows, m), _two(rows, m), strict=True):
                dafter.addcmul_(drow, row)
                _split(dz, m)[1].addcmul_(drow, from_middle)
        return dq.sum(2), dk.sum(2), dto_here.flatten(1, 2), dbeta


def _halves(size: int) -> list[int]:
    """1, 2, 4... below ``size``, a power of two."""
    return [1 << level for level in range(size.bit_length() - 1)]


def _split(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Views of the earlier and the later halves of the blocks of 2m tokens: [..., C, K] -> [..., C / 2m, m, K] each."""
    earlier, later = x.unflatten(-2, (-1, 2, m)).unbind(-3)
    return earlier, later


def _two(rows: Tensor, m: int) -> tuple[Tensor, ...]:
    """The queries' and the keys' [..., m, K] of stacked rows [..., 2m, K]."""
    return rows.unflatten(-2, (2, m)).unbind(-3)


def _squares(N: Tensor, m: int) -> Tensor:
    """View [X, Hv, C / 2m, 2, m, m] of [X, Hv, 2, C, C]: later half by earlier half of every block of 2m tokens."""
    blocks = N.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m))
    return blocks[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5).movedim(-1, 2)


forward = partial(delta_chunks.forward, _Chunks)
backward = partial(delta_chunks.backward, _Chunks)
