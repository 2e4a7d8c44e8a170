"""P1: the loss of a step is the sum of -log p over the valid targets of the global batch, divided by their number."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dataio.types import Batch
from pretrain.objective import cross_entropy
from tests.parity import jobs
from tests.parity.batches import GLOBAL_BATCH, global_batch, part_of
from tests.parity.pool import Pool
from tests.parity.specs import DENSE, HYBRID, SEQ_LEN, plan


def nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    largest = logits.max(-1)
    normaliser = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
    return normaliser - np.take_along_axis(logits, targets[:, None], 1)[:, 0]


def cross_entropy_job(vocabulary: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """-log p and the gradient of their sum weighted by 1, 2, 3..., on this rank's part of the vocabulary."""
    logits, targets = case(vocabulary)
    rows = math.ceil(vocabulary / dist.get_world_size())
    start = min(dist.get_rank() * rows, vocabulary)
    mine = torch.from_numpy(logits[:, start : start + rows]).to(dtype).requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    losses = cross_entropy(mine, torch.from_numpy(targets), start, group)
    (losses * torch.arange(1, len(targets) + 1)).sum().backward()
    assert mine.grad is not None
    return losses.detach().double().numpy(), mine.grad.double().numpy()


def case(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(vocabulary)
    logits = random.normal(0, 5, (65, vocabulary))
    logits[7] += 1e4  # exp would overflow
    logits[8] -= 1e4
    return logits, random.integers(0, vocabulary, 65)


@pytest.mark.parametrize("vocabulary", [1, 5, 257])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_p1_cross_entropy_over_a_split_vocabulary_is_that_of_the_whole(vocabulary: int, ranks: int, pool: Pool) -> None:
    # Vocabulary 5 over four ranks leaves the last without a row.
    logits, targets = case(vocabulary)
    expected = nats(logits, targets)
    weights = np.arange(1, 66)[:, None]
    gradient = weights * (np.exp(-nats_of_all(logits)) - np.eye(vocabulary)[targets])
    results = pool.run(ranks, cross_entropy_job, vocabulary, torch.float64)
    for losses, _ in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-11)
    found = np.concatenate([part for _, part in results], axis=1)
    np.testing.assert_allclose(found, gradient, rtol=1e-10, atol=1e-10)


def nats_of_all(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(-1, keepdims=True)
    return largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True)) - logits


def test_p1_bfloat16_logits_are_summed_in_float32(pool: Pool) -> None:
    logits, targets = case(257)
    rounded = torch.from_numpy(logits).bfloat16().double().numpy()
    for losses, _ in pool.run(2, cross_entropy_job, 257, torch.bfloat16):
        np.testing.assert_allclose(losses, nats(rounded, targets), rtol=1e-6, atol=2e-3)


def loss_and_logits(micro_batch: int, step: int) -> tuple[float, float, int, np.ndarray]:
    """Reported loss, gradient norm and targets of a step; logits of the whole batch [G * T, vocabulary]."""
    trainer = jobs.make_trainer(HYBRID, plan(1, micro_batch).to_dict())
    batch = part_of(global_batch(step, SEQ_LEN, HYBRID.vocab_size), trainer.part)
    normalisers = trainer.normalisers(batch, GLOBAL_BATCH)
    (chunk,) = trainer.chunks
    with torch.no_grad():
        parts = [
            chunk.head(chunk.final_norm(chunk.hidden(part)))  # type: ignore[misc]
            for part in trainer.micro_batches(batch, normalisers)
        ]
    chunk.take_statistics()
    report, _ = jobs.step(trainer, step)
    return report.loss, report.grad_norm, report.valid_targets, torch.cat(parts).numpy()


