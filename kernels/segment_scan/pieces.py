"""How packed sequences are cut in pieces that run in parallel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.errors import Refusal


class Pieces(NamedTuple):
    """``bounds`` [P+1]: piece p holds items [bounds[p], bounds[p+1]); ``first`` [Q+1]: sequence s is made of the pieces
    [first[s], first[s+1]), at least one, some of them possibly empty. Integers of the dtype that was cut."""

    bounds: Tensor
    first: Tensor


def max_pieces(num_items: int, num_sequences: int, size: int) -> int:
    """Most pieces that ``num_sequences`` sequences of ``num_items`` in all can give, an empty sequence giving one."""
    return max(num_sequences, -(-num_items // size) + num_sequences - 1)


def cut_pieces(cu_seqlens: Tensor, num_items: int, size: int) -> Pieces:
    """Cuts every sequence of ``cu_seqlens`` [Q+1] every ``size`` items from its own start.

    Always ``max_pieces`` pieces, the surplus empty at the end of the last sequence: shapes depend on shapes only, and
    nothing is read on the host. The given boundaries are kept as they are, so that what is wrong with them (see
    ``kernels.segments``) is still wrong with the pieces. Refusal if there is no sequence.

    >>> cut_pieces(torch.tensor([0, 5, 9]), num_items=9, size=4)
    Pieces(bounds=tensor([0, 4, 5, 9, 9]), first=tensor([0, 2, 4]))
    """
    num_sequences = cu_seqlens.shape[0] - 1
    if num_sequences < 1:
        raise Refusal(
            f"cut_pieces: cu_seqlens of shape {tuple(cu_seqlens.shape)} bounds no sequence: pass 0 and the ends"
        )
    lengths = cu_seqlens.diff()
    counts = ((lengths + size - 1) // size).clamp(min=1)
    piece = torch.arange(max_pieces(num_items, num_sequences, size), device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    starts = counts.cumsum(0, dtype=cu_seqlens.dtype) - counts
    sequence = torch.searchsorted(starts, piece, right=True) - 1
    within = ((piece - starts[sequence]) * size).minimum(lengths.clamp(min=0)[sequence])
    bounds = torch.cat((cu_seqlens[sequence] + within, cu_seqlens[-1:]))
    return Pieces(bounds, torch.cat((starts, torch.full_like(starts[:1], len(piece)))))
