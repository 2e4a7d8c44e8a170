"""Ours against peers, the physical limit and the targets on a GPU: ``python -m kernels.bench [--quick]``.

For every shape ours, as the registry chooses it, is timed again beside each peer; other implementations at home on the
device have rows of their own beside the limit. Inputs are random, in bfloat16 with float32 gates; a forward keeps
what its backward needs; a peer's outputs are compared with ours before it is timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels import registry
from kernels.bench import problems
from kernels.bench.peers import PEERS, Peer
from kernels.bench.problems import Outputs, Problem
from kernels.bench.roofline import Ceilings, measure_ceilings
from kernels.bench.rows import Row
from kernels.bench.shapes import LONG, MAIN, PHASES, SWEEP, TARGETS, Phase, Shape
from kernels.bench.timing import GraphTimer, Timer, Timing, first_line

#: Of ``--quick``, with a minute's room to four: what is under way when they end is finished.
QUICK_SECONDS = 180.0
#: A peer whose output is further from ours, in relative L2, computes something else, and its row says so.
DIFFERENT = 2e-2


#: By key of PEERS.
BUILD: dict[str, Callable[[Shape, torch.device], Problem]] = {
    "gated_delta": partial(problems.delta_problem, "gated_delta"),
    "kda": partial(problems.delta_problem, "kda"),
    "prologue": problems.prologue_problem,
    "epilogue": problems.epilogue_problem,
    "gated_delta layer": partial(problems.layer_problem, "gated_delta"),
    "kda layer": partial(problems.layer_problem, "kda"),
    "decode": problems.decode_problem,
}
LIMIT = "physical limit"
DECODE = Shape(256, 256, (32, 32))


@dataclass(frozen=True)
class Task:
    """``kind``: key of BUILD. Without ``peers`` ours is measured against the limit and the targets alone."""

    kind: str
    shape: Shape
    peers: bool


def gpu_rows(quick: bool = False) -> list[Row]:
    """All rows. With ``quick`` those of the targets first, within four minutes."""
    timer, device = GraphTimer(), torch.device("cuda")
    deadline = time.monotonic() + QUICK_SECONDS if quick else float("inf")
    ceilings = measure_ceilings(timer, device)
    return list(rows(tasks(quick), timer, ceilings, device, deadline))


def tasks(quick: bool) -> list[Task]:
    """First what the targets ask for, then the same with peers; unless ``quick`` every other shape as well."""
    rules, layers = ["gated_delta", "kda"], ["gated_delta layer", "kda layer"]
    first = [Task(kind, shape, False) for shape in (MAIN, LONG) for kind in rules]
    first += [Task(kind, MAIN, False) for kind in ("prologue", "epilogue", *layers)]
    first += [Task("decode", DECODE, False)]
    first += [Task(kind, MAIN, True) for kind in (*rules, "prologue", "epilogue", *layers)]
    if quick:
        return first
    others = [(kind, shape) for kinds in (rules, layers) for shape in SWEEP if shape != MAIN for kind in kinds]
    rest = [Task(kind, shape, peers) for kind, shape in others for peers in (False, True)]
    return [*first, Task("decode", DECODE, True), *rest]


def rows(
    todo: Sequence[Task], timer: Timer, ceilings: Ceilings, device: torch.device, deadline: float
) -> Iterator[Row]:
    """``deadline``: on the monotonic clock. What is not begun by then is one row, which says how much it is."""
    for index, task in enumerate(todo):
        if time.monotonic() > deadline:
            why = f"not measured: time was up before {len(todo) - index} of {len(todo)} tasks"
            yield Row("all", "the rest", "all", None, None, None, why)
            return
        try:
            with timer.stream():
                problem = BUILD[task.kind](task.shape, device)
        except RuntimeError as error:  # of memory, as a rule: other shapes may fit
            why = f"not measured, {first_line(error)}"
            yield Row(task.kind, str(task.shape), "all", None, None, None, why)
            continue
        if not task.peers:
            yield from _against_limits(problem, timer, ceilings)
        for peer in PEERS[task.kind] if task.peers else ():
            if time.monotonic() > deadline:
                yield Row(task.kind, problem.case, peer.name, None, None, None, "not measured: time was up")
                continue
            yield from _against_peer(problem, peer, timer)
        del problem
        gc.collect()


def _against_limits(problem: Problem, timer: Timer, ceilings: Ceilings) -> Iterator[Row]:
    """The chosen implementation's rows, then those of others, which say in their case whose they are."""
    chosen, *others = _implementations(problem)
    yield from _implementation_rows(problem, chosen, "", timer, ceilings)
    for name in others:
        yield from _implementation_rows(problem, name, f", by '{name}'", timer, ceilings)


