"""Inputs on which kernels are checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

Decay = Literal["trained", "none", "extreme"]


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """Boundaries int32 [S+1] of segments of the given lengths.

    >>> cu_seqlens_of([3, 1])
    tensor([0, 3, 4], dtype=torch.int32)
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def gated_delta_inputs(
    lengths: Sequence[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    decay: Decay = "trained",
    seed: int = 0,
    per_channel: bool = False,
) -> dict[str, Tensor]:
    """q, k, v, g, beta, initial_state for ``heads = (Hk, Hv)`` and ``dims = (K, V)``; q and k have unit length.

    ``trained``: decays of a softplus gate with A in [1, 16]; ``none``: g = 0; ``extreme``: each token of each head
    draws -1000, -20, -1e-6 or -0.0; each channel of it if ``per_channel``, and then g is [N, Hv, K]. g and beta are
    float32 for narrower dtypes, as models compute them.
    """
    generator, normal = _seeded(seed)
    N, (Hk, Hv), (K, V) = sum(lengths), heads, dims
    decays = (Hv, K) if per_channel else (Hv,)
    if decay == "trained":
        rate = 1 + 15 * torch.rand(Hv, generator=generator, dtype=torch.float64)
        rate = rate.unsqueeze(-1) if per_channel else rate
        g = -rate * torch.nn.functional.softplus(normal(N, *decays) - 4)
    elif decay == "none":
        g = torch.zeros(N, *decays, dtype=torch.float64)
    else:
        choices = torch.tensor([-1000.0, -20.0, -1e-6, -0.0], dtype=torch.float64)
        g = choices[torch.randint(4, (N, *decays), generator=generator)]
    high = torch.promote_types(dtype, torch.float32)
    return {
        "q": torch.nn.functional.normalize(normal(N, Hk, K), dim=-1).to(dtype),
        "k": torch.nn.functional.normalize(normal(N, Hk, K), dim=-1).to(dtype),
        "v": normal(N, Hv, V).to(dtype),
        "g": g.to(high),
        "beta": normal(N, Hv).sigmoid().to(high),
        "initial_state": normal(len(lengths), Hv, K, V).to(high),
    }


def fold_inputs(
    num_pieces: int, num_sequences: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """M [P, H, K, K], which shrinks what it is multiplied with; B [P, H, K, V]; initial [Q, H, K, V]."""
    _, normal = _seeded(seed)
    K, V = dims
    return {
        "M": (0.4 * K**-0.5 * normal(num_pieces, heads, K, K)).to(dtype),
        "B": normal(num_pieces, heads, K, V).to(dtype),
        "initial": normal(num_sequences, heads, K, V).to(dtype),
    }


def prologue_inputs(
    lengths: Sequence[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    width: int = 4,
    seed: int = 0,
    per_channel: bool = False,
) -> dict[str, Tensor]:
    """All tensors of the prologue for ``heads = (Hk, Hv)``, ``dims = (K, V)`` and ``width`` taps. Every fifth row of
    the decay gate is 30 times as large. A_log and dt_bias are float32 for narrower dtypes."""
    generator, normal = _seeded(seed)
    N, (Hk, Hv), (K, V) = sum(lengths), heads, dims
    decays = Hv * K if per_channel else Hv
    a = normal(N, decays)
    a[::5] *= 30
    high = torch.promote_types(dtype, torch.float32)
    return {
        "q": normal(N, Hk * K).to(dtype),
        "k": normal(N, Hk * K).to(dtype),
        "v": normal(N, Hv * V).to(dtype),
        "a": a.to(dtype),
        "b": normal(N, Hv).to(dtype),
        "q_conv": normal(Hk * K, width).to(dtype),
        "k_conv": normal(Hk * K, width).to(dtype),
        "v_conv": normal(Hv * V, width).to(dtype),
        "A_log": torch.rand(Hv, generator=generator, dtype=torch.float64).mul(16).log().to(high),
        "dt_bias": (normal(decays) - 4).to(high),
    }


def epilogue_inputs(num_tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """o, z and weight; the weight around 1."""
    _, normal = _seeded(seed)
    weight = 1 + 0.3 * normal(dim)
    return {
        "o": normal(num_tokens, heads, dim).to(dtype),
        "z": normal(num_tokens, heads, dim).to(dtype),
        "weight": weight.to(dtype),
    }


def _seeded(seed: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    """A generator, and a function of a shape that draws from N(0, 1) with it, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return generator, partial(torch.randn, generator=generator, dtype=torch.float64)
