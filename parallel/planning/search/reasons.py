"""Reasons in a sentence, with numbers: why a layout loses, what it lacks, which two cannot be told apart. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parallel.planning.memory.prediction import MemoryPrediction
from parallel.planning.plan import ParallelPlan
from parallel.planning.search.scored import Scored
from parallel.planning.topology import HardwareTopology

#: Which choice makes a part of the step longer, the likeliest first.
CAUSES: Mapping[str, tuple[str, ...]] = {
    "products": ("recompute", "recompute_modules", "precision", "pp", "tp", "micro_batch", "cp", "vpp", "ep"),
    "experts": ("recompute", "recompute_modules", "precision", "ep", "etp", "tp", "micro_batch", "pp", "vpp"),
    "attention": ("recompute", "pp", "tp", "cp", "vpp", "micro_batch"),
    "linear attention": ("recompute", "pp", "tp", "cp", "vpp", "micro_batch"),
    "memory-bound": ("recompute", "recompute_modules", "precision", "pp", "tp", "ep", "cp", "vpp", "micro_batch"),
    "host": ("micro_batch", "pp", "dp", "vpp", "recompute", "tp"),
    "tensor parallel": ("tp", "sequence_parallel", "recompute", "micro_batch", "etp"),
    "expert exchange": ("ep", "etp", "expert_overlap", "tp", "recompute", "micro_batch", "pp"),
    "context parallel": ("cp", "micro_batch", "tp"),
    "sharded weights": ("zero", "micro_batch", "tp", "dp", "ep"),
    "pipeline bubble": ("pp", "vpp", "schedule", "micro_batch", "dp"),
    "pipeline messages": ("pp", "vpp", "micro_batch", "tp"),
    "gradient reduction": ("zero", "dp", "tp", "pp", "ep", "etp", "cp"),
    "optimizer": ("offload", "zero", "dp", "pp", "tp", "ep"),
    "offload": ("offload",),
    "stragglers": ("world_size",),
    "not explained": (),
}
#: Everything that two layouts can differ in.
CHOICES = (
    *("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "micro_batch", "zero", "recompute", "sequence_parallel"),
    *("precision", "schedule", "recompute_modules", "offload", "expert_overlap", "world_size"),
)
#: Share of the best step below which a difference is not worth a word.
WORTH_TELLING = 0.002


def why_slower(best: Scored, other: Scored) -> str:
    """How much slower ``other`` is, which parts of its step are longer, and which choice makes the first of them so:
    "+4.8 % (12.9 s against 12.3 s): pp 16 instead of 8: pipeline bubble +7.1 % of the step, ..."."""
    whole = best.time.step_s
    names = {**best.time.parts, **other.time.parts}
    longer = [(other.time.parts.get(name, 0.0) - best.time.parts.get(name, 0.0), name) for name in names]
    told = sorted((each for each in longer if abs(each[0]) > WORTH_TELLING * whole), reverse=True)
    more, less = [each for each in told if each[0] > 0][:2], [each for each in reversed(told) if each[0] < 0][:1]
    text = f"{_percent(other.time.step_s - whole, whole)} ({other.time.step_s:.4g} s against {whole:.4g} s)"
    if more:
        parts = ", ".join(f"{name} {_percent(seconds, whole)} of the step" for seconds, name in more)
        text += f": {_cause(more[0][1], best, other)}: {parts}"
    if less:
        text += f"; {less[0][1]} gives back {_percent(-less[0][0], whole).lstrip('+')}"
    return text


def _cause(part: str, best: Scored, other: Scored) -> str:
    """The likeliest choice behind a longer part, or the first ones where none is known to be: "pp 16 instead of 8"."""
    differ = [name for name in CHOICES if _choice(best, name) != _choice(other, name)]
    likely = [name for name in CAUSES.get(part, ()) if name in differ][:1] or differ[:2]
    told = (f"{name.replace('_', '-')} {_choice(other, name)} instead of {_choice(best, name)}" for name in likely)
    return " and ".join(told)


def _choice(scored: Scored, name: str) -> str:
    """What was decided, a field of the plan or of the execution, in a word."""
    value = getattr(scored.plan if hasattr(scored.plan, name) else scored.execution, name)
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:+.1f} %"


def indistinct(best: Scored, others: Sequence[Scored]) -> str:
    """Which of ``others`` the prediction cannot tell from the best, and the simplest of them all; "" where it can.

    Errors of predictions for one model on one machine go together, so the order is likelier right than the bars say.
    """
    alike = [other for other in others if other.time.low_s <= best.time.high_s]
    if not alike:
        return ""
    simplest = min((best, *alike), key=lambda scored: (model_parallelism(scored.plan), scored.time.step_s))
    next_best = "the next best" if len(alike) == 1 else f"the next best {len(alike)}"
    advice = "it is also the simplest" if simplest is best else f"if in doubt, take the simpler {simplest.label}"
    bars = f"{best.time.low_s:.4g} to {best.time.high_s:.4g} s"
    return f"not distinguishable from {next_best} within the prediction's error bar ({bars}): {advice}"


def model_parallelism(plan: ParallelPlan) -> tuple[int, ...]:
    """How much a layout cuts the model: no more than is needed is the first of NVIDIA's guidelines (Megatron-Core
    documentation, parallelism strategies)."""
    return (plan.tp * plan.cp * plan.pp, plan.ep * plan.etp, plan.vpp)


def shortage(memory: MemoryPrediction, topology: HardwareTopology) -> str:
    """Which stage lacks how much memory, and what takes it."""
    stage = max(memory.stages, key=lambda stage: stage.upper)
    capacity = topology.known("device.memory_bytes")
    largest = sorted(stage.components.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in largest)
    missing = stage.upper - capacity
    lacks = f"{_gb(missing)} too much" if missing > 0 else f"{_gb(-missing)} to spare"
    return f"pipeline rank {stage.pp} needs up to {_gb(stage.upper)} of {_gb(capacity)}, {lacks} ({parts})"


def refusals(counts: Mapping[str, int]) -> str:
    """Refused layouts by reason, the commonest first: "1,204 too large for the memory; ..."."""
    commonest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{count:,} {reason}" for reason, count in commonest if count)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
