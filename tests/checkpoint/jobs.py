"""What the gloo processes of ``test_gloo.py`` run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.planning.plan import ParallelPlan
from pretrain.checkpoint import assembly, chunks
from pretrain.checkpoint.store import CheckpointStore
from tests.checkpoint.state import CHUNK_BYTES, EXCHANGE_BYTES, bits_equal, global_state, layouts, parts


def _store(root: str) -> CheckpointStore:
    chunks.TARGET_BYTES, assembly.EXCHANGE_BYTES = CHUNK_BYTES, EXCHANGE_BYTES
    return CheckpointStore(Path(root), dist.group.WORLD)


def save(root: str, step: int, fields: dict[str, Any], attempt: int = 1, die_on_rank: int | None = None) -> None:
    """Save ``global_state(step)`` under a plan; one rank may die by SIGKILL when its chunks are written."""
    plan = ParallelPlan.from_dict(fields)
    coords, where = plan.coords(dist.get_rank()), layouts(plan)
    if dist.get_rank() == die_on_rank:
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    tensors = {name: (where[name], tensor) for name, tensor in parts(global_state(step), where, coords).items()}
    _store(root).save(step, tensors, {"step": step}, coords, attempt).wait()


def load(root: str, step: int | None, fields: dict[str, Any]) -> tuple[int, list[str]]:
    """Load under a plan: the step that came, and the tensors that are not this rank's part of that step's state."""
    plan = ParallelPlan.from_dict(fields)
    coords, where = plan.coords(dist.get_rank()), layouts(plan)
    tensors, meta = _store(root).load(step, where, coords)
    expected = parts(global_state(meta["step"]), where, coords)
    assert tensors.keys() == expected.keys()
    return meta["step"], [name for name in expected if not bits_equal(tensors[name], expected[name])]


def refuse(root: str, fields: dict[str, Any]) -> str:
    """A save in which the last rank has a tensor of the wrong shape: what each rank is told."""
    plan = ParallelPlan.from_dict(fields)
    coords, where = plan.coords(dist.get_rank()), layouts(plan)
    tensors = parts(global_state(0), where, coords)
    if dist.get_rank() == plan.world_size - 1:
        tensors["mask"] = tensors["mask"][1:]
    try:
        _store(root).save(0, {name: (where[name], t) for name, t in tensors.items()}, {}, coords, attempt=1)
    except ValueError as error:
        return str(error)
    return "saved"


def verify(root: str, step: int) -> list[str]:
    return [str(damage) for damage in _store(root).verify(step)]
