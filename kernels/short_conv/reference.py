"""The short convolution, tap by tap: the definition.

``y_t = silu(sum_j weight[:, W-1-j] * x_{t-j})`` over ``0 <= j < W`` with ``t-j`` in the segment of ``t``: the last
column of the weight meets the current token, as in ``torch.nn.Conv1d`` with ``W - 1`` zeros left of every segment.
Shapes: ``N`` packed tokens, ``C`` channels, ``W`` taps, ``S`` segments.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.precision import compute_dtype


def short_conv_reference(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Signature and shapes of :func:`kernels.short_conv.op.short_conv`; differentiable by autograd."""
    dtype = compute_dtype(x.dtype)
    x_, weight_ = x.to(dtype), weight.to(dtype)
    width = weight.shape[1]
    bounds = cu_seqlens.tolist()
    rows = []
    for start, stop in pairwise(bounds):
        for t in range(start, stop):
            first = max(start, t - width + 1)
            rows.append((x_[first : t + 1] * weight_[:, width - (t + 1 - first) :].T).sum(0))
    y = torch.stack(rows) if rows else x_
    return torch.nn.functional.silu(y).to(x.dtype)
