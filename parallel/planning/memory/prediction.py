"""How much memory each pipeline stage of a plan takes on its device, by component: an estimate and an upper bound.

    predict_memory(workload, plan, execution, topology).fits(topology)

``allocated`` is what torch's allocator reports at its peak (``max_memory_allocated``); ``device`` adds what lies
outside it: context, communicators, dispatchers, fragmentation. What one layer takes is ``blocks.py``, how many
micro-batches are in flight ``flight.py``; here stages are put together and state is cut over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parallel.planning.execution import Execution, Stack
from parallel.planning.memory.blocks import (
    EXPERT_KEPT,
    FLOAT32_BYTES,
    HAND,
    KEPT,
    LAYER,
    UNIT,
    BlockMemory,
    Cut,
    ModelBlocks,
    model_blocks,
)
from parallel.planning.memory.flight import flight
from parallel.planning.memory.state import gathered_bytes, state_bytes, widened_gradient_bytes
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload

MIB = 2**20
#: CUDA context with kernels loaded, on Hopper and Blackwell (planner.md, section 2: 0.6 to 1 GB).
CONTEXT_BYTES = 0.8e9
#: Of a communicator with its channels: 4 MiB (NCCL_BUFFSIZE) for each of 16 channels, to send and to receive, twice.
COMMUNICATOR_BYTES = 256 * MIB
#: Reserved over allocated, in the mean and at most (planner.md, section 2: 1.03 to 1.10).
FRAGMENTATION, MOST_FRAGMENTATION = 1.03, 1.10
#: cuBLAS' and TransformerEngine's: 32 MiB each on Hopper and later (cuBLAS documentation, cublasSetWorkspace).
WORKSPACE_BYTES = 64 * MIB
#: Copies of a token that DeepEP's buffers hold: 10 channels of 512 from each of 8 peers (its csrc/config.hpp, 2025-02).
DEEPEP_COPIES = 10 * 512 * 8

#: Bytes that an output logit has at the peak of the loss: without tp, over tp. Stoker (``pretrain/objective.py``):
#: log-probabilities and two gradients in float32, as torch's cross entropy has them; over tp the logit and four float32
#: copies. llm-foundry and AutoModel: a fused loss, whose gradient takes the place of the logits. Megatron and the rest:
#: the logit and a float32 copy, in place from there on; at most, with Megatron's ``native`` fusion, two copies.
LOGIT_BYTES: Mapping[Stack, tuple[float, float]] = {"stoker": (12, 18), "fsdp": (4, 4), "automodel": (4, 4)}
MEGATRON_LOGIT_BYTES, MEGATRON_MOST_LOGIT_BYTES = 6.0, 10.0
#: Kept of the logits of each depth of multi-token prediction while the main loss is made: float32 probabilities.
KEPT_LOGIT_BYTES = 4.0

#: Copies of tokens that a rank's experts see over the mean, where a router decides: usual and most. Megatron's golden
#: runs of Mixtral and DeepSeek-V3's proxy lie between 1.1 and 1.75 at their worst step.
USUAL_IMBALANCE, MOST_IMBALANCE = 1.25, 2.0
#: What no term names of everything but the state: rounding of the allocator, scratch memory, small tensors.
UNNAMED = 0.05

NOT_MODELLED = (
    "dense attention masks and tables of packed documents",
    "scratch memory of kernels (split reductions, float32 gradients of queries)",
    "user buffers of overlapped tensor parallelism, CUDA graphs' pools",
    "layers that a quantised run leaves in bfloat16",
    "copies that an asynchronous checkpoint makes",
)

#: Components that torch's allocator holds and those outside it.
ALLOCATED = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "working",
    "logits",
    "gathered",
    "messages",
    "workspace",
)
OUTSIDE = ("context", "communicators", "dispatcher", "fragmentation")


@dataclass(frozen=True)
class StageMemory:
    """Pipeline rank ``pp``: bytes by component at the moment of its peak; ``allocated_upper`` and ``upper`` bound
    ``allocated`` and ``device``. ``resting``: allocated between steps."""

    pp: int
    components: Mapping[str, float]
    resting: float
    allocated_upper: float
    upper: float

    @property
    def allocated(self) -> float:
        return sum(self.components[name] for name in ALLOCATED)

    @property
    def device(self) -> float:
        return sum(self.components.values())


@dataclass(frozen=True)
class MemoryPrediction:
    """``stages`` by pipeline rank; the figures of the prediction are those of its worst stage."""

    stages: tuple[StageMemory, ...]
    not_modelled: tuple[str, ...] = NOT_MODELLED

    @property
    def allocated(self) -> float:
        return max(stage.allocated for stage in self.stages)

    @property
    def peak(self) -> float:
        return max(stage.device for stage in self.stages)

    @property
    def upper(self) -> float:
        return max(stage.upper for stage in self.stages)

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.device)

    def fits(self, topology: HardwareTopology, cautious: bool = True) -> bool:
        """Whether the upper bound (or the estimate) is within the device's usable memory."""
        size = topology.known("device.memory_bytes")
        return (self.upper if cautious else self.peak) <= size


