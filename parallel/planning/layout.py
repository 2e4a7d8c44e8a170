"""Layout: where the shards of one tensor lie.

Initialiser, gradient norm, optimizer state and checkpoint ask one question of a tensor, "which elements of the global
tensor does this rank hold, and where in its memory?", and this file is the one answer. No torch.

Two families of axes factor the same ranks: dense tensors lie on (tp, cp, dp), expert tensors on (etp, ep, edp); the
pipeline axis pp belongs to both. A coordinate is ``{axis: index}`` with keys tp, cp, dp, pp, etp, ep, edp
(``ParallelPlan.coords``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from stoker.errors import Refusal

Family = Literal["dense", "expert"]
FAMILIES: Mapping[Family, tuple[str, ...]] = {"dense": ("tp", "cp", "dp"), "expert": ("etp", "ep", "edp")}

Coords = Mapping[str, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """A dim cut over an axis in ``parts``.

    The dim is ``groups`` consecutive blocks of equal size (a packed gate and up is two), each cut by itself: part p
    takes units [p*n, (p+1)*n) of every block, n = ceil(units / parts), a unit being ``unit`` rows that stay together
    (a head). Every part allocates n units a block; where they do not divide, the last parts hold fewer valid rows or
    none, and the rest of their block is padding.

    >>> Layout((257, 64), (Split(0, "tp", 4),)).allocated_shape
    (65, 64)
    """

    dim: int
    axis: str
    parts: int
    unit: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Flat:
    """A range of a flat bucket (ZeRO-1): the padded local array, flattened, lies at [offset, offset + numel) of a
    bucket cut in ``parts`` ranges of ``shard`` elements; coordinate r of ``axis`` holds the intersection with
    [r*shard, (r+1)*shard)."""

    axis: str
    parts: int
    offset: int
    shard: int


@dataclass(frozen=True)
class Slice:
    """Global box [start, stop) whose row-major content is elements [offset, offset + numel) of the rank's tensor."""

    start: Shape
    stop: Shape
    offset: int

    @property
    def shape(self) -> Shape:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Run:
    """Valid rows of one block: local rows [local, local + length) are global rows [start, start + length)."""

    local: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Where the shards of one tensor of global ``shape`` lie.

    ``stages``: pipeline coordinates that hold it (a tied embedding has two). ``partial``: axes over which the local
    *gradient* is a partial sum until it is reduced. The slices of all owners tile the global tensor exactly once.
    Raises Refusal for a split that its shape does not admit; only dim 0 may be padded.
    """

    shape: Shape
    splits: tuple[Split, ...] = ()
    family: Family = "dense"
    stages: tuple[int, ...] = (0,)
    flat: Flat | None = None
    partial: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise Refusal(f"layout family {self.family!r}: known families are {', '.join(FAMILIES)}")
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise Refusal(f"layout stages {self.stages}: name each pipeline coordinate that holds the tensor once")
        axes = [split.axis for split in self.splits] + ([self.flat.axis] if self.flat else [])
        self._refuse_axes(axes, FAMILIES[self.family], "split")
        self._refuse_axes(self.partial, (*FAMILIES[self.family], "pp"), "partial")
        dims = [split.dim for split in self.splits]
        if len(set(dims)) != len(dims):
            raise Refusal(f"layout of shape {self.shape}: dims {dims} are split more than once")
        for split in self.splits:
            self._refuse_split(split)
        if self.flat is not None:
            self._refuse_flat(self.flat)

    def _refuse_axes(self, axes: tuple[str, ...] | list[str], known: tuple[str, ...], use: str) -> None:
        for axis in axes:
            if axis not in known:
                raise Refusal(f"layout: {use} axis {axis!r} is not one of {', '.join(known)} ({self.family} family)")
        if len(set(axes)) != len(axes):
            raise Refusal(f"layout: {use} axes {list(axes)} name an axis twice")

    def _refuse_split(self, split: Split) -> None:
        if not 0 <= split.dim < len(self.shape):
            raise Refusal(f"layout of shape {self.shape}: no dim {split.dim} to split over {split.axis}")
        if min(split.parts, split.unit, split.groups) < 1:
            raise Refusal(f"layout: parts, unit and groups of {split} must be positive")
        size = self.shape[split.dim]
        if size % (split.groups * split.unit):
            raise Refusal(
                f"layout of shape {self.shape}: dim {split.dim} of {size} rows is not {split.groups} groups "
                f"of whole units of {split.unit} rows"
            )
        if split.dim and size % (split.groups * split.unit * split.parts):
            raise Refusal(
                f"layout of shape {self.shape}: {split.axis}={split.parts} does not divide dim {split.dim} "
                f"({size // split.groups // split.unit} units); only dim 0 may be padded"
            )

    def _refuse_flat(self, flat: Flat) -> None:
        if flat.parts < 1 or flat.shard < 1 or flat.offset < 0:
            raise Refusal(f"layout: {flat} needs positive parts and shard and an offset of at least 0")
        end = flat.offset + math.prod(self.allocated_shape)
        if end > flat.parts * flat.shard:
            raise Refusal(f"layout: {flat} ends at {flat.parts * flat.shard}, before the tensor does ({end})")

    @property
    def allocated_shape(self) -> Shape:
        """Shape of a rank's part before it is flattened: the same for every coordinate, padding included."""
        shape = list(self.shape)
        for split in self.splits:
            shape[split.dim] = split.groups * _rows_per_part(split, shape[split.dim])
        return tuple(shape)

    def local_shape(self, coords: Coords) -> Shape:
        """Shape of this rank's tensor: ``allocated_shape``, or (n,) for a flat range (n may be 0)."""
        self._refuse_coords(coords)
        if self.flat is None:
            return self.allocated_shape
        low, high = self._flat_range(coords)
        return (high - low,)

    def holds(self, coords: Coords) -> bool:
        """Whether this rank has the tensor at all (its pipeline stage does)."""
        return coords["pp"] in self.stages

    def owner(self, coords: Coords) -> bool:
        """Whether this rank speaks for its elements: of all replicas, the first of ``stages`` and coordinate 0 on
        every axis that neither splits nor shards the tensor."""
        cut = {split.axis for split in self.splits} | ({self.flat.axis} if self.flat else set())
        return coords["pp"] == self.stages[0] and all(coords[a] == 0 for a in FAMILIES[self.family] if a not in cut)

    def slices(self, coords: Coords) -> list[Slice]:
        """Every valid element that this rank holds, as boxes with ascending offsets; empty where it holds none."""
        if not self.holds(coords):
            return []
        self._refuse_coords(coords)
        shape = self.allocated_shape
        low, high = self._flat_range(coords) if self.flat else (0, math.prod(shape))
        runs = self._runs(coords)
        # Inside the innermost dim that is cut in several runs, rows are not contiguous: walk the outer dims by index.
        broken = (dim for dim, found in enumerate(runs) if [run.length for run in found] != [shape[dim]])
        depth = max(broken, default=0)
        return [s for start, stop in _boxes(shape, low, high, depth) for s in _to_global(shape, start, stop, runs, low)]

    def _runs(self, coords: Coords) -> list[list[_Run]]:
        runs = [[_Run(0, 0, size)] for size in self.shape]
        for split in self.splits:
            block, rows = self.shape[split.dim] // split.groups, _rows_per_part(split, self.shape[split.dim])
            first = coords[split.axis] * rows
            length = min(rows, block - first)
            runs[split.dim] = [_Run(g * rows, g * block + first, length) for g in range(split.groups) if length > 0]
        return runs

    def _flat_range(self, coords: Coords) -> tuple[int, int]:
        assert self.flat is not None
        numel, first = math.prod(self.allocated_shape), coords[self.flat.axis] * self.flat.shard - self.flat.offset
        low = min(max(first, 0), numel)
        return low, max(low, min(first + self.flat.shard, numel))

    def _refuse_coords(self, coords: Coords) -> None:
        for cut in (*self.splits, *((self.flat,) if self.flat else ())):
            if not 0 <= coords[cut.axis] < cut.parts:
                raise Refusal(f"layout: coordinate {cut.axis}={coords[cut.axis]} is outside its {cut.parts} parts")


