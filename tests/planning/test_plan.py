"""ParallelPlan: two factorisations of the same ranks, and refusals that name the nearest valid values."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.plan import (
    ORDERS,
    ParallelPlan,
    balanced_stages,
    nearest_divisors,
    nearest_multiples,
    stages_from_counts,
)
from stoker.errors import Refusal


@st.composite
def plans(draw: st.DrawFn) -> ParallelPlan:
    """Any plan of up to a few hundred ranks, 3 and 6 among them."""
    degree = st.sampled_from((1, 1, 2, 3, 4))
    tp, cp, etp, ep, pp = (draw(degree) for _ in range(5))
    inner = math.lcm(tp * cp, etp * ep) * draw(st.integers(1, 2))
    dp, micro_batch = inner // (tp * cp), draw(st.integers(1, 2))
    vpp = draw(st.integers(1, 3)) if pp > 1 else 1
    micro_batches = draw(st.integers(pp if vpp > 1 else 1, 9))
    return ParallelPlan(
        inner * pp,
        dp * micro_batch * micro_batches,
        micro_batch,
        num_layers=draw(st.integers(pp * vpp, 15)),
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        zero=draw(st.integers(0, 3)),
    )


@settings(max_examples=60, deadline=None)
@given(plans())
def test_coordinates_and_ranks_are_inverse_in_both_families(plan: ParallelPlan) -> None:
    for order in ORDERS:
        assert math.prod(plan.degree(axis) for axis in order) == plan.world_size
    for rank in range(plan.world_size):
        coords = plan.coords(rank)
        assert plan.rank(coords) == rank
        for order in ORDERS:
            assert all(0 <= coords[axis] < plan.degree(axis) for axis in order)
            assert plan.rank({axis: coords[axis] for axis in order}) == rank


@settings(max_examples=40, deadline=None)
@given(plans())
def test_groups_partition_the_world_by_the_other_coordinates(plan: ParallelPlan) -> None:
    for order in ORDERS:
        for axes in (axes for n in range(len(order) + 1) for axes in combinations(order, n)):
            groups = plan.group(axes)
            assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
            others = [axis for axis in order if axis not in axes]
            for group in groups:
                assert group == sorted(group)
                assert len(group) == math.prod(plan.degree(axis) for axis in axes)
                assert len({tuple(plan.coords(rank)[axis] for axis in others) for rank in group}) == 1


@given(plans())
def test_a_plan_survives_json(plan: ParallelPlan) -> None:
    assert ParallelPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(plans())
def test_every_layer_lives_on_one_pipeline_rank(plan: ParallelPlan) -> None:
    held = [(layer, pp) for pp in range(plan.pp) for chunk in plan.chunks(pp) for layer in chunk]
    assert sorted(held) == [(layer, plan.stage_of(layer)) for layer in range(plan.num_layers)]


@given(st.integers(1, 12), st.integers(0, 40))
def test_balanced_stages_differ_by_one_layer_and_spare_the_last_and_the_first(chunks: int, more: int) -> None:
    counts = [len(chunk) for chunk in balanced_stages(chunks + more, chunks)]
    assert sum(counts) == chunks + more
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)
    assert counts[:-1] == sorted(counts[:-1])


def megatron_accepts(group: int, micro_batches: int, pp: int) -> bool:
    """The two conditions under which Megatron-core 0.16.1's interleaved schedule raises ValueError, restated."""
    return pp <= group <= micro_batches and not 0 < micro_batches % group < pp


@pytest.mark.parametrize("pp", [2, 3, 4, 6])
def test_interleaving_takes_the_smallest_group_that_megatron_accepts(pp: int) -> None:
    for micro_batches in range(1, 30):
        valid = [g for g in range(1, 31) if megatron_accepts(g, micro_batches, pp)]
        arguments: dict[str, Any] = dict(pp=pp, vpp=2, num_layers=2 * pp)
        if valid:
            assert ParallelPlan(pp, micro_batches, 1, **arguments).microbatch_group_size() == valid[0]
        else:
            with pytest.raises(Refusal, match=f"set global_batch={pp} or more"):
                ParallelPlan(pp, micro_batches, 1, **arguments)


def test_three_micro_batches_at_two_stages_need_a_group_of_three() -> None:
    assert ParallelPlan(2, 3, 1, pp=2, vpp=2, num_layers=4).microbatch_group_size() == 3


def test_stages_may_be_given_as_counts() -> None:
    plan = ParallelPlan(2, 4, 1, pp=2, num_layers=5, stages=stages_from_counts([1, 4]))
    assert plan.stages == ((0,), (1, 2, 3, 4))
    interleaved = ParallelPlan(2, 4, 1, pp=2, vpp=2, num_layers=7, stages=stages_from_counts([1, 2, 3, 1]))
    assert interleaved.chunks(1) == [(1, 2), (6,)]


