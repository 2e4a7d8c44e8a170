"""What each kind of pipeline rank does in a step, in seconds on ideal hardware: input of the time model.

Every kind of work is a column, counted at the peak rates of the topology, with what the shape of the work alone decides
(tiles, waves, ranks of a group) already in it. What software makes of it, the efficiencies, is ``calibration.py``; so
one set of columns serves any calibration, and a fit over hundreds of runs is a few array operations. What a layer takes
is ``layers.py``. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from parallel.planning.execution import Execution
from parallel.planning.hardware.collectives import Amount, Span, all_gather_s, span
from parallel.planning.plan import ParallelPlan, Stages
from parallel.planning.timing.layers import BACKWARD, COLUMN, COLUMNS, FORWARD, Again, Groups, LayerCosts, Share, over
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import LayerWorkload, Workload

#: What a pipeline rank holds: how many of each of the model's blocks (``WorkTable.blocks``).
Held = tuple[int, ...]


@dataclass(frozen=True)
class StepWork:
    """A step's work, by kind of pipeline rank: those that hold the same layers are one kind, ``ranks`` many.

    ``columns`` [kinds, 2, COLUMNS]: one micro-batch, forward and backward. Seconds that are spent once a step:
    ``reduce_s`` and ``gather_s`` [kinds] of gradients and weights over data parallelism, ``optimizer_s`` of its reads
    and writes. ``hop_s``: a message to the next pipeline rank. Steps side by side have a first axis more in all.
    """

    columns: np.ndarray
    ranks: np.ndarray
    reduce_s: np.ndarray
    gather_s: np.ndarray
    optimizer_s: np.ndarray
    hop_s: Any
    micro_batches: Any
    pp: Any
    vpp: Any
    world_size: Any
    zero_bubble: Any = 0.0
    kind_of_rank: tuple[int, ...] = ()


def stacked(works: Sequence[StepWork]) -> StepWork:
    """Steps along a new first axis, padded with kinds that no rank is of."""
    kinds = max(len(work.ranks) for work in works)

    def padded(name: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        out = np.zeros((len(works), kinds, *shape))
        for index, work in enumerate(works):
            out[index, : len(work.ranks)] = getattr(work, name)
        return out

    def scalars(name: str) -> Any:
        return np.array([getattr(work, name) for work in works], dtype=float)

    return StepWork(
        padded("columns", (2, len(COLUMNS))),
        padded("ranks"),
        padded("reduce_s"),
        padded("gather_s"),
        padded("optimizer_s"),
        *(scalars(name) for name in ("hop_s", "micro_batches", "pp", "vpp", "world_size", "zero_bubble")),
    )


class Once(NamedTuple):
    """What a step has once, seconds: of gradients and weights over data parallelism, and of the update; with weights
    sharded (FSDP) instead, in each micro-batch, ``weights_s`` forward and ``regather_s`` backward."""

    reduce_s: Amount
    gather_s: Amount
    optimizer_s: Amount
    weights_s: Amount
    regather_s: Amount


class WorkTable:
    """Work of one model on one machine, run in one way. Layers of one kind cost the same, so that many plans ask for
    few distinct layers; they are remembered here. ``blocks``: one of each kind of layer, embedding and head last."""

    def __init__(self, workload: Workload, execution: Execution, topology: HardwareTopology) -> None:
        self.workload, self.execution, self.topology = workload, execution, topology
        self.costs = LayerCosts(workload, execution, topology)
        kinds = {layer.kind: layer for layer in workload.layers}
        self._number = {kind: number for number, kind in enumerate(sorted(kinds))}
        self.blocks = (*(kinds[kind] for kind in sorted(kinds)), workload.embedding, workload.head)
        self._parameters = [_by_family(block) for block in self.blocks]
        self._layers: dict[tuple[Share, Again], np.ndarray] = {}
        self._pipelines: dict[tuple[int, Stages], tuple[dict[Held, int], tuple[int, ...]]] = {}

    def step(self, plan: ParallelPlan) -> StepWork:
        """The work of a step under ``plan``."""
        share, way = self._share(plan), Again.of(plan.recompute, self.execution)
        if (share, way) not in self._layers:
            self._layers[share, way] = np.array([self.costs.work(block, share, [way])[0] for block in self.blocks])
        layers = self._layers[share, way]
        kinds, kind_of_rank = self.pipeline(plan.pp, plan.stages)
        groups = [self.limited(span(plan, axes, self.topology)) for axes in (("cp", "dp"), ("edp",))]
        columns = np.array([np.tensordot(held, layers, 1) for held in kinds])
        once = []
        for held, work in zip(kinds, columns, strict=True):
            parameters = self.parameters(held, plan.tp, plan.ep, plan.etp)
            once.append(self.once(parameters, plan.zero, groups, "optimizer" in self.execution.offload))
            work[FORWARD, COLUMN["weights"]] += once[-1].weights_s
            work[BACKWARD, COLUMN["weights"]] += once[-1].regather_s
        return StepWork(
            columns,
            np.array(list(kinds.values()), dtype=float),
            np.array([each.reduce_s for each in once]),
            np.array([each.gather_s for each in once]),
            np.array([each.optimizer_s for each in once]),
            self.costs.hop_s(share, span(plan, ("pp",), self.topology)),
            plan.num_micro_batches,
            plan.pp,
            plan.vpp,
            plan.world_size,
            float(self.execution.schedule == "zero_bubble"),
            kind_of_rank,
        )

    def _share(self, plan: ParallelPlan) -> Share:
        tokens = plan.micro_batch * self.workload.seq_len // plan.cp
        spans = [span(plan, axes, self.topology) for axes in (("tp",), ("ep",), ("cp",), ("etp",))]
        return Share(tokens, plan.tp, plan.ep, plan.etp, plan.cp, plan.sequence_parallel, *spans)

    def pipeline(self, pp: int, stages: Stages) -> tuple[dict[Held, int], tuple[int, ...]]:
        """Pipeline ranks by what they hold, with how many there are; and which of these each rank is."""
        if (pp, stages) not in self._pipelines:
            self._pipelines[pp, stages] = self._pipeline(pp, stages)
        return self._pipelines[pp, stages]

    def _pipeline(self, pp: int, stages: Stages) -> tuple[dict[Held, int], tuple[int, ...]]:
        found: dict[Held, int] = {}
        each = []
        numbers = [self._number[layer.kind] for layer in self.workload.layers]
        for rank in range(pp):
            held = [0] * len(self.blocks)
            for chunk in stages[rank::pp]:
                for number in numbers[chunk[0] : chunk[-1] + 1]:
                    held[number] += 1
            held[-2:] = int(rank == 0), int(rank == pp - 1)
            found[tuple(held)] = found.get(tuple(held), 0) + 1
            each.append(tuple(held))
        order = {kind: index for index, kind in enumerate(found)}
        return found, tuple(order[kind] for kind in each)

    def parameters(self, held: Sequence[Amount], tp: Amount, ep: Amount, etp: Amount) -> tuple[Amount, Amount]:
        """Parameters that a rank holds with so many of each block: dense ones and those of experts."""
        dense, experts = 0.0, 0.0
        for count, (cut, whole, expert) in zip(held, self._parameters, strict=True):
            dense = dense + count * (cut / tp + whole)
            experts = experts + count * (expert / (ep * etp))
        return dense, experts

    def limited(self, group: Span) -> Span:
        """The ranks of a group that share an optimizer's state."""
        parts = self.execution.zero_parts
        return Span(parts, min(group.per_domain, parts)) if parts and group.ranks > parts else group

    def once(self, parameters: Sequence[Amount], zero: Amount, groups: Sequence[Groups], offloaded: Amount) -> Once:
        """Seconds of reducing gradients, gathering weights and updating them, for what ranks hold of either family.
        ``zero``: what the plans shard; ``offloaded``: whether the update happens in host memory."""
        execution, topology = self.execution, self.topology
        reduce_s = gather_s = weights_s = regather_s = updated = 0.0
        whole, sharded = np.equal(zero, 0), np.equal(zero, 3)
        for held, group in zip(parameters, groups, strict=True):
            gradients = over(group, self._gathered, held * execution.gradient_bytes)
            weights = over(group, self._gathered, held * execution.element_bytes)
            weights_s = weights_s + sharded * weights
            regather_s = regather_s + sharded * (weights + gradients)
            reduce_s = reduce_s + (1 + whole) * ~sharded * gradients
            gather_s = gather_s + ~whole * ~sharded * weights
            updated = updated + held / np.where(whole, 1, group.ranks)
        # Gradient read; master weight and two moments read and written; weight written.
        state = 2 * (execution.master_bytes + 2 * execution.moment_bytes)
        touched = execution.gradient_bytes + execution.element_bytes
        memory = topology.known("device.memory_bandwidth")
        there = topology.known("host_link.bandwidth") if np.any(offloaded) else memory
        seconds = touched / memory + state / np.where(offloaded, there, memory)
        return Once(reduce_s, gather_s, updated * seconds, weights_s, regather_s)

    def _gathered(self, size: Amount, group: Span) -> Amount:
        return all_gather_s(size, group, self.topology)


def _by_family(block: LayerWorkload) -> tuple[int, int, int]:
    """Parameters of a block that tensor parallelism cuts, that nothing cuts, and of its experts."""
    cut = whole = experts = 0
    for axes, parameters in block.parameters_by_axes().items():
        if "ep" in axes:
            experts += parameters
        elif "tp" in axes:
            cut += parameters
        else:
            whole += parameters
    return cut, whole, experts
