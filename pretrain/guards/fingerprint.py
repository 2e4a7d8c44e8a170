"""Fingerprints of tensors: 64 bits, made on the tensor's device, of its bytes and their order.

    f = sum over chunks c of S^(C - c) * sum over words i of m_i * x_i      (modulo 2^64, every m_i and S odd)

A single flipped bit changes one word by a power of two below 2^64, and an odd multiple of that is not zero: it is found
with certainty. Several independent changes go unnoticed with a chance of about 2^-63.
"""

from __future__ import annotations

from functools import lru_cache

import torch

#: 2^64 over the golden ratio, odd (Knuth, The Art of Computer Programming, volume 3, section 6.4), as int64.
STRIDE = 0x9E3779B97F4A7C15 - 2**64
#: Words at a time: those of a chunk stay in the cache of a CPU core, and fill a GPU.
CHUNKS = {"cpu": 2**16, "cuda": 2**24}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as flat integers of its element size."""
    return tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Fingerprint of a tensor, int64 []; equal for equal bytes in equal order on one kind of device."""
    flat = words(tensor)
    chunk = CHUNKS.get(flat.device.type, CHUNKS["cpu"])
    multipliers = _multipliers(min(chunk, max(flat.numel(), 1)), flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in flat.split(chunk):
        total = total * STRIDE + (multipliers[: part.numel()] * part).sum()
    return total


def folded(fingerprints: torch.Tensor) -> torch.Tensor:
    """One fingerprint, int64 [], of several, int64 [n]."""
    return fingerprint(fingerprints)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's words, int64 []: finds any single change in one pass, and tells nothing of their order.
    To be compared with another of the same memory: words of eight bytes are summed where it is aligned to them."""
    flat = words(tensor)
    size = flat.element_size()
    if not (flat.numel() * size % 8 or flat.storage_offset() * size % 8):
        flat = flat.view(torch.int64)
    return flat.sum(dtype=torch.int64)


@lru_cache(maxsize=8)
def _made(length: int, device: torch.device) -> torch.Tensor:
    index = torch.arange(1, length + 1, dtype=torch.int64, device=device) * STRIDE
    return (index ^ (index >> 29)) * STRIDE | 1


def _multipliers(length: int, device: torch.device) -> torch.Tensor:
    """Odd pseudo-random multipliers, int64 [length or more]."""
    return _made(1 << (length - 1).bit_length(), device)
