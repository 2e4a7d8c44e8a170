"""Blends are exact, are drawn in order, and can be entered, left and inverted at any draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.blend import DRAWS, Blend, quantise
from stoker.errors import Refusal

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=9).map(tuple)


@given(COUNTS, st.integers(0, 500))
def test_every_run_of_as_many_draws_as_the_weights_sum_to_is_exact(counts: tuple[int, ...], first: int) -> None:
    drawn = Blend(counts).sources(first, first + sum(counts))
    assert np.bincount(drawn, minlength=len(counts)).tolist() == list(counts)


@given(COUNTS, st.integers(0, 300))
def test_counts_and_draws_in_closed_form_agree_with_drawing(counts: tuple[int, ...], draws: int) -> None:
    blend = Blend(counts)
    drawn = blend.sources(0, draws)
    seen = [0] * len(counts)
    for draw, source in enumerate(drawn.tolist()):
        assert blend.draw_of(source, seen[source]) == draw
        seen[source] += 1
    assert [blend.count(source, draws) for source in range(len(counts))] == seen


@given(COUNTS, st.integers(0, 10**13), st.integers(0, 200))
def test_any_draw_at_any_time(counts: tuple[int, ...], first: int, length: int) -> None:
    blend = Blend(counts)
    drawn = blend.sources(first, first + length)
    for source in range(len(counts)):
        low, high = blend.count(source, first), blend.count(source, first + length)
        at = (first + np.flatnonzero(drawn == source)).tolist()
        assert at == [blend.draw_of(source, number) for number in range(low, high)]


def test_twenty_sources_never_drift_far_from_their_weights() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(20))
    blend = Blend(tuple(quantise({f"{i:02}": w for i, w in enumerate(weights)}).values()))
    drawn = blend.sources(0, 20_000)
    share = np.array(blend.counts) / DRAWS
    counts = np.cumsum(drawn[:, None] == np.arange(20), axis=0)
    drift = np.abs(counts - np.arange(1, 20_001)[:, None] * share).max()
    assert drift < 1.5, f"largest distance from exact proportion: {drift:.2f} draws"


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0.01, 1.0), min_size=1, max_size=12))
def test_quantised_weights_sum_up_and_are_within_one_of_exact(weights: dict[str, float]) -> None:
    counts = quantise(weights)
    assert sum(counts.values()) == DRAWS
    total = sum(weights.values())
    assert all(abs(counts[name] - DRAWS * weight / total) < 1 + 1e-9 for name, weight in weights.items())


@pytest.mark.parametrize(
    "weights, message",
    [
        ({}, "no source"),
        ({"a": 1.0, "b": 0.0}, "positive numbers: b"),
        ({"a": float("nan")}, "positive numbers: a"),
        ({"a": 1.0, "b": 1e-6}, "weight of b is below"),
    ],
)
def test_blends_that_cannot_be_drawn_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        quantise(weights)
