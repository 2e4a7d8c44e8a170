"""What lives from step to step on a stage: weights, gradients and the optimizer's state, cut over ranks (ZeRO, FSDP).

Element sizes are ``Execution``'s; which ranks share what is Rajbhandari et al. (arXiv 1910.02054): ``zero`` 1 shards
the optimizer, 2 gradients too, 3 weights too. Dense tensors are shared over dp and cp, experts over edp.
"""

from __future__ import annotations

import numpy as np

from parallel.planning.execution import Execution
from parallel.planning.memory.blocks import (
    DENSE,
    EXPERT,
    FLOAT32_BYTES,
    QUANTISED_BYTES,
    QUANTISED_DENSE,
    QUANTISED_EXPERT,
    WIDE,
)
from parallel.planning.plan import ParallelPlan

#: Stacks in which the sharded float32 parameters are themselves the master weights.
SHARDED_MASTER = frozenset({"fsdp", "torchtitan"})
#: Precisions whose weights exist in the quantised format only, master weights apart (Megatron-Bridge,
#: training/mixed_precision.py, 2026-08: ``fp8_param_gather`` or ``fp4_param_gather`` of each recipe); block-scaled FP8
#: keeps the base dtype as well.
QUANTISED_PRIMARY = frozenset({"fp8", "mxfp8", "nvfp4"})


def state_bytes(
    totals: np.ndarray, plan: ParallelPlan, execution: Execution, architecture: str
) -> dict[str, np.ndarray]:
    """Weights, gradients and optimizer of each stage, [pp] each, from its parameters ``totals [pp, SUMS]``."""
    size, zero, whole, sharded = execution.element_bytes, plan.zero, *_whole_and_sharded(totals, plan, execution)
    # A float64 run has everything in float64; where weights are float32 or wider they are their own master.
    least = size if size > FLOAT32_BYTES else 0
    gradient, moment = max(execution.gradient_bytes, least), max(execution.moment_bytes, least)
    master = execution.master_bytes if size < FLOAT32_BYTES else 0
    wide = totals[:, WIDE] if size < FLOAT32_BYTES else 0.0 * whole
    if zero == 3:
        weights = 0.0 * whole if execution.stack in SHARDED_MASTER else size * sharded
    else:
        weights = size * whole + (FLOAT32_BYTES - size) * wide
        if execution.quantised:
            quantised = totals[:, QUANTISED_DENSE] + totals[:, QUANTISED_EXPERT]
            weights = weights + (_quantised_weight_bytes(execution, architecture) - size) * quantised
    optimizer = (master + 2 * moment) * (sharded if zero else whole)
    optimizer = optimizer - master * wide / (_parts(plan, execution)[0] if zero else 1)
    return {
        "weights": weights,
        "gradients": gradient * (sharded if zero >= 2 else whole),
        "optimizer": 0.0 * optimizer if "optimizer" in execution.offload else optimizer,
    }


def widened_gradient_bytes(totals: np.ndarray, plan: ParallelPlan, execution: Execution) -> np.ndarray:
    """Float32 gradients that the update reads where they are accumulated in less, [pp]: they live from a step's end to
    the next one's beginning."""
    whole, sharded = _whole_and_sharded(totals, plan, execution)
    if execution.gradient_bytes >= FLOAT32_BYTES or execution.stack in SHARDED_MASTER or not execution.master_bytes:
        return 0.0 * whole
    return FLOAT32_BYTES * (sharded if plan.zero else whole)


def gathered_bytes(plan: ParallelPlan, execution: Execution) -> float:
    """Of a parameter of a stage's largest layer while its state is sharded: its weights and the next layer's, and its
    gradient as backward makes it and as it is summed."""
    if plan.zero < 2:
        return 0.0
    gradient = execution.element_bytes + execution.gradient_bytes
    return gradient + (2 * execution.element_bytes if plan.zero == 3 else 0)


def _whole_and_sharded(totals: np.ndarray, plan: ParallelPlan, execution: Execution) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of each stage's rank, and its share of them where they are sharded, [pp] each."""
    parameters = totals[:, [DENSE, EXPERT]]
    return parameters.sum(1), (parameters / _parts(plan, execution)).sum(1)


def _parts(plan: ParallelPlan, execution: Execution) -> np.ndarray:
    """Ranks that share what is sharded, of dense and of expert tensors."""
    limit = execution.zero_parts or plan.world_size
    return np.array([min(plan.dp * plan.cp, limit), min(plan.edp, limit)])


def _quantised_weight_bytes(execution: Execution, architecture: str) -> float:
    """Of a weight of a quantised product: itself, and the transposed copy that backward multiplies with unless products
    of the format and device take either order (per-tensor FP8 on Blackwell)."""
    either_order = execution.precision == "fp8" and architecture.startswith("blackwell")
    copies = QUANTISED_BYTES[execution.precision] * (1 if either_order else 2)
    return copies + (0 if execution.precision in QUANTISED_PRIMARY else execution.element_bytes)
