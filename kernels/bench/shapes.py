"""The shapes that are measured on a GPU, and the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "forward + backward"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "forward + backward")


@dataclass(frozen=True)
class Shape:
    """``tokens`` in all, in ``sequences`` of equal length; ``heads`` (Hk, Hv), ``dims`` (K, V); bfloat16."""

    tokens: int
    sequences: int
    heads: tuple[int, int]
    dims: tuple[int, int] = (128, 128)

    def __str__(self) -> str:
        (Hk, Hv), (K, V) = self.heads, self.dims
        dims = f"K=V={K}" if K == V else f"K={K}, V={V}"
        return f"{self.sequences} x {self.tokens // self.sequences}, heads {Hk}/{Hv}, {dims}, bfloat16"


@dataclass(frozen=True)
class Target:
    """``ms``: at most this on an H200."""

    op: str
    shape: Shape
    phase: Phase
    ms: float

    @property
    def peer(self) -> str:
        return f"target on an H200, {self.ms:.2g} ms"


#: The first of them is that of the targets; one sequence is to come within 1.4 times of it.
MAIN, LONG = Shape(32768, 4, (32, 32)), Shape(32768, 1, (32, 32))
_MAIN_MS: dict[str, dict[Phase, float]] = {
    "gated_delta": {"forward": 0.5, "backward": 1.5},
    "kda": {"forward": 0.7, "backward": 2.0},
}
TARGETS = [
    Target(op, shape, phase, slack * ms)
    for shape, slack in ((MAIN, 1.0), (LONG, 1.4))
    for op, phases in _MAIN_MS.items()
    for phase, ms in phases.items()
]

#: Every number of tokens, sequences and value heads, then grouped heads, and wide values.
SWEEP = [
    *(
        Shape(tokens, sequences, (heads, heads))
        for tokens in (32768, 8192)
        for sequences in (4, 1, 8)
        for heads in (32, 16, 8, 64)
    ),
    *(Shape(32768, sequences, (heads // 2, heads)) for sequences in (4, 1) for heads in (32, 64)),
    Shape(32768, 4, (16, 16), (128, 256)),
]
