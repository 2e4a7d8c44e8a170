"""What a candidate takes at least: from few predictions, to spare many. No torch.

Layouts that differ only in pipeline, data parallelism and relief do the same work a micro-batch, and those that differ
only in chunks reduce the same gradients: one prediction of each kind bounds all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import MemoryPrediction
from parallel.planning.search.candidates import Degrees
from parallel.planning.search.scored import MemoryPredictor, TimePredictor
from parallel.planning.search.ways import Relief, Ways

#: Share of the ideal bubble that a bound counts: a predictor may find the rest filled.
BUBBLE = 0.9
#: The same of a zero-bubble schedule, whose bubble is a third as long (ZB-H1, arXiv 2401.10241, section 2.3).
ZERO_BUBBLE = 0.2
#: Share of a micro-batch's work that a bound counts: stages round it differently.
SAME_WORK = 0.98
#: Parts of a step that chunks do not change, and the share of them that a bound counts.
ONCE, SAME_ONCE = ("gradient reduction", "optimizer", "offload", "sharded weights", "not explained"), 0.8
#: Interleaving, overlap and zero bubble keep more activations than 1F1B with one chunk a rank does, but for what stages
#: round differently.
SAME_MEMORY = 0.9


class Bounds:
    """Bounds of the candidates of one problem, remembered by what they depend on. An execution is one of the ways'."""

    def __init__(self, ways: Ways, predict_time: TimePredictor, predict_memory: MemoryPredictor) -> None:
        self.ways, self.problem = ways, ways.problem
        self.predict_time, self.predict_memory = predict_time, predict_memory
        self.capacity = ways.problem.topology.device.memory_bytes or float("inf")
        self._same_work = self._alike(schedule="1f1b")
        self._same_memory = self._alike(schedule="1f1b", expert_overlap=False)
        self._work_s: dict[tuple[object, ...], float] = {}
        self._once_s: dict[tuple[object, ...], float] = {}
        self._plain: dict[tuple[object, ...], MemoryPrediction] = {}

    def _alike(self, **plain: Any) -> dict[int, Execution]:
        """By the id of each execution, one object for all that are the same but for these fields."""
        found: dict[Execution, Execution] = {}
        return {id(each): found.setdefault(same := replace(each, **plain), same) for each in self.ways.executions}

    def step_s(self, degrees: Degrees, execution: Execution, relief: Relief) -> float:
        """Seconds of a step: its micro-batches on an average pipeline rank, and some of the bubble."""
        work_s = SAME_WORK * self._work(degrees, execution, relief)
        share_s = work_s / degrees.pp
        bubble = BUBBLE if execution.schedule == "1f1b" else ZERO_BUBBLE
        return degrees.micro_batches(self.problem.global_batch) * share_s + bubble * (work_s - share_s) / degrees.vpp

    def _work(self, degrees: Degrees, execution: Execution, relief: Relief) -> float:
        """Seconds of a micro-batch over all pipeline ranks, by how tokens and layers are cut."""
        key = (*self._kind(degrees, execution), relief.recompute, relief.modules)
        if key not in self._work_s:
            plain = relief._replace(zero=min(relief.zero, 1), offload=())
            step = self.predict_time(self.problem.workload, *self.ways.setting(degrees, execution, plain))
            self._work_s[key] = sum(stage.forward_s + stage.backward_s for stage in step.stages)
        return self._work_s[key]

    def once_s(self, degrees: Degrees, execution: Execution, relief: Relief) -> float:
        """Seconds that a step has beside the work of its micro-batches."""
        key = (*self._kind(degrees, execution), degrees.pp, degrees.dp, degrees.domain_ranks, relief)
        if key not in self._once_s:
            step = self.predict_time(self.problem.workload, *self.ways.setting(degrees, execution, relief))
            self._once_s[key] = SAME_ONCE * sum(step.parts.get(part, 0.0) for part in ONCE)
        return self._once_s[key]

    def may_fit(self, degrees: Degrees, execution: Execution, relief: Relief) -> bool:
        return self.ways.least_bytes(degrees, relief, execution) <= self.capacity

    def fits(self, degrees: Degrees, execution: Execution, relief: Relief) -> MemoryPrediction | None:
        """The memory of a candidate, if it fits."""
        if not self.may_fit(degrees, execution, relief):
            return None
        plain = degrees._replace(vpp=1), self._same_memory[id(execution)]
        least = self._memory(*plain, relief)
        if SAME_MEMORY * least.upper > self.capacity:
            return None
        memory = least if plain == (degrees, execution) else self._predict_memory(degrees, execution, relief)
        return memory if memory.fits(self.problem.topology) else None

    def _memory(self, degrees: Degrees, execution: Execution, relief: Relief) -> MemoryPrediction:
        key = (degrees, id(execution), relief)
        if key not in self._plain:
            self._plain[key] = self._predict_memory(degrees, execution, relief)
        return self._plain[key]

    def _predict_memory(self, degrees: Degrees, execution: Execution, relief: Relief) -> MemoryPrediction:
        return self.predict_memory(self.problem.workload, *self.ways.setting(degrees, execution, relief))

    def _kind(self, degrees: Degrees, execution: Execution) -> tuple[object, ...]:
        """How tokens and layers are cut (groups do not leave the domain), and what that is run with."""
        cut = (degrees.tp, degrees.cp, degrees.ep, degrees.etp, degrees.micro_batch)
        return (*cut, id(self._same_work[id(execution)]))
