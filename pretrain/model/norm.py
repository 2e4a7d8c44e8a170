"""RMSNorm (arXiv 1910.07467), plain or zero-centred, statistics in float32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.model.build import high


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool) -> torch.Tensor:
    """Over the last dim of ``x``; scales by ``weight``, or by ``1 + weight`` if zero-centred."""
    dtype = high(x.dtype)
    scale = weight.to(dtype) + 1 if zero_centred else weight.to(dtype)
    return F.rms_norm(x.to(dtype), scale.shape, scale, eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float, zero_centred: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.zero_centred = weight, eps, zero_centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.zero_centred)
