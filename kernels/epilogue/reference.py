"""The epilogue of a linear-attention mixer: the definition.

``y = o / sqrt(mean(o^2) + eps) * weight * act(z)`` over the value dim of every head, ``act`` SiLU (Gated DeltaNet,
arXiv 2412.06464; Qwen3-Next) or the logistic sigmoid (Kimi Linear, arXiv 2510.26692).
Shapes: ``N`` tokens, ``Hv`` value heads, ``V`` value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import compute_dtype


def epilogue_reference(o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """Signature and shapes of :func:`kernels.epilogue.op.epilogue`; differentiable by autograd."""
    dtype = compute_dtype(o.dtype)
    o_, z_ = o.to(dtype), z.to(dtype)
    gate = z_.sigmoid() * z_ if activation == "silu" else z_.sigmoid()
    normed = o_ * torch.rsqrt(o_.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(dtype) * gate).to(o.dtype)
