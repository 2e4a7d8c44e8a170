"""Replicated weights: gradient buffers, their reduction, and the shards that an optimizer updates.

Megatron-core's DistributedDataParallel owns the buffers and the data-parallel collectives. Its DistributedOptimizer is
not used: it is written for ``torch.cuda.*Tensor`` types, casts to float32, counts gradient norms by attributes and
steps before anybody can object. Stoker needs float64, a norm counted by Layout, and a verdict before anything moves;
so the shards of Megatron's buffers are handed out here, each with the Layout that says which part of which global
tensor it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.engine import seam
from parallel.engine.groups import Group, Groups
from parallel.planning.layout import Flat, Layout


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of one tensor: ``weight`` and ``gradient`` are flat views of the buffers, of equal length,
    holding what ``layout`` says. ``owned``: this rank is the one that counts it, of all that hold the same part."""

    name: str
    layout: Layout
    weight: torch.Tensor
    gradient: torch.Tensor
    owned: bool


class Replicas:
    """The model chunks of this rank, wrapped so that gradients accumulate in buffers.

    ``parameters``: ``{global name: parameter}`` of every chunk; ``layouts``: how each lies (without ZeRO).
    With ``plan.zero == 1`` gradients are reduce-scattered and each data rank updates a range of every buffer.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        parameters: Sequence[Mapping[str, nn.Parameter]],
        layouts: Mapping[str, Layout],
        groups: Groups,
        config: Any,
        reduce_dtype: torch.dtype,
    ) -> None:
        seam.install()
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        self.groups = groups
        self.zero = groups.plan.zero
        for named in parameters:
            for name, parameter in named.items():
                # Megatron reduces a parameter over the expert data-parallel group when `allreduce` is False. It sets
                # that only for ep > 1, and expert replicas drift under tp > etp; here every expert tensor says so.
                parameter.allreduce = layouts[name].family == "dense"  # type: ignore[attr-defined]
                parameter.shared_embedding = len(layouts[name].stages) > 1  # type: ignore[attr-defined]
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=reduce_dtype == torch.float32,
            overlap_grad_reduce=False,
            use_distributed_optimizer=self.zero == 1,
            check_for_nan_in_grad=False,
            bucket_size=None,
        )
        self.chunks = [
            DistributedDataParallel(config, ddp, chunk, disable_bucketing=True, pg_collection=groups.megatron())
            for chunk in chunks
        ]
        names = {parameter: name for named in parameters for name, parameter in named.items()}
        self.shards = [shard for chunk in self.chunks for shard in self._shards(chunk, names, layouts)]
        self._partial = self._by_partial_axes()

    def _shards(self, chunk: Any, names: Mapping[Any, str], layouts: Mapping[str, Layout]) -> Iterator[Shard]:
        for buffers, axis, group in (
            (chunk.buffers, "dp", self.groups["cp", "dp"]),
            (chunk.expert_parallel_buffers, "edp", self.groups["edp"]),
        ):
            for buffer in buffers:
                for parameter, (start, stop, bucket_id) in sorted(
                    buffer.param_index_map.items(), key=lambda item: item[1][0]
                ):
                    name = names[parameter]
                    yield from self._shard(name, layouts[name], parameter, buffer, start, stop, bucket_id, axis, group)

    def _shard(
        self,
        name: str,
        layout: Layout,
        parameter: Any,
        buffer: Any,
        start: int,
        stop: int,
        bucket_id: int,
        axis: str,
        group: Group,
    ) -> Iterator[Shard]:
        if self.zero != 1:
            weight, gradient = parameter.data.view(-1), parameter.main_grad.view(-1)
            yield Shard(name, layout, weight, gradient, layout.owner(self.groups.coords))
            return
        bucket = buffer.buckets[bucket_id]
        size = bucket.grad_data.numel() // group.size()
        layout = replace(layout, flat=Flat(axis, group.size(), offset=start - bucket.offset, shard=size))
        low = max(start, bucket.offset + group.rank() * size)
        high = min(stop, bucket.offset + (group.rank() + 1) * size)
        if low < high:
            weight, gradient = buffer.param_data[low:high], buffer.grad_data[low:high]
            yield Shard(name, layout, weight, gradient, layout.owner(self.groups.coords))

    def _by_partial_axes(self) -> list[tuple[Group, list[torch.Tensor]]]:
        """Gradients still to be summed after the data-parallel reduction, by group. Ranks of such a group cut their
        buffers alike, because a Layout allocates equal shapes on all of them."""
        found: dict[tuple[str, ...], list[torch.Tensor]] = {}
        for shard in self.shards:
            if shard.layout.partial:
                found.setdefault(shard.layout.partial, []).append(shard.gradient)
        partial = [(self.groups[axes], tensors) for axes, tensors in found.items()]
        shared = [shard.gradient for shard in self.shards if len(shard.layout.stages) > 1]
        if shared and self.groups.embedding is not None:
            partial.append((self.groups.embedding, shared))
        return [(group, tensors) for group, tensors in partial if group.size() > 1]

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def reduce_gradients(self) -> None:
        """After it, every shard's gradient is the sum over the global batch."""
        for chunk in self.chunks:
            chunk.finish_grad_sync()
        for group, tensors in self._partial:
            _all_reduce_together(tensors, group)

    def gather_weights(self) -> None:
        """After the shards were updated: every rank holds the whole of its weights again.

        Not by Megatron's ``start_param_sync``, which coalesces the buffers of a chunk into one call: gloo corrupts
        both of a bfloat16 and a float32 buffer that are gathered together, in silence.
        """
        if self.zero != 1:
            return
        for buffers, group in self._buffers():
            if group.size() > 1:
                for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                    mine = bucket.param_data.chunk(group.size())[group.rank()]
                    dist.all_gather_into_tensor(bucket.param_data, mine, group=group)

    def _buffers(self) -> Iterator[tuple[list[Any], Group]]:
        """Megatron's buffers of every chunk and the group that shares each."""
        for chunk in self.chunks:
            yield chunk.buffers, self.groups["cp", "dp"]
            yield chunk.expert_parallel_buffers, self.groups["edp"]


def _all_reduce_together(tensors: Sequence[torch.Tensor], group: Group) -> None:
    """One all-reduce for many small tensors, by dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(summed.view_as(tensor))
