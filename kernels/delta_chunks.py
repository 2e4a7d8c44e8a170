"""What the delta rules share in closed form over chunks: the solve, the scan over states, and both backwards.

Legend: ``X`` chunks of ``C`` tokens, ``Hk``/``Hv`` query-key/value heads, ``R = Hv / Hk``, ``K``/``V`` key/value dim.

One chunk of one head, entering state S0. The scaled queries and the keys read the past in the same way, so they are
stacked: Z = [sQ; K], 2C rows. With G_r the running sum of g inside the chunk (per key channel, or the same for all) and
N_ri = sum over channels of z_r k_i e^(G_r - G_i), for i <= r under the queries and i < r under the keys, the prediction
error e of every token (before its write beta e) solves::

    e = V - (e^G K) S0 - N_k diag(beta) e        o = (e^G sQ) S0 + N_q diag(beta) e
    S1 = e^(G_C) S0 + (e^(G_C - G) K)^T diag(beta) e

T = (I + N_k diag(beta))^-1 by forward substitution gives e = T V - w S0 with w = T e^G K: everything but S0 is
known for all chunks at once and the scan is two products a chunk. Backward, y being the cotangent of e through o and
S1::

    y = diag(beta) (N_q^T dO + e^(G_C - G) K dS1)      dS0 = e^(G_C) dS1 + (e^G sQ)^T dO - w^T y      dV = T^T y

and with the stacked cotangent dY = [dO; -dV] all remaining gradients are those of plain decayed attention with rows Z,
keys K, and values diag(beta) e: the operator's own, see :class:`Algebra`. (WY form of Gated DeltaNet, arXiv 2412.06464
section 3.3; solved for e instead of beta e, so that the gradient of beta needs no division.)

The chunks are worked through in groups of scan steps whose matrices fit the cache (products, scan and output of a
group before the next is touched), so temporaries do not grow with the number of tokens.

Memory kept for the backward, per token and value head: C (T) + V (e) + K V / C (entering states) elements of the
compute dtype, beside the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels.chunk_size import CHUNK
from kernels.chunks import ChunkTable, Group, chunk_table, max_chunks
from kernels.precision import compute_dtype

#: Elements of one group's C x C matrices: 1 MiB of float32 where a cache is to hold them, more where launches cost.
GROUP_ELEMENTS_CPU, GROUP_ELEMENTS_GPU = 1 << 18, 1 << 26


class Algebra(Protocol):
    """What an operator's decay makes of the chunks of a group; tensors are [X, heads, ...] in the compute dtype.

    ``N`` [X, Hv, 2, C, C], zero above the diagonal (the diagonal of the key half is not read); ``beta`` [X, Hv, C];
    ``whole``: e^(G_C), [X, Hv, K or 1, 1].
    """

    N: Tensor
    beta: Tensor
    whole: Tensor

    def __init__(self, group: Group, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, scale: float): ...

    def read_queries(self) -> Tensor:
        """e^G sQ, [X, Hv, C, K]."""
        ...

    def read_keys(self, T: Tensor) -> Tensor:
        """w = T e^G K, [X, Hv, C, K]."""
        ...

    def write_keys(self) -> Tensor:
        """e^(G_C - G) beta K, [X, Hv, C, K]."""
        ...

    def gradients(
        self, dY: Tensor, dN: Tensor, e: Tensor, states: Tensor, dleaving: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of sQ and K [X, Hk, C, K], g and beta: inside the chunk from ``dN`` (the cotangent of N without its
        factor beta, [X, Hv, 2, C, C]; may be overwritten), through the entering states from ``dY`` [X, Hv, 2, C, V],
        through the leaving ones from ``dleaving`` [X, Hv, K, V]. Entries of ``dN`` where N is zero are arbitrary."""
        ...


def workspace_shapes(
    num_tokens: int, num_segments: int, num_v_heads: int, key_dim: int, value_dim: int
) -> tuple[tuple[int, ...], ...]:
    """Shapes of what :func:`forward` leaves for :func:`backward`: entering states, e, T."""
    return _shapes(max_chunks(num_tokens, num_segments, CHUNK), num_v_heads, key_dim, value_dim)


