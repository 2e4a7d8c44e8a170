"""A fingerprint finds every single flipped bit and every exchange, and does not depend on where a tensor lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.guards.fingerprint import CHUNKS, STRIDE, checksum, fingerprint, words

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]


def values(dtype: torch.dtype, n: int = 257) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_flipped_bit_is_found(dtype: torch.dtype) -> None:
    tensor = values(dtype, 31)
    clean = {int(fingerprint(tensor))}, {int(checksum(tensor))}
    for index in range(31):
        for bit in range(8 * tensor.element_size()):
            flipped = tensor.clone()
            words(flipped).numpy().view(np.uint8)[index * tensor.element_size() + bit // 8] ^= 1 << bit % 8
            assert {int(fingerprint(flipped))} != clean[0] and {int(checksum(flipped))} != clean[1]


def test_two_values_exchanged_are_found_at_every_distance() -> None:
    tensor = values(torch.float32)
    clean = int(fingerprint(tensor))
    for other in range(1, 257):
        moved = tensor.clone()
        moved[0], moved[other] = tensor[other], tensor[0]
        assert int(fingerprint(moved)) != clean


def test_it_is_the_sum_that_the_docstring_states() -> None:
    n = 2 * CHUNKS["cpu"] + 3
    tensor = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))

    def signed(value: int) -> int:
        value %= 2**64
        return value - 2**64 if value >= 2**63 else value

    def multiplier(index: int) -> int:
        mixed = signed((index + 1) * STRIDE)
        return signed((mixed ^ (mixed >> 29)) * STRIDE) | 1

    total = 0
    for start in range(0, n, CHUNKS["cpu"]):
        part = tensor[start : start + CHUNKS["cpu"]].tolist()
        total = signed(total * STRIDE + sum(multiplier(i) * value for i, value in enumerate(part)))
    assert int(fingerprint(tensor)) == total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3, 257])
def test_it_does_not_depend_on_alignment_or_strides(dtype: torch.dtype, n: int) -> None:
    tensor = values(dtype, n)
    inside = torch.zeros(n + 3, dtype=dtype)
    inside[3:] = tensor
    wide = torch.zeros(n, 2, dtype=dtype)
    wide[:, 1] = tensor
    assert int(fingerprint(tensor)) == int(fingerprint(inside[3:])) == int(fingerprint(wide[:, 1]))
