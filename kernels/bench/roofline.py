"""How fast a device could be: the operations an operator must do and the bytes it must move, over the device's rates.

Counts per token and value head of dense tiles, without saving on triangles, with chunks of 64 tokens. Bytes are the
fewest: every input read once and every output written once, in bfloat16, with gates in float32. What a forward keeps
for its backward is not among them: a backward could make it again, and those operations are counted in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from kernels.bench.shapes import Phase, Shape
from kernels.bench.timing import Timer
from kernels.chunk_size import CHUNK

#: Sizes at which a device's rates are measured: a copy of 2 GiB, a product of square bfloat16 matrices.
COPY_BYTES, MATRIX = 1 << 31, 8192


@dataclass(frozen=True)
class Ceilings:
    """Bytes moved (read and written) and bfloat16 matrix operations per second."""

    bytes_per_s: float
    flops_per_s: float

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e12:.2f} TB/s, {self.flops_per_s / 1e12:.0f} TFLOP/s"


@dataclass(frozen=True)
class Work:
    """``bytes``: of memory; ``flops``: on the matrix units."""

    bytes: float
    flops: float = 0.0

    def floor_ms(self, ceilings: Ceilings) -> float:
        """
        >>> round(delta_work("gated_delta", Shape(32768, 4, (32, 32)), "forward").floor_ms(Ceilings(4.3e12, 790e12)), 3)
        0.252
        """
        return 1e3 * max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flops_per_s)

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def delta_work(op: str, shape: Shape, phase: Phase) -> Work:
    """Of ``gated_delta`` or ``kda``, whose gate has K numbers."""
    (Hk, Hv), (K, V), C = shape.heads, shape.dims, CHUNK
    keys, gates = 2 * K * Hk / Hv, 4 * ((K if op == "kda" else 1) + 1)
    inputs = 2 * keys + 2 * V + gates
    forward = Work(inputs + 2 * V, 6 * K * V + 4 * C * (K + V) + 4 * C * C / 3)
    again = 4 * K * V + 2 * C * V
    pairs = 10 * C * V + (12 if op == "kda" else 10) * C * K
    backward = Work(2 * inputs + 2 * V, 14 * K * V + pairs + again)
    return _total(shape, phase, forward, backward)


def prologue_work(shape: Shape, phase: Phase, per_channel: bool = False) -> Work:
    """Projections in, what the core reads out; the weights are too few to count."""
    (Hk, Hv), (K, V) = shape.heads, shape.dims
    rows, gates = 4 * K * Hk / Hv + 2 * V, (K if per_channel else 1) + 1
    forward = Work(2 * rows + 6 * gates)
    backward = Work(3 * rows + 8 * gates)
    return _total(shape, phase, forward, backward)


def epilogue_work(shape: Shape, phase: Phase) -> Work:
    """o, z in and y out; o, z, dy in and do, dz out."""
    row = 2 * shape.dims[1]
    return _total(shape, phase, Work(3 * row), Work(5 * row))


def layer_work(op: str, shape: Shape, phase: Phase) -> Work:
    """Prologue, delta rule ``op`` and epilogue, one after the other."""
    prologue = prologue_work(shape, phase, per_channel=op == "kda")
    return prologue + delta_work(op, shape, phase) + epilogue_work(shape, phase)


def _total(shape: Shape, phase: Phase, forward: Work, backward: Work) -> Work:
    work = {"forward": forward, "backward": backward, "forward + backward": forward + backward}[phase]
    times = shape.tokens * shape.heads[1]
    return Work(work.bytes * times, work.flops * times)


def measure_ceilings(timer: Timer, device: torch.device) -> Ceilings:
    """By a copy and a matrix product of random numbers: zeros would run faster than data does."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = timer(partial(target.copy_, source)).ms
    a, b = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    product_ms = timer(partial(torch.mm, a, b)).ms
    return Ceilings(2 * COPY_BYTES / copy_ms * 1e3, 2 * MATRIX**3 / product_ms * 1e3)
