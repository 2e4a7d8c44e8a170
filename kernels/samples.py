"""Inputs on which kernels are checked and timed."""

from __future__ import annotations

from collections.abc import Sequence
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
) -> dict[str, Tensor]:
    """q, k, v, g, beta, initial_state for ``heads = (Hk, Hv)`` and ``dims = (K, V)``; q and k have unit length.

    ``trained``: decays of a softplus gate with A in [1, 16]; ``none``: g = 0; ``extreme``: each token of each head
    draws -1000, -20, -1e-6 or -0.0. g and beta are float32 for narrower dtypes, as models compute them.
    """
    generator = torch.Generator().manual_seed(seed)
    N, (Hk, Hv), (K, V) = sum(lengths), heads, dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if decay == "trained":
        rate = 1 + 15 * torch.rand(Hv, generator=generator, dtype=torch.float64)
        g = -rate * torch.nn.functional.softplus(normal(N, Hv) - 4)
    elif decay == "none":
        g = torch.zeros(N, Hv, dtype=torch.float64)
    else:
        choices = torch.tensor([-1000.0, -20.0, -1e-6, -0.0], dtype=torch.float64)
        g = choices[torch.randint(4, (N, Hv), generator=generator)]
    high = torch.promote_types(dtype, torch.float32)
    return {
        "q": torch.nn.functional.normalize(normal(N, Hk, K), dim=-1).to(dtype),
        "k": torch.nn.functional.normalize(normal(N, Hk, K), dim=-1).to(dtype),
        "v": normal(N, Hv, V).to(dtype),
        "g": g.to(high),
        "beta": normal(N, Hv).sigmoid().to(high),
        "initial_state": normal(len(lengths), Hv, K, V).to(high),
    }


def short_conv_inputs(
    lengths: Sequence[int], channels: int, width: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """x and weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (sum(lengths), channels), "weight": (channels, width)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }
