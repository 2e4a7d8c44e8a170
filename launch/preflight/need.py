"""What a run asks of one host: bytes of memory and disk, files, threads. From the configuration alone, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.planning.memory.prediction import predict_memory
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import HardwareTopology, load_hardware
from pretrain.config import ELEMENT_BYTES, RunConfig
from pretrain.forecast import execution_of, workload_at
from pretrain.spec import ModelSpec

#: Components of a stage that lie in memory whatever a step does.
STATE = ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class Need:
    """Of one of ``hosts`` equal hosts that run ``ranks`` ranks each, ``world`` in all.

    ``checkpoint_bytes``: one whole checkpoint, all hosts together; ``checkpoints``: how many lie on disk at most.
    ``state_bytes``: weights, gradients and optimizer of the ranks of a host on average, a lower bound of its memory;
    ``peak_bytes``: the estimate with activations. ``grace_s``: within which an urgent checkpoint must be written.
    """

    ranks: int
    world: int
    checkpoint_bytes: int
    checkpoints: int
    state_bytes: float
    peak_bytes: float
    grace_s: float

    @property
    def hosts(self) -> int:
        return -(-self.world // self.ranks)


def need_of(config: RunConfig, plan: ParallelPlan, ranks: int, topology: HardwareTopology | None = None) -> Need:
    """What ``plan`` asks of a host with so many of its ranks; ``topology``: of its GPUs, None where it has none."""
    stages = predict_memory(workload_at(config), plan, execution_of(config), topology or load_hardware("cpu")).stages
    every = config.checkpoint.every
    saves = 1 if every is None else -(-config.run.steps // every)
    return Need(
        ranks=ranks,
        world=plan.world_size,
        checkpoint_bytes=checkpoint_bytes(config.model_spec(), config.run.dtype),
        checkpoints=min(saves, config.checkpoint.keep_last + 1),
        state_bytes=ranks * sum(stage.components[name] for stage in stages for name in STATE) / len(stages),
        peak_bytes=ranks * sum(stage.device for stage in stages) / len(stages),
        grace_s=config.launch.grace_s,
    )


def checkpoint_bytes(spec: ModelSpec, dtype: str) -> int:
    """Tensors of one checkpoint: every parameter and, of those that are trained, AdamW's two moments and the master
    where weights are narrower than float32."""
    narrow = ELEMENT_BYTES[dtype]
    wide = max(narrow, 4)
    width: Mapping[str, int] = {"param": narrow, "high": wide, "int64": 8}
    total = 0
    for parameter in spec.parameters().values():
        own = width[parameter.dtype]
        slots = 2 * wide + (wide if own < wide else 0) if parameter.trained else 0
        total += parameter.numel * (own + slots)
    return total
