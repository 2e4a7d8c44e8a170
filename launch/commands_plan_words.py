"""What ``stoker plan`` prints, and the page of its pictures: an answer for somebody who was not there. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from parallel.planning.hardware.settings import launch_settings
from parallel.planning.memory.prediction import MemoryPrediction, StageMemory
from parallel.planning.plan import ParallelPlan
from parallel.planning.search.judgement import Judgement
from parallel.planning.search.planner import Answer
from parallel.planning.search.reasons import refusals
from parallel.planning.search.scored import Scored, remembering_time
from parallel.planning.tables import aligned, percent

if TYPE_CHECKING:
    from launch.commands_plan_layout import Planned
    from pretrain.forecast import Forecast

WIDTH = 100
GB = 1e9
#: Parts of a step below this share are told together.
SMALL = 0.005
#: Memory components below this share of the fullest stage are told together.
MINOR = 0.03
UNKNOWN = "unknown"


def planned(found: Planned) -> str:
    """The whole answer, in blocks."""
    answer, winner = found.answer, found.winner
    blocks = [
        [title(found), *winner.plan.explain().split("\n"), *_beyond(answer)],
        ["predicted", *_indented(predictions(winner, found.basis))],
        ["where a step goes", *_indented(parts(winner.time.parts))],
        ["memory of a device by pipeline rank, GB", *_indented(memory(winner))],
        ["the next best, and why each loses", *_indented(_others(answer))],
        *([_judged(found, found.judged)] if found.judged else []),
        ["placement", *_indented(winner.placement.explain().split("\n"))],
        ["to run it", *_indented(_to_run(found))],
        list(_notes(found)),
    ]
    return "\n\n".join("\n".join(_wrapped(block)) for block in blocks if block)


def title(found: Planned) -> str:
    winner, config = found.winner, found.config
    return (
        f"{config.run.name} on {winner.plan.world_size:,} of {found.answer.problem.gpus:,} x "
        f"{winner.topology.device.name} ({winner.topology.name}): {winner.label}"
    )


def facts(known: Mapping[str, Any], steps: int) -> list[str]:
    """A model and its run in numbers."""
    return [
        f"parameters: {known['parameters']:,} ({known['active_parameters']:,} active for a token)",
        f"model FLOPs: {known['flops_per_token']:.3g} a token, forward and backward; "
        f"{known['flops_per_step']:.3g} a step of {known['tokens_per_step']:,} tokens",
        f"run: {steps:,} steps, {known['tokens']:,} tokens",
    ]


def forecast(known: Forecast | None) -> list[str]:
    """What is expected on this machine; unknown where nothing is."""
    if known is None:
        return [f"predicted time of a step: {UNKNOWN}", f"predicted memory of a rank: {UNKNOWN}"]
    step, memory = known.time, known.memory
    held = UNKNOWN if memory is None else f"{memory.peak / GB:.3g} GB, at most {memory.upper / GB:.3g}"
    return [
        f"predicted time of a step: {step.step_s:.3g} s ({step.low_s:.3g} to {step.high_s:.3g}; {known.basis})",
        f"predicted memory of a rank: {held}",
    ]


def predictions(winner: Scored, basis: str) -> list[str]:
    step, tokens = winner.time, winner.tokens_per_s
    return [
        f"step time  {step.step_s:.4g} s, {step.low_s:.4g} to {step.high_s:.4g} s for four runs of five ({basis})",
        f"tokens/s   {tokens:,.0f}, {tokens / winner.plan.world_size:,.0f} a device",
        f"MFU        {percent(winner.mfu)} of the device's {winner.execution.precision} peak",
    ]


def parts(seconds: Mapping[str, float]) -> list[str]:
    """Each part of the step on the critical path, the longest first, with a bar."""
    whole = sum(seconds.values())
    told = sorted(((s, name) for name, s in seconds.items() if s >= SMALL * whole), reverse=True)
    rest = whole - sum(s for s, _ in told)
    rows = [(name, f"{s:.4g} s", percent(s / whole), "#" * round(50 * s / whole)) for s, name in told]
    if rest > SMALL * SMALL * whole:
        rows.append(("all else", f"{rest:.3g} s", percent(rest / whole), ""))
    return aligned(("part", "seconds", "share", ""), rows, words=(0, -1))


def memory(winner: Scored) -> list[str]:
    """A line for each set of pipeline ranks that hold the same."""
    prediction, size = winner.memory, winner.topology.device.memory_bytes
    names = _components(prediction)
    rows = []
    for cells, stages in groupby(prediction.stages, lambda stage: _cells(stage, names)):
        ranks = [stage.pp for stage in stages]
        rows.append((str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}", *cells))
    lines = aligned(("rank", *names, "other", "total", "at most"), rows)
    usable = "" if size is None else f"usable: {size / GB:.1f} GB; "
    return [*lines, f"{usable}not modelled: {', '.join(prediction.not_modelled)}"]


def _components(prediction: MemoryPrediction) -> list[str]:
    """Components that matter on some stage."""
    fullest = prediction.peak
    return [
        name
        for name in prediction.stages[0].components
        if max(stage.components[name] for stage in prediction.stages) > MINOR * fullest
    ]


def _cells(stage: StageMemory, names: Sequence[str]) -> tuple[str, ...]:
    told = [stage.components[name] for name in names]
    return tuple(f"{size / GB:.1f}" for size in (*told, stage.device - sum(told), stage.device, stage.upper))


def _others(answer: Answer) -> Iterator[str]:
    for loser in answer.runners_up:
        yield loser.scored.label
        yield f"    {loser.reason}"
    if not answer.runners_up:
        yield "there is no other"
    yield (
        f"{answer.considered:,} layouts considered, {answer.predicted:,} predicted, {answer.bounded:,} shown to be "
        f"slower without, in {answer.seconds:.2f} s"
    )
    if any(answer.refused.values()):
        yield f"not possible: {refusals({reason: n for reason, n in answer.refused.items() if n})}"


def _judged(found: Planned, judged: Judgement) -> list[str]:
    whose = "your layout" if found.asked.explain else "the configuration's own layout"
    lines = []
    if judged.scored is not None and judged.fits:
        scored = judged.scored
        held = f"memory     {scored.memory.peak / GB:.1f} GB, at most {scored.memory.upper / GB:.1f}"
        lines = [scored.label, *predictions(scored, found.basis), held]
    return [f"{whose}: {judged.text}", *_indented([*lines, judged.verdict])]


def _to_run(found: Planned) -> Iterator[str]:
    if found.overrides:
        yield f"configuration: {found.asked.config} {' '.join(found.overrides)}"
    told = found.winner.placement.warnings
    settings = launch_settings(found.winner.placement, found.winner.execution).explain().split("\n")
    yield from (line for line in settings if line not in told)


def _beyond(answer: Answer) -> Iterator[str]:
    if answer.beyond:
        yield f"what if: the engine does not support {', '.join(answer.beyond)}"


def _notes(found: Planned) -> Iterator[str]:
    shown = set(found.winner.placement.warnings)  # told with the placement
    yield from (f"note: {text}" for text in (*found.answer.warnings, *found.notes) if text not in shown)


def axes(plan: ParallelPlan) -> list[str]:
    """Axes of more than one rank."""
    return [axis for axis in ("tp", "cp", "dp", "pp", "etp", "ep", "edp") if plan.degree(axis) > 1]


def page(found: Planned) -> bytes:
    """The answer and its pictures as one HTML file."""
    from parallel.planning.pictures.plan import plan_pictures
    from pretrain.figures.plan import plan_page

    winner = found.winner

    told = [
        ("step time", f"{winner.time.step_s:.4g} s ({winner.time.low_s:.4g} to {winner.time.high_s:.4g})"),
        ("tokens/s", f"{winner.tokens_per_s:,.0f}"),
        ("MFU", percent(winner.mfu)),
        ("memory of a device", f"{winner.memory.peak / GB:.1f} GB, at most {winner.memory.upper / GB:.1f}"),
    ]
    setting = winner.plan, winner.execution, winner.topology
    pictures = plan_pictures(winner.workload, *setting, winner.time, winner.memory, remembering_time(found.calibration))
    return plan_page(f"{found.config.run.name}: plan", title(found), told, pictures, [planned(found)])


def _indented(lines: Sequence[str] | Iterator[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _wrapped(lines: Sequence[str]) -> Iterator[str]:
    """Lines no wider than a page, what is wrapped hanging under its beginning; a number keeps its sign of percent."""
    for line in lines:
        if len(line) <= WIDTH:
            yield line
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        kept = line.replace(" %", "\0%")
        for piece in wrap(kept, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False):
            yield piece.replace("\0", " ")
