"""AdamW with decoupled decay (arXiv 1711.05101) on the shards of this rank.

Moments and masters live in float32, or float64 in a float64 run; a bfloat16 weight is a rounded copy of its master.
Nothing here moves before a verdict: ``update`` is called on an applied step and never otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from parallel.engine.replicas import Shard
from parallel.planning.layout import Layout
from pretrain.spec import Parameter

#: Roles that weight decay never touches; embedding and head are as the configuration says.
UNDECAYED = frozenset({"norm", "decay"})


class Hyperparameters(Protocol):
    """``train.optimizer`` of the configuration."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay_embedding: bool


class AdamW:
    """``shards``: this rank's; ``specs``: every tensor's Parameter, by global name."""

    def __init__(self, shards: Sequence[Shard], specs: Mapping[str, Parameter], options: Hyperparameters) -> None:
        self.shards = list(shards)
        self.masters = [_master(shard) for shard in self.shards]
        undecayed = UNDECAYED if options.decay_embedding else UNDECAYED | {"embedding", "head"}
        groups: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for shard, master in zip(self.shards, self.masters, strict=True):
            groups[specs[shard.name].role not in undecayed].append(master)
        self._inner = torch.optim.AdamW(
            [
                {"params": masters, "weight_decay": options.weight_decay if decayed else 0.0}
                for decayed, masters in groups.items()
            ],
            lr=0.0,
            betas=options.betas,
            eps=options.eps,
            fused=True,
        )
        self.set_updates(0)
        for shard, master in zip(self.shards, self.masters, strict=True):
            master.grad = shard.gradient

    def set_updates(self, updates: int) -> None:
        """How many updates were applied so far; moments keep their values, or start at zero."""
        self.updates = updates
        for master in self.masters:
            state = self._inner.state[master]
            state.setdefault("exp_avg", torch.zeros_like(master))
            state.setdefault("exp_avg_sq", torch.zeros_like(master))
            state["step"] = torch.tensor(float(updates), device=master.device)

    @torch.no_grad()
    def gradient_norm(self, world: dist.ProcessGroup) -> float:
        """L2 norm of the global gradient: every element counted once, by the rank whose layout owns it.

        NaN if any rank's gradient is not finite, a replica's that does not count included: it would be applied there.
        """
        total = torch.zeros((), dtype=torch.float64)
        if self.shards:
            norms = torch.stack(list(torch._foreach_norm([shard.gradient for shard in self.shards], 2))).double()
            counted = norms.new_tensor([shard.owned for shard in self.shards])
            finite = torch.where(norms.isfinite().all(), 0.0, torch.nan)
            total = (torch.where(counted > 0, norms, 0.0).square().sum() + finite).cpu()
        return _all_reduce_scalar(total, world) ** 0.5

    @torch.no_grad()
    def update(self, lr: float, scale: float) -> None:
        """One update with gradients times ``scale`` (clipping). Weights of other ranks are stale until gathered."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        if scale != 1.0 and self.shards:
            torch._foreach_mul_([shard.gradient for shard in self.shards], scale)
        self._inner.step()
        self.updates += 1
        self.copy_masters_to_weights()

    @torch.no_grad()
    def copy_masters_to_weights(self) -> None:
        for shard, master in zip(self.shards, self.masters, strict=True):
            if master.dtype != shard.weight.dtype:
                shard.weight.copy_(master)

    def tensors(self) -> Iterator[tuple[str, Layout, torch.Tensor]]:
        """Optimizer slots for the checkpoint: ``optim.<slot>/<name>``, its Layout, this rank's part."""
        for shard, master in zip(self.shards, self.masters, strict=True):
            state: dict[str, Any] = self._inner.state[master]
            slots = {slot: state[slot] for slot in ("exp_avg", "exp_avg_sq")}
            if master.dtype != shard.weight.dtype:
                slots["master"] = master
            for slot, tensor in slots.items():
                whole = shard.layout.flat is None
                shaped = tensor.view(shard.layout.allocated_shape) if whole else tensor
                yield f"optim.{slot}/{shard.name}", shard.layout, shaped


def _master(shard: Shard) -> torch.Tensor:
    dtype = torch.promote_types(shard.weight.dtype, torch.float32)
    return shard.weight if dtype == shard.weight.dtype else shard.weight.to(dtype)


def _all_reduce_scalar(value: torch.Tensor, group: dist.ProcessGroup) -> float:
    if group.size() > 1:
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        value = value.to(device)
        dist.all_reduce(value, group=group)
    return float(value)
