"""A slow rank is named within twenty steps, and in ten thousand clean ones nobody is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from parallel.planning.plan import ParallelPlan
from pretrain.guards.findings import Finding
from pretrain.guards.stragglers import WINDOW, Pace, peers

RATIO = 1.3
#: Seconds that each of two ranks worked in each step of the tiny preset, alone on two cores and beside others that used
#: both: ``record_work_times`` wrote them.
RECORDED = {name: Path(__file__).parent / f"work_times_{name}.json" for name in ("quiet", "busy")}


def generated(steps: int, ranks: int, seed: int) -> NDArray[np.float64]:
    """Work times with all that is not a fault: noise, a collection of garbage every 50 steps on one rank or another, a
    save every 200 on rank 0, moments at which everybody is slow, and a common drift."""
    random = np.random.default_rng(seed)
    times = random.lognormal(0.0, 0.08, (steps, ranks))
    times[np.arange(0, steps, 50), random.integers(0, ranks, len(range(0, steps, 50)))] *= 3
    times[::200, 0] *= 10
    common = np.ones(steps)
    for start in random.integers(0, steps, steps // 500):
        common[start : start + 40] *= random.uniform(1.5, 4.0)
    return times * (common * np.linspace(1.0, 1.6, steps))[:, None]


def recorded(name: str) -> NDArray[np.float64]:
    return np.array(json.loads(RECORDED[name].read_text())["seconds"])


def watched(times: NDArray[np.float64], groups: Sequence[Sequence[int]] | None = None) -> Iterator[Finding]:
    pace = Pace(groups or [range(times.shape[1])], RATIO)
    for step, seconds in enumerate(times):
        yield from pace.add(step, seconds.tolist())


@pytest.mark.parametrize("ranks", [2, 3, 6, 17])
def test_nobody_is_named_in_ten_thousand_clean_steps(ranks: int) -> None:
    assert list(watched(generated(10_000, ranks, seed=ranks))) == []


@pytest.mark.parametrize("slower", [1.3, 2.0, 10.0])
@pytest.mark.parametrize("ranks", [2, 3, 6, 17])
def test_a_slow_rank_and_no_other_is_named_within_twenty_steps(ranks: int, slower: float) -> None:
    for seed in range(12):
        times = generated(130, ranks, seed)
        onset, guilty = 60 + seed % 20, seed % ranks
        times[onset:, guilty] *= slower
        named = list(watched(times))
        assert [(finding.kind, finding.rank) for finding in named] == [("slow", guilty)]
        assert 0 <= named[0].step - onset < WINDOW
        assert f"rank {guilty} takes 1." in named[0].text or slower > 1.3


def test_a_rank_that_recovers_is_said_to(ranks: int = 3) -> None:
    times = generated(200, ranks, seed=9)
    times[50:100, 1] *= 2
    assert [(finding.kind, finding.rank) for finding in watched(times)] == [("slow", 1), ("slow_over", 1)]


@pytest.mark.parametrize("name", RECORDED)
def test_nobody_is_named_in_ten_thousand_steps_of_recorded_work_times(name: str) -> None:
    """Blocks of forty recorded steps in random order: what repeats inside a block stays together."""
    times, random = recorded(name), np.random.default_rng(1)
    starts = random.integers(0, len(times) - 40, 250)
    assert list(watched(np.concatenate([times[start : start + 40] for start in starts]))) == []


@pytest.mark.parametrize(
    ("name", "slower", "named_of_50"),
    [("quiet", 1.3, 50), ("quiet", 2.0, 50), ("busy", 1.3, 40), ("busy", 1.5, 50), ("busy", 2.0, 50)],
)
def test_a_rank_that_is_slow_in_recorded_work_times_is_named_within_twenty_steps(
    name: str, slower: float, named_of_50: int
) -> None:
    """Times what its peer takes. On a machine that busy, a core's share wanders by as much as half of 1.3."""
    found, whole = 0, recorded(name)
    for seed in range(50):
        start = int(np.random.default_rng(seed).integers(0, len(whole) - 90))
        times, guilty = whole[start : start + 90].copy(), seed % 2
        times[60:, guilty] *= slower * np.exp(np.median(np.log(times[:, 1 - guilty] / times[:, guilty])))
        named = [(finding.kind, finding.rank) for finding in watched(times) if finding.step < 60 + WINDOW]
        assert named in ([], [("slow", guilty)])
        found += bool(named)
    assert found >= named_of_50


def test_stages_and_experts_are_compared_with_their_like() -> None:
    assert peers(ParallelPlan(8, 8, 1, num_layers=4, pp=2, tp=2)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert peers(ParallelPlan(4, 8, 1, num_layers=4, ep=2)) == [[0, 2], [1, 3]]
    assert peers(ParallelPlan(2, 8, 1, num_layers=4, pp=2)) == []
    times = generated(200, 4, seed=5)
    times[:, 2:] *= 5
    assert list(watched(times, [[0, 1], [2, 3]])) == []
