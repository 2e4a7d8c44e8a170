"""The short convolution on blocks of tokens small enough to stay in cache, with its own backward.

A block lies inside one segment. Tap j adds the rows j earlier, from the segment's first token on, so nothing is padded,
copied or masked and no row of another segment is read. Nothing is saved but the inputs: the backward repeats the taps
of a block, which costs less than reading them from memory.

Against ``torch.nn.functional.conv1d`` (depthwise, channels-first) on one thread: ``python -m kernels.bench``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from kernels.precision import compute_dtype
from kernels.segments import segment_bounds

#: Elements of a block: 256 KiB of float32, so that a block, its source and its result share a 2 MiB L2.
BLOCK = 1 << 16


def forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [N, C], weight [C, W] -> [N, C] in x's dtype."""
    dtype = compute_dtype(x.dtype)
    x_, taps = x.to(dtype), weight.to(dtype).T.contiguous()
    y = x_.new_empty(x.shape)
    for start, lo, hi in _blocks(cu_seqlens, x):
        torch.nn.functional.silu(_convolve(x_, taps, start, lo, hi, y[lo:hi]), inplace=True)
    return y.to(x.dtype)


def backward(dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their shapes and dtypes."""
    dtype = compute_dtype(x.dtype)
    x_, dy_, taps = x.to(dtype), dy.to(dtype), weight.to(dtype).T.contiguous()
    width = len(taps)
    dx, dtaps = x_.new_zeros(x.shape), torch.zeros_like(taps)
    for start, lo, hi in _blocks(cu_seqlens, x):
        before = _convolve(x_, taps, start, lo, hi, x_.new_empty(hi - lo, x.shape[1]))
        dbefore = torch.ops.aten.silu_backward(dy_[lo:hi], before)
        for back in range(width):
            first = max(lo, start + back)
            if first < hi:
                source, cotangent = slice(first - back, hi - back), dbefore[first - lo :]
                dx[source].addcmul_(cotangent, taps[-1 - back])
                dtaps[-1 - back] += (cotangent * x_[source]).sum(0)
    return dx.to(x.dtype), dtaps.T.to(weight.dtype, memory_format=torch.contiguous_format)


def _convolve(x: Tensor, taps: Tensor, start: int, lo: int, hi: int, out: Tensor) -> Tensor:
    """Rows [lo, hi) of the convolution without SiLU, of the segment that begins at ``start``."""
    torch.mul(x[lo:hi], taps[-1], out=out)
    for back in range(1, len(taps)):
        first = max(lo, start + back)
        if first < hi:
            out[first - lo :].addcmul_(x[first - back : hi - back], taps[-1 - back])
    return out


def _blocks(cu_seqlens: Tensor, x: Tensor) -> Iterator[tuple[int, int, int]]:
    """(segment start, first row, end row) of every block, in order."""
    num_tokens, num_channels = x.shape
    bounds = segment_bounds(tuple(cu_seqlens.tolist()), num_tokens).tolist()
    rows = max(1, BLOCK // max(1, num_channels))
    for start, stop in pairwise(bounds):
        for lo in range(start, stop, rows):
            yield start, lo, min(lo + rows, stop)