@pytest.mark.parametrize("micro_batch", [12, 4, 1])
@pytest.mark.parametrize("step", [0, 1])
def test_p1_the_loss_is_the_plain_mean_over_valid_targets(micro_batch: int, step: int, pool: Pool) -> None:
    batch = global_batch(step, SEQ_LEN, HYBRID.vocab_size)
    ((loss, _, targets, logits),) = pool.run(1, loss_and_logits, micro_batch, step)
    losses = nats(logits, batch.targets.reshape(-1))[batch.loss_mask.reshape(-1)]
    assert targets == len(losses) == int(batch.loss_mask.sum())
    assert loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-13)


def padded(batch: Batch, tokens: int) -> Batch:
    """The same windows with ``tokens`` of padding behind each."""
    fill = {"doc_index": -1, "positions": 0, "loss_mask": False, "tokens": 5, "targets": 6}
    wider: dict[str, Any] = {}
    for field in fields(Batch):
        array = getattr(batch, field.name)
        wide = field.name in fill
        wider[field.name] = np.pad(array, ((0, 0), (0, tokens)), constant_values=fill[field.name]) if wide else array
    # One segment of padding: its positions count from 0, as dataio's do.
    pads = wider["doc_index"][:, -tokens - 1] < 0
    for row, continues in enumerate(pads):
        first = batch.positions[row, -1] + 1 if continues else 0
        wider["positions"][row, -tokens:] = first + np.arange(tokens)
    return replace(batch, **wider)


def measured(padding: int, micro_batch: int) -> tuple[float, float, dict[str, float], dict[int, tuple[int, ...]]]:
    trainer = jobs.make_trainer(HYBRID, plan(1, micro_batch).to_dict())
    batch = global_batch(0, SEQ_LEN, HYBRID.vocab_size)
    batch = part_of(padded(batch, padding) if padding else batch, trainer.part)
    normalisers = trainer.normalisers(batch, GLOBAL_BATCH)
    parts = trainer.micro_batches(batch, normalisers)
    trainer.replicas.zero_gradients()
    losses = trainer.pipeline.run(parts, rows=parts[0].tokens.shape[0])
    trainer.replicas.reduce_gradients()
    report = trainer.measure(0, losses, normalisers)
    return report.loss, report.grad_norm, dict(report.aux), dict(report.load)


@pytest.mark.parametrize(("padding", "micro_batch"), [(1, 12), (39, 3), (0, 1)])
def test_p1_padding_and_micro_batches_change_nothing(padding: int, micro_batch: int, pool: Pool) -> None:
    ((loss, norm, aux, load),) = pool.run(1, measured, 0, 12)
    ((other_loss, other_norm, other_aux, other_load),) = pool.run(1, measured, padding, micro_batch)
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert other_norm == pytest.approx(norm, rel=1e-12)
    assert other_aux == pytest.approx(aux, rel=1e-12, abs=0)
    assert other_load == load


def nothing_to_learn() -> tuple[float, float, str, bool]:
    trainer = jobs.make_trainer(DENSE, plan(1).to_dict())
    before = trainer.state_hash()
    batch = global_batch(0, SEQ_LEN, DENSE.vocab_size)
    batch = part_of(replace(batch, loss_mask=np.zeros_like(batch.loss_mask)), trainer.part)
    normalisers = trainer.normalisers(batch, GLOBAL_BATCH)
    parts = trainer.micro_batches(batch, normalisers)
    trainer.replicas.zero_gradients()
    losses = trainer.pipeline.run(parts, rows=parts[0].tokens.shape[0])
    trainer.replicas.reduce_gradients()
    report = trainer.measure(0, losses, normalisers)
    verdict = trainer.health.judge(report)
    return report.loss, report.grad_norm, verdict, trainer.state_hash() == before


def test_p1_a_batch_without_a_valid_target_has_no_loss_no_gradient_and_is_skipped(pool: Pool) -> None:
    ((loss, norm, verdict, unchanged),) = pool.run(1, nothing_to_learn)
    assert math.isnan(loss) and norm == 0.0 and verdict == "skip" and unchanged
