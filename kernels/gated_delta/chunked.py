"""The gated delta rule in closed form over chunks, with a closed-form backward (no autograd through the algebra).

Legend: ``X`` chunks of ``C`` tokens, ``Hk``/``Hv`` query-key/value heads, ``R = Hv / Hk``, ``K``/``V`` key/value dim.

One chunk of one head, entering state S0. The scaled queries and the keys read the past in the same way, so they are
stacked: Z = [sQ; K], 2C rows. With G the running sum of g inside the chunk, D_ri = e^(G_r - G_i) for i <= r, and
N = (Z K^T) * [D; D below the diagonal], the prediction error e of every token (before its write beta e) solves::

    e = V - e^G K S0 - N_k diag(beta) e        o = e^G sQ S0 + N_q diag(beta) e
    S1 = e^(G_C) S0 + sum_i e^(G_C - G_i) beta_i k_i e_i^T

T = (I + N_k diag(beta))^-1 by forward substitution gives e = T V - w S0 with w = T e^G K: everything but S0 is
known for all chunks at once and the scan is two products a chunk. Backward, y being the cotangent of e through o and
S1::

    y = diag(beta) (N_q^T dO + e^(G_C - G) K dS1)      dS0 = e^(G_C) dS1 + (e^G sQ)^T dO - w^T y      dV = T^T y

and with the stacked cotangent dY = [dO; -dV] all remaining gradients are those of plain decayed attention with rows Z,
keys K, and values diag(beta) e. (WY form of Gated DeltaNet, arXiv 2412.06464 section 3.3; solved for e instead of
beta e, so that the gradient of beta needs no division.)

Every exponent that is used is <= 0 for g <= 0. Sums of g are held in float64: a float32 sum of a chunk with one decay
of -1000 would lose 4 digits of every later ratio. The gradient of g_j adds what crosses token j (pairs
r >= j > i, reads of S0 from j on, writes to S1 before j) instead of subtracting two sums of all pairs: it stays exact
when it is tiny.

The chunks are worked through in groups of scan steps whose C x C matrices fit the cache (products, scan and output of a
group before the next is touched), so temporaries do not grow with the number of tokens.

Memory kept for the backward, per token and value head: C (T) + V (e) + K V / C (entering states) elements of the
compute dtype, beside the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_delta.chunks import ChunkTable, Group, chunk_table, max_chunks
from kernels.precision import compute_dtype

#: Tokens of a chunk. On CPU 32 is as fast and 64 keeps half the states.
CHUNK = 64
#: Elements of one group's C x C matrices: 1 MiB of float32 where a cache is to hold them, more where launches cost.
GROUP_ELEMENTS_CPU, GROUP_ELEMENTS_GPU = 1 << 18, 1 << 26


def workspace_shapes(
    num_chunks: int, num_v_heads: int, key_dim: int, value_dim: int
) -> tuple[tuple[int, int, int, int], ...]:
    """Shapes of what :func:`forward` leaves for :func:`backward`: entering states, e, T."""
    return (
        (num_chunks, num_v_heads, key_dim, value_dim),
        (num_chunks, num_v_heads, CHUNK, value_dim),
        (num_chunks, num_v_heads, CHUNK, CHUNK),
    )


def _table(cu_seqlens: Tensor, v: Tensor) -> ChunkTable:
    elements = GROUP_ELEMENTS_CPU if v.device.type == "cpu" else GROUP_ELEMENTS_GPU
    group_chunks = elements // (v.shape[1] * CHUNK * CHUNK)
    return chunk_table(cu_seqlens, v.shape[0], CHUNK, group_chunks)


def _running_sum(x: Tensor) -> Tensor:
    """cumsum over the last dim; on CUDA a product with a triangle of ones, since torch's own cumsum of floats there is
    not deterministic and refuses to run in deterministic mode (documentation of ``use_deterministic_algorithms``)."""
    if x.device.type == "cpu":
        return x.cumsum(-1)
    return x @ x.new_ones(x.shape[-1], x.shape[-1]).triu()


class _Chunks:
    """What forward and backward both derive from the inputs of a group; all tensors [X, heads, ...]."""

    def __init__(self, group: Group, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, scale: float):
        X, Hk, R, C, K = self.shape = len(group), k.shape[1], beta.shape[1] // k.shape[1], CHUNK, k.shape[2]
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
        #: [X, Hv, 2, C, C], the diagonal of the key half included (the unit-triangular solve does not read it).
        products = (self.Z.flatten(2, 3) @ self.k.mT).view(X, Hk, 1, 2, C, C)
        self.N = (products * self.D.view(X, Hk, R, 1, C, C)).flatten(1, 2)

    def grouped(self, x: Tensor) -> Tensor:
        """[X, Hv, ...] -> [X, Hk, R, ...]"""
        return x.unflatten(1, self.shape[1:3])

    def per_value_head(self, x: Tensor) -> Tensor:
        """[X, Hk, ...] -> [X, Hv, ...]; a view unless R > 1."""
        return x.unsqueeze(2).expand(*x.shape[:2], self.shape[2], *x.shape[2:]).flatten(1, 2)

    def write_keys(self) -> Tensor:
        """e^(G_C - G) beta k, [X, Hv, C, K]."""
        return (self.k.unsqueeze(2) * self.grouped(self.beta * self.to_end).unsqueeze(-1)).flatten(1, 2)

    def read_keys(self, T: Tensor) -> Tensor:
        """w = T e^G K, [X, Hv, C, K]: the decay scales T's columns, so one product serves the heads of a group."""
        X, Hk, R, C, K = self.shape
        return ((T * self.from_start.unsqueeze(-2)).view(X, Hk, R * C, C) @ self.k).view(X, Hk * R, C, K)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns o [N, Hv, V], final state [S, Hv, K, V] and the workspace (empty tensors unless ``save``)."""
    num_tokens, Hv, V = v.shape
    num_segments, K = cu_seqlens.numel() - 1, k.shape[2]
    dtype = compute_dtype(q.dtype)
    table = _table(cu_seqlens, v)
    rows = max_chunks(num_tokens, num_segments, CHUNK) if save else max(map(len, table.groups), default=0)
    workspace = [q.new_empty(shape, dtype=dtype) for shape in workspace_shapes(rows, Hv, K, V)]
    o = v.new_empty(v.shape)
    final = q.new_zeros((num_segments, Hv, K, V), dtype=dtype)
    if initial_state is not None:
        final.copy_(initial_state.index_select(0, table.segment_order))
    live = final[: table.num_alive].clone()
    for group in table.groups:
        states, e, T = (buffer[group.chunks if save else slice(len(group))] for buffer in workspace)
        chunks = _Chunks(group, q, k, g, beta, scale)
        system = chunks.N[:, :, 1] * chunks.beta.unsqueeze(-2)
        eye = torch.eye(CHUNK, dtype=dtype, device=q.device).expand_as(system)
        torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True, out=T)
        torch.matmul(T, group.cut(v).to(dtype, memory_format=torch.contiguous_format), out=e)
        live = _scan_states(group, live, states, e, chunks.read_keys(T), chunks.write_keys(), chunks.whole, final)
        out = (chunks.per_value_head(chunks.q) @ states).mul_(chunks.from_start.unsqueeze(-1))
        out.flatten(0, 1).baddbmm_(chunks.N[:, :, 0].flatten(0, 1), (chunks.beta.unsqueeze(-1) * e).flatten(0, 1))
        group.join(out, o)
    if save:
        for buffer in workspace:
            buffer[table.num_chunks :] = 0.0
    else:
        workspace = [buffer.new_empty(0) for buffer in workspace]
    states, e, T = workspace
    return o, final.index_select(0, table.segment_rank), states, e, T


def _scan_states(
    group: Group, live: Tensor, states: Tensor, e: Tensor, w: Tensor, write: Tensor, whole: Tensor, final: Tensor
) -> Tensor:
    """Fills ``states`` with every chunk's entering state, turns ``e`` from T V into T V - w S0, stores in ``final`` the
    states of the segments that end. ``live``: states entering the group; returns those entering the next."""
    for start, count, survivors in group.steps:
        at = slice(start, start + count)
        states[at] = live
        errors = e[at].flatten(0, 1)
        errors.baddbmm_(w[at].flatten(0, 1), live.flatten(0, 1), alpha=-1)
        leaving = live * whole[at]
        leaving.flatten(0, 1).baddbmm_(write[at].flatten(0, 1).mT, errors)
        final[survivors:count] = leaving[survivors:]
        live = leaving[:survivors]
    return live


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    states: Tensor,
    e: Tensor,
    T: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta (shapes and dtypes of the inputs) and of the initial state (compute dtype)."""
    table = _table(cu_seqlens, v)
    dq, dk, dv, dg, dbeta = grads = tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta))
    dends = dfinal.to(compute_dtype(q.dtype)).index_select(0, table.segment_order)
    dlive = dends[:0]
    for group in reversed(table.groups):
        chunks = _Chunks(group, q, k, g, beta, scale)
        workspace = states[group.chunks], e[group.chunks], T[group.chunks]
        dlive, *parts = _backward_group(group, chunks, group.cut(do), dlive, dends, *workspace)
        parts[0].mul_(scale)
        for part, grad in zip(parts, grads, strict=True):
            group.join(part, grad)
    dends[: table.num_alive] = dlive
    return dq, dk, dv, dg, dbeta, dends.index_select(0, table.segment_rank)


