"""Layout-free initialisation (P2): a parameter's first value is a function of (seed, global name, global index) only.

Element i of a tensor reads the i-th output of a counter-based generator keyed by (seed, name): SplitMix64's finaliser
over key + (i + 1) * golden gamma (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 13).
Any slice is made without the rest, in float64, then rounded to the tensor's dtype.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numba
import numpy as np
import torch

from parallel.planning.layout import Layout, Slice
from pretrain.spec import Init, ModelSpec

#: Normal values are cut at this many standard deviations.
CUT = 3.0


def initialise(
    spec: ModelSpec,
    tensors: Mapping[str, torch.Tensor],
    layouts: Mapping[str, Layout],
    coords: dict[str, int],
    seed: int,
) -> None:
    """Fill this rank's tensors in place; padding of an allocation is zero."""
    parameters = spec.parameters()
    for name, tensor in tensors.items():
        flat = np.zeros(tensor.numel())
        for piece in layouts[name].slices(coords):
            flat[piece.offset : piece.offset + piece.numel] = values(
                parameters[name].init, seed, name, layouts[name].shape, piece
            )
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(flat).view(tensor.shape))


def values(init: Init, seed: int, name: str, shape: tuple[int, ...], piece: Slice) -> np.ndarray:
    """First values of the box ``piece`` of a tensor of global ``shape``, row-major, float64 [piece.numel]."""
    if init.kind == "constant":
        return np.full(piece.numel, init.a)
    uniform = np.empty(piece.numel)
    key = _key(seed, name)
    position = 0
    for start, length in _runs(shape, piece):
        _fill(uniform[position : position + length], key, np.uint64(start))
        position += length
    return _transform(init, uniform)


def _transform(init: Init, u: np.ndarray) -> np.ndarray:
    """Uniform values in (0, 1) -> values of the distribution, element by element."""
    if init.kind == "uniform":
        return init.a + (init.b - init.a) * u
    if init.kind == "log_uniform":
        return np.log(init.a + (init.b - init.a) * u)
    if init.kind == "inverse_softplus":
        dt = np.exp(math.log(init.a) + (math.log(init.b) - math.log(init.a)) * u)
        return dt + np.log(-np.expm1(-dt))
    low = 0.5 * math.erfc(CUT / math.sqrt(2))
    cut = torch.from_numpy(low + (1 - 2 * low) * u)
    return init.a * torch.special.ndtri(cut).numpy()


def _key(seed: int, name: str) -> np.uint64:
    digest = hashlib.sha256(f"stoker.initialise/{seed}/{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _runs(shape: tuple[int, ...], piece: Slice) -> Iterator[tuple[int, int]]:
    """Contiguous runs (global index, length) of a box, in row-major order."""
    full = len(shape)
    while full > 1 and piece.start[full - 1] == 0 and piece.stop[full - 1] == shape[full - 1]:
        full -= 1
    inner = math.prod(shape[full:])
    length = (piece.stop[full - 1] - piece.start[full - 1]) * inner if shape else 1
    outer = [range(a, b) for a, b in zip(piece.start[: full - 1], piece.stop[: full - 1], strict=True)]
    for index in np.ndindex(*(len(r) for r in outer)):
        start = 0
        for size, r, i in zip(shape, outer, index, strict=False):
            start = start * size + r[i]
        start = start * shape[full - 1] + piece.start[full - 1]
        yield start * inner, length


@numba.njit(cache=True, nogil=True)
def _fill(out: np.ndarray, key: np.uint64, first: np.uint64) -> None:
    """out[j] = the generator's output at index first + j, uniform in (0, 1) with 53 bits."""
    for j in range(out.shape[0]):
        z = key + (first + np.uint64(j) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        out[j] = (np.float64(z >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0)
