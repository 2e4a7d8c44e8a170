"""Layout: the shards of a tensor tile it exactly once. The oracle is a counter array in numpy."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.layout import FAMILIES, Coords, Family, Flat, Layout, Slice, Split
from parallel.planning.plan import ParallelPlan
from stoker.errors import Refusal

AXES = ("tp", "cp", "dp", "pp", "etp", "ep", "edp")


def at(**coords: int) -> dict[str, int]:
    return {axis: coords.get(axis, 0) for axis in AXES}


def every(layout: Layout, degrees: dict[str, int]) -> list[dict[str, int]]:
    axes = (*FAMILIES[layout.family], "pp")
    return [at(**dict(zip(axes, index))) for index in product(*(range(degrees.get(a, 1)) for a in axes))]


def box(piece: Slice) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(piece.start, piece.stop))


def scatter(layout: Layout, coords: Coords, whole: np.ndarray) -> np.ndarray:
    """This rank's tensor, flat, filled from the global one through the slices; padding is -1."""
    local = np.full(math.prod(layout.local_shape(coords)), -1, whole.dtype)
    for piece in layout.slices(coords):
        window = local[piece.offset : piece.offset + piece.numel]
        assert window.size == piece.numel > 0, "a slice leaves the local tensor"
        assert (window == -1).all(), "two slices overlap in the local tensor"
        window[:] = whole[box(piece)].ravel()
    return local


