"""The epilogue on blocks of tokens small enough to stay in cache, with its own closed-form backward.

Nothing is saved but the inputs. With r = 1 / sqrt(mean(o^2) + eps), n = r o and s = act(z)::

    dn = dy w s;   do = r (dn - n mean(n dn));   dz = act'(z) dy n w;   dw = sum over tokens and heads of dy n s

The sum runs over the rows of a block, then over the blocks in order, the latter in float64.
Against the same steps in plain torch: ``python -m kernels.bench``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activation import sigmoid, silu_slope
from kernels.blocks import row_blocks
from kernels.precision import compute_dtype


def forward(o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """See :func:`kernels.epilogue.op.epilogue`."""
    dtype = compute_dtype(o.dtype)
    y, weight_ = o.new_empty(o.shape), weight.to(dtype)
    for rows, (gate,) in row_blocks(o, 1, dtype):
        o_, z_ = o[rows].to(dtype), z[rows].to(dtype)
        sigmoid(z_, out=gate)
        if activation == "silu":
            gate *= z_
        torch.mul(gate.mul_(weight_).mul_(o_), _inverse_rms(o_, eps), out=y[rows])
    return y


def backward(
    dy: Tensor, o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, z and weight, in their shapes and dtypes."""
    dtype = compute_dtype(o.dtype)
    do, dz = o.new_empty(o.shape), z.new_empty(z.shape)
    weight_, dweight = weight.to(dtype), torch.zeros_like(weight, dtype=torch.float64)
    for rows, (s, gate, slope, n, product) in row_blocks(o, 5, dtype):
        o_, z_, dy_ = (x[rows].to(dtype) for x in (o, z, dy))
        sigmoid(z_, out=s)
        if activation == "silu":
            torch.mul(z_, s, out=gate)
            silu_slope(s, gate, out=slope)
        else:
            gate = s
            torch.addcmul(s, s, s, value=-1, out=slope)
        inverse_rms = _inverse_rms(o_, eps)
        torch.mul(o_, inverse_rms, out=n)
        torch.mul(dy_, n, out=product)
        torch.mul(slope.mul_(weight_), product, out=dz[rows])
        dweight += product.mul_(gate).sum((0, 1))
        dn = gate.mul_(dy_).mul_(weight_)
        mean = product.mul_(weight_).mean(-1, keepdim=True)
        torch.mul(dn.addcmul_(n, mean, value=-1), inverse_rms, out=do[rows])
    return do, dz, dweight.to(weight.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[n, Hv, V] -> [n, Hv, 1]."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(eps).rsqrt_()
