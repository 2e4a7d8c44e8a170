"""Shapes of models that a designer would try: widths, depths, experts and mixers as plain numbers. No torch.

    for shape in shapes(topology): shape.workload(seq_len=8192), shape.caches()

Hard rules first: heads, widths and experts divide by the degrees that a domain allows, layers by pipelines, products by
tiles. Proportions stay within those of published models, where scaling laws were fitted and where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from parallel.planning.design.serving import Cache, delta_state, grouped_query
from parallel.planning.models.mixers import attention, kda
from parallel.planning.models.operations import Stream, assemble, layer, mlp, moe
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload

HEAD_DIM = 128
#: Heads of keys and values, or as many of them as divide the heads: Llama-3's 8.
KV_HEADS = 8
WIDTHS = (1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, 12288, 16384)
#: Width over layers. Published: 43 (Qwen3-30B, 2048/48), 117 (DeepSeek-V3, 7168/61), 130 (Llama-3 405B, 16384/126).
ASPECTS = (64, 128)
#: Pipelines of 2, 4 and 8 share the layers out evenly, and so do groups of 1 + 1, 3 + 1 and 7 + 1 mixers.
DEPTH_STEP = 8
#: Hidden width of a dense feed-forward over the width: Llama-3's 3.5 (8B and 70B).
DENSE_RATIO = 3.5
#: Hidden width of all experts that a token visits, over the width: 3 in Qwen3-30B and -235B, 2.6 in DeepSeek-V3.
VISITED_RATIO = 3.0
EXPERTS = (8, 16, 32, 64, 128, 256, 512)
VISITS = (2, 4, 8)
#: Experts over those that a token visits: 4 (Mixtral-8x7B) to 64 (beyond Kimi K2's 48).
EXPANSIONS = (4, 64)
#: Linear layers to one softmax layer: none, Qwen3-Next's and Kimi Linear's 3, MiniMax-01's 7.
RATIOS = (0, 3, 7)
#: Columns of a product are multiples of this: a tile of bfloat16 and a scaling block of FP8, two of them.
TILE = 256


@dataclass(frozen=True)
class Shape:
    """A decoder in plain numbers. ``hidden``: of the dense feed-forward, or of one expert where there are ``experts``,
    ``visits`` of them for a token. ``linear``: KDA layers before each softmax layer."""

    width: int
    layers: int
    hidden: int
    experts: int = 0
    visits: int = 0
    linear: int = 0
    kv_heads: int = KV_HEADS
    vocab: int = 131_072

    @property
    def heads(self) -> int:
        return self.width // HEAD_DIM

    @property
    def expansion(self) -> float:
        """Expert weights over those that a token visits; 1 for a dense model."""
        return self.experts / self.visits if self.experts else 1.0

    @property
    def granularity(self) -> float:
        """Hidden width that a token visits over an expert's."""
        return float(self.visits or 1)

    @property
    def softmax_layers(self) -> int:
        return self.layers // (self.linear + 1)

    def workload(self, seq_len: int, element_bytes: int = 2) -> Workload:
        stream = Stream(self.width, seq_len, element_bytes)
        feed = moe(stream, self.experts, self.visits, self.hidden) if self.experts else mlp(stream, self.hidden)
        softmax = layer(stream, attention(stream, self.heads, self.kv_heads, HEAD_DIM), feed)
        if not self.linear:
            return assemble(stream, self.vocab, (softmax,) * self.layers)
        mixer = kda(stream, self.heads, HEAD_DIM, HEAD_DIM, gate_rank=HEAD_DIM)
        group = (layer(stream, mixer, feed),) * self.linear + (softmax,)
        return assemble(stream, self.vocab, group * self.softmax_layers)

    def caches(self) -> tuple[Cache, ...]:
        """What each layer keeps of a sequence that is decoded."""
        softmax = grouped_query(self.heads, self.kv_heads, HEAD_DIM)
        return ((delta_state(self.heads, HEAD_DIM, HEAD_DIM),) * self.linear + (softmax,)) * self.softmax_layers

    def __str__(self) -> str:
        """ "48 x 4096, 8 of 128 experts x 1536, 3:1": layers x width, feed-forward, linear to softmax."""
        feed = f"{self.visits} of {self.experts} experts x {self.hidden}" if self.experts else f"dense x {self.hidden}"
        return f"{self.layers} x {self.width}, {feed}, " + (f"{self.linear}:1" if self.linear else "softmax")


def shapes(topology: HardwareTopology, vocab: int = 131_072) -> Iterator[Shape]:
    """Every shape to try on the machine, in a fixed order."""
    for width, (experts, visits), linear in product(WIDTHS, _expert_counts(topology), RATIOS):
        ratio = VISITED_RATIO / visits if experts else DENSE_RATIO
        hidden = round(ratio * width / TILE) * TILE
        for layers in _depths(width):
            yield Shape(width, layers, hidden, experts, visits, linear, math.gcd(KV_HEADS, width // HEAD_DIM), vocab)


def _depths(width: int) -> list[int]:
    return sorted({math.ceil(width / aspect / DEPTH_STEP) * DEPTH_STEP for aspect in ASPECTS})


def _expert_counts(topology: HardwareTopology) -> list[tuple[int, int]]:
    """(experts, visits); (0, 0) is dense. Experts share out over the ranks of a domain, or a power of two of them."""
    sizes = topology.domain.practice or (topology.domain.size,)
    low, high = EXPANSIONS
    return [(0, 0)] + [
        (experts, visits)
        for experts, visits in product(EXPERTS, VISITS)
        if low <= experts / visits <= high and any(_shares_out(experts, size) for size in sizes)
    ]


def _shares_out(experts: int, ranks: int) -> bool:
    return math.gcd(experts, ranks) in (experts, ranks)
