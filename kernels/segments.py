"""Boundaries of packed segments (``cu_seqlens``), checked."""

from __future__ import annotations

import numpy as np

from stoker.errors import Refusal


def segment_bounds(cu_seqlens: tuple[int, ...], num_tokens: int) -> np.ndarray:
    """The boundaries as int64 [S+1]. Refusal unless they run from 0 to ``num_tokens`` without going back."""
    bounds = np.asarray(cu_seqlens, np.int64)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens or (np.diff(bounds) < 0).any():
        shown = f"{list(cu_seqlens[:8])}{'...' if len(cu_seqlens) > 8 else ''}"
        raise Refusal(
            f"cu_seqlens={shown} must rise from 0 to the number of packed tokens, {num_tokens}: "
            "pass the start of every segment and the end of the last"
        )
    return bounds
