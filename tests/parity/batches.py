"""Synthetic global batches for the parity suite: a function of the step, hard on purpose.

Uneven masks, packed documents of random length, padding at the end of some windows, one window of padding only, and on
odd steps the second half of the batch wholly masked, which leaves a data rank without a single target.
"""

from __future__ import annotations

import numpy as np

from dataio.types import Batch, Part

GLOBAL_BATCH = 12


def global_batch(step: int, seq_len: int, vocab_size: int) -> Batch:
    """Windows [12, seq_len]; ``cu_seqlens`` is left to ``part_of``."""
    random = np.random.default_rng(1000 + step)
    n, T = GLOBAL_BATCH, seq_len
    doc_index = np.cumsum(random.random((n, T)) < 0.1, axis=1).astype(np.int32)
    doc_index -= doc_index[:, :1]
    positions = np.zeros((n, T), np.int32)
    for t in range(1, T):
        positions[:, t] = np.where(doc_index[:, t] == doc_index[:, t - 1], positions[:, t - 1] + 1, 0)
    loss_mask = random.random((n, T)) < random.uniform(0.2, 1.0, (n, 1))
    if step % 2:
        loss_mask[n // 2 :] = False
    for window, padding in ((2, T // 4), (5, T), (7, T // 2)):
        doc_index[window, T - padding :] = -1
        positions[window, T - padding :] = np.arange(padding)
        loss_mask[window, T - padding :] = False
    tokens = random.integers(0, vocab_size, (n, T + 1)).astype(np.int32)
    ids = np.arange(n, dtype=np.int64)
    return Batch(
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        targets=np.ascontiguousarray(tokens[:, 1:]),
        loss_mask=loss_mask,
        positions=positions,
        doc_index=doc_index,
        cu_seqlens=[],
        sample_id=ids,
        source=np.zeros(n, np.int16),
    )


def part_of(batch: Batch, part: Part) -> Batch:
    """A data rank's rows of a global batch, with the segments of its micro-batches."""
    rows = part.rows(len(batch.tokens))
    starts = batch.positions[rows].reshape(-1, part.micro_batch * batch.tokens.shape[1]) == 0
    bounds = [np.append(np.flatnonzero(row), row.size).astype(np.int32) for row in starts]
    fields = ("tokens", "targets", "loss_mask", "positions", "doc_index", "sample_id", "source")
    return Batch(**{field: getattr(batch, field)[rows] for field in fields}, cu_seqlens=bounds)
