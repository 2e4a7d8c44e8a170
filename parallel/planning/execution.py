"""Execution: how a plan's work is run, where the same ranks and layers leave a choice. No torch.

Memory and time models read it beside the plan. ``Execution()`` with a dtype is what Stoker's engine does; the other
values describe what other stacks do, for ``--what-if`` and ``evaluate`` (``capabilities.py`` says which is which).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from stoker.errors import Refusal

#: What matrix products of the layers run in. The rest (head, router, norms, attention) runs in ``base_dtype``.
Precision = Literal["float64", "float32", "float16", "bfloat16", "fp8", "fp8_block", "mxfp8", "nvfp4"]
#: Training software whose efficiency differs for reasons that no shape explains. ``stoker`` has no published runs.
Stack = Literal["stoker", "megatron", "fsdp", "torchtitan", "automodel", "primus", "neuron"]
Schedule = Literal["1f1b", "zero_bubble"]
Dispatcher = Literal["alltoall", "deepep", "hybridep"]
#: Parts of a layer that backward can run again, beside the plan's own recompute mode.
Module = Literal["core_attention", "norm", "activation", "moe_activation", "mla_up", "mlp", "moe", "shared_expert"]
Routing = Literal["balanced", "dropped", "real"]
#: What is launched as one CUDA graph: nothing, parts of each layer, or the whole iteration.
Graphs = Literal["none", "partial", "full"]

ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4}


@dataclass(frozen=True)
class Execution:
    """``generation``: of the software, as (year, month); calibration takes the nearest earlier one it knows.
    ``schedule``: of a pipeline; interleaving is the plan's ``vpp``. ``recompute_modules``: what backward runs again,
    beside the plan's own mode. ``offload``: what lives in host memory; ``offload_share``: of the layers whose
    activations do. ``gradient_bytes``, ``moment_bytes``, ``master_bytes``: an element of the accumulated gradient, of
    each Adam moment, of the master weights (0: none). ``zero_parts``: ranks that share the sharded state, where fewer
    than dp (hybrid sharding).
    ``expert_overlap``: the expert exchange of one micro-batch runs under another's computation. ``tensor_overlap``:
    gathers and scatters are cut and run under the products that need them. ``fused_experts``: the grouped products of
    experts run as one kernel with activation and quantisation. ``fp8_attention``: attention's products in FP8 as well.
    ``routing``: balanced as benchmarks force it, with tokens dropped, or as a router decides.
    """

    precision: Precision = "bfloat16"
    stack: Stack = "stoker"
    generation: tuple[int, int] = (2026, 11)
    schedule: Schedule = "1f1b"
    dispatcher: Dispatcher = "alltoall"
    recompute_modules: tuple[Module, ...] = ()
    offload: tuple[Literal["optimizer", "activations"], ...] = ()
    offload_share: float = 1.0
    gradient_bytes: int = 4
    moment_bytes: int = 4
    master_bytes: int = 4
    expert_overlap: bool = False
    tensor_overlap: bool = False
    graphs: Graphs = "none"
    fused_experts: bool = False
    fp8_attention: bool = False
    deterministic: bool = False
    routing: Routing = "balanced"
    zero_parts: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("precision", Precision), ("stack", Stack), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(allowed):
                raise Refusal(f"{name}={getattr(self, name)!r}: choose one of {', '.join(get_args(allowed))}")

    @property
    def base_dtype(self) -> str:
        """What everything runs in that is not a quantised product."""
        return self.precision if self.precision in ("float64", "float32", "float16") else "bfloat16"

    @property
    def element_bytes(self) -> int:
        """Of an activation or a weight in ``base_dtype``."""
        return ELEMENT_BYTES.get(self.base_dtype, 2)

    @property
    def quantised(self) -> bool:
        return self.precision in ("fp8", "fp8_block", "mxfp8", "nvfp4")