def _backward_group(
    group: Group, chunks: _Chunks, do: Tensor, dlive: Tensor, dends: Tensor, states: Tensor, e: Tensor, T: Tensor
) -> tuple[Tensor, ...]:
    """Cotangent of the states entering the group, then of scaled q, k, v, g and beta, [X, heads, C, ...].

    ``dlive``: cotangent of the states that leave the group alive; ``dends`` of the final states, by segment rank."""
    X, Hv, C, V = e.shape
    beta, from_start, to_end = chunks.beta, chunks.from_start.unsqueeze(-1), chunks.to_end.unsqueeze(-1)

    dY = e.new_empty(X, Hv, 2, C, V)
    dO, dV = dY[:, :, 0], dY[:, :, 1]
    dO.copy_(do)
    y = (chunks.N[:, :, 0].mT @ dO).mul_(beta.unsqueeze(-1))
    dstates = (chunks.per_value_head(chunks.q) * from_start).mT @ dO
    dleaving = torch.empty_like(dstates)
    read, write = chunks.read_keys(T), chunks.write_keys()
    dlive = _scan_cotangents(group, dlive, dends, dleaving, dstates, y, read, write, chunks.whole)
    dv = T.mT @ y
    torch.neg(dv, out=dV)

    # Inside the chunk: dN without its factor beta, whose column sums against N are beta's own gradient.
    dN = (dY.flatten(2, 3) @ e.mT).view(X, Hv, 2, C, C)
    dN[:, :, 1].diagonal(dim1=-2, dim2=-1).zero_()
    pairs = (dN * chunks.N).sum(2)
    dbeta = pairs.sum(-2)
    from_here_on = torch.ones(C, C, dtype=e.dtype, device=e.device).triu_()
    dg = ((from_here_on @ pairs).tril_(-1) @ beta.unsqueeze(-1)).squeeze(-1)
    dN *= (chunks.D * beta.unsqueeze(-2)).unsqueeze(2)
    F = chunks.grouped(dN).sum(2).flatten(2, 3)
    dZ = (F @ chunks.k).view_as(chunks.Z)
    dk = F.mT @ chunks.Z.flatten(2, 3)

    # Through the entering state.
    dread = (dY.flatten(2, 3) @ states.mT).view(X, Hv, 2, C, -1).mul_(from_start.unsqueeze(2))
    along_z = (chunks.grouped(dread) * chunks.Z.unsqueeze(2)).sum(-1).flatten(1, 2).sum(2)
    dg += _running_sum(along_z.flip(-1)).flip(-1)
    dZ += chunks.grouped(dread).sum(2)

    # Through the leaving state.
    dwrite = (e @ dleaving.mT).mul_(to_end)
    along_k = (chunks.grouped(dwrite) * chunks.k.unsqueeze(2)).sum(-1).flatten(1, 2)
    dbeta += along_k
    dg[..., 1:] += _running_sum(along_k * beta)[..., :-1]
    dg += (dleaving * states).sum((-2, -1)).unsqueeze(-1) * chunks.whole.squeeze(-1)
    dk += chunks.grouped(dwrite.mul_(beta.unsqueeze(-1))).sum(2)
    return dlive, dZ[:, :, 0], dk.add_(dZ[:, :, 1]), dv, dg, dbeta


def _scan_cotangents(
    group: Group,
    dlive: Tensor,
    dends: Tensor,
    dleaving: Tensor,
    dstates: Tensor,
    y: Tensor,
    w: Tensor,
    write: Tensor,
    whole: Tensor,
) -> Tensor:
    """The scan backwards: turns ``dstates`` and ``y`` from their parts through o into the whole, fills ``dleaving``
    with the cotangents of every chunk's leaving state, returns those of the states entering the group."""
    for start, count, survivors in reversed(group.steps):
        at = slice(start, start + count)
        dS1, dS0, cotangent = dleaving[at], dstates[at], y[at].flatten(0, 1)
        dS1[:survivors] = dlive
        dS1[survivors:] = dends[survivors:count]
        cotangent.baddbmm_(write[at].flatten(0, 1), dS1.flatten(0, 1))
        dS0.addcmul_(dS1, whole[at])
        dS0.flatten(0, 1).baddbmm_(w[at].flatten(0, 1).mT, cotangent, alpha=-1)
        dlive = dS0
    return dlive
