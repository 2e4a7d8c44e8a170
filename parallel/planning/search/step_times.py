"""Step times of many layouts at once: what ``predict_time`` says of each, by the same formulas on arrays. No torch.

Thousands of layouts cut a micro-batch in a few hundred ways, lie on a few hundred pipelines and form a few hundred
groups: each is looked at once, and a step is put together from them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from parallel.planning.hardware.collectives import span
from parallel.planning.search.candidates import Degrees
from parallel.planning.search.ways import Relief, Ways
from parallel.planning.timing.calibration import Calibration, Efficiencies
from parallel.planning.timing.layers import BACKWARD, COLUMN, FORWARD, Again, Share, Spans
from parallel.planning.timing.step_time import critical_path, steps_s
from parallel.planning.timing.work import StepWork, WorkTable

#: Layouts that are looked at together: so many that numpy's overhead does not count, and few enough for the caches.
TOGETHER = 4096
#: What rounding may be off by, between sums in one order and in another.
ROUNDING = 1e-9
#: Groups of a layout: inside a micro-batch, of dense and expert state, and the pipeline.
INSIDE, STATE, PIPELINE = (("tp",), ("ep",), ("cp",), ("etp",)), (("cp", "dp"), ("edp",)), ("pp",)

Key = TypeVar("Key", bound=Hashable)


class StepTimes:
    """Step times of the ``layouts`` of a search. An execution is the number of one of the ways'."""

    def __init__(self, ways: Ways, layouts: Sequence[Degrees], calibration: Calibration) -> None:
        self.ways, self.workload, self.topology = ways, ways.workload, ways.problem.topology
        self.degrees: Any = Degrees(*np.array(layouts, dtype=int).T)
        self.micro_batches: Any = self.degrees.micro_batches(ways.problem.global_batch)
        executions = ways.executions
        plain = [replace(each, schedule="1f1b", expert_overlap=False) for each in executions]
        worked, self._table = distinct(plain)
        self.tables = [WorkTable(self.workload, each, self.topology) for each in worked]
        self._zero_bubble = np.array([each.schedule == "zero_bubble" for each in executions], dtype=float)
        found = [calibration.efficiencies(self.topology, each) for each in executions]
        self._efficiencies = {f.name: np.array([getattr(each, f.name) for each in found]) for f in fields(Efficiencies)}
        self._again: dict[Again, int] = {}
        for relief in ways.every_relief():
            self._again.setdefault(_again(relief), len(self._again))
        self._place(layouts)
        self._pipelines(layouts)
        self._layers = np.array([self._work(table) for table in self.tables])

    def _place(self, layouts: Sequence[Degrees]) -> None:
        """The groups of each layout, and how it cuts a micro-batch."""
        size = self.topology.domain.size
        self._placed = distinct((*each[:3], *each[4:7], each.domain_ranks) for each in layouts)[1]
        spans = []
        for layout in (layouts[index] for index in np.unique(self._placed, return_index=True)[1]):
            domain_ranks = layout.domain_ranks if layout.world_size > size else size
            spans.append([span(layout, axes, self.topology, domain_ranks) for axes in (*INSIDE, *STATE, PIPELINE)])
        groups = [Spans.of(each) for each in zip(*spans, strict=True)]
        inside, state, self._pipeline_groups = groups[:4], groups[4:6], groups[6]
        self._state = [Spans(tuple(map(self.tables[0].limited, each.distinct)), each.which) for each in state]
        numbers = np.array([each.which for each in inside]).T.tolist()
        cuts, self._cut = distinct(
            (each.tp, each.cp, each.ep, each.etp, each.micro_batch, *numbers[place])
            for each, place in zip(layouts, self._placed.tolist(), strict=True)
        )
        tp, cp, ep, etp, micro_batch, *which = np.array(cuts).T
        tokens = micro_batch * self.workload.seq_len // cp
        sequence_parallel = (tp > 1) & (tokens % tp == 0)
        if "sequence_parallel" in self.ways.problem.fixed:
            sequence_parallel = np.full(len(tp), self.ways.problem.fixed["sequence_parallel"])
        spans_of_cuts = [Spans(each.distinct, numbers) for each, numbers in zip(inside, which, strict=True)]
        self._share = Share(tokens, tp, ep, etp, cp, sequence_parallel, *spans_of_cuts)

    def _pipelines(self, layouts: Sequence[Degrees]) -> None:
        """What the ranks of each pipeline hold: [pipelines, kinds of rank, blocks], and how many are of a kind."""
        pipelines, self._pipeline = distinct((each.pp, each.vpp) for each in layouts)
        kinds = [self.tables[0].pipeline(pp, self.ways.stages.stages(pp, vpp))[0] for pp, vpp in pipelines]
        most = max(map(len, kinds))
        self._held = np.zeros((len(kinds), most, len(self.tables[0].blocks)))
        self._ranks = np.zeros((len(kinds), most))
        for index, found in enumerate(kinds):
            self._held[index, : len(found)] = list(found)
            self._ranks[index, : len(found)] = list(found.values())
        numbers = [block.kind for block in self.tables[0].blocks[:-2]]
        layers = [layer.kind for layer in self.workload.layers]
        self._whole = np.array([*map(layers.count, numbers), 1, 1], dtype=float)

    def _work(self, table: WorkTable) -> np.ndarray:
        """[ways to run again, cuts, blocks, 2, COLUMNS]."""
        found = [table.costs.work(block, self._share, list(self._again)) for block in table.blocks]
        return np.moveaxis(np.array(found), (0, 4), (2, 1))

    def seconds(self, layouts: np.ndarray, executions: np.ndarray, reliefs: Sequence[Relief]) -> np.ndarray:
        """Step times [n] of the n layouts of these numbers, each under its execution and relief."""
        return np.concatenate(
            [
                self._seconds(layouts[start:end], executions[start:end], reliefs[start:end])
                for start in range(0, len(layouts), TOGETHER)
                for end in [start + TOGETHER]
            ]
            or [np.zeros(0)]
        )

    def _seconds(self, layouts: np.ndarray, executions: np.ndarray, reliefs: Sequence[Relief]) -> np.ndarray:
        kinds, which = distinct(reliefs)
        again, zero = np.array([(self._again[_again(relief)], relief.zero) for relief in kinds]).T[:, which]
        offloaded = np.array(["optimizer" in relief.offload for relief in kinds])[which]
        pipeline, placed, cut = self._pipeline[layouts], self._placed[layouts], self._cut[layouts]
        held = self._held[pipeline]
        layers = self._layers[self._table[executions], again, cut]
        columns = np.zeros((*held.shape[:2], *layers.shape[2:]))
        for block in range(held.shape[2]):
            columns += held[:, :, block, None, None] * layers[:, None, block]
        tp, ep, etp = (getattr(self.degrees, axis)[layouts] for axis in ("tp", "ep", "etp"))
        table = self.tables[0]
        parameters = table.parameters(held.T, tp, ep, etp)
        once = table.once(parameters, zero, [groups[placed] for groups in self._state], offloaded)
        if (zero == 3).any():
            columns[..., FORWARD, COLUMN["weights"]] += once.weights_s.T
            columns[..., BACKWARD, COLUMN["weights"]] += once.regather_s.T
        work = StepWork(
            columns,
            self._ranks[pipeline],
            once.reduce_s.T,
            once.gather_s.T,
            once.optimizer_s.T,
            table.costs.hop_s(self._share[cut], self._pipeline_groups[placed]),
            self.micro_batches[layouts],
            self.degrees.pp[layouts],
            self.degrees.vpp[layouts],
            self.degrees.world_size[layouts],
            self._zero_bubble[executions],
        )
        return steps_s(work, self._efficiency(executions))

    def _efficiency(self, executions: np.ndarray) -> Efficiencies:
        return Efficiencies(**{name: values[executions] for name, values in self._efficiencies.items()})

    def least_s(self, execution: int) -> np.ndarray:
        """What a step of each layout takes at least, under any relief: the work of an average pipeline rank, and while
        the pipeline fills and drains that of all others (in a zero-bubble schedule, of their forward passes)."""
        cuts = len(self._share.tokens)
        which = np.full(cuts, execution)
        relief = self._again[min(self._again, key=lambda way: ("none", "selective", "full").index(way.recompute))]
        least = self._layers[self._table[execution], relief]
        columns = np.einsum("b,cbij->cij", self._whole, least)[:, None]
        none, one = np.zeros((cuts, 1)), np.ones(cuts)
        whole = StepWork(columns, none + 1, none, none, none, 0.0 * one, one, one, one, one)
        seconds = critical_path(whole, self._efficiency(which))[0][:, 0]
        forward, both = seconds[self._cut, FORWARD], seconds.sum(-1)[self._cut]
        share = both / self.degrees.pp
        others = np.maximum(forward - share, 0.0) if self._zero_bubble[execution] else both - share
        step = self.micro_batches * share + others / self.degrees.vpp
        e = self._efficiency(np.array(execution))
        doublings = np.log2(np.maximum(self.degrees.world_size / 8, 1.0))
        return (step * (1 + e.stragglers * doublings) + e.step_s) * (1 - ROUNDING)


def _again(relief: Relief) -> Again:
    return Again(relief.recompute, relief.modules, "activations" in relief.offload)


def distinct(keys: Iterable[Key]) -> tuple[list[Key], np.ndarray]:
    """Each key once, and which of these each is."""
    numbers: dict[Any, int] = {}
    which = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=int)
    return list(numbers), which