def _shapes(num_chunks: int, Hv: int, K: int, V: int) -> tuple[tuple[int, ...], ...]:
    return (num_chunks, Hv, K, V), (num_chunks, Hv, CHUNK, V), (num_chunks, Hv, CHUNK, CHUNK)


def _table(cu_seqlens: Tensor, v: Tensor) -> ChunkTable:
    elements = GROUP_ELEMENTS_CPU if v.device.type == "cpu" else GROUP_ELEMENTS_GPU
    group_chunks = elements // (v.shape[1] * CHUNK * CHUNK)
    return chunk_table(cu_seqlens, v.shape[0], CHUNK, group_chunks)


def forward(
    algebra: Callable[[Group, Tensor, Tensor, Tensor, Tensor, float], Algebra],
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
    if save:
        shapes = workspace_shapes(num_tokens, num_segments, Hv, K, V)
    else:
        shapes = _shapes(max(map(len, table.groups), default=0), Hv, K, V)
    workspace = [q.new_empty(shape, dtype=dtype) for shape in shapes]
    o = v.new_empty(v.shape)
    final = q.new_zeros((num_segments, Hv, K, V), dtype=dtype)
    if initial_state is not None:
        final.copy_(initial_state.index_select(0, table.segment_order))
    live = final[: table.num_alive].clone()
    for group in table.groups:
        states, e, T = (buffer[group.chunks if save else slice(len(group))] for buffer in workspace)
        chunks = algebra(group, q, k, g, beta, scale)
        system = chunks.N[:, :, 1] * chunks.beta.unsqueeze(-2)
        eye = torch.eye(CHUNK, dtype=dtype, device=q.device).expand_as(system)
        torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True, out=T)
        torch.matmul(T, group.cut(v).to(dtype, memory_format=torch.contiguous_format), out=e)
        live = _scan_states(group, live, states, e, chunks.read_keys(T), chunks.write_keys(), chunks.whole, final)
        out = chunks.read_queries() @ states
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
    algebra: Callable[[Group, Tensor, Tensor, Tensor, Tensor, float], Algebra],
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
        chunks = algebra(group, q, k, g, beta, scale)
        workspace = states[group.chunks], e[group.chunks], T[group.chunks]
        dlive, *parts = _backward_group(group, chunks, group.cut(do), dlive, dends, *workspace)
        parts[0].mul_(scale)
        for part, grad in zip(parts, grads, strict=True):
            group.join(part, grad)
    dends[: table.num_alive] = dlive
    return dq, dk, dv, dg, dbeta, dends.index_select(0, table.segment_rank)


def _backward_group(
    group: Group, chunks: Algebra, do: Tensor, dlive: Tensor, dends: Tensor, states: Tensor, e: Tensor, T: Tensor
) -> tuple[Tensor, ...]:
    """Cotangent of the states entering the group, then of scaled q, k, v, g and beta, [X, heads, C, ...].

    ``dlive``: cotangent of the states that leave the group alive; ``dends`` of the final states, by segment rank."""
    X, Hv, C, V = e.shape
    dY = e.new_empty(X, Hv, 2, C, V)
    dO, dV = dY[:, :, 0], dY[:, :, 1]
    dO.copy_(do)
    y = (chunks.N[:, :, 0].mT @ dO).mul_(chunks.beta.unsqueeze(-1))
    dstates = chunks.read_queries().mT @ dO
    dleaving = torch.empty_like(dstates)
    read, write = chunks.read_keys(T), chunks.write_keys()
    dlive = _scan_cotangents(group, dlive, dends, dleaving, dstates, y, read, write, chunks.whole)
    dv = T.mT @ y
    torch.neg(dv, out=dV)
    dN = (dY.flatten(2, 3) @ e.mT).view(X, Hv, 2, C, C)
    dN[:, :, 1].diagonal(dim1=-2, dim2=-1).zero_()
    dq, dk, dg, dbeta = chunks.gradients(dY, dN, e, states, dleaving)
    return dlive, dq, dk, dv, dg, dbeta


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
