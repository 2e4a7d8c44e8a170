"""The delta rule with every sequence cut in pieces that run in parallel, exact in forward and backward.

Forward: the pairs of all pieces at once, their fold, then the operator on the pieces, each from the state that enters
it. Backward: how a token reads the entering state is known from the pairs' pass, so the cotangent that each piece's own
outputs give to its entering state is one product, read^T dO; the reverse fold turns these into the cotangents of the
states that leave the pieces, and with them the operator's own backward does the rest. The pairs' pass is not
differentiated, nothing is dropped by size, no branch looks at data.

It costs the operator on K more value columns once, and keeps read [N, Hv, K] and M for the backward: worth it where
sequences x heads do not fill the device. The pairs have the accuracy of the operator: what bfloat16 operands cost there
they cost every uncut sequence, chunk after chunk, and M, B and the fold are float32 all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import registry
from kernels.chunk_size import CHUNK
from kernels.chunks import chunk_table
from kernels.delta_op import check_shapes
from kernels.gated_delta.reference import gated_delta_reference
from kernels.kda.reference import kda_reference
from kernels.segment_scan.op import affine_pass, delta_rule, fold, reverse_fold
from kernels.segment_scan.pieces import cut_pieces
from stoker.errors import Refusal

#: Elements of the products of one group of chunks in :func:`segment_products`: 1 MiB of float32.
GROUP_ELEMENTS = 1 << 18


def split_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    *,
    piece_tokens: int,
) -> tuple[Tensor, Tensor]:
    """``gated_delta`` (g [N, Hv]) or ``kda`` (g [N, Hv, K]), their arguments and results, with every sequence cut each
    ``piece_tokens`` tokens, a multiple of 64, so that chunks stay what they were; not cut at all where N is no more
    than that. Refusal as theirs.

    >>> o, state = split_delta(q, k, v, g, beta, torch.tensor([0, 700, 32768]), piece_tokens=4096)
    """
    if piece_tokens < CHUNK or piece_tokens % CHUNK:
        raise Refusal(f"split_delta: piece_tokens={piece_tokens} must be a positive multiple of {CHUNK}")
    if v.shape[0] <= piece_tokens:
        return delta_rule(q, k, v, g, beta, cu_seqlens, initial_state, scale)
    check_shapes("split_delta", q, k, v, g, beta, cu_seqlens, initial_state, per_channel=g.dim() == 3)
    chosen = registry.choose("split_delta", q.device, q.dtype, (q.shape[2], v.shape[2]))
    o, final = chosen.run(q, k, v, g, beta, cu_seqlens, initial_state, scale, piece_tokens=piece_tokens)
    return o, final


def _in_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float | None,
    piece_tokens: int,
) -> tuple[Tensor, Tensor]:
    bounds, first = cut_pieces(cu_seqlens, v.shape[0], piece_tokens)
    with torch.no_grad():
        M, B, read = affine_pass(q, k, v, g, beta, bounds, scale, dtype=v.dtype)
        entering, _ = fold(M, B, first, initial_state)
    if initial_state is not None:
        entering = entering.index_copy(0, first[:-1].long(), initial_state.to(entering.dtype))
    o, leaving = delta_rule(q, k, v, g, beta, bounds, entering, scale)
    return _Pieces.apply(o, leaving, read, M, bounds, first)


def _uncut(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any, piece_tokens: int) -> tuple[Tensor, Tensor]:
    return (gated_delta_reference if g.dim() == 2 else kda_reference)(q, k, v, g, *rest)


class _Pieces(torch.autograd.Function):
    """Outputs and leaving states of pieces -> outputs and final states of sequences. Backward: the cotangents of all
    leaving states, each holding what the later pieces of its sequence make of it."""

    @staticmethod
    def forward(
        ctx: Any, o: Tensor, leaving: Tensor, read: Tensor, M: Tensor, bounds: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(read, M, bounds, first)
        return o.view_as(o), leaving.index_select(0, first[1:] - 1)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        read, M, bounds, first = ctx.saved_tensors
        dleaving, _ = reverse_fold(M, segment_products(read.to(M.dtype), do, bounds), first, dfinal)
        return do, dleaving, None, None, None, None


@torch.library.custom_op("stoker::segment_products", mutates_args=())
def segment_products(x: Tensor, y: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of x_t y_t^T over the tokens of each segment, in their order: x [N, H, K], y [N, H, V] -> [S, H, K, V] in x's
    dtype."""
    sums = x.new_zeros(cu_seqlens.shape[0] - 1, *x.shape[1:], y.shape[-1])
    table = chunk_table(cu_seqlens, len(x), CHUNK, GROUP_ELEMENTS // sums[0].numel())
    for group in table.groups:
        products = group.cut(x).mT @ group.cut(y).to(x.dtype)
        for start, count, _ in group.steps:
            sums[:count] += products[start : start + count]
    return sums.index_select(0, table.segment_rank)


@segment_products.register_fake
def _(x: Tensor, y: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(cu_seqlens.shape[0] - 1, *x.shape[1:], y.shape[-1])


registry.register("split_delta", registry.Implementation("pieces", _in_pieces))
registry.register("split_delta", registry.Implementation("reference", _uncut))