def assert_tiles(layout: Layout, degrees: dict[str, int]) -> None:
    whole = np.arange(math.prod(layout.shape)).reshape(layout.shape)
    count = np.zeros(layout.shape, int)
    for coords in every(layout, degrees):
        scatter(layout, coords, whole)
        if layout.owner(coords):
            assert layout.holds(coords)
            for piece in layout.slices(coords):
                count[box(piece)] += 1
    assert (count == 1).all()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, dict[str, int]]:
    """Any layout over up to two split dims, with padding on dim 0, groups, units and a flat range."""
    family: Family = draw(st.sampled_from(("dense", "expert")))
    axes = draw(st.permutations(FAMILIES[family]))
    degrees = {axis: draw(st.integers(1, 4)) for axis in (*axes, "pp")}
    shape: list[int] = []
    splits: list[Split] = []
    split_dims = draw(st.sets(st.integers(0, 2), max_size=2))
    for dim in range(draw(st.integers(max(split_dims, default=-1) + 1, 3))):
        if dim not in split_dims:
            shape.append(draw(st.integers(1, 4)))
            continue
        axis = axes[len(splits)]
        unit, groups, parts = draw(st.integers(1, 3)), draw(st.integers(1, 3)), degrees[axis]
        units = draw(st.integers(1, 7)) if dim == 0 else parts * draw(st.integers(1, 2))
        shape.append(units * unit * groups)
        splits.append(Split(dim, axis, parts, unit, groups))
    stages = tuple(draw(st.sets(st.integers(0, degrees["pp"] - 1), min_size=1, max_size=2)))
    layout = Layout(tuple(shape), tuple(splits), family, stages)
    if draw(st.booleans()):
        axis, offset = axes[2], draw(st.integers(0, 20))
        parts = degrees[axis]
        shard = -(-(offset + math.prod(layout.allocated_shape)) // parts) + draw(st.integers(0, 5))
        layout = Layout(tuple(shape), tuple(splits), family, stages, Flat(axis, parts, offset, shard))
    return layout, degrees


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_owners_tile_the_tensor_exactly_once(case: tuple[Layout, dict[str, int]]) -> None:
    assert_tiles(*case)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("flat", [False, True])
def test_a_vocabulary_of_257_tiles_with_padding_at_the_end(parts: int, flat: bool) -> None:
    rows = math.ceil(257 / parts)
    numel = rows * 3
    layout = Layout((257, 3), (Split(0, "tp", parts),), flat=Flat("dp", 3, 5, numel // 3 + 9) if flat else None)
    assert layout.allocated_shape == (rows, 3)
    assert_tiles(layout, {"tp": parts, "dp": 3})


def test_a_rank_may_hold_no_valid_row() -> None:
    layout = Layout((5, 2), (Split(0, "tp", 4),))
    assert layout.local_shape(at(tp=3)) == (2, 2)
    assert layout.slices(at(tp=2)) == [Slice((4, 0), (5, 2), 0)]
    assert layout.slices(at(tp=3)) == []
    assert_tiles(layout, {"tp": 4})


@pytest.mark.parametrize("dim", [1, 2])
def test_experts_tile_over_expert_and_expert_tensor_axes(dim: int) -> None:
    layout = Layout((6, 4, 8), (Split(0, "ep", 3), Split(dim, "etp", 2)), "expert", flat=Flat("edp", 2, 7, 25))
    assert layout.local_shape(at(edp=0)) == (18,)
    assert layout.local_shape(at(edp=1)) == (14,)
    assert_tiles(layout, {"ep": 3, "etp": 2, "edp": 2})


def test_a_packed_dim_takes_its_part_of_every_group() -> None:
    whole = np.arange(8 * 2).reshape(8, 2)
    layout = Layout((8, 2), (Split(0, "tp", 2, groups=2),))
    want = np.concatenate([whole[2:4], whole[6:8]])
    np.testing.assert_array_equal(scatter(layout, at(tp=1), whole).reshape(4, 2), want)


def test_an_inner_packed_dim_is_row_major_in_the_local_tensor() -> None:
    whole = np.arange(3 * 8 * 2).reshape(3, 8, 2)
    layout = Layout((3, 8, 2), (Split(1, "etp", 2, groups=2),), "expert")
    want = np.concatenate([whole[:, 2:4], whole[:, 6:8]], axis=1)
    np.testing.assert_array_equal(scatter(layout, at(etp=1), whole).reshape(3, 4, 2), want)


def test_heads_stay_together() -> None:
    layout = Layout((3 * 16, 4), (Split(0, "tp", 2, unit=16),))
    assert layout.slices(at(tp=0)) == [Slice((0, 0), (32, 4), 0)]
    assert layout.slices(at(tp=1)) == [Slice((32, 0), (48, 4), 0)]


def test_a_flat_range_cuts_the_padded_local_array() -> None:
    # 5 rows over tp=2 allocate 3 rows each; the second rank's third row is padding that the flat shard still counts.
    layout = Layout((5, 2), (Split(0, "tp", 2),), flat=Flat("dp", 2, 0, 3))
    assert [layout.local_shape(at(tp=1, dp=r)) for r in (0, 1)] == [(3,), (3,)]
    assert layout.slices(at(tp=1, dp=0)) == [Slice((3, 0), (4, 2), 0), Slice((4, 0), (5, 1), 2)]
    assert layout.slices(at(tp=1, dp=1)) == [Slice((4, 1), (5, 2), 0)]


def test_a_scalar_is_one_slice() -> None:
    assert Layout(()).slices(at()) == [Slice((), (), 0)]


def test_a_tied_embedding_is_held_twice_and_owned_once() -> None:
    layout = Layout((7, 2), stages=(0, 3), partial=("pp",))
    holders = [c["pp"] for c in every(layout, {"pp": 4}) if layout.holds(c)]
    owners = [c["pp"] for c in every(layout, {"pp": 4}) if layout.owner(c)]
    assert (holders, owners) == ([0, 3], [0])
    assert layout.slices(at(pp=1)) == []


def test_ranks_of_a_plan_tile_dense_and_expert_tensors() -> None:
    plan = ParallelPlan(12, 12, 1, tp=2, pp=2, ep=3, num_layers=4)
    dense = Layout((9, 4), (Split(0, "tp", 2),), stages=(1,), flat=Flat("dp", 3, 0, 7))
    expert = Layout((7, 4, 2), (Split(0, "ep", 3),), "expert", stages=(0,), flat=Flat("edp", 2, 1, 13))
    for layout in (dense, expert):
        count = np.zeros(layout.shape, int)
        for coords in map(plan.coords, range(12)):
            for piece in layout.slices(coords) if layout.owner(coords) else ():
                count[box(piece)] += 1
        assert (count == 1).all()


REFUSED = {
    "only dim 0 may be padded": lambda: Layout((4, 5), (Split(1, "tp", 2),)),
    "whole units": lambda: Layout((10, 2), (Split(0, "tp", 2, unit=4),)),
    "more than once": lambda: Layout((4, 4), (Split(0, "tp", 2), Split(0, "cp", 2))),
    "twice": lambda: Layout((4, 4), (Split(0, "tp", 2), Split(1, "tp", 2))),
    "expert family": lambda: Layout((4, 4), (Split(0, "tp", 2),), "expert"),
    "no dim 2": lambda: Layout((4, 4), (Split(2, "tp", 2),)),
    "before the tensor does": lambda: Layout((4, 4), flat=Flat("dp", 2, 1, 8)),
    "pipeline coordinate": lambda: Layout((4,), stages=(0, 0)),
    "outside its 2 parts": lambda: Layout((4,), (Split(0, "tp", 2),)).slices(at(tp=2)),
    "must be positive": lambda: Layout((4,), (Split(0, "tp", 0),)),
    "partial axis": lambda: Layout((4,), partial=("ep",)),
    "known families": lambda: Layout((4,), family="moe"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", REFUSED)
def test_p7_a_layout_that_cannot_be_is_refused(message: str) -> None:
    with pytest.raises(Refusal, match=message):
        REFUSED[message]()
