"""Held-out loss by domain, under the run's own layout: nats per token and bits per byte."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from dataio.store import Store
from dataio.stream import SequentialStream
from pretrain.objective import Normalisers
from pretrain.trainer import Trainer


class Evaluator:
    """Evaluates the first ``windows`` windows of ``seq_len`` tokens of each store, ``{domain: store}``.

    ``tokenizer``: the content of tokenizer.json; without it bits per byte are unknown and left out.
    ``spent_s``: seconds spent here since it was last set to zero.
    """

    def __init__(
        self,
        trainer: Trainer,
        stores: Mapping[str, Store],
        seq_len: int,
        windows: int,
        tokenizer: bytes | None = None,
    ) -> None:
        self._trainer = trainer
        plan = trainer.groups.plan
        # A batch of the schedule's shape; rows beyond the store's last window are padding.
        self._global_batch = plan.global_batch
        self._streams = {
            domain: SequentialStream(store, seq_len, self._global_batch, windows) for domain, store in stores.items()
        }
        self._bytes_of = None if tokenizer is None else token_bytes(tokenizer)
        self.spent_s = 0.0

    def run(self) -> dict[str, float]:
        """``heldout.<domain>.nats_per_token`` and ``.bits_per_byte``, equal on every rank. Collective."""
        started = time.perf_counter()
        measured: dict[str, float] = {}
        for domain, stream in self._streams.items():
            nats, tokens, num_bytes = self._sum(stream)
            if not tokens:
                continue
            measured[f"heldout.{domain}.nats_per_token"] = nats / tokens
            if self._bytes_of is not None:
                measured[f"heldout.{domain}.bits_per_byte"] = nats / math.log(2) / max(num_bytes, 1)
        self.spent_s += time.perf_counter() - started
        return measured

    @torch.no_grad()
    def _sum(self, stream: SequentialStream) -> tuple[float, int, int]:
        """Nats, targets and bytes of the targets over the evaluated windows of all data ranks."""
        trainer = self._trainer
        coords = trainer.groups.coords
        nats, tokens, num_bytes = 0.0, 0, 0
        for step in range(stream.num_steps):
            batch = stream.read(stream.plan(step), trainer.part)
            # Sums, not means: every micro-batch divides by one.
            micro_batches = trainer.micro_batches(batch, Normalisers(1, 1, self._global_batch))
            losses = trainer.pipeline.run(micro_batches, micro_batches[0].tokens.shape[0], forward_only=True)
            for chunk in trainer.chunks:
                chunk.take_statistics()
            if coords["tp"] == coords["cp"] == 0:
                nats += sum(float(loss) for loss in losses)
            if coords["tp"] == coords["cp"] == coords["pp"] == 0:
                targets = batch.targets[batch.loss_mask]
                tokens += targets.size
                num_bytes += 0 if self._bytes_of is None else int(self._bytes_of[targets].sum())
        sums = torch.tensor([nats, tokens, num_bytes], dtype=torch.float64)
        if trainer.groups.plan.world_size > 1:
            dist.all_reduce(sums, group=trainer.groups.control)
        nats, total, total_bytes = sums.tolist()
        return nats, int(total), int(total_bytes)


def token_bytes(tokenizer_json: bytes) -> np.ndarray | None:
    """Bytes of text that each token id stands for, from a byte-level BPE ``tokenizer.json``; 0 for special tokens.
    None for another kind of tokenizer: its pieces do not tell.

    In the byte-level alphabet every character of a token is one byte (GPT-2's byte-to-unicode table).
    """
    content = json.loads(tokenizer_json)
    if content["model"].get("type") != "BPE" or (content.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    vocabulary: dict[str, int] = content["model"]["vocab"]
    added = content.get("added_tokens", [])
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
    lengths = np.zeros(size, np.int64)
    for text, index in vocabulary.items():
        lengths[index] = len(text)
    for token in added:
        lengths[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return lengths
