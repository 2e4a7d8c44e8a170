"""A small global state, the layouts of its tensors under a plan, and a rank's part, cut without Layout's arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from parallel.planning.layout import Coords, Flat, Layout, Split
from parallel.planning.plan import ParallelPlan

NUM_LAYERS = 4
#: Small, so that tensors of a few kilobytes have several chunks and the boundaries of shards fall inside chunks.
CHUNK_BYTES, EXCHANGE_BYTES = 1000, 1500

Tensors = dict[str, torch.Tensor]


def plan(world_size: int, **degrees: Any) -> ParallelPlan:
    dense = math.prod(degrees.get(axis, 1) for axis in ("tp", "cp", "pp"))
    return ParallelPlan(world_size, world_size // dense * degrees.get("pp", 1), 1, num_layers=NUM_LAYERS, **degrees)


def global_state(seed: int = 0) -> Tensors:
    """Odd sizes, every dtype that a run has, three dims, no dims and no elements."""
    make = torch.Generator().manual_seed(seed)
    state: Tensors = {
        "embed.weight": torch.randn(257, 12, generator=make).bfloat16(),
        "final_norm.weight": torch.randn(65, generator=make),
        "counter.steps": torch.tensor(17 + seed),
        "counter.none": torch.zeros(0, 5),
    }
    for layer in range(NUM_LAYERS):
        prefix = f"layers.{layer}"
        state[f"{prefix}.mixer.o.weight"] = torch.randn(13, 60, generator=make).bfloat16()
        state[f"{prefix}.mixer.A_log"] = torch.randn(12, generator=make)
        state[f"{prefix}.ffn.gate_up"] = torch.randn(2 * 36, 11, generator=make, dtype=torch.float64)
        state[f"{prefix}.ffn.experts.up.weight"] = torch.randn(12, 12, 7, generator=make).bfloat16()
        state[f"{prefix}.ffn.experts.down.weight"] = torch.randn(12, 7, 12, generator=make)
        state[f"{prefix}.ffn.router.load"] = torch.randint(0, 2**62, (12,), generator=make)
    slots = {f"optim.exp_avg/{name}": torch.randn(t.shape, generator=make) for name, t in state.items() if t.dim() > 1}
    return {**state, **slots, "mask": torch.rand(63, generator=make) > 0.5}


def layouts(plan: ParallelPlan) -> dict[str, Layout]:
    """Where the tensors of ``global_state`` lie; optimizer slots are flat ranges if the plan has ZeRO-1."""
    both_ends = (0,) if plan.pp == 1 else (0, plan.pp - 1)
    found = {
        "embed.weight": Layout((257, 12), (Split(0, "tp", plan.tp),), stages=both_ends),
        "final_norm.weight": Layout((65,), stages=(plan.pp - 1,)),
        "counter.steps": Layout(()),
        "counter.none": Layout((0, 5)),
        "mask": Layout((63,)),
    }
    etp, ep = ("etp", plan.etp), ("ep", plan.ep)
    for layer in range(NUM_LAYERS):
        prefix, stages = f"layers.{layer}", (plan.stage_of(layer),)
        found |= {
            f"{prefix}.mixer.o.weight": Layout((13, 60), (Split(1, "tp", plan.tp),), stages=stages),
            f"{prefix}.mixer.A_log": Layout((12,), (Split(0, "tp", plan.tp),), stages=stages),
            f"{prefix}.ffn.gate_up": Layout((72, 11), (Split(0, "tp", plan.tp, unit=3, groups=2),), stages=stages),
            f"{prefix}.ffn.experts.up.weight": Layout(
                (12, 12, 7), (Split(0, *ep), Split(1, *etp)), "expert", stages=stages
            ),
            f"{prefix}.ffn.experts.down.weight": Layout(
                (12, 7, 12), (Split(0, *ep), Split(2, *etp)), "expert", stages=stages
            ),
            f"{prefix}.ffn.router.load": Layout((12,), stages=stages),
        }
    slots = {f"optim.exp_avg/{name}": _sharded(at, plan) for name, at in found.items() if len(at.shape) > 1}
    return {**found, **slots}


def _sharded(layout: Layout, plan: ParallelPlan) -> Layout:
    axis, parts = ("dp", plan.dp) if layout.family == "dense" else ("edp", plan.edp)
    numel = math.prod(layout.allocated_shape)
    if not plan.zero or numel == 0:
        return layout
    before, behind = 5, 3  # other tensors in the bucket
    return replace(layout, flat=Flat(axis, parts, before, -(-(before + numel + behind) // parts)))


def part(whole: torch.Tensor, layout: Layout, coords: Coords, padding: float = 0) -> torch.Tensor:
    """A rank's tensor by padding, chunking and concatenating: an oracle for ``Layout.slices``."""
    for split in layout.splits:
        blocks = []
        for block in whole.chunk(split.groups, split.dim) if split.groups > 1 else [whole]:
            rows = -(-(block.shape[split.dim] // split.unit) // split.parts) * split.unit
            missing = list(block.shape)
            missing[split.dim] = rows * split.parts - block.shape[split.dim]
            block = torch.cat([block, torch.full(missing, padding, dtype=block.dtype)], split.dim)
            blocks.append(block.narrow(split.dim, coords[split.axis] * rows, rows))
        whole = torch.cat(blocks, split.dim)
    if layout.flat is None:
        return whole.clone()
    flat = layout.flat
    bucket = torch.cat([torch.full((flat.offset,), padding, dtype=whole.dtype), whole.reshape(-1)])
    shard = bucket[coords[flat.axis] * flat.shard : (coords[flat.axis] + 1) * flat.shard]
    outside = max(0, flat.offset - coords[flat.axis] * flat.shard)
    return shard[outside:].clone()


def parts(state: Tensors, where: dict[str, Layout], coords: Coords, padding: float = 0) -> Tensors:
    """All tensors of a rank."""
    return {
        name: part(whole, where[name], coords, padding)
        for name, whole in state.items()
        if coords["pp"] in where[name].stages
    }


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits (NaN equals itself)."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
