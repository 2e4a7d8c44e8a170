"""Collectives that autograd knows, from Megatron-core, each with its group stated.

Placements, for a tensor whose rows are tokens ``[N, ...]``:

=====================  ==========================  ===============================  ==========================
function               before                      after                            backward
=====================  ==========================  ===============================  ==========================
``replicate_in``       equal on every rank         equal, read by sharded weights   all-reduce of the gradient
``reduce_out``         partial sums                equal on every rank              identity
``gather_rows``        rows split over the ranks   all rows on every rank           reduce-scatter
``reduce_scatter_rows`` partial sums of all rows   rows split over the ranks        gather
``split_rows``         equal on every rank         rows split over the ranks        gather
``collect_rows``       rows split over the ranks   equal on every rank              split (gradient was equal)
``exchange_rows``      rows for each rank          rows from each rank              the way back
=====================  ==========================  ===============================  ==========================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.engine import seam

Group = dist.ProcessGroup


def _load() -> Any:
    from megatron.core.tensor_parallel import mappings

    return mappings


_mappings = seam.lazily(_load)


def replicate_in(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x if group.size() == 1 else _mappings().copy_to_tensor_model_parallel_region(x, group)


def reduce_out(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x if group.size() == 1 else _mappings().reduce_from_tensor_model_parallel_region(x, group)


def gather_rows(x: torch.Tensor, group: Group, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """``sizes``: rows of each rank where they differ."""
    if group.size() == 1:
        return x
    if sizes is None:
        return _mappings().gather_from_sequence_parallel_region(x, True, group)
    return _GatherUneven.apply(x, group, list(sizes))


def reduce_scatter_rows(x: torch.Tensor, group: Group, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """``sizes``: rows that each rank keeps where they differ."""
    if group.size() == 1:
        return x
    if sizes is None:
        return _mappings().reduce_scatter_to_sequence_parallel_region(x, group)
    return _ReduceScatterUneven.apply(x, group, list(sizes))


def split_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x if group.size() == 1 else _mappings().scatter_to_sequence_parallel_region(x, group)


def collect_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x if group.size() == 1 else _mappings().gather_from_sequence_parallel_region(x, False, group)


def exchange_rows(x: torch.Tensor, group: Group, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
    """``send[r]`` rows go to rank r in order, ``receive[r]`` rows come from it."""
    return x if group.size() == 1 else _mappings().all_to_all(group, x, list(receive), list(send))


def exchange_counts(counts: torch.Tensor, group: Group) -> torch.Tensor:
    """``counts [ranks, ...]`` integers: row r goes to rank r; row r of the result came from it."""
    if group.size() == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def all_gather_uneven(x: torch.Tensor, group: Group, sizes: Sequence[int]) -> torch.Tensor:
    """Rows of every rank, in rank order, where rank r holds ``sizes[r]``. Padded to the largest: gloo and NCCL both
    want equal parts."""
    largest = max(sizes)
    padded = x.new_zeros((largest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatter_uneven(x: torch.Tensor, group: Group, sizes: Sequence[int]) -> torch.Tensor:
    """Sum over ranks of ``x [sum(sizes), ...]``; rank r keeps its ``sizes[r]`` rows."""
    rank, largest = group.rank(), max(sizes)
    padded = x.new_zeros((len(sizes), largest, *x.shape[1:]))
    for part, rows in zip(padded, torch.split(x, list(sizes)), strict=True):
        part[: rows.shape[0]] = rows
    kept = torch.empty_like(padded[0])
    dist.reduce_scatter_tensor(kept, padded.flatten(0, 1), group=group)
    return kept[: sizes[rank]]


class _GatherUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, sizes: list[int]) -> torch.Tensor:
        ctx.group, ctx.sizes = group, sizes
        return all_gather_uneven(x, group, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return reduce_scatter_uneven(gradients[0], ctx.group, ctx.sizes), None, None


class _ReduceScatterUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, sizes: list[int]) -> torch.Tensor:
        ctx.group, ctx.sizes = group, sizes
        return reduce_scatter_uneven(x, group, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return all_gather_uneven(gradients[0], ctx.group, ctx.sizes), None, None