def _rows_per_part(split: Split, size: int) -> int:
    """Rows that one part allocates in one block."""
    units = size // split.groups // split.unit
    return -(-units // split.parts) * split.unit


def _boxes(shape: Shape, low: int, high: int, depth: int) -> Iterator[tuple[Shape, Shape]]:
    """Boxes of a row-major array that cover its flat range [low, high) in order, each contiguous and, in dims before
    ``depth``, one index wide."""
    if low >= high:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    row = low // inner
    while low < high:
        end = min(high, (row + 1) * inner)
        if depth == 0 and low == row * inner and high >= (row + 1) * inner:
            last = high // inner
            yield (row, *(0 for _ in shape[1:])), (last, *shape[1:])
            row, low = last, last * inner
            continue
        for start, stop in _boxes(shape[1:], low - row * inner, end - row * inner, max(depth - 1, 0)):
            yield (row, *start), (row + 1, *stop)
        row, low = row + 1, end


def _to_global(shape: Shape, start: Shape, stop: Shape, runs: list[list[_Run]], base: int) -> Iterator[Slice]:
    """The valid parts of one local box, moved to global coordinates; at most one dim of it meets several runs."""
    pieces: list[tuple[Shape, Shape, Shape]] = [((), (), ())]  # local start, global start, global stop
    for dim, found in enumerate(runs):
        cuts = [(r, max(start[dim], r.local), min(stop[dim], r.local + r.length)) for r in found]
        pieces = [
            ((*local, a), (*first, r.start + a - r.local), (*last, r.start + b - r.local))
            for local, first, last in pieces
            for r, a, b in cuts
            if a < b
        ]
    for local, first, last in pieces:
        offset = 0
        for index, size in zip(local, shape, strict=True):
            offset = offset * size + index
        yield Slice(first, last, offset - base)
