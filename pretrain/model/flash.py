"""Adapter to flash-attn (github.com/Dao-AILab/flash-attention): attention over packed documents without a mask.

Used on CUDA in 16-bit types where the package is installed; detected, never assumed.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Any

import torch

_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _varlen() -> Any:
    """flash-attn's packed forward, or None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        _log.warning(
            "flash-attn is not installed: softmax attention runs on torch's SDPA with a mask of T x T for each window, "
            "slower and with more memory as documents get shorter or windows longer"
        )
        return None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def usable(q: torch.Tensor) -> bool:
    """flash-attn is installed and takes heads like ``q [N, H, K]``."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and _varlen() is not None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """q [N, H, K], k and v [N, G, K], documents bounded by ``cu_seqlens``, none over ``longest`` -> [N, H, K]."""
    bounds = cu_seqlens.to(torch.int32)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _varlen()(q, k, v, bounds, bounds, longest, longest, causal=True, deterministic=deterministic)
