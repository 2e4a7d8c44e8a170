"""Pipeline tables: the figures of the papers, what is in flight, and refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.execution import Execution
from parallel.planning.plan import ParallelPlan
from parallel.planning.schedule import (
    Table,
    Work,
    dual_pipe,
    folded,
    forward_only,
    in_flight,
    interleaved,
    looped,
    one_f_one_b,
    peak_in_flight,
    table_of,
    warm_up,
    zb_h1,
    zb_v,
)
from parallel.planning.timing.simulator import Durations, simulate
from stoker.errors import Refusal


def drawn(table: Table, rank: int) -> str:
    """``F0.2``: forward of chunk 0, micro-batch 2; ``+`` joins a work to the next."""
    return " ".join(f"{work.kind}{work.chunk}.{work.micro_batch}{'+' * work.joined}" for work in table.orders[rank])


def test_1f1b_is_the_figure_of_the_paper() -> None:
    table = one_f_one_b(4, 8)
    assert drawn(table, 0) == ("F0.0 F0.1 F0.2 F0.3 B0.0 F0.4 B0.1 F0.5 B0.2 F0.6 B0.3 F0.7 B0.4 B0.5 B0.6 B0.7")
    assert drawn(table, 3) == " ".join(f"F0.{index} B0.{index}" for index in range(8))


def test_interleaved_is_the_figure_of_the_paper() -> None:
    assert drawn(interleaved(2, 2, 4, 2), 0) == (
        "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3"
    )
    # Groups of three, the last of two (the comment in Megatron's schedule: PP2 N3M5 with VP2).
    assert drawn(forward_only(2, 5, 2, 3), 1) == "F0.0 F0.1 F0.2 F1.0 F1.1 F1.2 F0.3 F0.4 F1.3 F1.4"


def test_zb_h1_delays_the_weight_gradients_of_rank_r_by_r_micro_batches() -> None:
    table = zb_h1(3, 4)
    assert drawn(table, 0) == "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3"
    assert drawn(table, 2) == "F0.0 I0.0 F0.1 I0.1 F0.2 I0.2 W0.0 F0.3 I0.3 W0.1 W0.2 W0.3"


def test_dual_pipe_gives_each_direction_half_of_the_micro_batches_and_joins_opposite_passes() -> None:
    table = dual_pipe(4, 8)
    for rank, works in enumerate(table.orders):
        assert {work.micro_batch for work in works if work.chunk == 0} == set(range(4))
        assert {work.micro_batch for work in works if work.chunk == 1} == set(range(4, 8))
        for work, partner in pairwise(works):
            assert not work.joined or (work.kind, partner.kind, work.chunk + partner.chunk) == ("F", "B", 1)
        mirrored = [work._replace(chunk=1 - work.chunk, micro_batch=(work.micro_batch + 4) % 8) for work in works]
        assert list(table.orders[3 - rank]) == mirrored


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 16])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 33])
def test_1f1b_holds_as_many_micro_batches_as_ranks_follow_and_one_never_more_than_there_are(p: int, m: int) -> None:
    assert in_flight(one_f_one_b(p, m)) == [[min(m, p - rank)] for rank in range(p)] == peak_in_flight(p, m)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """p, v, m and a group size that Megatron takes: in [p, m], the last group not smaller than p."""
    p, v = draw(st.integers(2, 6)), draw(st.integers(2, 4))
    m = draw(st.integers(p, 4 * p + 1))
    group = draw(st.sampled_from([size for size in range(p, m + 1) if m % size == 0 or m % size >= p]))
    return p, v, m, group


@settings(max_examples=80, deadline=None)
@given(shapes(), st.booleans())
def test_interleaved_holds_the_warm_up_of_megatron_and_one_more(shape: tuple[int, int, int, int], joined: bool) -> None:
    p, v, m, group = shape
    held = in_flight(interleaved(p, v, m, group, joined))
    for rank in range(p):
        ahead = 2 * (p - rank - 1) + (v - 1) * group + joined
        assert sum(held[rank]) == min(ahead + 1, m * v)
        assert warm_up(p, m, v, group, rank, joined) == min(ahead, m * v)
    assert held == peak_in_flight(p, m, v, group, joined)


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("more", [0, 2, 10])
def test_in_flight_of_zero_bubble_schedules_is_that_of_their_papers(p: int, more: int) -> None:
    m = 2 * p + more
    assert in_flight(zb_h1(p, m)) == [[p]] * p  # what 1F1B holds on its first rank (arXiv 2401.10241, table 2)
    assert [sum(chunks) for chunks in in_flight(zb_v(p, m))] == [2 * p] * p  # of half a rank's layers each
    assert [sum(chunks) for chunks in in_flight(dual_pipe(p, m))] == [p + 1] * p  # arXiv 2412.19437, table 2


@settings(max_examples=40, deadline=None)
@given(shapes(), st.lists(st.floats(0.5, 3.0), min_size=24, max_size=24))
def test_in_flight_is_the_heaviest_moment_of_the_timeline(
    shape: tuple[int, int, int, int], weights: list[float]
) -> None:
    p, v, m, group = shape
    table = interleaved(p, v, m, group)
    timeline = simulate(table, Durations((1.0,) * p * v, (2.0,) * p * v))
    for rank, held in enumerate(in_flight(table, weights)):
        events = [event for event in timeline.events if event.rank == rank]
        starts = {event.work[1:3]: event.start_s for event in events if event.work.kind == "F"}
        ends = {event.work[1:3]: event.end_s for event in events if event.work.kind == "B"}
        weight = weights[rank : p * v : p]
        heaviest = max(
            sum(weight[work[0]] for work in starts if starts[work] <= now < ends[work]) for now in starts.values()
        )
        assert sum(count * weight[chunk] for chunk, count in enumerate(held)) == pytest.approx(heaviest)


def test_evaluation_holds_every_micro_batch_forward_and_nothing_back() -> None:
    table = forward_only(3, 5)
    assert table.forward_only and all(len(works) == 5 for works in table.orders)


def test_a_plan_names_its_table() -> None:
    plan = ParallelPlan(4, 20, 2, pp=2, num_layers=8)
    chunks = replace(plan, vpp=2, stages=())
    assert table_of(plan, Execution()) is one_f_one_b(2, 5, False)
    assert table_of(chunks, Execution(expert_overlap=True)) is interleaved(2, 2, 5, 3, True)
    assert table_of(plan, Execution(schedule="zero_bubble")) is zb_h1(2, 5)
    with pytest.raises(Refusal, match=r"zero_bubble \(ZB-H1\) runs one chunk a rank and vpp=2: set vpp=1"):
        table_of(chunks, Execution(schedule="zero_bubble"))


def test_routes_are_inverse_to_stages() -> None:
    for route, table in ((looped(3, 2), interleaved(3, 2, 6, 3)), (folded(3), zb_v(3, 6))):
        assert [table.stages[place] for place in route] == list(range(6))
        assert table.num_stages == 6 and table.num_ranks == 3
    assert folded(3)[2:4] == ((2, 0), (2, 1))  # the turn stays on a rank


def test_a_table_that_leaves_out_or_repeats_a_pass_is_refused() -> None:
    works = one_f_one_b(1, 2).orders[0]
    for wrong in (works[:-1], works[1:], (*works, works[-1]), (*works, Work("I", 0, 0)), (*works, Work("W", 0, 0))):
        with pytest.raises(Refusal, match="leaves some out or repeats them"):
            Table("home made", 2, (looped(1),), (wrong,))


def test_a_pass_joined_to_no_backward_pass_is_refused() -> None:
    forward, *backwards = forward_only(1, 2).orders[0][1], *one_f_one_b(1, 2).orders[0][1::2]
    for first in (forward, forward._replace(joined=True)):
        wrong = (Work("F", 0, 0, joined=True), first, *backwards)
        with pytest.raises(Refusal, match="rank 0: F of chunk 0, micro-batch 0 is joined and no backward pass follows"):
            Table("home made", 2, (looped(1),), (wrong,))


@pytest.mark.parametrize(("p", "m"), [(3, 12), (4, 9), (4, 6)])
def test_dual_pipe_refuses_what_its_figure_does_not_show(p: int, m: int) -> None:
    with pytest.raises(Refusal, match=rf"pp={p} ranks with {m} micro-batches: it wants an even pp"):
        dual_pipe(p, m)
