"""Closed forms of pipeline schedules, held to the simulator: never more, exact where they say so, and how far off."""

from __future__ import annotations

import statistics
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.plan import ParallelPlan
from parallel.planning.schedule import interleaved, one_f_one_b, zb_h1
from parallel.planning.timing.closed_form import bubble_fraction, closed_step_s, zero_bubble_step_s
from parallel.planning.timing.simulator import Durations, simulate


def group_size(p: int, m: int) -> int:
    return ParallelPlan(p, m, 1, pp=p, vpp=2, num_layers=2 * p).microbatch_group_size()


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """p, v, m, group."""
    p, v = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    m = draw(st.integers(1 if v == 1 else p, 3 * p + 2))
    return p, v, m, 1 if v == 1 else draw(st.sampled_from([group_size(p, m), m]))


seconds = st.floats(0.1, 10.0)


@settings(max_examples=150, deadline=None)
@given(steps(), st.lists(seconds, min_size=48, max_size=48), st.sampled_from([0.0, 0.05, 1.0]))
def test_the_closed_form_is_never_more_than_the_simulator_finds(
    step: tuple[int, int, int, int], drawn: list[float], p2p_s: float
) -> None:
    p, v, m, group = step
    durations = Durations(tuple(drawn[: p * v]), tuple(drawn[24 : 24 + p * v]))
    found = simulate(one_f_one_b(p, m) if v == 1 else interleaved(p, v, m, group), durations, p2p_s).makespan_s
    assert closed_step_s(durations, p, m, group, p2p_s) <= found * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(steps(), seconds, seconds, st.sampled_from([0.0, 0.05]))
def test_for_even_stages_it_is_what_the_simulator_finds(
    step: tuple[int, int, int, int], forward: float, backward: float, p2p_share: float
) -> None:
    p, v, m, group = step
    durations = Durations((forward,) * p * v, (backward,) * p * v)
    p2p_s = p2p_share * min(forward, backward)
    timeline = simulate(one_f_one_b(p, m) if v == 1 else interleaved(p, v, m, group), durations, p2p_s)
    assert closed_step_s(durations, p, m, group, p2p_s) == pytest.approx(timeline.makespan_s, rel=1e-12)
    if not p2p_s:
        assert timeline.bubble == pytest.approx(bubble_fraction(p, m, v), abs=1e-12)


def planned(random: Random, p: int, v: int) -> Durations:
    """Stages as a plan lays them: layers balanced over chunks, one in four of another cost, and a head on the last."""
    plan = ParallelPlan(p, p, 1, pp=p, vpp=v, num_layers=random.randint(p * v, 5 * p * v))
    odd = random.choice([1.0, 0.8, 1.5])
    forward = [sum(odd if layer % 4 else 1.0 for layer in chunk) for chunk in plan.stages]
    forward[-1] += random.uniform(0.0, 1.5)
    backward, exchanged = random.choice([2.0, 3.0]), random.uniform(0.0, 0.5)
    return Durations(
        tuple(forward),
        tuple(backward * seconds for seconds in forward),
        tuple(seconds for seconds in forward),
        tuple(exchanged * seconds for seconds in forward),
        tuple(exchanged * seconds for seconds in forward),
    )


def errors(v: int, p2p_share: float, schedule: str) -> list[float]:
    """|closed / simulated - 1| over 60 steps of ``planned`` stages, ascending."""
    random, found = Random(v), []
    for _ in range(60):
        p = random.choice([2, 4, 8])
        m = random.choice([p, 2 * p, 3 * p + 1, 32])
        durations = planned(random, p, v)
        p2p_s = p2p_share * sum(durations.forward) / len(durations.forward)
        if schedule == "zero bubble":
            table, closed = zb_h1(p, m), zero_bubble_step_s(durations, m, p2p_s)
        else:
            group, joined = group_size(p, m), schedule == "joined"
            table = interleaved(p, v, m, group, joined) if v > 1 else one_f_one_b(p, m, joined)
            closed = closed_step_s(durations, p, m, group, p2p_s, joined)
        found.append(abs(closed / simulate(table, durations, p2p_s).makespan_s - 1))
    return sorted(found)


@pytest.mark.parametrize(
    ("schedule", "v", "p2p_share", "median", "worst"),
    [
        ("plain", 1, 0.0, 1e-9, 1e-6),
        ("plain", 1, 0.1, 1e-3, 0.03),
        ("plain", 2, 0.0, 1e-3, 0.08),
        ("plain", 4, 0.0, 1e-3, 0.08),
        ("plain", 4, 0.1, 2e-3, 0.08),
        ("joined", 2, 0.02, 0.02, 0.10),
        ("joined", 4, 0.02, 0.02, 0.10),
        ("zero bubble", 1, 0.0, 0.01, 0.10),
        ("zero bubble", 1, 0.05, 0.01, 0.10),
    ],
)
def test_for_stages_as_plans_lay_them_it_is_as_near_as_stated(
    schedule: str, v: int, p2p_share: float, median: float, worst: float
) -> None:
    found = errors(v, p2p_share, schedule)
    print(f"{schedule} v={v}, messages {p2p_share}: median {statistics.median(found):.1e}, worst {found[-1]:.1e}")
    assert statistics.median(found) <= median and found[-1] <= worst


@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_zero_bubble_is_exact_for_even_stages(p: int) -> None:
    for m in (p, 2 * p, 5 * p + 1):
        durations = Durations((1.0,) * p, (2.1,) * p, (0.9,) * p)
        assert zero_bubble_step_s(durations, m) == pytest.approx(simulate(zb_h1(p, m), durations).makespan_s, abs=1e-9)
