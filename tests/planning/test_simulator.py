"""The simulator: an independent one, closed forms of the papers, any legal table, and ranks that wait for ever."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.schedule import (
    Kind,
    Route,
    Table,
    Work,
    dual_pipe,
    folded,
    forward_only,
    interleaved,
    looped,
    one_f_one_b,
    zb_h1,
    zb_v,
)
from parallel.planning.timing.simulator import Durations, simulate
from stoker.errors import Refusal


def even(num_stages: int, forward: float, backward: float, weight: float = 0.0) -> Durations:
    return Durations((forward,) * num_stages, (backward,) * num_stages, (weight,) * num_stages)


def relaxed(table: Table, durations: Durations, p2p_s: float) -> dict[tuple[int, Work], float]:
    """When each work ends, by raising lower bounds until none is broken: no event, no queue, no order of evaluation."""
    last = table.num_stages - 1
    ends = {(rank, work): 0.0 for rank, works in enumerate(table.orders) for work in works}
    of = {
        (work.kind in "BI", work.micro_batch, table.stages[rank, work.chunk], work.kind == "W"): (rank, work)
        for rank, work in ends
    }

    def inputs(rank: int, work: Work) -> tuple[tuple[int, Work], ...]:
        index, stage = work.micro_batch, table.stages[rank, work.chunk]
        if work.kind == "W":
            return (of[True, index, stage, False],)
        if work.kind == "F":
            return (of[False, index, stage - 1, False],) if stage else ()
        return (of[False, index, stage, False] if stage == last else of[True, index, stage + 1, False],)

    def seconds(rank: int, *together: Work) -> float:
        stages = [table.stages[rank, work.chunk] for work in together]
        whole, half = durations.backward[stages[0]], durations.weight[stages[0]]
        alone = {"F": durations.forward[stages[0]], "B": whole, "I": whole - half, "W": half}
        return alone[together[0].kind] if len(together) == 1 else durations.joined(*stages)

    changed = True
    while changed:
        changed = False
        for rank, works in enumerate(table.orders):
            clock, together = 0.0, list[Work]()
            for work in works:
                together.append(work)
                arrivals = [ends[needed] + p2p_s * (needed[0] != rank) for needed in inputs(rank, work)]
                clock = max([clock, *arrivals])
                if work.joined:
                    continue
                clock += seconds(rank, *together)
                for each in together:
                    changed |= ends[rank, each] != clock
                    ends[rank, each] = clock
                together = []
    return ends


def unevenly(num_stages: int, seed: int) -> Durations:
    draw = random.Random(seed).uniform
    forward, weight = ([draw(0.5, 2.0) for _ in range(num_stages)] for _ in range(2))
    return Durations(
        tuple(forward),
        tuple(draw(0.5, 2.0) + half for half in weight),
        tuple(weight),
        tuple(draw(0.0, 1.0) * seconds for seconds in forward),
        tuple(draw(0.0, 0.5) for _ in forward),
    )


TABLES: dict[str, Callable[[], Table]] = {
    "1f1b": lambda: one_f_one_b(3, 5),
    "1f1b joined": lambda: one_f_one_b(3, 5, True),
    "interleaved": lambda: interleaved(3, 2, 7, 4),
    "interleaved joined": lambda: interleaved(2, 3, 6, 2, True),
    "fewer micro-batches than ranks": lambda: one_f_one_b(4, 2),
    "zb-h1": lambda: zb_h1(4, 6),
    "zb-v": lambda: zb_v(3, 7),
    "dualpipe": lambda: dual_pipe(4, 10),
    "forward only": lambda: forward_only(3, 5, 2, 3),
}


@pytest.mark.parametrize("p2p_s", [0.0, 0.3])
@pytest.mark.parametrize("name", TABLES)
def test_the_timeline_is_that_of_an_independent_simulator(name: str, p2p_s: float) -> None:
    table = TABLES[name]()
    durations = unevenly(table.num_stages, seed=len(name))
    timeline = simulate(table, durations, p2p_s)
    ends = relaxed(table, durations, p2p_s)
    assert {(event.rank, event.work): event.end_s for event in timeline.events} == pytest.approx(ends, rel=1e-12)
    assert timeline.makespan_s == pytest.approx(max(ends.values()), rel=1e-12)
    for rank in range(table.num_ranks):
        spans = {(event.start_s, event.end_s) for event in timeline.events if event.rank == rank}
        assert timeline.busy_s[rank] == pytest.approx(sum(end - start for start, end in spans))
        assert timeline.idle_s[rank] == timeline.makespan_s - timeline.busy_s[rank]
        assert all(end <= start for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:]))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("m", [1, 2, 5, 16, 65])
@pytest.mark.parametrize("backward", [0.5, 1.0, 2.0])
def test_1f1b_waits_p_minus_1_of_m_plus_p_minus_1(p: int, m: int, backward: float) -> None:
    assert simulate(one_f_one_b(p, m), even(p, 1.0, backward)).bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("v", [2, 3, 5])
@pytest.mark.parametrize("backward", [0.5, 1.0, 3.0])
def test_interleaving_divides_the_bubble_by_its_chunks_whatever_the_group(p: int, v: int, backward: float) -> None:
    for m in (p, 2 * p, 3 * p + 1, 4 * p + 3):
        for group in (size for size in range(p, m + 1) if m % size == 0 or m % size >= p):
            timeline = simulate(interleaved(p, v, m, group), even(p * v, 1.0, backward))
            waits = (p - 1) / (v * m)  # of the work, arXiv 2104.04473, section 2.2
            assert timeline.makespan_s / timeline.busy_s[0] - 1 == pytest.approx(waits, abs=1e-12)


@pytest.mark.parametrize(("forward", "backward", "weight"), [(1.0, 2.0, 1.0), (1.0, 2.0, 0.8), (1.0, 1.7, 0.7)])
def test_zero_bubble_schedules_wait_as_their_papers_say(forward: float, backward: float, weight: float) -> None:
    for p in (2, 4, 6, 8):
        for m in (2 * p, 2 * p + 2, 5 * p):
            work = m * (forward + backward)
            h1 = simulate(zb_h1(p, m), even(p, forward, backward, weight))
            # arXiv 2401.10241, table 2: (p-1)(F + I - W), with F + I = F + B - W.
            assert h1.makespan_s == pytest.approx(work + (p - 1) * (forward + backward - 2 * weight), abs=1e-9)
            dual = simulate(dual_pipe(p, m), even(p, forward, backward, weight))
            # arXiv 2412.19437, table 2: (p/2 - 1)(F&B + B - 3W), with F&B = F + B where there is nothing to hide.
            bubble = (p / 2 - 1) * (forward + 2 * backward - 3 * weight)
            assert dual.makespan_s == pytest.approx(work + bubble, abs=1e-9)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_zb_v_never_waits_between_its_first_and_last_work_where_the_three_passes_are_even(p: int) -> None:
    for m in (2 * p, 3 * p + 1, 6 * p):
        timeline = simulate(zb_v(p, m), even(2 * p, 1.0, 2.0, 1.0))
        for starts, ends, busy in zip(timeline.starts_s, timeline.ends_s, timeline.busy_s):
            assert ends[-1] - starts[0] == busy == 6 * m


def test_joined_passes_hide_each_others_exchanges_as_far_as_their_computation_lasts() -> None:
    durations = Durations((3.0,), (5.0,), (), (1.0,), (2.0,))
    assert durations.joined(0, 0) == 8.0 - 1.0 - 2.0
    assert Durations((3.0,), (5.0,), (), (2.5,), (4.0,)).joined(0, 0) == 8.0 - 1.0 - 0.5
    # The first forward and the last backward have no partner.
    assert simulate(one_f_one_b(1, 6, joined=True), durations).makespan_s == 3.0 + 5 * 5.0 + 5.0


@st.composite
def legal(draw: st.DrawFn) -> tuple[Table, Durations, float]:
    """Any table at all: works in a random order that respects what each needs, whole backward passes or halves."""
    m = draw(st.integers(1, 5))
    route: Route = draw(st.sampled_from([looped(1), looped(3), looped(2, 2), folded(3), looped(2, 3)]))
    there_only = draw(st.booleans())
    ways: list[list[tuple[int, Work]]] = []  # each to be walked from its start
    for index in range(m):
        ways.append([(rank, Work("F", chunk, index)) for rank, chunk in route])
        if not there_only:
            back: Kind = draw(st.sampled_from(["B", "I"]))
            ways[-1] += [(rank, Work(back, chunk, index)) for rank, chunk in reversed(route)]
    orders: dict[int, list[Work]] = {rank: [] for rank, _ in route}
    while left := [way for way in ways if way]:
        rank, work = left[draw(st.integers(0, len(left) - 1))].pop(0)
        orders[rank].append(work)
        if work.kind == "I":
            ways.append([(rank, work._replace(kind="W"))])
    table = Table("drawn", m, (route,), tuple(tuple(orders[rank]) for rank in sorted(orders)))
    return table, unevenly(len(route), draw(st.integers(0, 99))), draw(st.sampled_from([0.0, 0.1, 2.0]))


@settings(max_examples=100, deadline=None)
@given(legal())
def test_any_legal_table_ends_and_no_sooner_than_its_longest_rank_and_its_longest_way(
    case: tuple[Table, Durations, float],
) -> None:
    table, durations, p2p_s = case
    timeline = simulate(table, durations, p2p_s)
    ends = relaxed(table, durations, p2p_s)
    assert [len(starts) for starts in timeline.starts_s] == [len(works) for works in table.orders]
    assert timeline.makespan_s == pytest.approx(max(ends.values()), rel=1e-12)
    assert timeline.makespan_s >= max(timeline.busy_s) * (1 - 1e-12)
    hops = sum(here[0] != there[0] for route in table.routes for here, there in pairwise(route))
    way = sum(durations.forward) + hops * p2p_s
    if not table.forward_only:
        way += sum(durations.backward) - sum(durations.weight) + hops * p2p_s
    assert timeline.makespan_s >= way * (1 - 1e-12)
    assert simulate(table, durations, p2p_s + 0.5).makespan_s >= timeline.makespan_s


def test_ranks_that_wait_for_one_another_for_ever_are_named_with_what_they_wait_before() -> None:
    first, second = one_f_one_b(2, 2).orders
    wrong = Table("home made", 2, (looped(2),), ((first[0], first[2], first[1], first[3]), tuple(reversed(second))))
    with pytest.raises(Refusal) as refused:
        simulate(wrong, even(2, 1.0, 2.0))
    assert str(refused.value) == (
        "schedule home made never ends: its ranks wait for one another, "
        "rank 0 before B of chunk 0, micro-batch 0; rank 1 before B of chunk 0, micro-batch 1"
    )


def test_durations_of_other_stages_than_the_schedules_are_refused() -> None:
    with pytest.raises(Refusal, match="durations of 3 stages for a schedule of 2"):
        simulate(one_f_one_b(2, 2), even(3, 1.0, 2.0))
    with pytest.raises(Refusal, match="durations: backward is given for 1 of 2 stages"):
        Durations((1.0, 1.0), (2.0,))


def test_a_fold_sends_nothing_at_its_turn() -> None:
    timeline = simulate(zb_v(2, 1), even(4, 1.0, 1.0), p2p_s=math.pi)
    assert timeline.makespan_s == pytest.approx(4 * 1.0 + 4 * 1.0 + 4 * math.pi)