def test_explain_states_both_factorisations_and_the_batch() -> None:
    text = ParallelPlan(8, 12, 1, tp=2, pp=2, vpp=2, ep=2, num_layers=7, sequence_parallel=True).explain()
    assert "tp 2 x cp 1 x dp 2 x pp 2" in text
    assert "etp 1 x ep 2 x edp 2 x pp 2" in text
    assert "12 sequences = 2 dp x 6 micro-batches x 1" in text
    assert "interleaved 1F1B, 2 chunks a rank, groups of 2 micro-batches" in text
    assert "pipeline rank 0: layers 0-1 and 4-5; pipeline rank 1: layers 2-3 and 6" in text


@given(st.integers(1, 200), st.integers(1, 50))
def test_nearest_values_are_valid_and_nothing_valid_is_nearer(value: int, near: int) -> None:
    multiples, divisors = nearest_multiples(value, near), nearest_divisors(value, near)
    assert all(m % near == 0 and m > 0 for m in multiples) and all(value % d == 0 for d in divisors)
    assert not [
        m
        for m in range(1, 2 * value + near)
        if m % near == 0 and abs(m - value) < min(abs(m - value) for m in multiples)
    ]
    assert not [
        d for d in range(1, value + 1) if value % d == 0 and abs(d - near) < min(abs(d - near) for d in divisors)
    ]


REFUSED: dict[str, dict[str, Any]] = {
    r"tp\*cp\*pp = 3\*1\*1 = 3 does not divide world_size=8.*world_size=6 or 9, or tp=2 or 4": dict(tp=3),
    r"etp\*ep\*pp = 1\*3\*1 = 3 does not divide world_size=8.*ep=2 or 4": dict(ep=3),
    r"dp\*micro_batch = 8\*1 = 8 does not divide global_batch=12.*global_batch=8 or 16": dict(global_batch=12),
    r"dp\*micro_batch = 8\*3 = 24 .*global_batch=24 or 48, or micro_batch=2 or 4": dict(global_batch=32, micro_batch=3),
    r"vpp=2 .*needs pp > 1": dict(vpp=2),
    r"interleaving needs at least pp=4 .*global_batch=8 or more": dict(pp=4, vpp=2, global_batch=4, num_layers=8),
    r"3 layers cannot fill pp\*vpp = 4 chunks.*pp\*vpp <= 3": dict(pp=4, num_layers=3),
    r"2 chunks where pp\*vpp = 4\*1 = 4": dict(pp=4, stages=((0, 1), (2, 3))),
    r"must cover layers 0 to 3 in order": dict(pp=2, stages=((0, 1), (3, 2))),
    r"cover layers 0 to 3 in order, each once": dict(pp=2, stages=((0, 1, 2), (2, 3))),
    r"at least one a chunk": dict(pp=2, stages=((0, 1, 2, 3), ())),
    r"needs tp > 1, and tp is 1": dict(sequence_parallel=True),
    r"zero=4": dict(zero=4),
    r"recompute='some'.*none, selective, full": dict(recompute="some"),
    r"tp=0 must be a positive integer": dict(tp=0),
    r"pp=True must be a positive integer": dict(pp=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_p7_a_plan_that_cannot_be_is_refused_with_the_nearest_that_can(message: str) -> None:
    valid: dict[str, Any] = dict(world_size=8, global_batch=16, micro_batch=1, num_layers=4)
    ParallelPlan(**valid)
    with pytest.raises(Refusal, match=message) as refused:
        ParallelPlan(**{**valid, **REFUSED[message]})
    assert "\n" not in str(refused.value)


def test_p7_impossible_questions_are_refused() -> None:
    plan = ParallelPlan(4, 4, 1, tp=2, ep=2, num_layers=2)
    with pytest.raises(Refusal, match="one of"):
        plan.group(("tp", "ep"))
    with pytest.raises(Refusal, match="rank 4 is outside"):
        plan.coords(4)
    with pytest.raises(Refusal, match="name 2 ranks"):
        plan.rank({**plan.coords(1), "etp": 0, "ep": 0, "edp": 0})
    with pytest.raises(Refusal, match="tp=2 is outside"):
        plan.rank({"tp": 2, "cp": 0, "dp": 0, "pp": 0})
    with pytest.raises(Refusal, match="unknown keys fsdp"):
        ParallelPlan.from_dict({**plan.to_dict(), "fsdp": 1})
    with pytest.raises(Refusal, match="at least one layer"):
        stages_from_counts([1, 0])
