"""The planner: which layout to run, how fast it will be, and why the others are worse. No torch.

    answer = search(Problem(workload, global_batch=4096, topology=load_hardware("gb200-nvl72"), gpus=256))
    answer.winner.label, answer.winner.time.step_s, [loser.reason for loser in answer.runners_up]

The search is exhaustive and yet does not predict everything. Layouts that differ only in pipeline, data parallelism and
relief do the same work a micro-batch: one prediction for each kind of micro-batch bounds the time of all of them from
below, and they are taken in the order of their bounds until none that is left can be among the best.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nsmallest
from typing import Any, NamedTuple

from parallel.planning.capabilities import TABLE, features_of
from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import MemoryPrediction, predict_memory
from parallel.planning.search import reasons, shortfall
from parallel.planning.search.bounds import Bounds
from parallel.planning.search.candidates import Degrees, Space
from parallel.planning.search.problem import Problem
from parallel.planning.search.scored import MemoryPredictor, Scored, TimePredictor, remembering_time
from parallel.planning.search.ways import Relief, Steps, Ways
from stoker.errors import Refusal

#: Why a candidate is refused, as those of ``candidates.py``.
MEMORY = "too large for the memory"


@dataclass(frozen=True)
class RunnerUp:
    scored: Scored
    reason: str


@dataclass(frozen=True)
class Answer:
    """``runners_up``: the best of each other (tp, cp, pp, ep, etp, FSDP), with why it loses. ``considered``: layouts in
    all; ``bounded``: those that a bound showed to be slower, without a prediction; ``refused``: by reason.
    ``beyond``: features of the winner that the engine does not have, with their status (``what_if`` only)."""

    problem: Problem
    winner: Scored
    runners_up: tuple[RunnerUp, ...]
    considered: int
    predicted: int
    bounded: int
    refused: Mapping[str, int]
    seconds: float
    warnings: tuple[str, ...]
    beyond: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "winner": self.winner.to_dict(),
            "runners_up": [{**loser.scored.to_dict(), "reason": loser.reason} for loser in self.runners_up],
            **{name: getattr(self, name) for name in ("considered", "predicted", "bounded", "seconds")},
            "refused": dict(self.refused),
            "warnings": list(self.warnings),
            "beyond": list(self.beyond),
        }


def search(
    problem: Problem,
    predict_time: TimePredictor | None = None,
    predict_memory: MemoryPredictor = predict_memory,
    top: int = 5,
) -> Answer:
    """The fastest layout that fits, and the next ``top - 1``, each with why it loses.

    The same problem has the same answer; of layouts that are equally fast, the one that cuts the model less wins.
    Raises Refusal where no layout is allowed, and where none fits: then with what is missing and what would fit.
    """
    began = time.perf_counter()
    found = _Search(problem, predict_time or remembering_time(), predict_memory, top)
    best = found.run()
    if not best:
        raise Refusal(shortfall.explain_nothing(problem, found.space.refused, MEMORY, predict_memory))
    winner, others = best[0], best[1:]
    runners_up = tuple(RunnerUp(other, reasons.why_slower(winner, other)) for other in others)
    return Answer(
        problem,
        winner,
        runners_up,
        found.considered,
        found.predicted,
        found.bounded,
        dict(found.space.refused),
        time.perf_counter() - began,
        tuple(_warnings(problem, winner, others)),
        tuple(_beyond(winner)),
    )


class _Search:
    """One search, best bound first: what waits, the best of each layout so far, and what was refused."""

    def __init__(
        self, problem: Problem, predict_time: TimePredictor, predict_memory: MemoryPredictor, top: int
    ) -> None:
        self.problem, self.top = problem, top
        self.predict_time, self.predict_memory = predict_time, predict_memory
        self.ways = Ways(problem)
        self.space = Space(problem, self.ways.stages)
        self.bounds = Bounds(self.ways, predict_time, predict_memory)
        self.considered = self.predicted = self.bounded = self.hopeless = 0
        self.best: dict[tuple[Any, ...], Scored] = {}
        self.enough_s = float("inf")  # what is slower than this is not among the top
        self._fitting: dict[tuple[Degrees, int], list[Relief]] = {}
        self._seen: set[tuple[Degrees, int, Steps]] = set()
        self._slower: set[tuple[Degrees, int]] = set()

    def run(self) -> list[Scored]:
        waiting = list(self._candidates())
        heapify(waiting)
        while waiting:
            candidate = heappop(waiting)
            if candidate.bound_s > self.enough_s:
                self._slower.update(each.layout for each in (candidate, *waiting))
                break
            for relieved in self._try(candidate):
                heappush(waiting, relieved)
        misfits = {layout for layout, fitting in self._fitting.items() if not fitting} - self._slower
        self.space.refused[MEMORY] += len(misfits) + self.hopeless
        self.bounded = len(self._slower)
        return sorted(self.best.values(), key=order)[: self.top]

    def _candidates(self) -> Iterator[_Candidate]:
        """Every layout under every execution, with as little relief as there is."""
        for degrees in self.space.degrees():
            reliefs = list(self.ways.reliefs(degrees).values())
            least, most = reliefs[0], reliefs[-1]
            for index, execution in enumerate(self.ways.executions):
                if not self.ways.runs(degrees, execution):
                    continue
                self.considered += 1
                if self.bounds.may_fit(degrees, execution, most):
                    yield _Candidate(self.bounds.step_s(degrees, execution, least), degrees, index, least.steps)
                else:
                    self.hopeless += 1

    def _try(self, candidate: _Candidate) -> Iterator[_Candidate]:
        """Predict a candidate if it fits; if not, it comes again with a step more of each relief."""
        bound_s, degrees, index, steps = candidate
        fitting = self._fitting.setdefault(candidate.layout, [])
        reliefs, execution = self.ways.reliefs(degrees), self.ways.executions[index]
        relief, least = reliefs[steps], next(iter(reliefs.values()))
        if any(relief.beyond(less) for less in fitting):
            return
        if bound_s + self.bounds.once_s(degrees, execution, least) > self.enough_s:
            self._slower.add(candidate.layout)
        elif memory := self.bounds.fits(degrees, execution, relief):
            fitting.append(relief)
            if bound_s + self.bounds.once_s(degrees, execution, relief) > self.enough_s:
                self._slower.add(candidate.layout)
            else:
                self._predict(degrees, execution, relief, memory)
        else:
            for further in relief.further():
                if further in reliefs and (degrees, index, further) not in self._seen:
                    self._seen.add((degrees, index, further))
                    yield _Candidate(self.bounds.step_s(degrees, execution, reliefs[further]), degrees, index, further)

    def _predict(self, degrees: Degrees, execution: Execution, relief: Relief, memory: MemoryPrediction) -> None:
        workload = self.problem.workload
        plan, run, topology = self.ways.setting(degrees, execution, relief)
        step = self.predict_time(workload, plan, run, topology)
        self.predicted += 1
        scored = Scored(workload, plan, run, self.problem.topology, degrees.domain_ranks, step, memory)
        layout = (plan.tp, plan.cp, plan.pp, plan.ep, plan.etp, plan.zero == 3)
        if layout in self.best and order(self.best[layout]) <= order(scored):
            return
        self.best[layout] = scored
        if len(self.best) >= self.top:
            self.enough_s = nsmallest(self.top, (each.time.step_s for each in self.best.values()))[-1]


class _Candidate(NamedTuple):
    """``bound_s``: no step of it is faster. ``execution``: which of the ways'; ``steps`` of its relief."""

    bound_s: float
    degrees: Degrees
    execution: int
    steps: Steps

    @property
    def layout(self) -> tuple[Degrees, int]:
        return self.degrees, self.execution


