"""What the pool runs: a short training run under a plan, and the state that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.engine.groups import create
from parallel.planning.layout import Layout, Slice
from parallel.planning.plan import ParallelPlan
from pretrain.config_sections import OptimizerSection, TrainSection
from pretrain.health import StepReport
from pretrain.loop import train_step
from pretrain.spec import ModelSpec
from pretrain.trainer import Trainer
from tests.parity.batches import GLOBAL_BATCH, global_batch, part_of
from tests.parity.mutations import mutated
from tests.parity.specs import SEQ_LEN

#: Small enough that rounding is not amplified: at 1e-2 Adam turns 1e-16 of gradient noise into 1e-4 within 20 steps.
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Held:
    """What a rank holds of one tensor; ``owner``: this rank counts it, others have replicas."""

    name: str
    layout: Layout
    owner: bool
    pieces: list[tuple[Slice, np.ndarray]]


@dataclass(frozen=True)
class Outcome:
    """One rank's reports of the steps, and what it holds after them."""

    reports: list[StepReport]
    held: list[Held]


def make_trainer(spec: ModelSpec, plan: dict[str, Any], dtype: str = "float64", **train: Any) -> Trainer:
    # Clipping at 0.5 is at work in most steps, so that a wrong norm bends the curve.
    train = {"global_batch": GLOBAL_BATCH, "lr": LEARNING_RATE, "clip": 0.5, "optimizer": OptimizerSection(), **train}
    groups = create(ParallelPlan.from_dict(plan), shared_embedding=spec.tied_embedding)
    return Trainer(spec, groups, TrainSection(**train), dtype, seed=1)


def step(trainer: Trainer, index: int, seq_len: int = SEQ_LEN) -> tuple[StepReport, str]:
    batch = global_batch(index, seq_len, trainer.spec.vocab_size)
    return train_step(trainer, index, part_of(batch, trainer.part), GLOBAL_BATCH, lr=LEARNING_RATE)


def train(spec: ModelSpec, plan: dict[str, Any], dtype: str, steps: int, mutation: str | None = None) -> Outcome:
    """``steps`` steps under a plan on synthetic batches, at a constant learning rate, with a known bug put back."""
    with mutated(mutation):
        trainer = make_trainer(spec, plan, dtype)
        reports = [step(trainer, index)[0] for index in range(steps)]
    return Outcome(reports, held_tensors(trainer))


def losses(spec: ModelSpec, plan: dict[str, Any], dtype: str, steps: int) -> list[float]:
    trainer = make_trainer(spec, plan, dtype)
    return [step(trainer, index)[0].loss for index in range(steps)]


def held_tensors(trainer: Trainer) -> list[Held]:
    coords = trainer.groups.coords
    held = []
    for name, layout, tensor in trainer.tensors():
        flat = tensor.detach().reshape(-1).double().numpy()
        pieces = [(s, flat[s.offset : s.offset + s.numel].copy()) for s in layout.slices(coords)]
        held.append(Held(name, layout, layout.owner(coords), pieces))
    return held
