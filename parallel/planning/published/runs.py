"""Published training runs as the planner's own types: from a row's layout columns to what the models take.

    for row in read_rows():
        match interpret(row):
            case Run() as run: predict_time(run.workload, run.plan, run.execution, run.topology)
            case Skipped(reason=reason): ...

No measured column is read for a run, nor a measured number in its notes; ``published`` gives them apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from parallel.planning.execution import Execution
from parallel.planning.models.architectures import Form
from parallel.planning.plan import ParallelPlan
from parallel.planning.published.executions import execution_of, precision_of
from parallel.planning.published.models import model_of
from parallel.planning.published.plans import PlanReader
from parallel.planning.published.recipes import recipe_of, with_stated_cells
from parallel.planning.published.rows import Published, Row, read_rows
from parallel.planning.topology import HardwareTopology, load_hardware
from parallel.planning.workload import Workload
from stoker.errors import Refusal

__all__ = ["Published", "Row", "Run", "Skipped", "flops_per_token", "interpret", "published", "read_rows"]

#: How a table's ``gpu`` begins or contains -> the preset; the first that fits.
PRESETS = (
    ("gb300", "gb300-nvl72"),
    ("gb200", "gb200-nvl72"),
    ("b300", "b300"),
    ("b200", "b200"),
    ("h800", "h800"),
    ("h200", "h200"),
    ("h100", "h100"),
    ("a10040", "a100-40gb"),
    ("a100sxm440", "a100-40gb"),
    ("a100", "a100-80gb"),
    ("mi355", "mi355x"),
    ("mi350", "mi350x"),
    ("mi300", "mi300x"),
    ("trainium1", "trainium1"),
    ("trn1", "trainium1"),
    ("trainium2", "trainium2"),
    ("trn2", "trainium2"),
)
#: Parts whose names contain a preset's and which are not it.
OTHER_PARTS = ("gh200", "pcie", "h100nvl")
#: Cells that a row with a fully stated layout has, and beside them vpp where there is a pipeline.
LAYOUT = ("gpus", "global_batch_seqs", "micro_batch", "precision", "tp", "pp")
EMPTY_VPP = "Megatron-Bridge"  # this source leaves vpp empty where there is no interleaving
FLASH_ATTENTION = (2022, 12)  # Megatron-LM's first release with it; before, scores went to memory
LEAN_EXPERTS = (2025, 5)  # Megatron-core 0.12: routing weights applied before the down product


@dataclass(frozen=True)
class Run:
    """What a row says, without anything that it measured. ``assumed``: every cell that was inferred or chosen, in
    words. ``doubtful``: why the row is doubted. ``stated``: the row itself gives its whole layout and is not doubted.
    ``tags``: source, model, gpu, precision, kind (dense or moe)."""

    index: int
    workload: Workload
    plan: ParallelPlan
    execution: Execution
    topology: HardwareTopology
    assumed: tuple[str, ...]
    tags: dict[str, str]
    stated: bool
    doubtful: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that is not modelled, and why."""

    index: int
    reason: str


def interpret(row: Row) -> Run | Skipped:
    """The run of a row, or why there is none: a layout that contradicts itself, an unknown machine or model."""
    try:
        return _run(row)
    except Refusal as refusal:
        return Skipped(row.index, str(refusal))


def _run(stated: Row) -> Run:
    if "use no layout" in stated.notes:
        raise Refusal(f"the table doubts its layout: {doubt(stated)}")
    doubtful = doubt(stated)
    assumed: list[str] = []
    row = with_stated_cells(stated, assumed)
    _refuse_impossible(row)
    topology = _topology(row, assumed)
    precision = precision_of(row, topology, assumed)
    recipe = recipe_of(row, precision)
    if recipe:
        assumed.append("recompute, dispatcher, overlap and graphs of the source's recipe, where the row is silent")
    execution = execution_of(row, precision, recipe, assumed)
    unfused = execution.stack == "megatron" and execution.generation < FLASH_ATTENTION
    form = Form(execution.element_bytes, not unfused, unfused, execution.generation >= LEAN_EXPERTS)
    model = model_of(row, form)
    assumed += model.assumed
    reader = PlanReader(row, model, execution, recipe, topology.device.memory_bytes, assumed)
    plan = reader.plan()
    doubtful = doubtful or reader.doubtful
    return Run(
        row.index,
        model.workload,
        plan,
        execution,
        topology,
        tuple(assumed),
        {
            "source": row.source,
            "model": row.model,
            "gpu": row.gpu,
            "precision": row.precision,
            "kind": "moe" if model.workload.has_experts else "dense",
        },
        not doubtful and _fully_stated(stated),
        doubtful,
    )


