"""Ways to run a candidate: executions, reliefs of memory, and the plan that comes of them. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from parallel.planning.execution import Dispatcher, Execution, Graphs, Module, Precision
from parallel.planning.models.operations import MODULES
from parallel.planning.plan import ParallelPlan, Recompute
from parallel.planning.search.candidates import Degrees
from parallel.planning.search.problem import Problem
from parallel.planning.search.stages import StageChoice
from parallel.planning.topology import HardwareTopology

#: Parts of a layer that are cheap to run again, for ``Execution.recompute_modules``.
CHEAP_MODULES: tuple[Module, ...] = ("norm", "activation", "mla_up")

#: Share of the device's memory from which on the optimizer's state is worth moving to the host.
OPTIMIZER_SHARE = 0.05

Offload = tuple[Literal["optimizer", "activations"], ...]
#: How far along each of the three ways to need less memory: sharding, recompute, offload.
Steps = tuple[int, int, int]
#: No relief, and weights sharded (FSDP) where they may be.
PLAIN, SHARDED = (0, 0, 0), (1, 0, 0)


class Relief(NamedTuple):
    """What buys memory with time. More ``steps`` on any of the ways are never faster, so that they are tried only where
    fewer do not fit."""

    zero: int
    recompute: Recompute
    modules: tuple[Module, ...]
    offload: Offload
    steps: Steps

    def beyond(self, other: Relief) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self.steps, other.steps, strict=True))

    def further(self) -> Iterator[Steps]:
        """One step further on each of the ways."""
        sharding, recompute, offload = self.steps
        yield from (
            (sharding + 1, recompute, offload),
            (sharding, recompute + 1, offload),
            (sharding, recompute, offload + 1),
        )


class Ways:
    """How the candidates of a problem may be run."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.workload = problem, problem.workload
        self.stages = StageChoice(problem.workload)
        self._reliefs: dict[tuple[bool, tuple[Offload, ...]], Mapping[Steps, Relief]] = {}
        self._topologies: dict[int, HardwareTopology] = {}

    @cached_property
    def executions(self) -> tuple[Execution, ...]:
        """How candidates may be run, beside relief: the engine's way, and under ``what_if`` what others can do."""
        problem = self.problem
        plain = problem.execution or Execution(precision=problem.dtype)
        if problem.execution or not problem.what_if:
            return (plain,)
        domain = problem.topology.domain
        dispatcher: Dispatcher = "deepep" if domain.size == domain.per_host else "hybridep"
        # The shapes of a dropless mixture's experts change with every batch, so that no graph holds the whole of it.
        graphs: Graphs = "partial" if self.workload.has_experts else "full"
        best = replace(plain, dispatcher=dispatcher, graphs=graphs, tensor_overlap=True)
        precisions = [problem.dtype, *(self._eight_bits() if problem.dtype == "bfloat16" else ())]
        return tuple(
            replace(best, precision=precision, schedule=schedule, expert_overlap=overlap)
            for precision in precisions
            for schedule in ("1f1b", "zero_bubble")
            for overlap in ((False, True) if self.workload.has_experts else (False,))
        )

    def _eight_bits(self) -> list[Precision]:
        """FP8 as published runs have it: mixtures in the device's finest blocks, dense models by tensor as well."""
        finest: tuple[Precision, ...] = ("mxfp8", "fp8")
        has = [precision for precision in finest if precision in self.problem.topology.device.peak_flops]
        return has[:1] if self.workload.has_experts else has

    def runs(self, degrees: Degrees, execution: Execution) -> Any:
        """Whether the layout has what the execution is about, where others are tried as well; of many layouts, which
        have."""
        has = degrees.pp > 0
        if self.problem.execution:
            return has
        if execution.schedule == "zero_bubble":
            has = has & (degrees.pp > 1) & (degrees.vpp == 1)
        return has & (degrees.ep > 1) if execution.expert_overlap else has

    def reliefs(self, degrees: Degrees) -> Mapping[Steps, Relief]:
        """Ways to need less memory by their steps, the plain one first and the most of each last."""
        what_if = self.problem.what_if
        # Sharded weights are gathered in every micro-batch: a pipeline would wait for them each time. (Gradients alone
        # sharded, ZeRO-2, are reduced in every micro-batch, which the time model does not count: not tried.)
        sharded = what_if and degrees.pp == 1 and degrees.dp > 1
        offload: tuple[Offload, ...] = (("activations",),)
        if self._optimizer_share(degrees) > OPTIMIZER_SHARE:
            offload = (("optimizer",), ("optimizer", "activations"))
        return self._reliefs_for(sharded, offload)

    def _reliefs_for(self, sharded: bool, offload: tuple[Offload, ...]) -> Mapping[Steps, Relief]:
        key = (sharded, offload)
        if key not in self._reliefs:
            host = self.problem.topology.host_link.bandwidth is not None
            moved = offload * (self.problem.what_if and host)
            self._reliefs[key] = self._reliefs_of((1, 3) if sharded else (1,), ((), *moved))
        return self._reliefs[key]

    def every_relief(self) -> Iterator[Relief]:
        """Those of any layout."""
        moved: tuple[tuple[Offload, ...], ...] = ((("activations",),), (("optimizer",), ("optimizer", "activations")))
        for offload in moved:
            yield from self._reliefs_for(self.problem.what_if, offload).values()

    def _reliefs_of(self, zero: tuple[int, ...], offload: tuple[Offload, ...]) -> Mapping[Steps, Relief]:
        recompute: list[tuple[Recompute, tuple[Module, ...]]] = [("none", ()), ("selective", ()), ("full", ())]
        if self.problem.what_if and self._cheap_modules:
            recompute.insert(1, ("none", self._cheap_modules))
        if "recompute" in self.problem.fixed:
            recompute = [each for each in recompute if each[0] == self.problem.fixed["recompute"]]
        return {
            (i, j, k): Relief(each, mode, modules, moved, (i, j, k))
            for i, each in enumerate(self.problem.choices("zero", zero))
            for j, (mode, modules) in enumerate(recompute)
            for k, moved in enumerate(offload)
            # What is run again need not be kept anywhere, and half of it hardly goes with what is offloaded.
            if mode == "none" or not moved or (mode == "full" and moved == ("optimizer",))
        }

    def _optimizer_share(self, degrees: Degrees) -> float:
        """Of the device's memory, what moments take that are sharded over dp."""
        moments, capacity = 2 * self.executions[0].moment_bytes, self.problem.topology.device.memory_bytes
        return moments * sum(self._parameters) / (degrees.world_size * capacity) if capacity else 1.0

    @cached_property
    def _cheap_modules(self) -> tuple[Module, ...]:
        names = {op.name for block in self.workload.blocks for op in block.operations}
        return tuple(module for module in CHEAP_MODULES if names.intersection(MODULES[module]))

    def _plan(self, degrees: Degrees, relief: Relief) -> ParallelPlan:
        tokens = degrees.micro_batch * self.workload.seq_len // degrees.cp
        sequence_parallel = degrees.tp > 1 and tokens % degrees.tp == 0
        return ParallelPlan(
            degrees.world_size,
            self.problem.global_batch,
            degrees.micro_batch,
            num_layers=len(self.workload.layers),
            tp=degrees.tp,
            cp=degrees.cp,
            pp=degrees.pp,
            vpp=degrees.vpp,
            ep=degrees.ep,
            etp=degrees.etp,
            sequence_parallel=self.problem.fixed.get("sequence_parallel", sequence_parallel),
            zero=relief.zero,
            recompute=relief.recompute,
            stages=self.stages.stages(degrees.pp, degrees.vpp),
        )

    def setting(
        self, degrees: Degrees, execution: Execution, relief: Relief
    ) -> tuple[ParallelPlan, Execution, HardwareTopology]:
        """What the predictors take beside the workload."""
        if relief.modules or relief.offload:
            execution = replace(execution, recompute_modules=relief.modules, offload=relief.offload)
        return self._plan(degrees, relief), execution, self._topology(degrees)

    def _topology(self, degrees: Degrees) -> HardwareTopology:
        """The machine with as many spares in a domain as this layout leaves."""
        topology, spares = self.problem.topology, self.problem.topology.domain.size - degrees.domain_ranks
        if degrees.world_size <= topology.domain.size or spares == topology.spares:
            return topology
        if spares not in self._topologies:
            self._topologies[spares] = replace(topology, spares=spares)
        return self._topologies[spares]

    @cached_property
    def _parameters(self) -> tuple[int, int, int]:
        """Parameters cut over (tp), over (ep, etp), over nothing."""
        found = Counter[tuple[str, ...]]()
        for block in self.workload.blocks:
            found.update(block.parameters_by_axes())
        return found["tp",], found["ep", "etp"], found[()]

    def least_bytes(self, degrees: Degrees, relief: Relief, execution: Execution) -> float:
        """Bytes that a rank of the fullest stage holds at the very least: its share of weights, gradients and optimizer
        state, were the stages even and no activation kept."""
        sliced, experts, whole = self._parameters
        stage = degrees.dp * degrees.cp * degrees.tp
        state = 0 if "optimizer" in relief.offload else 2 * execution.moment_bytes
        total = 0.0
        for parameters, replicas in (
            (sliced / degrees.tp + whole, degrees.dp * degrees.cp),
            (experts / (degrees.ep * degrees.etp), stage / (degrees.ep * degrees.etp)),
        ):
            weight = (1 if execution.quantised else execution.element_bytes) / (replicas if relief.zero == 3 else 1)
            gradient = execution.gradient_bytes / (replicas if relief.zero >= 2 else 1)
            total += parameters * (weight + gradient + state / (replicas if relief.zero else 1))
        return total / degrees.pp
