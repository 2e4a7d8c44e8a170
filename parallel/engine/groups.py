"""Process groups of one rank, made from a ParallelPlan and handed to whoever needs them: there are no globals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from parallel.engine import seam
from parallel.planning.plan import ParallelPlan

Group = dist.ProcessGroup

#: Every set of axes that something reduces or exchanges over, with who does.
USED: tuple[tuple[str, ...], ...] = (
    ("tp",),  # tensor-parallel layers, sequence parallelism, loss
    ("cp",),  # context parallelism
    ("dp",),  # the parts of the global batch
    ("cp", "dp"),  # gradients of dense tensors
    ("pp",),  # activations between stages
    ("etp",),  # expert weights split inside an expert
    ("ep",),  # tokens to experts
    ("edp",),  # gradients of expert tensors
)


@dataclass(frozen=True)
class Groups:
    """``groups["tp"]``, ``groups["cp", "dp"]``: the group of this rank along these axes. ``embedding`` joins the first
    and the last stage when both hold the embedding (None where this rank is on neither or it is not shared).
    ``control``: all ranks over gloo, for what is said on the CPU: decisions, checkpoints, small objects."""

    plan: ParallelPlan
    rank: int
    coords: dict[str, int]
    _by_axes: dict[tuple[str, ...], Group] = field(repr=False)
    control: Group
    embedding: Group | None = None

    def __getitem__(self, axes: str | tuple[str, ...]) -> Group:
        return self._by_axes[(axes,) if isinstance(axes, str) else axes]

    def size(self, *axes: str) -> int:
        return self[axes].size()

    @property
    def world(self) -> Group:
        return _world()

    def megatron(self) -> Any:
        """The same groups as Megatron's ProcessGroupCollection."""
        seam.install()
        from megatron.core.process_groups_config import ProcessGroupCollection

        return ProcessGroupCollection(
            tp=self["tp"],
            pp=self["pp"],
            cp=self["cp"],
            dp=self["dp"],
            dp_cp=self["cp", "dp"],
            intra_dp_cp=self["cp", "dp"],
            ep=self["ep"],
            expt_tp=self["etp"],
            expt_dp=self["edp"],
            intra_expt_dp=self["edp"],
            embd=self.embedding,
            pos_embd=None,
        )


def _world() -> Group:
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is not initialised"
    return group


def create(plan: ParallelPlan, shared_embedding: bool = False, timeout: timedelta | None = None) -> Groups:
    """Create this rank's groups; every rank of the world calls it with the same plan.

    ``shared_embedding``: the first and the last stage both hold the embedding (tied to the head). ``timeout`` of their
    collectives; None is torch's default for the back end.
    """
    rank = dist.get_rank()
    made: dict[tuple[int, ...], Group] = {tuple(range(plan.world_size)): _world()}

    def joining(ranks: Sequence[int]) -> Group:
        # Members alone make a group, all in the same order of axes: a rank of ten thousand makes a dozen, not all.
        key = tuple(sorted(ranks))
        if key not in made:
            made[key] = dist.new_group(list(key), timeout=timeout, use_local_synchronization=True)
        return made[key]

    by_axes = {axes: joining(next(ranks for ranks in plan.group(axes) if rank in ranks)) for axes in USED}
    embedding = None
    if shared_embedding and plan.pp > 1:
        stages = next(ranks for ranks in plan.group(("pp",)) if rank in ranks)
        if rank in (stages[0], stages[-1]):
            embedding = joining((stages[0], stages[-1]))
    gloo = dist.get_backend() == "gloo"
    control = _world() if gloo else dist.new_group(backend="gloo", timeout=timeout)
    return Groups(plan, rank, dict(plan.coords(rank)), by_axes, control, embedding)
