"""A layout of the user's own, judged against the planner's: ``stoker plan --explain tp=4,pp=8``. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from parallel.planning.capabilities import refuse_unsupported
from parallel.planning.memory.prediction import predict_memory
from parallel.planning.placement import place
from parallel.planning.plan import ParallelPlan, Recompute
from parallel.planning.search import reasons
from parallel.planning.search.candidates import Degrees, Space
from parallel.planning.search.planner import Answer, order, search
from parallel.planning.search.problem import Problem, refuse_unknown
from parallel.planning.search.scored import MemoryPredictor, Scored, TimePredictor, remembering_time
from parallel.planning.search.shortfall import first_fit
from parallel.planning.search.ways import Ways
from parallel.planning.workload import check_divisibility
from stoker.errors import Refusal

#: Choices that are words; all others are numbers.
WORDS: Mapping[str, tuple[str, ...]] = {"recompute": get_args(Recompute), "sequence_parallel": ("true", "false")}


@dataclass(frozen=True)
class Judgement:
    """A layout of the user's own. ``scored`` None: it cannot be; ``fits`` false: predicted as if there were memory.
    ``answer``: what the planner would run instead; None where nothing fits."""

    text: str
    scored: Scored | None
    fits: bool
    verdict: str
    answer: Answer | None


def explain(
    problem: Problem,
    text: str,
    predict_time: TimePredictor | None = None,
    predict_memory: MemoryPredictor = predict_memory,
) -> Judgement:
    """Judge the layout ``text`` ("tp=4,pp=8,...") on all of the problem's GPUs against the planner's own.

    An axis that is not named is 1 and data parallelism takes the rest, as in a configuration; micro-batch, recompute
    and sharding that are not named are chosen for this layout. Raises Refusal for a name that is none.
    """
    timed = predict_time or remembering_time()
    named = dict.fromkeys(("tp", "cp", "pp", "vpp", "ep", "etp"), 1) | parse_layout(text)
    own = replace(problem, fixed=named, exact=True)
    try:
        answer = search(problem, timed, predict_memory)
    except Refusal:
        answer = None
    try:
        layouts = list(_layouts(own, timed, predict_memory))
    except Refusal as refusal:
        return Judgement(text, None, False, f"not possible: {refusal}", answer)
    if fitting := [scored for scored in layouts if scored.fits]:
        best = min(fitting, key=order)
        return Judgement(text, best, True, _verdict(best, answer), answer)
    lean = min(layouts, key=lambda scored: scored.memory.upper)
    missing = reasons.shortage(lean.memory, lean.topology)
    remedy = _remedy(own, predict_memory)
    return Judgement(text, lean, False, f"does not fit: {lean.label}: {missing}{remedy}", answer)


def _remedy(own: Problem, predict_memory: MemoryPredictor) -> str:
    """The first of the user's choices without which a layout would fit."""
    for name in ("micro_batch", "recompute", "zero", "pp", "tp"):
        freed = {key: value for key, value in own.fixed.items() if key != name}
        if name in own.fixed and (fit := first_fit(replace(own, fixed=freed), predict_memory)):
            return f"; with {name} left to the planner it does: {fit.label()}"
    return ""


def _layouts(own: Problem, predict_time: TimePredictor, predict_memory: MemoryPredictor) -> Iterator[Scored]:
    """The layout under every micro-batch and relief that is not fixed; Refusal where the layout cannot be."""
    ways, fixed = Ways(own), dict(own.fixed)
    space = Space(own, ways.stages)
    dp = own.gpus // math.prod(fixed[axis] for axis in ("tp", "cp", "pp"))
    if fixed.get("dp", dp) != dp:
        raise Refusal(f"dp={fixed['dp']}: tp, cp and pp leave dp={dp} of {own.gpus} GPUs; leave dp out or change them")
    degrees = {axis: fixed[axis] for axis in ("tp", "cp", "pp", "vpp", "ep", "etp")}
    plan = ParallelPlan(
        own.gpus,
        own.global_batch,
        fixed.get("micro_batch", 1),
        num_layers=len(own.workload.layers),
        **degrees,
        sequence_parallel=fixed.get("sequence_parallel", False),
        zero=fixed.get("zero", 1),
        recompute=fixed.get("recompute", "none"),
    )
    if not own.what_if:
        refuse_unsupported(plan, ways.executions[0], has_experts=own.workload.has_experts)
    check_divisibility(own.workload, plan)
    fills = space.domains(plan.tp * plan.cp, plan.etp * plan.ep)
    ranks = place(plan, own.topology, fills[0][0] if fills else None).domain_ranks
    for micro_batch in space.micro_batches_of(own.global_batch // dp):
        if plan.vpp > 1 and own.global_batch < plan.pp * dp * micro_batch:
            continue  # too few micro-batches to interleave
        candidate = Degrees(**degrees, dp=dp, micro_batch=micro_batch, domain_ranks=ranks)
        for execution in (e for e in ways.executions if ways.runs(candidate, e)):
            for relief in ways.reliefs(candidate).values():
                setting = ways.setting(candidate, execution, relief)
                step, memory = predict_time(own.workload, *setting), predict_memory(own.workload, *setting)
                yield Scored(own.workload, *setting[:2], own.topology, ranks, step, memory)


def parse_layout(text: str) -> dict[str, Any]:
    """Names and values of "tp=4,pp=8,recompute=full"; an unknown name is refused with the nearest (``Problem``)."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = "sequence_parallel" if name == "sp" else name
        refuse_unknown(name)
        words = WORDS.get(name, ())
        parsed = (value == "true" if name == "sequence_parallel" else value) if words else _number(value)
        if not equals or parsed is None or (words and value not in words):
            raise Refusal(f"layout: {part!r} must be {name}={'|'.join(words) or 'a number'}")
        if name in found:
            raise Refusal(f"layout: {name} is given twice")
        found[name] = parsed
    if not found:
        raise Refusal(f"layout: {text!r} names nothing: give for example tp=2,pp=4")
    return found


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) > 0 else None


def _verdict(scored: Scored, answer: Answer | None) -> str:
    if answer is None:
        return "it fits, and the planner finds none of its own"
    if (scored.plan, scored.execution) == (answer.winner.plan, answer.winner.execution):
        return "the planner's own choice"
    if scored.time.step_s < answer.winner.time.step_s:
        return f"faster than what the planner tries: {reasons.why_slower(answer.winner, scored)}"
    return reasons.why_slower(answer.winner, scored)
