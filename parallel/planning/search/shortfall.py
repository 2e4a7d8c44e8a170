"""When nothing fits: what is missing, where, and the smallest change with which something would. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from heapq import nsmallest
from typing import NamedTuple

from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import MemoryPrediction
from parallel.planning.plan import ParallelPlan
from parallel.planning.search import reasons
from parallel.planning.search.candidates import Degrees, Space
from parallel.planning.search.problem import Problem
from parallel.planning.search.scored import MemoryPredictor, label
from parallel.planning.search.ways import Relief, Ways

#: GPUs up to so many times as many are tried.
MOST_GPUS = 1024
#: Layouts whose memory is predicted to say whether any fits.
MOST_PROBES = 64


class Probe(NamedTuple):
    """A layout of which only the memory was predicted."""

    plan: ParallelPlan
    execution: Execution
    memory: MemoryPrediction
    fits: bool

    def label(self) -> str:
        return label(self.plan, self.execution)


def _probes(problem: Problem, predict_memory: MemoryPredictor) -> Iterator[Probe]:
    """The layouts that hold least on a device, with all the relief there is."""
    lean = replace(problem, exact=False, fixed={"vpp": 1, "micro_batch": 1} | dict(problem.fixed))
    ways = Ways(lean)
    space = Space(lean, ways.stages)
    execution = ways.executions[0]

    def least(degrees: Degrees) -> float:
        return ways.least_bytes(degrees, _most(ways, degrees), execution)

    for degrees in nsmallest(MOST_PROBES, space.degrees(), key=lambda degrees: (least(degrees), degrees)):
        relief = _most(ways, degrees)
        plan, run, topology = ways.setting(degrees, execution, relief)
        memory = predict_memory(problem.workload, plan, run, topology)
        yield Probe(plan, run, memory, memory.fits(topology))


def _most(ways: Ways, degrees: Degrees) -> Relief:
    return list(ways.reliefs(degrees).values())[-1]


def first_fit(problem: Problem, predict_memory: MemoryPredictor) -> Probe | None:
    return next((probe for probe in _probes(problem, predict_memory) if probe.fits), None)


def explain_nothing(problem: Problem, refused: Mapping[str, int], memory: str, predict_memory: MemoryPredictor) -> str:
    """Why there is no layout; where there are and none fits, what is missing and the smallest change that would do."""
    device = problem.topology.device.name
    if not refused.get(memory):
        why = reasons.refusals(refused) or "nothing to try"
        return f"no layout over {problem.gpus} x {device} at global_batch={problem.global_batch}: {why}"
    nearest = min(_probes(problem, predict_memory), key=lambda probe: probe.memory.upper)
    missing = reasons.shortage(nearest.memory, problem.topology)
    return (
        f"nothing fits on {problem.gpus} x {device}; nearest is {nearest.label()}: {missing}. "
        f"What fits: {'; or '.join(_remedies(problem, predict_memory)) or 'nothing that was tried: a smaller model'}"
    )


def _remedies(problem: Problem, predict_memory: MemoryPredictor) -> Iterator[str]:
    """Changes that make a model fit: choices given back to the planner, fewest GPUs, what other stacks can do."""
    for name in problem.fixed:
        freed = {key: value for key, value in problem.fixed.items() if key != name}
        if fit := first_fit(replace(problem, fixed=freed), predict_memory):
            yield f"with {name} left to the planner, {fit.label()}"
    if fit := _on_more_gpus(problem, predict_memory):
        yield f"{fit.plan.world_size} GPUs, {fit.label()}"
    if not problem.what_if and (fit := first_fit(replace(problem, what_if=True), predict_memory)):
        yield f"with --what-if, which the engine does not run: {fit.label()}"


def _on_more_gpus(problem: Problem, predict_memory: MemoryPredictor) -> Probe | None:
    """On the fewest times as many GPUs: by doubling, then by halving what lies between."""

    def fit(times: int) -> Probe | None:
        return first_fit(replace(problem, gpus=problem.gpus * times), predict_memory)

    few, many = 1, 2
    while (found := fit(many)) is None:
        few, many = many, 2 * many
        if many > MOST_GPUS:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        if (fewer := fit(middle)) is None:
            few = middle
        else:
            found, many = fewer, middle
    return found
