"""Successive halving: who goes on at a rung."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from launch.sweep.definition import MetricSection, StopSection
from launch.sweep.history import Cut
from launch.sweep.metric import metric
from launch.sweep.rungs import Rungs
from pretrain.events import StepEvent


def rungs(factor: int = 3, mode: str = "min") -> Rungs:
    return Rungs(StopSection(first=10, factor=factor), MetricSection.model_validate({"mode": mode}), 100)


def test_the_first_ones_go_on_and_then_only_the_best_third_of_those_that_came() -> None:
    found = rungs()
    assert found.next(1) == 10
    assert [found.arrive(n, 10, value) for n, value in ((1, 5.0), (2, 4.0))] == [None, None]
    assert found.arrive(3, 10, 6.0) == Cut(10, 6.0, 3, 3)
    assert found.arrive(4, 10, 4.5) is None, "second of four, of which two go on"
    assert found.arrive(5, 10, 4.7) == Cut(10, 4.7, 3, 5)
    assert found.arrive(6, 10, 1.0) is None
    assert found.next(6) == 30


def test_the_highest_is_the_best_where_the_metric_says_so() -> None:
    found = rungs(factor=2, mode="max")
    assert found.arrive(1, 10, 1.0) is None and found.arrive(2, 10, 2.0) is None
    assert found.arrive(3, 10, 0.5) == Cut(10, 0.5, 3, 3)


def test_what_is_no_finite_number_is_stopped_even_when_it_comes_first() -> None:
    assert rungs().arrive(1, 10, math.nan) == Cut(10, None, 1, 1)
    assert rungs().arrive(1, 10, math.inf) == Cut(10, None, 1, 1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(2, 5))
def test_the_best_so_far_always_goes_on_and_the_last_of_many_never(values: list[float], factor: int) -> None:
    found = rungs(factor)
    for number, value in enumerate(values, start=1):
        before = values[: number - 1]
        decision = found.arrive(number, 10, value)
        if not before or value < min(before):
            assert decision is None
        if number >= 2 * factor and value > max(before):
            assert decision == Cut(10, value, number, number)


def step(number: int, loss: float, applied: bool = True, **aux: float) -> StepEvent:
    return StepEvent(1, number, loss, 1.0, 1e-3, 8, 8, {}, "apply" if applied else "skip", applied, aux)


def test_the_metric_is_the_mean_of_the_last_measurements_before_the_rung() -> None:
    events = [step(n, float(n), applied=n != 5, **({"heldout.a.x": 10.0 * n} if n % 4 == 3 else {})) for n in range(12)]
    loss, heldout = MetricSection(window=3), MetricSection(name="heldout.a.x")
    assert metric(events, loss) == (9 + 10 + 11) / 3
    assert metric(events, loss, before=7) == (3 + 4 + 6) / 3, "a step that was skipped is no measurement"
    assert metric(events, heldout) == 110.0 and metric(events, heldout, before=11) == 70.0
    assert metric(events, heldout, before=3) is None


def test_a_run_that_ends_in_nan_is_not_judged_by_what_it_was_before() -> None:
    found = metric([step(0, 1.0), step(1, math.nan, applied=False)], MetricSection())
    assert found is not None and math.isnan(found)