def _implementation_rows(problem: Problem, name: str, suffix: str, timer: Timer, ceilings: Ceilings) -> Iterator[Row]:
    limit = f"{LIMIT} of {device_name(problem.cu_seqlens.device)}, {ceilings} measured here"
    for phase in _phases(problem):
        row = partial(Row, problem.op, f"{problem.case}, {phase}{suffix}")
        work = problem.work(phase)
        floor = work.floor_ms(ceilings)
        try:
            with registry.force(problem.op, name):
                timing = _time(problem, problem.ours, phase, timer)
                kept = _kept_bytes(problem) if phase == "forward" else None
        except Exception as error:
            yield row(limit, None, floor, None, f"ours failed: {first_line(error)}")
            continue
        rates = f"{work.bytes / timing.ms / 1e9:.2f} TB/s, {work.flops / timing.ms / 1e9:.0f} TFLOP/s of the least work"
        keeps = "" if kept is None else f", keeps {kept / 2**20:.0f} MiB for the backward"
        yield row(limit, timing.ms, floor, floor / timing.ms, f"runs '{name}'{keeps}, {rates}; {timing}")
        for target in TARGETS:
            if (target.op, target.shape, target.phase, False) == (problem.op, problem.shape, phase, problem.layer):
                yield row(target.peer, timing.ms, target.ms, target.ms / timing.ms)


def _implementations(problem: Problem) -> list[str]:
    """The chosen one, then all that can run the problem and lose nothing by running on this device."""
    device = problem.cu_seqlens.device
    call = (problem.op, device, torch.bfloat16, problem.dispatch)
    able = [i.name for i in registry.able(*call) if device.type not in i.cost and i.name != "reference"]
    return list(dict.fromkeys([registry.choose(*call).name, *able]))


def _against_peer(problem: Problem, peer: Peer, timer: Timer) -> Iterator[Row]:
    """A row for each phase, or one for all if the peer cannot be called."""
    notes: list[str] = []
    measured: list[tuple[Phase, Timing | None, Timing | None, str]] = []
    try:
        with peer.around(notes), timer.stream():
            theirs = peer.make(problem)
            difference = _difference(theirs(), problem.ours())
            if difference > DIFFERENT:
                notes.append(f"its outputs differ from ours by {difference:.0e}")
            measured += [(phase, *_pair(problem, theirs, phase, timer)) for phase in _phases(problem)]
    except Exception as error:  # of any kind: it is other people's code
        why = f"not measured, {first_line(error)}"
        yield Row(problem.op, f"{problem.case}, all phases", peer.name, None, None, None, why)
    for phase, ours, other, failed in measured:
        note = "; ".join(filter(None, [*notes, failed, f"peer: {other}" if other else ""]))
        times = (ours.ms if ours else None, other.ms if other else None)
        ratio = other.ms / ours.ms if ours and other else None
        yield Row(problem.op, f"{problem.case}, {phase}", peer.name, *times, ratio, note)


def _pair(
    problem: Problem, theirs: Callable[[], Outputs], phase: Phase, timer: Timer
) -> tuple[Timing | None, Timing | None, str]:
    """Ours, then theirs; and what went wrong."""
    timings: list[Timing | None] = []
    failures = []
    for who, call in (("ours", problem.ours), ("it", theirs)):
        try:
            timings.append(_time(problem, call, phase, timer))
        except Exception as error:
            timings.append(None)
            failures.append(f"{who} failed: {first_line(error)}")
    ours, other = timings
    return ours, other, "; ".join(failures)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"


def _phases(problem: Problem) -> Sequence[Phase]:
    return PHASES if problem.leaves else PHASES[:1]


def _time(problem: Problem, call: Callable[[], Outputs], phase: Phase, timer: Timer) -> Timing:
    if phase == "forward":
        return timer(call)
    with timer.stream():
        outputs = _several(call())
        cotangents = [torch.randn_like(x) for x in outputs]
        if phase == "backward":
            return timer(lambda: torch.autograd.grad(outputs, problem.leaves, cotangents, retain_graph=True))
        return timer(lambda: torch.autograd.grad(_several(call()), problem.leaves, cotangents))


def _several(outputs: Outputs) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _difference(theirs: Outputs, ours: Outputs) -> float:
    """The largest relative L2 distance of an output."""
    pairs = zip(_several(theirs), _several(ours), strict=True)
    with torch.no_grad():
        return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def _kept_bytes(problem: Problem) -> int | None:
    """What a forward leaves allocated beside its outputs; unknown on CPU."""
    if problem.cu_seqlens.device.type != "cuda" or not problem.leaves:
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    outputs = problem.ours()
    return torch.cuda.memory_allocated() - before - sum(x.nbytes for x in _several(outputs))