def predict_memory(
    workload: Workload, plan: ParallelPlan, execution: Execution, topology: HardwareTopology
) -> MemoryPrediction:
    """What each pipeline stage of ``plan`` takes of its device.

    >>> prediction = predict_memory(workload, plan, Execution(), load_hardware("h100"))
    >>> prediction.worst.components["activations"], prediction.upper
    """
    on_cpu = topology.device.architecture == "cpu"
    blocks = model_blocks(workload, Cut.of(plan, workload), plan.recompute, execution, on_cpu)
    sums, most = blocks.by_chunk(plan, workload.tied_embedding)
    totals = sums.sum(0)
    state = state_bytes(totals, plan, execution, topology.device.architecture)
    running, more = _running(sums, most, blocks, plan, execution)
    workspace = np.full(plan.pp, 0.0 if on_cpu else WORKSPACE_BYTES)
    steady, busy = sum(state.values(), workspace), sum(running.values(), 0.0 * workspace)
    # The update comes when activations are gone.
    widened = widened_gradient_bytes(totals, plan, execution)
    running["working"] = running["working"] + np.maximum(widened - busy, 0.0)
    # A chunk keeps the input that it last received, and that input's gradient, until it is given the next.
    received = 2 * blocks.message * (plan.vpp - (np.arange(plan.pp) == 0)) if plan.pp > 1 else 0.0
    return _prediction(
        {**state, **running, "workspace": workspace},
        resting=steady + widened + received,
        upper=steady + np.maximum((1 + UNNAMED) * busy + more, widened),
        outside=dict.fromkeys(OUTSIDE[:-1], 0.0) if on_cpu else _outside(plan, execution, blocks),
        on_cpu=on_cpu,
    )


def _prediction(
    components: Mapping[str, np.ndarray],
    resting: np.ndarray,
    upper: np.ndarray,
    outside: dict[str, float],
    on_cpu: bool,
) -> MemoryPrediction:
    """Stages from figures of all stages, [pp] each."""
    usual, most = (0.0, 0.0) if on_cpu else (FRAGMENTATION - 1, MOST_FRAGMENTATION - 1)
    rest = sum(outside.values())
    names = [*components, "fragmentation"]
    inside = np.array(list(components.values()))
    rows = np.vstack([inside, usual * inside.sum(0)]).T.tolist()
    return MemoryPrediction(
        tuple(
            StageMemory(
                pp, dict(zip(names, row, strict=True)) | outside, stage_resting, bound, bound * (1 + most) + rest
            )
            for pp, (row, stage_resting, bound) in enumerate(zip(rows, resting.tolist(), upper.tolist(), strict=True))
        )
    )


