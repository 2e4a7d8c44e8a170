"""The planner: which layout to run, how fast it will be, and why the others are worse. No torch.

    answer = search(Problem(workload, global_batch=4096, topology=load_hardware("gb200-nvl72"), gpus=256))
    answer.winner.label, answer.winner.time.step_s, [loser.reason for loser in answer.runners_up]

The search is exhaustive and yet does not look at everything. Step times are found for many layouts at once
(``step_times.py``), in the order of what they take at least; memory is asked about for the fastest first, until none
that is left can be among the best; and only these are predicted part by part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, nsmallest
from typing import Any, NamedTuple

import numpy as np

from parallel.planning.capabilities import TABLE, features_of
from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import MemoryPrediction, predict_memory
from parallel.planning.search import reasons, shortfall
from parallel.planning.search.candidates import Degrees, Space
from parallel.planning.search.problem import Problem
from parallel.planning.search.room import Room
from parallel.planning.search.scored import MemoryPredictor, Scored, TimePredictor, remembering_time
from parallel.planning.search.step_times import ROUNDING, StepTimes, distinct
from parallel.planning.search.ways import PLAIN, SHARDED, Relief, Steps, Ways
from stoker.errors import Refusal

#: Why a candidate is refused, as those of ``candidates.py``.
MEMORY = "too large for the memory"
#: Pairs whose times are found together: with as little relief as there is, and with more.
PRICED_FIRST, PRICED = 2048, 512

#: What runners-up differ in: tp, cp, pp, ep, etp, and whether weights are sharded (FSDP).
Layout = tuple[int, int, int, int, int, bool]


@dataclass(frozen=True)
class RunnerUp:
    scored: Scored
    reason: str


@dataclass(frozen=True)
class Answer:
    """``runners_up``: the best of each other (tp, cp, pp, ep, etp, FSDP), with why it loses. ``considered``: layouts in
    all; ``predicted``: part by part; ``bounded``: shown to be slower without; ``refused``: by reason.
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
    """One search, fastest first: what waits, the best of each layout so far, and what was refused.

    A way to run a layout is a pair of their numbers. With as little relief as there is, pairs are priced in the order
    of what they take at least; with more, where less does not fit.
    """

    def __init__(
        self, problem: Problem, predict_time: TimePredictor, predict_memory: MemoryPredictor, top: int
    ) -> None:
        self.problem, self.top, self.predict_time = problem, top, predict_time
        self.ways = Ways(problem)
        self.space = Space(problem, self.ways.stages)
        self.room = Room(self.ways, predict_memory)
        self.considered = self.predicted = self.bounded = 0
        self.best: dict[Layout, Scored] = {}
        self.enough_s = float("inf")  # what is slower than this is not among the top
        self._waiting: list[_Candidate] = []
        self._unpriced: list[tuple[int, int, Steps]] = []
        self._fitting: dict[tuple[int, int], list[Relief]] = {}
        self._seen: set[tuple[int, int, Steps]] = set()
        self._slower: set[tuple[int, int]] = set()

    def run(self) -> list[Scored]:
        self.layouts = list(self.space.degrees())
        if not self.layouts:
            return []
        self.times = StepTimes(self.ways, self.layouts, self.predict_time.calibration)
        bound_s, layouts, executions = self._hopeful()
        for first in range(0, len(layouts), PRICED_FIRST):
            portion = slice(first, first + PRICED_FIRST)
            if bound_s[first] > self.enough_s:
                break
            self._price_plain(layouts[portion], executions[portion])
            self._settle(bound_s[portion.stop] if portion.stop < len(bound_s) else float("inf"))
        self._slower.update((each.layout, each.execution) for each in self._waiting)
        misfits = {pair for pair, fitting in self._fitting.items() if not fitting} - self._slower
        self.space.refused[MEMORY] += len(misfits) + self.considered - len(layouts)
        self.bounded = len(layouts) - len(misfits) - len(self._fitting.keys() - misfits - self._slower)
        return sorted(self.best.values(), key=order)[: self.top]

    def _hopeful(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of a layout and an execution that may fit with all the relief there is, those first that take least;
        with that time."""
        degrees = self.times.degrees
        most, which = distinct(list(self.ways.reliefs(each).values())[-1] for each in self.layouts)
        found = []
        for number, execution in enumerate(self.ways.executions):
            runs = np.flatnonzero(self.ways.runs(degrees, execution))
            self.considered += len(runs)
            least = np.choose(which, [self.ways.least_bytes(degrees, relief, execution) for relief in most])
            held = runs[least[runs] <= self.room.capacity]
            found.append((self.times.least_s(number)[held], held, np.full(len(held), number)))
        bound_s, layouts, executions = (np.concatenate(each) for each in zip(*found, strict=True))
        fastest = np.argsort(bound_s, kind="stable")
        return bound_s[fastest], layouts[fastest], executions[fastest]

    def _price_plain(self, layouts: np.ndarray, executions: np.ndarray) -> None:
        """Put pairs among those that wait. What is sharded may be faster for it, and is tried where it has to be."""
        reliefs = [self.ways.reliefs(self.layouts[layout]) for layout in layouts.tolist()]
        step_s = self.times.seconds(layouts, executions, [next(iter(each.values())) for each in reliefs])
        early_s = step_s.copy()
        if (sharded := np.array([SHARDED in each for each in reliefs])).any():
            chosen = [each[SHARDED] for each in reliefs if SHARDED in each]
            sharded_s = self.times.seconds(layouts[sharded], executions[sharded], chosen)
            early_s[sharded] = np.minimum(early_s[sharded], sharded_s)
        for each in zip(early_s.tolist(), step_s.tolist(), layouts.tolist(), executions.tolist(), strict=True):
            heappush(self._waiting, _Candidate(*each, PLAIN))

    def _price(self) -> None:
        """Put what has more relief among those that wait."""
        layouts, executions, steps = zip(*self._unpriced, strict=True)
        reliefs = [self.ways.reliefs(self.layouts[layout])[step] for layout, step in zip(layouts, steps, strict=True)]
        step_s = self.times.seconds(np.array(layouts), np.array(executions), reliefs).tolist()
        for seconds, unpriced in zip(step_s, self._unpriced, strict=True):
            heappush(self._waiting, _Candidate(seconds, seconds, *unpriced))
        self._unpriced = []

    def _settle(self, until_s: float) -> None:
        """Try what waits and is faster than ``until_s``, and what comes of it."""
        while True:
            fast = self._waiting and self._waiting[0].early_s <= min(until_s, self.enough_s)
            if fast and len(self._unpriced) < PRICED:
                self._try(heappop(self._waiting))
            elif self._unpriced:
                self._price()
            else:
                return

    def _try(self, candidate: _Candidate) -> None:
        """Predict a candidate if it fits; if not, it comes again with a step more of each relief."""
        pair, step_s = (candidate.layout, candidate.execution), candidate.step_s
        degrees, execution = self.layouts[candidate.layout], self.ways.executions[candidate.execution]
        reliefs = self.ways.reliefs(degrees)
        relief = reliefs[candidate.steps]
        fitting = self._fitting.setdefault(pair, [])
        if any(relief.beyond(less) for less in fitting) or self._needless(candidate):
            return
        found = self.best.get(_layout(degrees, relief))
        beaten = step_s * (1 - ROUNDING) > min(self.enough_s, found.time.step_s if found else float("inf"))
        if beaten and SHARDED not in reliefs:
            self._slower.add(pair)
        elif memory := self.room.fits(degrees, execution, relief):
            fitting.append(relief)
            if beaten:
                self._slower.add(pair)
            else:
                self._predict(degrees, execution, relief, memory)
        else:
            for further in relief.further():
                if further in reliefs and (*pair, further) not in self._seen:
                    self._seen.add((*pair, further))
                    self._unpriced.append((*pair, further))

    def _needless(self, candidate: _Candidate) -> bool:
        """Whether weights are sharded that fit whole, which is for when they do not, though it be faster."""
        sharded, *others = candidate.steps
        if not sharded:
            return False
        degrees = self.layouts[candidate.layout]
        whole = self.ways.reliefs(degrees)[0, others[0], others[1]]
        return self.room.fits(degrees, self.ways.executions[candidate.execution], whole) is not None

    def _predict(self, degrees: Degrees, execution: Execution, relief: Relief, memory: MemoryPrediction) -> None:
        workload = self.problem.workload
        plan, run, topology = self.ways.setting(degrees, execution, relief)
        step = self.predict_time(workload, plan, run, topology)
        self.predicted += 1
        scored = Scored(workload, plan, run, self.problem.topology, degrees.domain_ranks, step, memory)
        layout = _layout(degrees, relief)
        if layout in self.best and order(self.best[layout]) <= order(scored):
            return
        self.best[layout] = scored
        if len(self.best) >= self.top:
            self.enough_s = nsmallest(self.top, (each.time.step_s for each in self.best.values()))[-1]


class _Candidate(NamedTuple):
    """Numbers of a layout and of an execution, with ``steps`` of relief: ``step_s`` is what a step takes. ``early_s``:
    what it takes with weights sharded, where that is less."""

    early_s: float
    step_s: float
    layout: int
    execution: int
    steps: Steps


def _layout(degrees: Degrees, relief: Relief) -> Layout:
    return degrees.tp, degrees.cp, degrees.pp, degrees.ep, degrees.etp, relief.zero == 3


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
