"""Numbers of the time model that were set by hand and are not fitted: what they are is beside them where they stand.

``stoker plan evaluate --constants`` prints them below the fitted ones. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from parallel.planning.hardware import collectives
from parallel.planning.timing import calibration, layers, step_time

#: Names in the modules of the time model, with what they say.
MEANINGS = {
    collectives: {
        "SWITCH_STEPS": "steps of a ring that a reduction in the switch takes to begin, and a transfer to speed up",
        "SCATTERED": "share of a ring's stream that a link carries where a device talks to all others at once",
    },
    layers: {
        "TILES": "output tiles of a matrix product, rows and columns, and their throughput against the best",
        "INNER_HALF": "depth of the inner dim at which a tile's start-up costs as much as its products",
        "ATTENTION_BACKWARD": "time of attention's backward against what its model FLOPs say",
        "HEAD_DIM_POWER": "power of the head dim, against 128, by which attention's throughput grows",
        "SCATTERED_UNTIL": "year and month until which a stage was sent in shares and gathered",
        "ATTENTION_TILE": "tokens of a tile of attention's scores, in full on the diagonal",
        "QUANTISE_BYTES": "bytes that quantising an element moves",
    },
    calibration: {
        "AMPERE_INSTRUCTIONS": "share of its speed that a later architecture reaches with Ampere's instructions",
        "FP8_ATTENTION": "speed of attention with its products in FP8, against bfloat16",
        "ATTENTION_YEAR": "year from which attention kernels are written for their hardware",
        "ROUTING_GENERATIONS": "years and months at which routing became faster",
        "KERNEL_HOST_S": "seconds of the host to launch a kernel",
        "GRAPHS": "what is left of the host's work under CUDA graphs",
        "POWER_RATIO": "watts per TFLOP/s of the base dtype's peak at which `product` is stated",
        "OVERLAP_GENERATION": "year and month from which gradients are reduced while backward computes",
        "STATIC": "what is left of waiting for a routing's counts where experts take a fixed number of tokens",
    },
    step_time: {
        "STREAM": "share of memory bandwidth that a large element-wise kernel reaches",
        "UNSEEN": "power of the spread for an architecture without fitted runs",
    },
}


class HandSet(NamedTuple):
    """``where``: "timing/layers.py"; ``value`` as the code has it."""

    name: str
    value: Any
    meaning: str
    where: str


def hand_set() -> Iterator[HandSet]:
    """Every one, with the value that holds now."""
    for module, meanings in MEANINGS.items():
        where = "/".join(module.__name__.split(".")[2:]) + ".py"
        yield from (HandSet(name, getattr(module, name), meaning, where) for name, meaning in meanings.items())
