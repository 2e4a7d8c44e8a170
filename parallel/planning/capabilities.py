"""What the engine can run: one table, read by validation, ``parallel: auto``, the planner and the parity suite.

A feature is ``supported`` (built, and held to P4 by the parity suite), ``planned`` (refused until its issue lands) or
``model_only`` (the planner can reason about it under ``--what-if``; the engine has no code for it). Two supported
features go together unless ``APART`` says why not; ``exclusive`` is a pair that can never be. ``refused_pairs.txt`` is
the reviewed copy of everything refused; a test holds it equal to the table, so that it cannot grow unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from parallel.planning.execution import Execution
from parallel.planning.plan import ParallelPlan, Recompute
from stoker.errors import Refusal

Status = Literal["supported", "planned", "model_only", "exclusive"]
Kind = Literal["axis", "precision", "state", "schedule", "dispatcher", "recompute", "overlap", "kernel", "offload"]


@dataclass(frozen=True)
class Capability:
    """``needs``: features that this one cannot be without. ``instead``: the nearest thing that is supported."""

    name: str
    kind: Kind
    status: Status
    reason: str
    needs: tuple[str, ...] = ()
    instead: str = ""


_BFLOAT16 = "dtype=bfloat16"
_ROWS = (
    Capability("dp", "axis", "supported", "gradients summed over dp (experts: edp) in float32 or wider"),
    Capability("zero1", "axis", "supported", "optimizer state sharded over dp (experts: edp) in flat ranges", ("dp",)),
    Capability("tp", "axis", "supported", "heads and feed-forward columns; the vocabulary is padded, not restricted"),
    Capability("sp", "axis", "supported", "activations between tensor-parallel regions split by token", ("tp",)),
    Capability("pp", "axis", "supported", "1F1B; uneven stages"),
    Capability("vpp", "axis", "supported", "interleaved 1F1B with unbatched point-to-point messages", ("pp",)),
    Capability("ep", "axis", "supported", "whole experts over ranks, tokens exchanged all to all"),
    Capability("etp", "axis", "supported", "each expert's hidden dim over ranks, whatever tp is"),
    Capability("recompute_selective", "axis", "supported", "backward runs the mixer again, bit-equal to none"),
    Capability("recompute_full", "axis", "supported", "a layer keeps its input only, bit-equal to none"),
    Capability("cp", "axis", "planned", "context parallelism waits until its own issue", instead="cp=1"),
    Capability(
        "zero2", "axis", "model_only", "gradients sharded over dp: the engine shards optimizer state", ("dp",), "zero=1"
    ),
    Capability(
        "fsdp", "axis", "model_only", "weights sharded over dp: the engine shards optimizer state", ("dp",), "zero=1"
    ),
    Capability(
        "hybrid_sharding", "axis", "model_only", "sharded state is spread over the whole of dp", ("dp",), "zero=1"
    ),
    Capability("float64", "precision", "supported", "CPU parity; experts run one GEMM each"),
    Capability("float32", "precision", "supported", "published band in docs/parity.md"),
    Capability("bfloat16", "precision", "supported", "float32 master weights and reductions"),
    Capability("float16", "precision", "model_only", "no loss scaling is built", instead="dtype=bfloat16"),
    *(
        Capability(name, "precision", "planned", "refused until it is built and held to a band", instead=_BFLOAT16)
        for name in ("fp8", "fp8_block", "mxfp8", "nvfp4")
    ),
    Capability(
        "narrow_state",
        "state",
        "model_only",
        "the engine keeps gradients, moments and master weights in float32",
        instead="4 bytes an element",
    ),
    Capability("fp8_attention", "kernel", "planned", "attention runs in the dtype of the run", instead=_BFLOAT16),
    Capability("1f1b", "schedule", "supported", "one forward, one backward"),
    Capability("interleaved", "schedule", "supported", "vpp chunks a rank"),
    Capability(
        "zero_bubble", "schedule", "model_only", "the engine does not part input and weight gradients", instead="vpp"
    ),
    Capability("alltoall", "dispatcher", "supported", "torch.distributed all_to_all, gloo and NCCL"),
    Capability("deepep", "dispatcher", "planned", "no adapter is built and tested", instead="dispatcher alltoall"),
    Capability("hybridep", "dispatcher", "planned", "no adapter is built and tested", instead="dispatcher alltoall"),
    Capability(
        "token_dropping", "dispatcher", "model_only", "every token reaches its experts", instead="dropless routing"
    ),
    Capability(
        "recompute_modules",
        "recompute",
        "model_only",
        "backward runs a mixer or a layer again, no chosen part of one",
        instead="recompute=selective or recompute=full",
    ),
    Capability(
        "tensor_overlap",
        "overlap",
        "model_only",
        "gathers and scatters run before and after the products that need them",
        instead="sequence_parallel",
    ),
    Capability(
        "expert_overlap",
        "overlap",
        "model_only",
        "the expert exchange of one micro-batch waits for no other's computation",
        instead="ep inside the domain",
    ),
    Capability(
        "fused_experts",
        "kernel",
        "model_only",
        "grouped products and activation are kernels each",
        instead="grouped_mm",
    ),
    Capability(
        "cuda_graphs", "kernel", "model_only", "kernels are launched one by one", instead="larger micro-batches"
    ),
    Capability(
        "offload_optimizer",
        "offload",
        "model_only",
        "no tensor moves to host memory",
        instead="zero=1 over more data-parallel ranks",
    ),
    Capability(
        "offload_activations", "offload", "model_only", "no tensor moves to host memory", instead="recompute=full"
    ),
)
TABLE: Mapping[str, Capability] = {row.name: row for row in _ROWS}

#: Pairs of supported features that are refused together, and why.
APART: Mapping[frozenset[str], tuple[Status, str]] = {
    frozenset(("recompute_selective", "recompute_full")): ("exclusive", "a run has one recompute mode"),
}


def status(*features: str) -> tuple[Status, str]:
    """The status of features used together and the reason: that of the first that is not supported by itself, else of
    the first pair of them in ``APART``."""
    for name in features:
        if TABLE[name].status != "supported":
            return TABLE[name].status, TABLE[name].reason
    return next((APART[pair] for pair in map(frozenset, combinations(features, 2)) if pair in APART), ("supported", ""))


def pairs() -> Iterator[tuple[str, str]]:
    """Every pair of parallel axes that the engine must run, for the parity suite (P4)."""
    axes = [row.name for row in _ROWS if row.kind == "axis"]
    return ((a, b) for a, b in combinations(axes, 2) if status(a, b)[0] == "supported")


def refused() -> list[str]:
    """One line for each refused feature and each refused pair of supported ones: names, status, reason."""
    alone = [f"{row.name} | {row.status} | {row.reason}" for row in _ROWS if row.status != "supported"]
    apart = [f"{' '.join(sorted(pair))} | {found} | {reason}" for pair, (found, reason) in APART.items()]
    return sorted(alone + apart)


def smallest_plan(features: Iterable[str], *, num_layers: int, global_batch: int, degree: int = 2) -> ParallelPlan:
    """The smallest plan in which all of ``features`` (axes, with what they need) are at work at ``degree``.

    dp replicates whatever the other axes shard: (dp, ep) at degree 2 is four ranks, each expert held twice. The
    optimizer is sharded only where ``zero1`` asks. Raises Refusal where the features are not supported together.
    """
    used = _with_needs(features)
    if used >= {"ep", "etp"}:
        used.add("tp")  # both cuts of the experts over dp alone would ask for a batch of eight parts and more
    found, reason = status(*sorted(used))
    if found != "supported":
        raise Refusal(f"{', '.join(sorted(used))}: {found}, {reason}")
    size = {axis: degree if axis in used else 1 for axis in ("tp", "pp", "vpp", "ep", "etp", "dp")}
    recompute: Recompute = "selective" if "recompute_selective" in used else "none"
    return ParallelPlan(
        math.lcm(size["tp"], size["etp"] * size["ep"]) * size["dp"] * size["pp"],
        global_batch,
        1,
        num_layers=num_layers,
        tp=size["tp"],
        pp=size["pp"],
        vpp=size["vpp"],
        ep=size["ep"],
        etp=size["etp"],
        sequence_parallel="sp" in used,
        zero=int("zero1" in used),
        recompute="full" if "recompute_full" in used else recompute,
    )


def supported(name: str) -> bool:
    """Whether the engine has this feature of the table."""
    return TABLE[name].status == "supported"


def features_of(plan: ParallelPlan, execution: Execution | None = None) -> list[str]:
    """The axes at work in a plan and, with ``execution``, how it is run; in the order of the table."""
    at_work = {
        "sp": plan.sequence_parallel,
        "zero1": plan.zero == 1 and plan.dp > 1,
        "zero2": plan.zero == 2 and plan.dp > 1,
        "fsdp": plan.zero == 3 and plan.dp > 1,
        "recompute_selective": plan.recompute == "selective",
        "recompute_full": plan.recompute == "full",
    }
    at_work |= {axis: plan.degree(axis) > 1 for axis in ("dp", "tp", "pp", "vpp", "ep", "etp", "cp")}
    if execution is not None:
        at_work |= _execution_features(plan, execution)
    return [name for name in TABLE if at_work.get(name)]


def _execution_features(plan: ParallelPlan, execution: Execution) -> dict[str, bool]:
    master_bytes = execution.master_bytes or execution.element_bytes
    schedule = "interleaved" if plan.vpp > 1 and execution.schedule == "1f1b" else execution.schedule
    return {
        "hybrid_sharding": execution.zero_parts is not None,
        execution.precision: True,
        "narrow_state": min(execution.gradient_bytes, execution.moment_bytes, master_bytes) < 4,
        schedule: plan.pp > 1,
        execution.dispatcher: plan.ep > 1,
        "token_dropping": execution.routing == "dropped",
        "recompute_modules": bool(execution.recompute_modules),
        "tensor_overlap": execution.tensor_overlap,
        "expert_overlap": execution.expert_overlap,
        "fused_experts": execution.fused_experts,
        "fp8_attention": execution.fp8_attention,
        "cuda_graphs": execution.graphs != "none",
        **{f"offload_{what}": True for what in execution.offload},
    }


def refuse_unsupported(
    plan: ParallelPlan, execution: str | Execution, *, has_experts: bool, others: Iterable[str] = ()
) -> None:
    """Raise Refusal, with the reason and the nearest supported choice, where the engine cannot run this plan.

    ``execution``: how the plan is run, or only the dtype that it runs in. ``others``: further features asked for by
    name, such as a dispatcher or a schedule.
    """
    if isinstance(execution, Execution):
        used = [*features_of(plan, execution), *others]
    else:
        precisions = [row.name for row in _ROWS if row.kind == "precision"]
        if execution not in precisions:
            raise Refusal(f"precision {execution!r} is not known: choose one of {', '.join(precisions)}")
        used = [*features_of(plan), execution, *others]
    for name in used:
        if name not in TABLE:
            raise Refusal(f"feature {name!r} is not known: choose from {', '.join(TABLE)}")
        row = TABLE[name]
        if row.status != "supported":
            raise Refusal(f"{row.kind} {name} is {row.status.replace('_', ' ')}: {row.reason}; use {row.instead}")
    found, reason = status(*used)
    if found != "supported":
        raise Refusal(reason)
    for axis in ("ep", "etp"):
        if plan.degree(axis) > 1 and not has_experts:
            raise Refusal(f"{axis}={plan.degree(axis)} shards experts and the model has none: use {axis}=1")


def _with_needs(features: Iterable[str]) -> set[str]:
    used, todo = set[str](), list(features)
    while todo:
        name = todo.pop()
        if name not in TABLE or TABLE[name].kind != "axis":
            axes = ", ".join(row.name for row in _ROWS if row.kind == "axis")
            raise Refusal(f"feature {name!r} is not a parallel axis: choose from {axes}")
        used.add(name)
        todo += TABLE[name].needs
    return used