def _fully_stated(row: Row) -> bool:
    interleaving = row.pp == 1 or row.vpp or EMPTY_VPP in row.source
    return bool(interleaving) and all(getattr(row, name) for name in LAYOUT)


def doubt(row: Row) -> str | None:
    """Why a row is doubted: what its notes say behind DOUBTFUL, or columns that contradict them."""
    if found := re.match(r"DOUBTFUL: ([^;]*)", row.notes):
        return found[1]
    if row.experts and (row.ep or 1) == 1 and re.search("DeepEP|HybridEP", row.notes):
        return "the notes name an expert dispatcher and the columns no expert parallelism"
    return None


def _refuse_impossible(row: Row) -> None:
    """Raise Refusal for cells that are not what their columns hold, or that no run can have together."""
    if row.unreadable:
        raise Refusal("; ".join(row.unreadable))
    for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "gpus", "micro_batch", "global_batch_seqs", "seq_len"):
        if getattr(row, name) == 0:
            raise Refusal(f"{name} is 0")
    if row.topk and row.experts and row.topk > row.experts:
        raise Refusal(f"topk={row.topk} of experts={row.experts}: a token cannot visit more than there are")
    if row.heads and row.kv_heads and row.heads % row.kv_heads:
        raise Refusal(f"kv_heads={row.kv_heads} does not divide heads={row.heads}")


def _topology(row: Row, assumed: list[str]) -> HardwareTopology:
    name = re.sub(r"[^a-z0-9]", "", row.gpu.lower().replace("80gb", ""))
    if not name:
        assumed.append("gpu=GB200")
        name = "gb200"
    preset = next((preset for part, preset in PRESETS if part in name), None)
    if preset is None or any(other in name for other in OTHER_PARTS):
        raise Refusal(f"gpu {row.gpu!r} is none of the presets: {', '.join(dict(PRESETS))}")
    if preset == "h100" and "96GB" in row.notes:
        preset = "h100-96gb-500w"
    topology, size = load_hardware(preset), row.gpus_per_nvlink_domain
    if not size or size == topology.domain.size:
        return topology
    practice = tuple(usual for usual in topology.domain.practice if usual <= size) or (size,)
    domain = replace(topology.domain, size=size, per_host=min(topology.domain.per_host, size), practice=practice)
    return replace(topology, domain=domain, spares=min(topology.spares, size - practice[-1]))


def published(row: Row, run: Run) -> Published:
    """What the row measured, the step time filled from tokens/s, or from TFLOP/s where the accounting is known."""
    measured, plan = row.measured, run.plan
    tokens = plan.global_batch * run.workload.seq_len / plan.world_size
    step_s, rate, tflops = measured.step_time_s, measured.tokens_per_s_per_gpu, measured.tflops_per_gpu
    if step_s is None and rate:
        step_s = tokens / rate
    if tflops is None and measured.mfu_pct:
        tflops = measured.mfu_pct / 100 * run.topology.peak(run.execution.precision) / 1e12
    if step_s is None and tflops and (flops := flops_per_token(row, run)):
        step_s = flops * tokens / (tflops * 1e12)
    if rate is None and step_s:
        rate = tokens / step_s
    return replace(measured, step_time_s=step_s, tokens_per_s_per_gpu=rate)


def flops_per_token(row: Row, run: Run) -> float | None:
    """FLOPs a token as the row's source counts them; None where that is not known or doubted.

    SC21 counts what the hardware runs: forward twice with full recompute. MPT and Nemotron-4 count attention in full,
    not its causal half. The others count model FLOPs, as ``Workload`` does.
    """
    reason, work = (run.doubtful or "").lower(), run.workload
    if "use tokens/s" in reason:
        return None
    if "HARDWARE flops" in row.notes:
        return work.training_flops + work.forward_flops
    if "full, not causal" in reason or run.execution.stack == "fsdp":
        cores = (op for block in work.blocks for op in block.operations if op.name == "attention")
        return work.training_flops + sum(op.forward_flops + op.backward_flops for op in cores)
    return work.training_flops
