"""How packed segments are cut into chunks.

Every segment is cut on its own, from its first token, so a chunk never holds tokens of two segments and no state
crosses a boundary. Chunks are ordered by their index within the segment, then by segment, longest first: the chunks
that a scan handles at one step are contiguous, and the segments alive at a step are a prefix of those alive before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kernels.segments import segment_bounds


def max_chunks(num_tokens: int, num_segments: int, size: int) -> int:
    """Most chunks of ``size`` tokens that ``num_segments`` segments of ``num_tokens`` in all can give (exact for one
    segment). Buffers are sized by it, since a fake tensor knows the shapes but not the boundaries."""
    return (num_tokens + size - 1) // size + num_segments - 1


@dataclass(frozen=True)
class Group:
    """Consecutive scan steps that are worked on together: ``n`` chunks, ``n * size`` slots.

    ``chunks``: their range in the whole table. ``steps``: (first chunk of the step within the group, segments alive,
    segments alive at the next step). ``tokens`` int64 [n * size]: the token in each slot, 0 where the slot is padding.
    ``filled``, ``padding`` int64: the slots that hold a token and those that do not. ``span``: the range of tokens, if
    the slots are consecutive tokens without padding.
    """

    size: int
    chunks: slice
    steps: tuple[tuple[int, int, int], ...]
    tokens: Tensor
    filled: Tensor
    padding: Tensor
    span: slice | None

    def __len__(self) -> int:
        return len(self.tokens) // self.size

    def cut(self, x: Tensor) -> Tensor:
        """[N, H, ...] -> [n, H, size, ...], zeros in padding slots. Not contiguous, possibly a view: copy it."""
        if self.span is not None:
            slots = x[self.span]
        else:
            slots = x.index_select(0, self.tokens).index_fill_(0, self.padding, 0.0)
        return slots.unflatten(0, (len(self), self.size)).transpose(1, 2)

    def join(self, chunks: Tensor, out: Tensor) -> None:
        """Inverse of :meth:`cut`: writes [n, H, size, ...] to this group's tokens of ``out`` [N, H, ...]."""
        slots = chunks.transpose(1, 2)
        if self.span is not None:
            out[self.span].unflatten(0, (len(self), self.size)).copy_(slots)
        else:
            rows = slots.flatten(0, 1).index_select(0, self.filled).to(out.dtype)
            out.index_copy_(0, self.tokens.index_select(0, self.filled), rows)


@dataclass(frozen=True)
class ChunkTable:
    """``groups`` in scan order; ``segment_order`` int64 [S]: segments by falling number of chunks; ``segment_rank``:
    its inverse; ``num_alive``: segments with at least one token."""

    groups: tuple[Group, ...]
    num_chunks: int
    segment_order: Tensor
    segment_rank: Tensor
    num_alive: int


def chunk_table(cu_seqlens: Tensor, num_tokens: int, size: int, group_chunks: int) -> ChunkTable:
    """The table of ``cu_seqlens`` [S+1]; a group takes whole steps up to ``group_chunks`` chunks, one step at least.

    Reads ``cu_seqlens`` on the host; the last few tables are kept, keyed by content, since all layers of a model ask
    for the same one. Refusal when the boundaries do not run from 0 to ``num_tokens`` without going back."""
    return _build(tuple(cu_seqlens.tolist()), num_tokens, size, group_chunks, cu_seqlens.device)


@lru_cache(maxsize=16)
def _build(
    cu_seqlens: tuple[int, ...], num_tokens: int, size: int, group_chunks: int, device: torch.device
) -> ChunkTable:
    bounds = segment_bounds(cu_seqlens, num_tokens)
    chunks_of_segment = -(-np.diff(bounds) // size)
    order = np.argsort(-chunks_of_segment, kind="stable")
    alive = np.array([(chunks_of_segment > step).sum() for step in range(chunks_of_segment.max())], np.int64)
    first_chunk = np.concatenate(([0], np.cumsum(alive)))

    step_of_chunk = np.repeat(np.arange(len(alive)), alive)
    segment_of_chunk = order[np.arange(first_chunk[-1]) - first_chunk[step_of_chunk]]
    first_token = bounds[segment_of_chunk] + step_of_chunk * size
    tokens = first_token[:, None] + np.arange(size)
    filled = tokens < bounds[segment_of_chunk + 1][:, None]
    tokens[~filled] = 0

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(device)

    def group(first_step: int, end_step: int) -> Group:
        lo, hi = int(first_chunk[first_step]), int(first_chunk[end_step])
        slots, full = tokens[lo:hi].reshape(-1), filled[lo:hi].reshape(-1)
        start = int(slots[0])
        consecutive = bool(full.all() and (slots == start + np.arange(len(slots))).all())
        survivors = np.append(alive, 0)
        return Group(
            size=size,
            chunks=slice(lo, hi),
            steps=tuple(
                (int(first_chunk[s]) - lo, int(alive[s]), int(survivors[s + 1])) for s in range(first_step, end_step)
            ),
            tokens=tensor(slots),
            filled=tensor(np.flatnonzero(full)),
            padding=tensor(np.flatnonzero(~full)),
            span=slice(start, start + len(slots)) if consecutive else None,
        )

    groups, first_step = [], 0
    while first_step < len(alive):
        fitting = int(np.searchsorted(first_chunk, first_chunk[first_step] + group_chunks, side="right")) - 1
        end_step = min(max(fitting, first_step + 1), len(alive))
        groups.append(group(first_step, end_step))
        first_step = end_step
    return ChunkTable(
        groups=tuple(groups),
        num_chunks=int(first_chunk[-1]),
        segment_order=tensor(order),
        segment_rank=tensor(np.argsort(order)),
        num_alive=int((chunks_of_segment > 0).sum()),
    )
