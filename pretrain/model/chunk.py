"""A chunk of the model: what one (virtual) pipeline stage holds, from embedding to loss.

``stream [n, D]``: the residual stream, n = N tokens of the micro-batch, or N / tp with sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.engine.groups import Groups
from parallel.planning.plan import ParallelPlan
from pretrain.model.attention import SoftmaxAttention
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build
from pretrain.model.embedding import Embedding, Head
from pretrain.model.feed_forward import DenseFeedForward
from pretrain.model.gated_delta import GatedDeltaMixer
from pretrain.model.kda import KdaMixer
from pretrain.model.moe import MoEFeedForward
from pretrain.model.norm import RMSNorm
from pretrain.model.router import Router, RouterStatistics
from pretrain.model.sharding import layouts as layouts_of
from pretrain.objective import cross_entropy, with_auxiliary
from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, Mixer, ModelSpec


class Layer(nn.Module):
    """stream -> stream: two pre-normed residual branches."""

    def __init__(self, build: Build, index: int, spec: LayerSpec, recompute: str) -> None:
        super().__init__()
        prefix = f"layers.{index}"
        norm = build.spec.norm_eps, build.spec.zero_centred_norm
        self._recompute = recompute
        self.mixer_norm = RMSNorm(build.parameter(f"{prefix}.mixer.norm.weight"), *norm)
        self.mixer = _mixer(build, f"{prefix}.mixer", spec.mixer)
        self.ffn_norm = RMSNorm(build.parameter(f"{prefix}.ffn.norm.weight"), *norm)
        self.ffn: nn.Module
        if isinstance(spec.ffn, Dense):
            self.ffn = DenseFeedForward(build, f"{prefix}.ffn")
        else:
            self.ffn = MoEFeedForward(build, f"{prefix}.ffn", spec.ffn)

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, RouterStatistics | None]:
        if self._recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._layer, x, batch, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x, batch)

    def _layer(self, x: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, RouterStatistics | None]:
        x = x + self._mix(x, batch)
        out, statistics = self.ffn(self.ffn_norm(x), batch)
        return x + out, statistics

    def _mix(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        if self._recompute == "selective" and torch.is_grad_enabled():
            return checkpoint(self._mixer, x, batch, use_reentrant=False, preserve_rng_state=False)
        return self._mixer(x, batch)

    def _mixer(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return self.mixer(self.mixer_norm(x), batch)


def _mixer(build: Build, prefix: str, spec: Mixer) -> nn.Module:
    match spec:
        case GatedDelta():
            return GatedDeltaMixer(build, prefix, spec)
        case Kda():
            return KdaMixer(build, prefix, spec)
        case Attention():
            return SoftmaxAttention(build, prefix, spec)


class Chunk(nn.Module):
    """MicroBatch -> the stream as ``[n, 1, D]`` for the next chunk, or on the last chunk the scalar loss.

    The loss is the micro-batch's sum of -log p over valid targets divided by the *global* number of them (P1): the sum
    over micro-batches and data ranks is the step's loss. Auxiliary losses enter the gradient where they arise, and are
    reported apart: ``statistics`` collects each layer's, by layer index, until ``take_statistics``.
    """

    #: Read by Megatron's schedules.
    model_type: Any = None

    def __init__(self, build: Build, index: int, plan: ParallelPlan, config: Any = None) -> None:
        super().__init__()
        spec = build.spec
        self.config = config
        self.vp_stage: int | None = None
        self._sequence_parallel = plan.sequence_parallel
        first, last = index == 0, index == plan.pp * plan.vpp - 1
        self.embedding = Embedding(build) if first else None
        self._indices = plan.stages[index]
        self.layers = nn.ModuleList(Layer(build, i, spec.layers[i], plan.recompute) for i in self._indices)
        self.final_norm = self.head = None
        if last:
            self.final_norm = RMSNorm(build.parameter("final_norm.weight"), spec.norm_eps, spec.zero_centred_norm)
            name = "embed.weight" if spec.tied_embedding else "head.weight"
            tied = self.embedding.weight if spec.tied_embedding and self.embedding is not None else None
            self.head = Head(build, name, tied)
        self._tp = build.groups["tp"]
        self._input: torch.Tensor | None = None
        self._statistics: dict[int, list[RouterStatistics]] = {}

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        self._input = received[0]

    def routers(self) -> dict[int, Router]:
        """``{layer index: router}`` of the mixtures of experts in this chunk."""
        return {
            index: layer.ffn.router
            for index, layer in zip(self._indices, self.layers, strict=True)
            if isinstance(layer, Layer) and isinstance(layer.ffn, MoEFeedForward)
        }

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        x = self.hidden(batch)
        if self.head is None or self.final_norm is None:
            return x[:, None]
        return self.loss(self.head(self.final_norm(x)), batch)

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """The stream after this chunk's layers."""
        if self.embedding is not None:
            x = self.embedding(batch.tokens)
        else:
            assert self._input is not None, "a later stage runs on what it received"
            x = self._input[:, 0]
        auxiliary: list[torch.Tensor] = []
        for index, layer in zip(self._indices, self.layers, strict=True):
            x, statistics = layer(x, batch)
            if statistics is not None:
                self._statistics.setdefault(index, []).append(statistics.detach())
                auxiliary += [statistics.balance, statistics.z]
        return with_auxiliary(x, auxiliary)

    def loss(self, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        assert self.head is not None
        nats = cross_entropy(logits, batch.targets, self.head.vocabulary.start, self._tp)
        return (nats * batch.loss_mask).sum() / max(batch.normalisers.targets, 1)

    def take_statistics(self) -> dict[int, list[RouterStatistics]]:
        """What the layers collected since the last call, ``{layer index: one entry a micro-batch}``."""
        taken, self._statistics = self._statistics, {}
        return taken


def build_chunks(
    spec: ModelSpec, groups: Groups, dtype: torch.dtype, device: torch.device, config: Any = None
) -> tuple[list[Chunk], list[Build]]:
    """This rank's chunks, uninitialised, and what each holds by global name."""
    plan, layouts = groups.plan, layouts_of(spec, groups.plan)
    chunks, builds = [], []
    for virtual in range(plan.vpp):
        build = Build(spec, layouts, groups, dtype, device)
        chunk = Chunk(build, virtual * plan.pp + groups.coords["pp"], plan, config)
        chunk.vp_stage = virtual if plan.vpp > 1 else None
        chunks.append(chunk)
        builds.append(build)
    return chunks, builds


def named_tensors(builds: list[Build]) -> Mapping[str, torch.Tensor]:
    """Every tensor of this rank's chunks by global name, parameters and state."""
    return {name: tensor for build in builds for name, tensor in (*build.parameters.items(), *build.state.items())}
