"""How a published run was executed: stack, generation of the software, precision and overlaps, from a row's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from parallel.planning.execution import Dispatcher, Execution, Graphs, Module, Precision, Routing, Stack
from parallel.planning.published.recipes import Recipe
from parallel.planning.published.rows import Row
from parallel.planning.topology import HardwareTopology
from stoker.errors import Refusal

Offload = Literal["optimizer", "activations"]

#: Words of a source's name -> its stack; the first that occurs.
STACKS: tuple[tuple[str, Stack], ...] = (
    ("automodel", "automodel"),
    ("torchtitan", "torchtitan"),
    ("foundry", "fsdp"),
    ("mpt", "fsdp"),
    ("primus", "primus"),
    ("amd", "primus"),
    ("neuron", "neuron"),
    ("fsdp", "fsdp"),
    ("megatron", "megatron"),
    ("nemo", "megatron"),
)
#: Words of a ``recompute`` cell -> modules that backward runs again.
MODULES: dict[str, Module] = {
    "core attention": "core_attention",
    "core_attn": "core_attention",
    "layernorm": "norm",
    "norm": "norm",
    "act": "activation",
    "moe_act": "moe_activation",
    "mla_up_proj": "mla_up",
    "mlp": "mlp",
    "moe": "moe",
    "shared_expert": "shared_expert",
    "shared_experts": "shared_expert",
}


def stack_of(row: Row) -> Stack:
    """Megatron unless the source says otherwise."""
    source = row.source.lower()
    found = next((stack for word, stack in STACKS if word in source), None)
    # An unknown source that shards weights without any model parallelism trains with PyTorch's FSDP.
    return found or ("fsdp" if row.zero_stage == 3 and (row.tp or 1) == (row.pp or 1) == 1 else "megatron")


def generation_of(row: Row, assumed: list[str]) -> tuple[int, int]:
    """(year, month) of the software: a container's version, a date in the address, a paper's number, or the year."""
    texts = (
        (row.notes, r"(?:container: |NeMo |v)(2\d)\.(0[1-9]|1[0-2])"),
        (row.source_url, r"ngc(2\d)\.(0[1-9]|1[0-2])"),
        (row.source_url, r"_20(2\d)-(0[1-9]|1[0-2])"),
        (row.source_url, r"arxiv\.org/abs/(2\d)(0[1-9]|1[0-2])\."),
    )
    for text, pattern in texts:
        if found := re.search(pattern, text):
            return 2000 + int(found[1]), int(found[2])
    if found := re.search(r"MLPerf Training v(\d)\.(\d)", row.source):
        # Rounds are published in June (.0) and November (.1); v5 in 2025.
        return 2020 + int(found[1]), (4, 9)[int(found[2]) > 0]
    year = row.year or 2025
    assumed.append(f"software of {year}")
    return year, 6


def precision_of(row: Row, topology: HardwareTopology, assumed: list[str]) -> Precision:
    """The precision that the many spellings mean."""
    text = re.sub(r"[^a-z0-9]", "", row.precision.lower())
    blackwell = "mxfp8" in topology.device.peak_flops
    if not text:
        if "MLPerf" in row.source:
            small = blackwell and (row.gpus or 0) <= 16
            found: Precision = "nvfp4" if small and "nvfp4" in topology.device.peak_flops else "fp8"
            assumed.append(f"precision={found}: MLPerf runs of this size name theirs so")
            return found
        assumed.append("precision=bfloat16")
        return "bfloat16"
    if "fp4" in text:
        return "nvfp4"
    if "mx" in text or "32x32" in text:
        return "mxfp8"
    if "blk" in text or "block" in text or "128x128" in text or "row" in text:
        return "fp8_block"  # a scale for each row is as fine, and as much work, as one for each block
    if "fp8" in text:
        return "fp8"
    if "bf16" in text or "bfloat16" in text:
        return "bfloat16"
    if "fp16" in text or "float16" in text:
        return "float16"
    if "fp32" in text or "float32" in text:
        return "float32"
    raise Refusal(f"precision {row.precision!r} is not known")


#: Share of a layer's activations in what goes into an expert's first product and comes out of its activation, experts
#: of 1536 in a model of 4096 with 8 visits (Qwen3-235B-A22B).
OFFLOADED_MODULES = 0.5


def execution_of(row: Row, precision: Precision, recipe: Recipe | None, assumed: list[str]) -> Execution:
    """Everything of ``Execution`` that a row's cells, notes and source say, and its recipe where they are silent."""
    notes, stack = row.notes.lower(), stack_of(row)
    generation = generation_of(row, assumed)
    bridge = "bridge" in row.source.lower()
    if bridge:
        assumed.append("gradients reduced in bfloat16, as Megatron-Bridge's benchmarks set")
    plain_optimizer = stack == "automodel"  # torch's Adam on bfloat16 parameters, as its benchmarks set
    short_gradients = bridge or plain_optimizer or "mp mode pure" in notes or "bf16 gradients" in notes
    shard = re.search(r"shard degree (\d+)", notes)
    return Execution(
        precision=precision,
        stack=stack,
        generation=generation,
        dispatcher=_dispatcher(notes, recipe),
        recompute_modules=_modules(row, recipe),
        offload=_offload(notes, recipe, assumed),
        offload_share=_offload_share(row, recipe),
        gradient_bytes=2 if short_gradients else 4,
        moment_bytes=2 if plain_optimizer or "bf16 moments" in notes else 4,
        master_bytes=0 if plain_optimizer else 4,
        expert_overlap=_expert_overlap(notes) or bool(recipe and recipe.expert_overlap),
        tensor_overlap=_tensor_overlap(row, stack, generation),
        graphs=_graphs(notes, recipe),
        fused_experts=bool(recipe and recipe.fused_experts),
        fp8_attention="fp8 attention" in notes or bool(recipe and recipe.fp8_attention),
        deterministic="deterministic" in notes,
        routing=_routing(row, assumed),
        zero_parts=int(shard[1]) if shard and row.dp and int(shard[1]) < row.dp else None,
    )


