"""Blocks of rows that stay in cache while several operations pass over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements of a block: 256 KiB of float32 where a few of them are to share a 2 MiB L2, more where launches cost.
ELEMENTS_CPU, ELEMENTS_GPU = 1 << 16, 1 << 26


def row_blocks(x: Tensor, buffers: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of ``x`` [N, ...], in order, as ranges of as many whole rows as a block holds, or of one; and scratch
    [buffers, rows, ...] in ``dtype``, the same memory for every block: fresh memory is not in cache."""
    elements = ELEMENTS_CPU if x.device.type == "cpu" else ELEMENTS_GPU
    rows = min(len(x), max(1, elements // max(1, x.shape[1:].numel())))
    scratch = x.new_empty((buffers, rows, *x.shape[1:]), dtype=dtype)
    for lo in range(0, len(x), max(1, rows)):
        hi = min(lo + rows, len(x))
        yield slice(lo, hi), scratch[:, : hi - lo]