def order(scored: Scored) -> tuple[Any, ...]:
    """Faster first; of equals, what cuts the model less; then anything that is always the same."""
    plan, run = scored.plan, scored.execution
    choices = (plan.world_size, plan.tp, plan.cp, plan.pp, plan.ep, plan.zero, plan.recompute, -plan.micro_batch)
    return (
        scored.time.step_s,
        *reasons.model_parallelism(plan),
        *choices,
        *(run.precision, run.schedule, run.expert_overlap, run.recompute_modules, run.offload),
    )


def _warnings(problem: Problem, winner: Scored, others: Sequence[Scored]) -> list[str]:
    plan, found = winner.plan, []
    if idle := problem.gpus - plan.world_size:
        found.append(
            f"{idle:,} of {problem.gpus:,} GPUs stay idle: the model's degrees and global_batch={problem.global_batch} "
            f"divide better over {plan.world_size:,}"
        )
    found.append(reasons.indistinct(winner, others))
    found += winner.placement.warnings
    return [line for line in found if line]


def _beyond(winner: Scored) -> list[str]:
    """What the engine cannot run of a layout: "mxfp8 (planned)"."""
    rows = [TABLE[name] for name in features_of(winner.plan, winner.execution)]
    return [f"{row.name} ({row.status.replace('_', ' ')})" for row in rows if row.status != "supported"]
