"""ParallelPlan: how many ranks each axis takes, in which order, and which layers lie where. No torch.

Two factorisations of the same ranks, each from the fastest axis to the slowest: dense tensors see (tp, cp, dp, pp),
experts (etp, ep, edp, pp). The pipeline axis is slowest in both, so the ranks of a stage are the same ranks.
What the engine can run is another question: ``capabilities.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from itertools import product
from typing import Any, Literal, get_args

from parallel.planning.layout import FAMILIES
from stoker.errors import Refusal

Recompute = Literal["none", "selective", "full"]
Stages = tuple[tuple[int, ...], ...]
#: What is sharded over dp: nothing, the optimizer, gradients as well, weights as well (FSDP).
ZERO_STAGES = (0, 1, 2, 3)

ORDERS: tuple[tuple[str, ...], ...] = tuple((*axes, "pp") for axes in FAMILIES.values())


@dataclass(frozen=True)
class ParallelPlan:
    """Degrees of parallelism and what they imply.

    ``world_size`` ranks; ``global_batch`` and ``micro_batch`` in sequences (micro-batch: per data-parallel rank).
    ``vpp`` chunks a pipeline rank; ``zero`` shards over dp: 1 the optimizer, 2 gradients as well,
    3 weights as well (FSDP); 0 nothing.
    ``recompute``: what backward runs again, ``selective`` each layer's mixer, ``full`` each layer.
    ``stages``: the layers of each of the pp*vpp chunks in order, chunk c living on pipeline rank c % pp; left out, the
    layers are balanced (``balanced_stages``).
    Holds: tp*cp*dp*pp = etp*ep*edp*pp = world_size; dp*micro_batch divides global_batch; every layer in one chunk.
    Raises Refusal otherwise, with the nearest values that are valid.

    >>> plan = ParallelPlan(8, 12, 1, tp=2, pp=2, num_layers=5)
    >>> plan.dp, plan.num_micro_batches, plan.stages
    (2, 6, ((0, 1, 2), (3, 4)))
    """

    world_size: int
    global_batch: int
    micro_batch: int
    _: KW_ONLY
    num_layers: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    zero: int = 1
    recompute: Recompute = "none"
    stages: Stages = ()

    def __post_init__(self) -> None:
        for name in ("world_size", "global_batch", "micro_batch", "num_layers", "tp", "cp", "pp", "vpp", "ep", "etp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise Refusal(f"{name}={value!r} must be a positive integer")
        if self.zero not in ZERO_STAGES:
            raise Refusal(f"zero={self.zero!r}: choose one of {', '.join(map(str, ZERO_STAGES))}")
        if self.recompute not in get_args(Recompute):
            raise Refusal(f"recompute={self.recompute!r}: choose one of {', '.join(get_args(Recompute))}")
        if self.sequence_parallel and self.tp == 1:
            raise Refusal("sequence_parallel=true shards over tensor-parallel ranks: it needs tp > 1, and tp is 1")
        self._refuse_degrees(("tp", "cp", "pp"))
        self._refuse_degrees(("etp", "ep", "pp"))
        self._refuse_batch()
        self._refuse_pipeline()

    def _refuse_degrees(self, axes: tuple[str, ...]) -> None:
        used = math.prod(getattr(self, axis) for axis in axes)
        if self.world_size % used == 0:
            return
        advice = [f"world_size={_either(nearest_multiples(self.world_size, used))}"]
        for axis in axes:
            degree = getattr(self, axis)
            room, rest = divmod(self.world_size, used // degree)
            if degree > 1 and rest == 0:
                advice.append(f"{axis}={_either(nearest_divisors(room, degree))}")
        raise Refusal(
            f"{'*'.join(axes)} = {'*'.join(str(getattr(self, axis)) for axis in axes)} = {used} does not divide "
            f"world_size={self.world_size}: nearest that fit are {', or '.join(advice)}"
        )

    def _refuse_batch(self) -> None:
        together = self.dp * self.micro_batch
        if self.global_batch % together == 0:
            return
        advice = [f"global_batch={_either(nearest_multiples(self.global_batch, together))}"]
        if self.global_batch % self.dp == 0:
            advice.append(f"micro_batch={_either(nearest_divisors(self.global_batch // self.dp, self.micro_batch))}")
        raise Refusal(
            f"dp*micro_batch = {self.dp}*{self.micro_batch} = {together} does not divide "
            f"global_batch={self.global_batch}: nearest that do are {', or '.join(advice)}"
        )

    def _refuse_pipeline(self) -> None:
        if self.vpp > 1 and self.pp == 1:
            raise Refusal(f"vpp={self.vpp} interleaves chunks of a pipeline: it needs pp > 1, or set vpp=1")
        if not self.stages:
            object.__setattr__(self, "stages", balanced_stages(self.num_layers, self.pp * self.vpp))
        if len(self.stages) != self.num_chunks:
            raise Refusal(
                f"stages has {len(self.stages)} chunks where pp*vpp = {self.pp}*{self.vpp} = {self.num_chunks}: "
                "give one entry for each chunk"
            )
        if [layer for chunk in self.stages for layer in chunk] != list(range(self.num_layers)) or not all(self.stages):
            raise Refusal(
                f"stages {[list(chunk) for chunk in self.stages]} must cover layers 0 to {self.num_layers - 1} in "
                "order, each once and at least one a chunk; leave stages out to have them balanced"
            )
        self.microbatch_group_size()

    @property
    def dp(self) -> int:
        """Data-parallel degree of dense tensors."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel degree of expert tensors: how many ranks hold the same expert shard."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each rank runs a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def num_chunks(self) -> int:
        return self.pp * self.vpp

    def microbatch_group_size(self) -> int:
        """Micro-batches that a chunk runs before the next chunk of the same rank takes over (interleaved schedule).

        Megatron's schedule wants it in [pp, num_micro_batches] and the last group not smaller than pp (checked in
        ``forward_backward_pipelining_with_interleaving``); the smallest such size holds the fewest activations.
        Raises Refusal where there is none: fewer micro-batches than pipeline ranks. 1 without interleaving.
        """
        if self.vpp == 1:
            return 1
        for size in range(self.pp, self.num_micro_batches + 1):
            rest = self.num_micro_batches % size
            if rest == 0 or rest >= self.pp:
                return size
        raise Refusal(
            f"vpp={self.vpp}: interleaving needs at least pp={self.pp} micro-batches a step and there are "
            f"{self.num_micro_batches}: set global_batch={self.pp * self.dp * self.micro_batch} or more, or vpp=1"
        )

    def chunks(self, pp: int) -> list[tuple[int, ...]]:
        """Layers of each chunk that pipeline rank ``pp`` holds, in order of its chunks."""
        return list(self.stages[pp :: self.pp])

    def stage_of(self, layer: int) -> int:
        """Pipeline rank that holds ``layer``; the embedding lives on 0, final norm and head on pp - 1."""
        return next(c for c, chunk in enumerate(self.stages) if layer in chunk) % self.pp

    def degree(self, axis: str) -> int:
        return int(getattr(self, axis))

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank on every axis: tp, cp, dp, pp, etp, ep, edp."""
        if not 0 <= rank < self.world_size:
            raise Refusal(f"rank {rank} is outside the world of {self.world_size} ranks")
        coords: dict[str, int] = {}
        for order in ORDERS:
            rest = rank
            for axis in order:
                rest, coords[axis] = divmod(rest, self.degree(axis))
        return coords

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank at these coordinates: all axes of one family and pp, or both families if they name one rank."""
        ranks = {self._rank(order, coords) for order in ORDERS if all(axis in coords for axis in order)}
        if len(ranks) != 1:
            wanted = " or ".join(f"({', '.join(order)})" for order in ORDERS)
            raise Refusal(f"coordinates {dict(coords)} name {len(ranks)} ranks: give {wanted}, consistent if both")
        return ranks.pop()

    def _rank(self, order: tuple[str, ...], coords: Mapping[str, int]) -> int:
        rank = 0
        for axis in reversed(order):
            if not 0 <= coords[axis] < self.degree(axis):
                raise Refusal(f"coordinate {axis}={coords[axis]} is outside its {self.degree(axis)} ranks")
            rank = rank * self.degree(axis) + coords[axis]
        return rank

    def group(self, axes: tuple[str, ...]) -> list[list[int]]:
        """Ranks that differ on ``axes`` only, as lists that cover the world once; ascending inside each list.

        ``axes`` come from one family and pp, for example ("tp",), ("cp", "dp"), ("edp",), ("tp", "pp").
        """
        order = next((order for order in ORDERS if set(axes) <= set(order)), None)
        if order is None:
            raise Refusal(f"group over {axes}: take the axes from one of {', or '.join(map(str, ORDERS))}")
        inside = [axis for axis in order if axis in axes]
        outside = [axis for axis in order if axis not in axes]
        return [
            [self._rank(order, {**fixed, **moving}) for moving in self._grid(inside)] for fixed in self._grid(outside)
        ]

    def _grid(self, axes: Sequence[str]) -> list[dict[str, int]]:
        """Every coordinate over ``axes``, the first of them running fastest."""
        slow_first = list(reversed(axes))
        return [
            dict(zip(slow_first, index, strict=True))
            for index in product(*(range(self.degree(axis)) for axis in slow_first))
        ]

    def explain(self) -> str:
        """The plan in words, a line for each thing that it decides."""
        dense, expert = (" x ".join(f"{axis} {self.degree(axis)}" for axis in order) for order in ORDERS)
        stages = "; ".join(
            f"pipeline rank {pp}: layers " + " and ".join(_span(chunk) for chunk in self.chunks(pp))
            for pp in range(self.pp)
        )
        schedule = "no pipeline" if self.pp == 1 else "1F1B"
        if self.vpp > 1:
            groups = f"groups of {self.microbatch_group_size()} micro-batches"
            schedule = f"interleaved 1F1B, {self.vpp} chunks a rank, {groups}"
        sharded = ("", "optimizer", "optimizer and gradients", "optimizer, gradients and weights")[self.zero]
        optimizer = f"{sharded} sharded over dp ({self.dp} parts)" if self.zero else "optimizer replicated over dp"
        return "\n".join(
            (
                f"{self.world_size} ranks, dense (fastest first): {dense}",
                f"{self.world_size} ranks, experts (fastest first): {expert}",
                f"batch: {self.global_batch} sequences = {self.dp} dp x {self.num_micro_batches} micro-batches"
                f" x {self.micro_batch}",
                f"schedule: {schedule}",
                f"stages: {stages}",
                f"{optimizer}; sequence parallel: {'on' if self.sequence_parallel else 'off'};"
                f" recompute: {self.recompute}",
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` gives the same plan back."""
        return {**asdict(self), "stages": [list(chunk) for chunk in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParallelPlan:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise Refusal(f"plan has unknown keys {', '.join(unknown)}: it was written by a newer release, or by hand")
        return cls(**{**values, "stages": tuple(tuple(chunk) for chunk in values.get("stages", ()))})


def balanced_stages(num_layers: int, num_chunks: int) -> Stages:
    """Layers over chunks, sizes differing by at most one.

    The last chunk also holds the head and the early ones hold the most micro-batches in flight, so the extra layers go
    to the chunks just before the last.
    """
    if num_layers < num_chunks:
        raise Refusal(
            f"{num_layers} layers cannot fill pp*vpp = {num_chunks} chunks with one each: "
            f"choose pp and vpp so that pp*vpp <= {num_layers}"
        )
    size, extra = divmod(num_layers, num_chunks)
    return stages_from_counts(
        [size + (num_chunks - 1 - extra <= chunk < num_chunks - 1) for chunk in range(num_chunks)]
    )


def stages_from_counts(counts: Sequence[int]) -> Stages:
    """Stages from the number of layers of each chunk: (2, 1) -> ((0, 1), (2,))."""
    if not counts or min(counts) < 1:
        raise Refusal(f"stages {list(counts)}: every chunk holds at least one layer")
    starts = [sum(counts[:chunk]) for chunk in range(len(counts))]
    return tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))


def nearest_multiples(value: int, step: int) -> list[int]:
    """The positive multiples of ``step`` next below and above ``value`` (``value`` itself if it is one)."""
    below = value // step * step
    return sorted({below or step, below + step if value % step else below})


def nearest_divisors(value: int, near: int) -> list[int]:
    """The divisors of ``value`` next below and above ``near`` (``near`` itself if it is one)."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below, above = [d for d in divisors if d <= near], [d for d in divisors if d >= near]
    return sorted({*below[-1:], *above[:1]})


def _either(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))


def _span(chunk: tuple[int, ...]) -> str:
    return str(chunk[0]) if len(chunk) == 1 else f"{chunk[0]}-{chunk[-1]}"
