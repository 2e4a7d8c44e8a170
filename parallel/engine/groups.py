"""Process groups of one rank, made from a ParallelPlan and handed to whoever needs them: there are no globals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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
    ("tp", "cp", "dp"),  # router statistics of a stage
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


def create(plan: ParallelPlan, shared_embedding: bool = False) -> Groups:
    """Create this rank's groups; every rank of the world calls it with the same plan.

    ``shared_embedding``: the first and the last stage both hold the embedding (tied to the head).
    """
    rank = dist.get_rank()
    made: dict[frozenset[int], Group] = {frozenset(range(plan.world_size)): _world()}

    def mine(partition: Iterable[Iterable[int]]) -> Group | None:
        # Every rank makes every group, in the same order, as torch.distributed asks; equal rank lists share one.
        own = None
        for ranks in partition:
            key = frozenset(ranks)
            if key not in made:
                made[key] = dist.new_group(sorted(key))
            if rank in key:
                own = made[key]
        return own

    by_axes: dict[tuple[str, ...], Group] = {}
    for axes in USED:
        group = mine(plan.group(axes))
        assert group is not None
        by_axes[axes] = group
    embedding = None
    if shared_embedding and plan.pp > 1:
        embedding = mine({ranks[0], ranks[-1]} for ranks in map(list, plan.group(("pp",))))
    control = _world() if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return Groups(plan, rank, dict(plan.coords(rank)), by_axes, control, embedding)
