"""A whole model from a checkpoint in this process alone, whatever layout wrote it: for generation and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.engine import seam
from parallel.engine.groups import Groups, create
from parallel.planning.plan import ParallelPlan
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig, parse
from pretrain.model.chunk import Chunk, build_chunks, named_tensors
from pretrain.rundir import CHECKPOINTS
from pretrain.spec import ModelSpec
from pretrain.trainer import DTYPES
from stoker.errors import Refusal

#: Checkpoint names that generation and export have no use for.
OPTIMIZER = "optim."


@dataclass(frozen=True)
class Restored:
    """``tensors``: every weight and router state by global name, those that ``model`` uses."""

    step: int
    config: RunConfig
    spec: ModelSpec
    model: Chunk
    tensors: dict[str, torch.Tensor]
    store: CheckpointStore

    def file(self, name: str) -> bytes:
        """An extra file of the checkpoint, such as tokenizer.json."""
        return self.store.file(self.step, name)


def restore(run_dir: Path, step: int | None = None) -> Restored:
    """The model of a run's checkpoint: of ``step``, or the newest. Raises Refusal where there is none or it is damaged;
    nothing in the run directory is changed."""
    store = CheckpointStore(run_dir / CHECKPOINTS)
    if step is None:
        step = store.latest()
        if step is None:
            raise Refusal(f"{run_dir} holds no committed checkpoint: train first, or give another run directory")
    config = parse(store.meta(step)["config"], f"checkpoint of step {step}")
    spec = config.model_spec()
    groups = alone(len(spec.layers))
    (model,), builds = build_chunks(spec, groups, DTYPES[config.run.dtype], seam.device())
    tensors = {name: tensor.detach() for name, tensor in named_tensors(builds).items()}
    store.load(step, builds[0].layouts, groups.coords, tensors, ignore=(OPTIMIZER,))
    return Restored(step, config, spec, model.eval(), tensors, store)


def alone(num_layers: int) -> Groups:
    """Groups of a world of one, formed here if this process is in none."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return create(ParallelPlan(1, 1, 1, num_layers=num_layers))
