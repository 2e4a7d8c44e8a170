"""Calibration: the few physical constants between ideal hardware and what software makes of it. No torch.

Constants belong to classes (architecture, precision, software stack, generation), never to a run, a model or a source.
What a class does not have it takes from its parent: an architecture without runs has the common efficiency, a
generation that is not known has that of the nearest earlier one. ``calibration.json`` holds the values with where they
come from; ``fit.py`` makes it from published runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from parallel.planning.execution import Execution
from parallel.planning.topology import HardwareTopology
from stoker import formats

FORMAT, VERSION = "planner-calibration", 1


@dataclass(frozen=True)
class Constant:
    """``kind``: a ``rate`` is positive (fitted as a logarithm), a ``share`` lies in (0, 1) (as a logit), a ``shift``
    is a logarithm of a factor, 0 where nothing is known. ``prior`` and ``width``: what is believed before any run, in
    those coordinates' natural values; ``width`` in the fitted coordinate. ``least`` to ``most``: where it should lie if
    it is what it is called, a shift as its factor; a fit is not held to that, and what lies outside is told."""

    name: str
    kind: Literal["rate", "share", "shift"]
    prior: float
    width: float
    meaning: str
    least: float = 0.0
    most: float = math.inf

    def natural(self, value: float) -> float:
        """A shift as the factor that it is."""
        return math.exp(value) if self.kind == "shift" else value

    def is_physical(self, value: float) -> bool:
        return self.least <= self.natural(value) <= self.most


#: Stacks told apart from Megatron-core, and how much slower their kernels are believed to be: unfused and eager.
STACKS = {"fsdp": -0.15, "torchtitan": -0.15, "automodel": -0.15, "primus": -0.1, "neuron": -0.2}

CONSTANTS = (
    Constant(
        "product", "rate", 0.70, 0.06, "achieved share of peak of a large matrix product in the base dtype", most=1.0
    ),
    Constant("power", "rate", 0.4, 0.2, "power of its growth with watts per TFLOP/s, against 0.5: clocks follow power"),
    *(
        Constant(f"product.{name}", "shift", 0.0, 0.05, f"the same on {name}, beside what its power explains")
        for name in ("ampere", "hopper", "blackwell", "blackwell-ultra")
    ),
    Constant(
        "precision.fp8",
        "rate",
        0.92,
        0.1,
        "FP8 by tensor scales: share of its peak, against the base dtype's",
        most=1.0,
    ),
    Constant("precision.fp8_block", "rate", 0.8, 0.1, "FP8 by blocks of 128 or by rows", most=1.0),
    Constant("precision.mxfp8", "rate", 0.88, 0.1, "FP8 by blocks of 32", most=1.0),
    Constant("precision.nvfp4", "rate", 0.6, 0.2, "FP4 by blocks of 16, some products in more bits", most=1.0),
    Constant("attention", "rate", 0.6, 0.1, "achieved share of peak of flash attention at head dim 128", most=1.0),
    *(
        Constant(f"attention.{name}", "shift", 0.0, 0.12, f"the same on {name}, against the common value")
        for name in ("ampere", "hopper", "blackwell", "blackwell-ultra")
    ),
    Constant(
        "attention.early", "rate", 0.65, 0.15, "attention kernels before 2024 on Ampere, against later ones", most=1.0
    ),
    Constant(
        "linear", "rate", 0.09, 0.4, "achieved share of peak of chunked linear attention and state spaces", most=1.0
    ),
    Constant(
        "experts", "rate", 0.85, 0.07, "grouped products of experts against dense ones of the same shapes", most=1.0
    ),
    Constant(
        "memory", "rate", 0.45, 0.2, "achieved share of memory bandwidth, against ideally fused kernels", most=1.0
    ),
    Constant("routing", "rate", 0.25, 0.3, "the same for routed tokens: permutation, padding, quantisation", most=1.0),
    Constant(
        "routing.fused", "shift", 0.5, 0.3, "the same where products and what lies between are one kernel", least=1.0
    ),
    *(
        Constant(f"routing.{name}", "shift", 0.1, 0.2, f"the same with software from {name} on", least=1.0)
        for name in ("2025-11", "2026-02")
    ),
    Constant("kernel_gap_s", "rate", 4e-6, 0.2, "start-up and drain of an operation's kernels on the device, seconds"),
    Constant("routed_kernel_s", "rate", 1.5e-5, 0.5, "the same of operations of routing, which wait for counts"),
    Constant("expert_kernel_s", "rate", 1.5e-5, 0.5, "the same of a product of one expert, quantisation included"),
    Constant("links", "rate", 0.85, 0.05, "achieved share of link bandwidth of collectives", most=1.0),
    Constant("exchange", "rate", 0.75, 0.12, "achieved share of link bandwidth of the expert exchange", most=1.0),
    Constant("tensor_overlap", "share", 0.6, 0.5, "share of tensor-parallel traffic hidden, where it is overlapped"),
    Constant("expert_overlap", "share", 0.8, 0.8, "share of the expert exchange hidden, where it is overlapped"),
    Constant("contention", "share", 0.1, 0.5, "slow-down of computation under hidden traffic, seconds a second"),
    Constant("weights_contention", "share", 0.25, 0.5, "the same under gathers of sharded weights (FSDP)"),
    Constant("stragglers", "rate", 0.004, 0.3, "growth of the step with every doubling of the ranks above eight"),
    Constant("step_s", "rate", 0.01, 0.4, "seconds of a step that nothing above explains"),
    Constant(
        "real_routing", "rate", 0.85, 0.15, "speed of experts under a router's own balance, against even load", most=1.0
    ),
    *(
        Constant(
            f"stack.{name}", "shift", prior, 0.1, f"speed of computation under {name}, against Megatron-core", most=1.0
        )
        for name, prior in STACKS.items()
    ),
)
#: Share of its peak that a later architecture reaches with Ampere's instructions, as attention kernels before 2024 use
#: them (FlashAttention-3, arXiv 2407.08608, section 1: 35 % of H100's peak with FlashAttention-2, 70 % on A100).
AMPERE_INSTRUCTIONS = 0.5
#: Attention with its products in FP8 against bfloat16 (FlashAttention-3, section 4.1: 740 to 1200 TFLOP/s at best on
#: H100, head dim 256; less where exponentials weigh more).
FP8_ATTENTION = 1.3
#: Software from this year on has attention kernels written for its hardware.
ATTENTION_YEAR = 2024
ROUTING_GENERATIONS = ((2025, 11), (2026, 2))
#: Host time of launching a kernel, seconds: 4 to 6 us in PyTorch and Transformer Engine; the published runs do not tell
#: it apart, since few of them wait for the host alone.
KERNEL_HOST_S = 5e-6
#: What of the host's work is left where parts of each layer, or all of an iteration, are launched as CUDA graphs.
GRAPHS = {"none": 1.0, "partial": 0.6, "full": 0.1}
#: Watts per TFLOP/s of the base dtype's peak at which ``product`` is stated.
POWER_RATIO = 0.5


#: Software from then on reduces gradients and, interleaved, sends to the next stage while it computes; Stoker's engine
#: does neither yet.
OVERLAP_GENERATION = (2022, 6)
#: The same of waiting for a routing's counts where every expert takes a fixed number of tokens and drops the rest.
STATIC = 0.2


@dataclass(frozen=True)
class Efficiencies:
    """What the constants come to for one run (floats) or for many (arrays of one length)."""

    product: Any
    quantised: Any
    experts: Any
    quantised_experts: Any
    attention: Any
    linear: Any
    memory: Any
    routing: Any
    kernel_gap_s: Any
    kernel_host_s: Any
    routed_kernel_s: Any
    expert_kernel_s: Any
    links: Any
    exchange: Any
    tensor_overlap: Any
    expert_overlap: Any
    contention: Any
    weights_contention: Any
    overlap: Any
    stragglers: Any
    step_s: Any

    def over(self, axes: int) -> Efficiencies:
        """With ``axes`` trailing axes of length one, to broadcast over kinds and directions."""
        return Efficiencies(
            *(np.reshape(v, np.shape(v) + (1,) * axes) for v in (getattr(self, f.name) for f in fields(self)))
        )


def efficiencies(values: Mapping[str, float], topology: HardwareTopology, execution: Execution) -> Efficiencies:
    """The constants of a run's class. ``values``: every constant by name."""
    architecture = topology.device.architecture
    speed = np.exp(values.get(f"stack.{execution.stack}", 0.0))
    product = values["product"] * np.exp(values.get(f"product.{architecture}", 0.0)) * speed
    if power_w := topology.device.power_w:
        ratio = power_w / (topology.device.peak_flops["bfloat16"] / 1e12) / POWER_RATIO
        product = product * ratio ** values["power"]
    quantised = product * values.get(f"precision.{execution.precision}", 1.0)
    experts = values["experts"] * (values["real_routing"] if execution.routing == "real" else 1.0)
    early = execution.generation[0] < ATTENTION_YEAR
    written_for = "ampere" if early else architecture
    attention = values["attention"] * np.exp(values.get(f"attention.{written_for}", 0.0)) * speed
    if early:
        attention = attention * values["attention.early"] * (1.0 if architecture == "ampere" else AMPERE_INSTRUCTIONS)
    if execution.fp8_attention:
        attention = attention * FP8_ATTENTION
    graphs = GRAPHS[execution.graphs]
    routing = values["routing"] * speed * (np.exp(values["routing.fused"]) if execution.fused_experts else 1.0)
    for since in ROUTING_GENERATIONS:
        if execution.generation >= since:
            routing = routing * np.exp(values["routing.{}-{:02}".format(*since)])
    return Efficiencies(
        product=product,
        quantised=quantised,
        experts=product * experts,
        quantised_experts=quantised * experts,
        attention=attention,
        linear=values["linear"] * speed,
        memory=values["memory"],
        routing=routing,
        kernel_gap_s=values["kernel_gap_s"],
        kernel_host_s=0.0 if architecture == "cpu" else KERNEL_HOST_S * graphs,
        routed_kernel_s=values["routed_kernel_s"] * (STATIC if execution.routing == "dropped" else graphs),
        expert_kernel_s=values["expert_kernel_s"],
        links=values["links"],
        exchange=values["exchange"],
        tensor_overlap=values["tensor_overlap"] if execution.tensor_overlap else 0.0,
        expert_overlap=values["expert_overlap"] if execution.expert_overlap else 0.0,
        contention=values["contention"],
        weights_contention=values["weights_contention"],
        overlap=float(execution.stack != "stoker" and execution.generation >= OVERLAP_GENERATION),
        stragglers=values["stragglers"],
        step_s=values["step_s"],
    )


@dataclass(frozen=True)
class Calibration:
    """``values``: every constant. ``spreads``: factor that four of five held-out runs lie within, by kind of model."""

    values: Mapping[str, float]
    spreads: Mapping[str, float]
    provenance: Mapping[str, Any]

    def efficiencies(self, topology: HardwareTopology, execution: Execution) -> Efficiencies:
        return efficiencies(self.values, topology, execution)

    def spread(self, kind: str) -> float:
        return self.spreads[kind]

    def has_seen(self, topology: HardwareTopology) -> bool:
        """Whether runs on the architecture were fitted: it has a constant of its own, or is the CPU measured."""
        architecture = topology.device.architecture
        return architecture == "cpu" or f"product.{architecture}" in self.values


def priors() -> dict[str, float]:
    return {constant.name: constant.prior for constant in CONSTANTS}


@lru_cache(maxsize=1)
def load_calibration() -> Calibration:
    """The calibration that comes with Stoker."""
    path = files("parallel.planning.timing") / "calibration.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    formats.require(stored, FORMAT, VERSION, "parallel/planning/timing/calibration.json")
    return Calibration(stored["values"], stored["spreads"], stored["provenance"])
