"""Faults of hardware, put into a trainer of one rank: a flipped bit, or a number that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from parallel.engine.groups import create
from parallel.planning.plan import ParallelPlan
from pretrain.config_sections import GuardSection, TrainSection
from pretrain.guards.fingerprint import words
from pretrain.model.feed_forward import DenseFeedForward
from pretrain.spec import ModelSpec
from pretrain.trainer import Trainer
from tests.parity.batches import GLOBAL_BATCH
from tests.parity.jobs import LEARNING_RATE

Spoil = Callable[[torch.Tensor], None]


def make_trainer(spec: ModelSpec, plan: dict[str, Any], dtype: str = "float32", **guard: Any) -> Trainer:
    train = TrainSection(global_batch=GLOBAL_BATCH, lr=LEARNING_RATE, clip=0.5)
    groups = create(ParallelPlan.from_dict(plan), shared_embedding=spec.tied_embedding)
    return Trainer(spec, groups, train, dtype, seed=1, guard=GuardSection(**guard))


def flip(bit: int, index: int = 7) -> Spoil:
    """One bit of one element; of a number of 32 bits, 31 is the sign and 23 to 30 the exponent."""

    def spoil(tensor: torch.Tensor) -> None:
        flat = words(tensor)
        flat[index % flat.numel()] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=flat.dtype)

    return spoil


def to_nan(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1)[7 % tensor.numel()] = torch.nan


@contextmanager
def fault(trainer: Trainer, where: str, spoil: Spoil, rank: int, times: int = 1) -> Iterator[None]:
    """Spoils one rank's numbers the first ``times`` that they are computed: a GEMM's output, its own gradients, the
    reduced gradients, or a weight (for good)."""
    left = [times if trainer.groups.rank == rank else 0]

    def once(tensor: torch.Tensor) -> None:
        if left[0]:
            left[0] -= 1
            spoil(tensor)

    module = next(module for module in trainer.chunks[0].modules() if isinstance(module, DenseFeedForward))
    # Of the last parameter, where every element has a gradient: a token that did not come has none in the embedding,
    # and a zero with its highest exponent bit flipped is a harmless 2.
    gradient = list(trainer.parameters.values())[-1].main_grad  # type: ignore[attr-defined]
    run, reduce, forward = trainer.pipeline.run, trainer.replicas.reduce_gradients, module.forward

    def spoilt_forward(*arguments: Any) -> Any:
        out, statistics = forward(*arguments)
        changed = out.clone()
        once(changed.data)
        return changed, statistics

    def spoilt_run(*arguments: Any, **options: Any) -> Any:
        losses = run(*arguments, **options)
        once(gradient)
        return losses

    def spoilt_reduce() -> None:
        reduce()
        once(trainer.replicas.shards[0].gradient)

    if where == "weight":
        once(next(iter(trainer.parameters.values())).data)
        yield
        return
    target, name, replacement = {
        "gemm": (module, "forward", spoilt_forward),
        "gradient": (trainer.pipeline, "run", spoilt_run),
        "reduction": (trainer.replicas, "reduce_gradients", spoilt_reduce),
    }[where]
    with patch.object(target, name, replacement):
        yield
