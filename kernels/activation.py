"""Logistic functions of which every bit depends on the element alone; ``out`` as everywhere in torch.

torch's own sigmoid, silu, softplus and their backwards compute the last elements of a tensor, or a strided one, by
another routine than the rest (torch 2.13 on CPU): a token's bits would depend on what it is packed with. Its exp and
log1p do not, and these are made of them, at about the same cost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(x: Tensor, out: Tensor | None = None) -> Tensor:
    """1 / (1 + e^-x); 0 where e^-x overflows."""
    return torch.neg(x, out=out).exp_().add_(1).reciprocal_()


def softplus(x: Tensor, out: Tensor | None = None) -> Tensor:
    """log(1 + e^x), to rounding for every x: e^x far below zero, x far above."""
    return torch.abs(x, out=out).neg_().exp_().log1p_().add_(x.clamp(min=0))


def silu_slope(s: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Derivative of ``y = silu(x) = x s`` by x, from y and ``s = sigmoid(x)``: s + y (1 - s)."""
    return torch.add(s, y, out=out).addcmul_(s, y, value=-1)
