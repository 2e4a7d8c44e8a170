"""Everything that a run holds in memory on one rank: chunks, gradient buffers, optimizer, health, data position.

``loop.py`` shows what happens to it in a step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dataio.types import Batch, Part
from parallel.engine import seam
from parallel.engine.groups import Groups
from parallel.engine.pipeline import Pipeline, megatron_config
from parallel.engine.replicas import Replicas
from parallel.planning.layout import Layout
from pretrain.config_sections import GuardSection, TrainSection
from pretrain.guards.recompute import Recompute
from pretrain.guards.replicas import ReplicaCheck
from pretrain.guards.stragglers import WorkClock
from pretrain.health import Health, StepReport
from pretrain.initialise import initialise
from pretrain.model.batch import MicroBatch
from pretrain.model.build import high
from pretrain.model.chunk import build_chunks, named_tensors
from pretrain.model.router import Router, update_router
from pretrain.model.sharding import layouts as layouts_of
from pretrain.objective import Normalisers
from pretrain.optim.adamw import AdamW
from pretrain.spec import ModelSpec, MoE
from stoker.errors import Refusal

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Trainer:
    """A model under a plan, with its optimizer. Created by every rank of the world together.

    ``seed`` None leaves the tensors as they come: every one of them is about to be loaded. ``deterministic``: on CUDA,
    arithmetic repeats to the last bit, as it does on a CPU.
    """

    def __init__(
        self,
        spec: ModelSpec,
        groups: Groups,
        train: TrainSection,
        dtype: str,
        seed: int | None,
        guard: GuardSection | None = None,
        deterministic: bool = True,
    ) -> None:
        guard, exact = guard or GuardSection(), deterministic or not torch.cuda.is_available()
        self.spec, self.groups, self.train = spec, groups, train
        self.dtype, self.device = DTYPES[dtype], seam.device()
        self.layouts = layouts_of(spec, groups.plan)
        config = megatron_config(groups, spec.width, len(spec.layers), self.dtype)
        chunks, builds = build_chunks(spec, groups, self.dtype, self.device, config)
        parameters = [build.parameters for build in builds]
        if seed is not None:
            initialise(spec, named_tensors(builds), self.layouts, groups.coords, seed)
        self.chunks = chunks
        self.parameters = {name: tensor for named in parameters for name, tensor in named.items()}
        self.state = {name: tensor for build in builds for name, tensor in build.state.items()}
        self.replicas = Replicas(chunks, parameters, self.layouts, groups, config, high(self.dtype))
        self.pipeline = Pipeline(self.replicas.chunks, groups, config)
        self.optimizer = AdamW(self.replicas.shards, spec.parameters(), train.optimizer)
        self.health = Health(train.skip_limit, guard)
        self.clock = WorkClock(self.device)
        self.recompute = Recompute(self, guard.recompute, exact)
        self.twins = ReplicaCheck(self, guard.hash_every, exact)
        self.routers: dict[int, Router] = {i: r for chunk in chunks for i, r in chunk.routers().items()}

    @property
    def part(self) -> Part:
        """This data rank's share of a global batch."""
        plan, coords = self.groups.plan, self.groups.coords
        return Part(coords["dp"], plan.dp, plan.micro_batch, coords["cp"], plan.cp)

    def normalisers(self, batch: Batch, windows: int) -> Normalisers:
        """Counts over the global batch, from this rank's part of it (P1)."""
        counts = torch.tensor([int(batch.loss_mask.sum()), int((batch.doc_index >= 0).sum())], device=self.device)
        if self.groups.size("dp") > 1:
            dist.all_reduce(counts, group=self.groups["dp"])
        targets, routed = counts.tolist()
        return Normalisers(targets, routed, windows)

    def micro_batches(self, batch: Batch, normalisers: Normalisers) -> list[MicroBatch]:
        """This rank's part in micro-batches. Raises Refusal for a token outside the vocabulary."""
        for tokens in (batch.tokens, batch.targets):
            if (foreign := (tokens < 0) | (tokens >= self.spec.vocab_size)).any():
                row, position = np.argwhere(foreign)[0]
                raise Refusal(
                    f"window {batch.sample_id[row]} holds token {tokens[row, position]} at {position}, outside the "
                    f"vocabulary of {self.spec.vocab_size}: its store is damaged, or made with another tokenizer"
                )
        size = self.groups.plan.micro_batch
        return [
            micro_batch(batch, slice(i * size, (i + 1) * size), cu_seqlens, normalisers, self.device)
            for i, cu_seqlens in enumerate(batch.cu_seqlens)
        ]

    def forward_backward(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Gradients of this rank's micro-batches, added to the buffers; their losses where a pipeline ends."""
        with self.clock.working():
            losses = self.pipeline.run(micro_batches, rows=micro_batches[0].tokens.shape[0])
        self.recompute.observe(losses)
        return losses

    def measure(
        self, step: int, losses: Sequence[torch.Tensor], normalisers: Normalisers, preempted: bool = False
    ) -> StepReport:
        """The step's report, from every rank's parts; gradients must be reduced. Equal on every rank.

        The loss counts on the ranks that end a pipeline, once per tensor group; auxiliary losses and expert loads are
        sums over the ranks' own tokens. It is unknown (NaN) for a batch without a target.
        """
        loads, balance, z = self._router_sums()
        first = self.groups.coords["tp"] == 0 and self.groups.coords["cp"] == 0
        loss = torch.stack(list(losses)).double().sum() if losses and first else balance.new_zeros(())
        sums = torch.stack([loss, balance, z, balance.new_tensor(float(preempted))])
        if self.groups.plan.world_size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(loads)
        total, total_balance, total_z, asked = sums.tolist()
        widths = self._expert_counts
        return StepReport(
            step=step,
            loss=total if normalisers.targets else math.nan,
            grad_norm=self.optimizer.gradient_norm(self.groups.world),
            valid_targets=normalisers.targets,
            tokens=normalisers.routed,
            aux={"balance_loss": total_balance, "z_loss": total_z} if widths else {},
            load={index: tuple(loads[index, :width].tolist()) for index, width in widths.items()},
            preempted=asked > 0,
        )

    @property
    def _expert_counts(self) -> dict[int, int]:
        """``{layer index: experts}`` of the mixtures of experts in the whole model."""
        return {i: layer.ffn.num_experts for i, layer in enumerate(self.spec.layers) if isinstance(layer.ffn, MoE)}

    def _router_sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's expert loads int64 [layers, experts], balance loss and z-loss (float64), summed over its
        micro-batches; nothing is read back to the host."""
        shape = len(self.spec.layers), max(self._expert_counts.values(), default=0)
        loads = torch.zeros(shape, dtype=torch.int64, device=self.device)
        balance, z = torch.zeros(2, dtype=torch.float64, device=self.device).unbind()
        for chunk in self.chunks:
            for index, entries in chunk.take_statistics().items():
                for entry in entries:
                    loads[index, : len(entry.load)] += entry.load
                    balance, z = balance + entry.balance, z + entry.z
        return loads, balance, z

    def apply(self, report: StepReport, lr: float) -> None:
        """Everything that a step changes, and only after the verdict ``apply``."""
        clip = self.train.clip
        scale = 1.0 if clip is None else min(1.0, clip / (report.grad_norm + 1e-6))
        self.optimizer.update(lr, scale)
        self.replicas.gather_weights()
        for index, router in self.routers.items():
            update_router(router, torch.tensor(report.load[index], dtype=torch.int64, device=self.device))

    def tensors(self) -> Iterator[tuple[str, Layout, torch.Tensor]]:
        """The whole state of this rank as (checkpoint name, layout, tensor): weights, router state, optimizer."""
        for name, tensor in (*self.parameters.items(), *self.state.items()):
            yield name, self.layouts[name], tensor.detach()
        yield from self.optimizer.tensors()

    def state_hash(self) -> str:
        """SHA-256 of everything that an applied step may change on this rank; a skipped one changes nothing of it. What
        skipping itself records is ``health``'s, and not part of it."""
        digest = hashlib.sha256(repr(self.optimizer.updates).encode())
        for name, _, tensor in sorted(self.tensors(), key=lambda item: item[0]):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def micro_batch(
    batch: Batch, rows: slice, cu_seqlens: np.ndarray, normalisers: Normalisers, device: torch.device
) -> MicroBatch:
    """Windows ``rows`` of a part, flattened and moved to the device."""

    def tensor(array: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype, non_blocking=True)

    return MicroBatch(
        tokens=tensor(batch.tokens[rows].reshape(-1)),
        targets=tensor(batch.targets[rows].reshape(-1)),
        positions=tensor(batch.positions[rows].reshape(-1)),
        loss_mask=tensor(batch.loss_mask[rows].reshape(-1), torch.bool),
        valid=tensor(batch.doc_index[rows].reshape(-1) >= 0, torch.bool),
        document=tensor(batch.doc_index[rows].reshape(-1)),
        cu_seqlens=tensor(cu_seqlens),
        windows=batch.tokens[rows].shape[0],
        normalisers=normalisers,
    )


def load_imbalance(load: Mapping[int, tuple[int, ...]]) -> float | None:
    """Largest max / mean of tokens per expert over layers; None without experts."""
    ratios = [max(counts) * len(counts) / sum(counts) for counts in load.values() if sum(counts)]
    return max(ratios) if ratios else None
