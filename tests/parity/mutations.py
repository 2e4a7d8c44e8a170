"""Known bugs, to be put back: the suite is worth what it fails on.

Each is a context manager for a worker of the pool; nothing of it is left when the job ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from dataio.types import Batch, Part
from pretrain import trainer as product
from pretrain.model.batch import MicroBatch
from pretrain.objective import Normalisers
from pretrain.optim.adamw import AdamW
from pretrain.trainer import Trainer


def mutated(name: str | None) -> AbstractContextManager[None]:
    return MUTATIONS[name]() if name else nullcontext()


@contextmanager
def _batched_p2p() -> Iterator[None]:
    """Megatron's default in the interleaved schedule (row 9 of the seam's table)."""
    real = product.megatron_config

    def config(*arguments: Any) -> Any:
        config = real(*arguments)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    with patch.object(product, "megatron_config", config):
        yield


@contextmanager
def _experts_over_the_dense_group() -> Iterator[None]:
    """Megatron's default for ep = 1: expert replicas on tensor ranks drift (row 13)."""
    from megatron.core import distributed

    real = distributed.DistributedDataParallel

    def wrap(config: Any, ddp: Any, chunk: torch.nn.Module, **options: Any) -> Any:
        for parameter in chunk.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]
        return real(config, ddp, chunk, **options)

    with patch.object(distributed, "DistributedDataParallel", wrap):
        yield


@contextmanager
def _norm_without_experts() -> Iterator[None]:
    real = AdamW.gradient_norm

    def gradient_norm(self: AdamW, world: Any) -> float:
        with patch.object(self, "shards", [shard for shard in self.shards if shard.layout.family == "dense"]):
            return real(self, world)

    with patch.object(AdamW, "gradient_norm", gradient_norm):
        yield


@contextmanager
def _with_normalisers(change: Callable[[Trainer, Batch, list[MicroBatch]], list[MicroBatch]]) -> Iterator[None]:
    """Micro-batches as ``change`` leaves them."""
    real = Trainer.micro_batches

    def micro_batches(self: Trainer, batch: Batch, normalisers: Normalisers) -> list[MicroBatch]:
        return change(self, batch, real(self, batch, normalisers))

    with patch.object(Trainer, "micro_batches", micro_batches):
        yield


def _local_targets() -> AbstractContextManager[None]:
    """Each data rank divides its loss by its own number of targets, and the ranks are averaged."""

    def change(trainer: Trainer, batch: Batch, parts: list[MicroBatch]) -> list[MicroBatch]:
        targets = int(batch.loss_mask.sum()) * trainer.part.dp_size
        return [replace(part, normalisers=replace(part.normalisers, targets=targets)) for part in parts]

    return _with_normalisers(change)


def _auxiliary_per_micro_batch() -> AbstractContextManager[None]:
    """The z-loss is the mean of its micro-batches' means, as Megatron takes it: right for one micro-batch only."""

    def change(trainer: Trainer, _: Batch, parts: list[MicroBatch]) -> list[MicroBatch]:
        number = len(parts) * trainer.part.dp_size
        return [
            replace(part, normalisers=replace(part.normalisers, routed=int(part.valid.sum()) * number))
            for part in parts
        ]

    return _with_normalisers(change)


@contextmanager
def _without_reductions(forgotten: Callable[[Any, Any], bool]) -> Iterator[None]:
    """Leaves out the reductions after the data-parallel one for which ``forgotten(replicas, group)``."""
    real = product.Replicas._by_partial_axes

    def by_partial_axes(self: Any) -> Any:
        return [(group, tensors) for group, tensors in real(self) if not forgotten(self, group)]

    with patch.object(product.Replicas, "_by_partial_axes", by_partial_axes):
        yield


def _partial_sums_not_reduced() -> AbstractContextManager[None]:
    return _without_reductions(lambda replicas, group: group is replicas.groups["tp"])


def _tied_embedding_not_joined() -> AbstractContextManager[None]:
    return _without_reductions(lambda replicas, group: group is replicas.groups.embedding)


@contextmanager
def _router_counts_of_one_rank() -> Iterator[None]:
    """The router's bias follows the loads that its own rank saw."""
    real_sums, real_apply = Trainer._router_sums, Trainer.apply
    local: dict[Trainer, torch.Tensor] = {}

    def router_sums(self: Trainer) -> Any:
        loads, balance, z = real_sums(self)
        local[self] = loads.clone()
        return loads, balance, z

    def apply(self: Trainer, report: Any, lr: float) -> None:
        load = {index: tuple(local[self][index, : len(counts)].tolist()) for index, counts in report.load.items()}
        real_apply(self, replace(report, load=load), lr)

    with patch.object(Trainer, "_router_sums", router_sums), patch.object(Trainer, "apply", apply):
        yield


@contextmanager
def _initialisation_by_rank() -> Iterator[None]:
    """Megatron seeds by tensor and pipeline rank (row 12)."""
    real = product.initialise

    def initialise(spec: Any, tensors: Any, layouts: Any, coords: dict[str, int], seed: int) -> None:
        real(spec, tensors, layouts, coords, seed + coords["tp"] + 100 * coords["pp"])

    with patch.object(product, "initialise", initialise):
        yield


@contextmanager
def _rows_of_another_rank() -> Iterator[None]:
    """The last data rank reads the rows of the first."""
    real = vars(Trainer)["part"]

    def part(self: Trainer) -> Part:
        own: Part = real.fget(self)
        return replace(own, dp_index=own.dp_index % (own.dp_size - 1))

    with patch.object(Trainer, "part", property(part)):
        yield


MUTATIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "batched transfers in the interleaved schedule": _batched_p2p,
    "expert gradients reduced over the dense group": _experts_over_the_dense_group,
    "experts left out of the gradient norm": _norm_without_experts,
    "loss divided by the local number of targets": _local_targets,
    "auxiliary loss averaged over micro-batches": _auxiliary_per_micro_batch,
    "partial sums of norm weights not reduced": _partial_sums_not_reduced,
    "gradients of the tied embedding not joined": _tied_embedding_not_joined,
    "router counts of one rank only": _router_counts_of_one_rank,
    "initialisation seeded by rank": _initialisation_by_rank,
    "a data rank reads another's rows": _rows_of_another_rank,
}
