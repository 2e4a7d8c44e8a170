"""What the pool runs: a short training run under a plan, and the state that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.engine.groups import create
from parallel.planning.layout import Layout, Slice
from parallel.planning.plan import ParallelPlan
from pretrain.config_sections import OptimizerSection, TrainSection
from pretrain.loop import train_step
from pretrain.spec import ModelSpec
from pretrain.trainer import Trainer
from tests.parity.batches import GLOBAL_BATCH, global_batch, part_of


@dataclass(frozen=True)
class Curve:
    """Loss, gradient norm and auxiliary losses of each step, and this rank's owned part of every tensor."""

    losses: list[float]
    norms: list[float]
    aux: list[dict[str, float]]
    load: list[dict[int, tuple[int, ...]]]
    owned: list[tuple[str, Layout, list[tuple[Slice, np.ndarray]]]]


def train(spec: ModelSpec, plan: dict[str, Any], dtype: str, steps: int, seq_len: int) -> Curve:
    """``steps`` steps of ``spec`` under a plan on synthetic batches, at a constant learning rate."""
    trainer = Trainer(
        spec,
        create(ParallelPlan.from_dict(plan), shared_embedding=spec.tied_embedding),
        TrainSection(global_batch=GLOBAL_BATCH, lr=1e-2, optimizer=OptimizerSection(eps=1e-8)),
        dtype,
        seed=1,
    )
    reports = []
    for step in range(steps):
        batch = global_batch(step, seq_len, spec.vocab_size)
        report, verdict = train_step(trainer, step, part_of(batch, trainer.part), GLOBAL_BATCH, lr=1e-2)
        assert verdict == "apply"
        reports.append(report)
    return Curve(
        losses=[report.loss for report in reports],
        norms=[report.grad_norm for report in reports],
        aux=[dict(report.aux) for report in reports],
        load=[dict(report.load) for report in reports],
        owned=owned_tensors(trainer),
    )


def owned_tensors(trainer: Trainer) -> list[tuple[str, Layout, list[tuple[Slice, np.ndarray]]]]:
    """The parts that this rank is the owner of; over all ranks they tile every tensor once."""
    coords = trainer.groups.coords
    owned = []
    for name, layout, tensor in trainer.tensors():
        if layout.owner(coords):
            flat = tensor.detach().reshape(-1).double().numpy()
            pieces = [(s, flat[s.offset : s.offset + s.numel].copy()) for s in layout.slices(coords)]
            owned.append((name, layout, pieces))
    return owned


def assemble(curves: list[Curve]) -> dict[str, np.ndarray]:
    """Global tensors from every rank's owned parts; an element that nobody owns stays NaN, one owned twice fails."""
    tensors: dict[str, np.ndarray] = {}
    for curve in curves:
        for name, layout, pieces in curve.owned:
            whole = tensors.setdefault(name, np.full(layout.shape, np.nan))
            for piece, content in pieces:
                box = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
                assert np.isnan(whole[box]).all(), f"{name}{box} is owned by two ranks"
                whole[box] = content.reshape(piece.shape)
    for name, whole in tensors.items():
        assert not np.isnan(whole).any(), f"{name}: {np.isnan(whole).sum()} elements are owned by no rank"
    return tensors
