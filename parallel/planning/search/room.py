"""Whether a candidate fits: from few memory predictions, to spare many. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import MemoryPrediction
from parallel.planning.search.candidates import Degrees
from parallel.planning.search.scored import MemoryPredictor
from parallel.planning.search.ways import Relief, Ways

#: Interleaving, overlap and zero bubble keep more activations than 1F1B with one chunk a rank does, but for what stages
#: round differently.
SAME_MEMORY = 0.9


class Room:
    """The memory of candidates of one problem, remembered by what it depends on. An execution is one of the ways'."""

    def __init__(self, ways: Ways, predict_memory: MemoryPredictor) -> None:
        self.ways, self.problem = ways, ways.problem
        self.predict_memory = predict_memory
        self.capacity = ways.problem.topology.device.memory_bytes or float("inf")
        self._same_memory = self._alike(schedule="1f1b", expert_overlap=False)
        self._plain: dict[tuple[object, ...], MemoryPrediction] = {}

    def _alike(self, **plain: Any) -> dict[int, Execution]:
        """By the id of each execution, one object for all that are the same but for these fields."""
        found: dict[Execution, Execution] = {}
        return {id(each): found.setdefault(same := replace(each, **plain), same) for each in self.ways.executions}

    def fits(self, degrees: Degrees, execution: Execution, relief: Relief) -> MemoryPrediction | None:
        """The memory of a candidate, if it fits."""
        if self.ways.least_bytes(degrees, relief, execution) > self.capacity:
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