def _running(
    sums: np.ndarray, most: np.ndarray, blocks: ModelBlocks, plan: ParallelPlan, execution: Execution
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What a step needs beside the state, [pp] each, at the moment when a stage needs most, and how much more it may
    be: where more tokens visit the stage's experts than usual, or the loss is not made in place."""
    pp, vpp = plan.pp, plan.vpp
    kept, expert = sums[..., KEPT].T.copy(), sums[..., EXPERT_KEPT].T
    if execution.routing == "real":
        kept += (USUAL_IMBALANCE - 1) * expert
    if pp > 1 and execution.stack == "stoker":
        # The pipeline keeps what a chunk received and what it sent until the micro-batch comes back. The very tensor
        # received is what a norm without a wider copy keeps, or a layer that is made again.
        received = execution.element_bytes < FLOAT32_BYTES and plan.recompute == "none"
        kept += blocks.message * (received + 1)
        kept[0, 0] -= blocks.message * received
        kept[-1, -1] -= blocks.message
    zero_bubble = execution.schedule == "zero_bubble"
    held = flight(pp, vpp, plan.num_micro_batches, plan.microbatch_group_size(), zero_bubble)
    activations = np.matmul(held.counts, kept[..., None])[..., 0]
    layer = most[..., LAYER].max(0)
    if "activations" in execution.offload:  # of layers whose activations wait in host memory, one runs, one travels
        share, stays = execution.offload_share, np.minimum(activations, 2 * layer[:, None])
        activations = (1 - share) * activations + share * stays
    ranks = np.arange(pp)
    hand = most[..., HAND].T[ranks[:, None], held.backward]
    if execution.expert_overlap:  # a layer of the forward pass is done before one of the backward pass is
        hand = hand + layer[:, None]
    logits = np.zeros_like(hand)
    logits[-1] = np.where(held.forward[-1] == vpp - 1, _loss_bytes(plan, execution, blocks.head), 0.0)
    peak = ranks, np.argmax(activations + np.maximum(hand, logits), axis=1)
    hand, logits = hand[peak], logits[peak]
    components = {
        "activations": activations[peak],
        "working": np.where(hand >= logits, hand, 0.0),
        "logits": np.where(hand >= logits, 0.0, logits),
        "gathered": gathered_bytes(plan, execution) * most[..., UNIT].max(0),
        "messages": np.full(pp, (0 if pp == 1 else 2 if vpp == 1 else 4) * blocks.message),
    }
    more = np.zeros(pp)
    if execution.routing == "real":
        more = more + (MOST_IMBALANCE - USUAL_IMBALANCE) * (held.counts[peak] * expert).sum(1)
    if execution.stack not in LOGIT_BYTES:
        most_logits = MEGATRON_MOST_LOGIT_BYTES / MEGATRON_LOGIT_BYTES * logits
        more = more + np.maximum(most_logits - np.maximum(hand, logits), 0.0)
    return components, more


def _loss_bytes(plan: ParallelPlan, execution: Execution, head: BlockMemory) -> float:
    """Of the output logits of a micro-batch at the peak of the loss; heads of further tokens keep theirs meanwhile."""
    alone, split = LOGIT_BYTES.get(execution.stack, (MEGATRON_LOGIT_BYTES, MEGATRON_LOGIT_BYTES))
    each = (alone if plan.tp == 1 else split) + (head.depths - 1) * KEPT_LOGIT_BYTES
    return each * head.logits / head.depths * max(1, execution.element_bytes / FLOAT32_BYTES)


def _outside(plan: ParallelPlan, execution: Execution, blocks: ModelBlocks) -> dict[str, float]:
    """What no allocator of torch sees: the context, a communicator for each group of more than one rank, and the
    buffers of the dispatcher. HybridEP's take every token of the group, in dispatch and in combine (deepseek-ai/DeepEP,
    branch hybrid-ep, ``allocate_buffer_for_dispatch``, 2025-10)."""
    sizes = (plan.world_size, plan.tp, plan.cp, plan.dp, plan.pp, plan.ep, plan.etp, plan.edp if plan.ep > 1 else 1)
    copies = 0.0
    if plan.ep > 1 and execution.dispatcher == "hybridep":
        copies = 2 * blocks.routed * plan.ep
    elif plan.ep > 1 and execution.dispatcher == "deepep":
        copies = DEEPEP_COPIES
    return {
        "context": CONTEXT_BYTES,
        "communicators": sum(size > 1 for size in sizes) * COMMUNICATOR_BYTES,
        "dispatcher": copies * blocks.copy,
    }
