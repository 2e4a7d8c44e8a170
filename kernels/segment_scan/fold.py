"""The states that enter the pieces of sequences, from the pieces' affine pairs: forward only, no autograd.

Sequences advance together, longest first, one piece of each a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.chunks import chunk_table
from kernels.segment_scan.pieces import cut_pieces


def sequential(M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes of :func:`kernels.segment_scan.op.fold`. As many steps as the longest sequence has pieces; 2 K K V FLOPs a
    piece and head."""
    table = chunk_table(first, len(M), 1, len(M))
    entering = torch.empty_like(B)
    if initial is None:
        states = B.new_zeros(len(first) - 1, *B.shape[1:])
    else:
        states = initial.index_select(0, table.segment_order)
    for group in table.groups:
        for start, count, _ in group.steps:
            pieces, live = group.tokens[start : start + count], states[:count]
            entering.index_copy_(0, pieces, live)
            live.copy_((M.index_select(0, pieces) @ live).add_(B.index_select(0, pieces)))
    return entering, states.index_select(0, table.segment_rank)


def two_level(M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """The same in blocks of up to ``block`` pieces: compose each block, fold the blocks, fold the pieces inside each.

    Twice ``block`` + (pieces / ``block``) steps; 2 K K (K + 2 V) FLOPs a piece and head. Between racks or ranks only
    one pair a block has to travel. A block is composed by folding its pieces from the state [0 | I], B having K more
    columns of zeros: what ends in those columns is its M."""
    (H, K, V), num_pieces = B.shape[1:], len(B)
    blocks = cut_pieces(first, num_pieces, block)
    identity = pad(torch.eye(K, dtype=B.dtype, device=B.device), (V, 0))
    start = identity.expand(len(blocks.bounds) - 1, H, K, V + K)
    _, composed = sequential(M, pad(B, (0, K)), blocks.bounds, start)
    entering_block, final = sequential(composed[..., V:], composed[..., :V], blocks.first, initial)
    return sequential(M, B, blocks.bounds, entering_block)[0], final
