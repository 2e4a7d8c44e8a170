"""The prologue on blocks of tokens small enough to stay in cache, with its own closed-form backward.

Each of q, k and v passes through the cache once: a block is convolved, activated and scaled to unit length before the
next is touched. Tap j adds the rows j earlier of the same segment, from the segment's first token on, so nothing is
padded, copied or masked and no row of another segment is read. Nothing is saved but the inputs: the backward repeats a
block's forward, which costs less than reading it from memory. With c the convolution, y = silu(c), r = 1 / sqrt(|y|^2 +
eps) and dn the cotangent of n = r y::

    dy = r (dn - n (n . dn));   dc = silu'(c) dy;   dx_s = sum_j w_{W-1-j} dc_{s+j};   dw_{W-1-j} = sum_t dc_t x_{t-j}
    da = -e^A_log sigmoid(a + dt_bias) dg;   ddt_bias = sum_t da;   dA_log = sum_t g dg;   db = beta (1 - beta) dbeta

Sums over tokens run over the rows of a block, then over the blocks in order, the latter in float64.
Against the same steps in plain torch: ``python -m kernels.bench``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kernels.activation import sigmoid, silu_slope, softplus
from kernels.blocks import row_blocks
from kernels.precision import compute_dtype
from kernels.prologue.reference import UNIT_EPS
from kernels.segments import segment_bounds


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    num_qk_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kernels.prologue.op.prologue`."""
    bounds = segment_bounds(tuple(cu_seqlens.tolist()), len(q))
    return (
        _activate(q, q_conv, bounds, num_qk_heads, unit=True),
        _activate(k, k_conv, bounds, num_qk_heads, unit=True),
        _activate(v, v_conv, bounds, len(A_log), unit=False),
        decay(a, A_log, dt_bias),
        sigmoid(b.to(compute_dtype(b.dtype))),
    )


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
    dbeta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, q_conv, k_conv, v_conv, A_log and dt_bias, in their shapes and dtypes."""
    bounds = segment_bounds(tuple(cu_seqlens.tolist()), len(q))
    dq, dq_conv = _activate_backward(dq, q, q_conv, bounds, unit=True)
    dk, dk_conv = _activate_backward(dk, k, k_conv, bounds, unit=True)
    dv, dv_conv = _activate_backward(dv, v, v_conv, bounds, unit=False)
    da, dA_log, ddt_bias = _decay_backward(dg, a, A_log, dt_bias)
    beta = sigmoid(b.to(compute_dtype(b.dtype)))
    db = (dbeta * beta * (1 - beta)).to(b.dtype)
    return dq, dk, dv, da, db, dq_conv, dk_conv, dv_conv, dA_log, ddt_bias


class _Convolution:
    """The convolution at the tokens ``rows`` of x [N, C], computed in the dtype of ``taps`` [W, C]."""

    def __init__(self, x: Tensor, taps: Tensor, bounds: np.ndarray, rows: slice):
        first = max(0, rows.start - len(taps) + 1)
        self.x, self.before = x[first : rows.stop].to(taps.dtype), rows.start - first
        self.taps, self.rows = taps, rows
        self.reads = tuple(_reads(bounds, rows, len(taps)))

    def forward(self, out: Tensor) -> Tensor:
        """[rows, C]"""
        torch.mul(self.x[self.before :], self.taps[-1], out=out)
        for back, first, end in self.reads:
            out[first:end].addcmul_(self._earlier(back, first, end), self.taps[-1 - back])
        return out

    def backward(self, dc: Tensor, dx: Tensor, dtaps: Tensor, scratch: Tensor) -> None:
        """Sets ``rows`` of ``dx`` [N, C] and adds to those before; adds to ``dtaps``."""
        lo = self.rows.start
        torch.mul(dc, self.taps[-1], out=dx[self.rows])
        dtaps[-1] += torch.mul(dc, self.x[self.before :], out=scratch).sum(0)
        for back, first, end in self.reads:
            dx[lo + first - back : lo + end - back].addcmul_(dc[first:end], self.taps[-1 - back])
            products = torch.mul(dc[first:end], self._earlier(back, first, end), out=scratch[first:end])
            dtaps[-1 - back] += products.sum(0)

    def _earlier(self, back: int, first: int, end: int) -> Tensor:
        """What the rows [first, end) of the block read ``back`` rows before themselves."""
        return self.x[self.before + first - back : self.before + end - back]


def _reads(bounds: np.ndarray, rows: slice, width: int) -> Iterator[tuple[int, int, int]]:
    """(back, first, end): rows [first, end) of the block see the token ``back`` before them, in their own segment."""
    segments = slice(np.searchsorted(bounds, rows.start, "right") - 1, np.searchsorted(bounds, rows.stop) + 1)
    for start, stop in pairwise(bounds[segments].tolist()):
        for back in range(1, width):
            first, end = max(rows.start, start + back), min(rows.stop, stop)
            if first < end:
                yield back, first - rows.start, end - rows.start


def _activate(x: Tensor, weight: Tensor, bounds: np.ndarray, num_heads: int, unit: bool) -> Tensor:
    """x [N, C], weight [C, W] -> [N, num_heads, C / num_heads]."""
    dtype = compute_dtype(x.dtype)
    taps = weight.to(dtype).T.contiguous()
    y = x.new_empty(len(x), num_heads, x.shape[1] // num_heads)
    for rows, (c, s) in row_blocks(x, 2, dtype):
        _Convolution(x, taps, bounds, rows).forward(out=c)
        sigmoid(c, out=s)
        if unit:
            active = c.mul_(s).view(y[rows].shape)
            torch.mul(active, inverse_length(active), out=y[rows])
        else:
            torch.mul(c, s, out=y[rows].flatten(1))
    return y


def _activate_backward(dy: Tensor, x: Tensor, weight: Tensor, bounds: np.ndarray, unit: bool) -> tuple[Tensor, Tensor]:
    """dy [N, heads, dim] -> gradients of x and weight."""
    dtype = compute_dtype(x.dtype)
    taps = weight.to(dtype).T.contiguous()
    dx, dtaps = x.new_empty(x.shape, dtype=dtype), torch.zeros_like(taps, dtype=torch.float64)
    for rows, (c, s, slope, scratch) in row_blocks(x, 4, dtype):
        convolution = _Convolution(x, taps, bounds, rows)
        convolution.forward(out=c)
        dy_ = dy[rows].to(dtype)
        y = c.mul_(sigmoid(c, out=s))
        silu_slope(s, y, out=slope)
        if unit:
            n, dn, product = y.view_as(dy_), dy_, scratch.view_as(dy_)
            r = inverse_length(n)
            n *= r
            along = torch.mul(n, dn, out=product).sum(-1, keepdim=True)
            dy_ = torch.addcmul(dn, n, along, value=-1, out=product).mul_(r)
        convolution.backward(slope.mul_(dy_.flatten(1)), dx, dtaps, scratch)
    return dx.to(x.dtype), dtaps.T.to(weight.dtype, memory_format=torch.contiguous_format)


def inverse_length(x: Tensor) -> Tensor:
    """[n, heads, dim] -> [n, heads, 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(UNIT_EPS).rsqrt_()


def decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g [N, Hv], or [N, Hv, K] for ``a`` of Hv * K columns."""
    dtype = compute_dtype(a.dtype)
    per_head = a.shape[1] // len(A_log)
    g = a.new_empty((len(a), len(A_log), per_head), dtype=dtype)
    rate, bias = A_log.to(dtype).exp().neg_().unsqueeze(-1), dt_bias.to(dtype)
    for rows, (step, dt) in row_blocks(a, 2, dtype):
        softplus(torch.add(a[rows], bias, out=step), out=dt)
        torch.mul(dt.view_as(g[rows]), rate, out=g[rows])
    return g if per_head > 1 else g.squeeze(-1)


def _decay_backward(dg: Tensor, a: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, A_log and dt_bias."""
    dtype = compute_dtype(a.dtype)
    heads = (len(A_log), a.shape[1] // len(A_log))
    da, ddt_bias = a.new_empty(a.shape), torch.zeros_like(dt_bias, dtype=torch.float64)
    dA_log = torch.zeros_like(A_log, dtype=torch.float64)
    rate, bias = A_log.to(dtype).exp().neg_().unsqueeze(-1), dt_bias.to(dtype)
    for rows, (step, dstep, scratch) in row_blocks(a, 3, dtype):
        torch.add(a[rows], bias, out=step)
        torch.mul(dg[rows].view(-1, *heads), rate, out=dstep.view(-1, *heads))
        dA_log += softplus(step, out=scratch).mul_(dstep).view(-1, *heads).sum((0, 2))
        da[rows] = dstep.mul_(sigmoid(step, out=scratch))
        ddt_bias += dstep.sum(0)
    return da, dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype)