def _tested(row: Row) -> bool:
    return "golden value" in row.notes


def _offload(notes: str, recipe: Recipe | None, assumed: list[str]) -> tuple[Offload, ...]:
    said: tuple[tuple[str, Offload], ...] = (
        ("optimizer state offload", "optimizer"),
        ("activation offload", "activations"),
    )
    found = [offload for words, offload in said if words in notes]
    if recipe and recipe.offloaded_layers and "activations" not in found:
        found.append("activations")
        assumed.append(f"activations offloaded; the recipe does so with {recipe.offloaded_layers} layers")
    return tuple(found)


def _offload_share(row: Row, recipe: Recipe | None) -> float:
    """Layers whose activations are offloaded, of all; the whole of them where nobody says."""
    if recipe and recipe.offloaded_layers and row.layers:
        return min(1.0, recipe.offloaded_layers / row.layers)
    return OFFLOADED_MODULES if "activation offload expert_fc1+moe_act" in row.notes else 1.0


def _modules(row: Row, recipe: Recipe | None) -> tuple[Module, ...]:
    cell = row.recompute.lower()
    words: Sequence[str] = ()
    if not cell and recipe:
        words = recipe.recompute
    elif cell.startswith("selective"):
        words = re.split(r"[+,]", re.sub(r"^selective\W*|\)$", "", cell))
    elif "sac" in cell:
        words = ("norm", "act")  # torchtitan's keeps every second matrix product and the attention
    return tuple(dict.fromkeys(MODULES[word.strip()] for word in words if word.strip() in MODULES))


def _dispatcher(notes: str, recipe: Recipe | None) -> Dispatcher:
    named: tuple[tuple[str, Dispatcher], ...] = (
        ("hybridep", "hybridep"),
        ("deepep", "deepep"),
        ("a2a dispatcher", "alltoall"),
    )
    texts = (notes, recipe.dispatcher if recipe else "")
    return next((dispatcher for text in texts for word, dispatcher in named if word in text), "alltoall")


def _graphs(notes: str, recipe: Recipe | None) -> Graphs:
    """Of the whole iteration where the notes or the recipe say so, of parts of a layer where they say less."""
    stated = recipe.cuda_graphs if recipe else ""
    if stated == "iteration" or "cuda graph full" in notes:
        return "full"
    return "partial" if stated or "cuda graph" in notes else "none"


def _expert_overlap(notes: str) -> bool:
    return bool(re.search(r"a2a overlap on|1f1b a2a overlap|1f1b overlap|; a2a overlap", notes))


def _tensor_overlap(row: Row, stack: Stack, generation: tuple[int, int]) -> bool:
    """Megatron's user-buffer overlap came with Transformer Engine in 2023; torchtitan's runs say which they are."""
    notes = row.notes.lower()
    if stack == "torchtitan":
        return "async tp" in notes
    return stack == "megatron" and generation >= (2023, 6) and not row.experts and "deterministic" not in notes


def _routing(row: Row, assumed: list[str]) -> Routing:
    notes = row.notes.lower()
    if "token dropping" in notes or "token-drop" in notes:
        return "dropped"
    if "real dropless" in notes or _tested(row):
        return "real"
    if row.experts and "balance" not in notes:
        assumed.append("routing=balanced")
    return "balanced"
