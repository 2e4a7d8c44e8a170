"""A spike is found when it comes, and a clean curve has none: on curves of real runs, and on generated ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config_sections import GuardSection
from pretrain.guards.spikes import Spikes, forecast
from pretrain.health import Health, StepReport

SCORE, WINDOW = GuardSection().spike_score, GuardSection().spike_window
#: {run: [[loss, gradient norm] of each step]}: the presets demo and tiny-dense, 1,024 and 2,048 tokens a step, float32.
RECORDED = Path(__file__).parent / "curves.json"

Curve = Sequence[tuple[float, float]]


def recorded() -> dict[str, Curve]:
    return {name: [tuple(step) for step in steps] for name, steps in json.loads(RECORDED.read_text()).items()}


def generated(steps: int, seed: int, noise: float = 0.05) -> Curve:
    """A power law with warm-up of the norm, batches of uneven difficulty, and now and then an odd one."""
    random = np.random.default_rng(seed)
    t = np.arange(steps)
    loss = 2.0 + 6.0 / (1 + t / 50) ** 0.4 + random.normal(0, noise, steps)
    norm = np.exp(0.6 * np.exp(-t / 100) + random.normal(0, 0.15, steps) + 0.1 * np.sin(t / 300))
    norm[random.random(steps) < 0.005] *= random.uniform(1.3, 2.5)
    return list(zip(loss.tolist(), norm.tolist(), strict=True))


def alarms(curve: Curve, spikes: Spikes | None = None) -> list[int]:
    """Steps that are found; like a run that skips them, which does not remember them."""
    spikes = spikes or Spikes(SCORE, WINDOW)
    found = []
    for step, (loss, norm) in enumerate(curve):
        if spikes.judge(loss, norm) is None:
            spikes.add(loss, norm)
        else:
            found.append(step)
    return found


@pytest.mark.parametrize("name", recorded())
def test_a_clean_run_has_no_spike(name: str) -> None:
    assert alarms(recorded()[name]) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_generated_clean_curve_has_no_spike(seed: int) -> None:
    assert alarms(generated(2_000, seed)) == []


@pytest.mark.verify
@pytest.mark.parametrize("noise", [0.003, 0.05, 0.3])
def test_a_hundred_thousand_clean_steps_have_no_spike(noise: float) -> None:
    assert sum(len(alarms(generated(10_000, seed, noise))) for seed in range(10)) == 0


@pytest.mark.verify
def test_a_hundred_thousand_resampled_steps_of_real_runs_have_less_than_one_spike_in_each() -> None:
    """Blocks of 64 recorded steps of the settled half of a run, levelled, in random order."""
    random, found = np.random.default_rng(3), 0
    for curve in recorded().values():
        half = np.log(np.asarray(curve)[len(curve) // 2 :])
        starts = random.integers(0, len(half) - 64, 100_000 // len(recorded()) // 64)
        blocks = [
            half[start : start + 64] - np.median(half[start : start + 64], 0) + np.median(half, 0) for start in starts
        ]
        found += len(alarms([tuple(step) for step in np.exp(np.concatenate(blocks)).tolist()]))
    assert found == 0


@pytest.mark.parametrize("at", [64, 150, 399])
@pytest.mark.parametrize("kind", ["loss", "norm", "climb"])
@pytest.mark.parametrize("seed", range(2))
def test_a_spike_is_found_within_three_steps(kind: str, at: int, seed: int) -> None:
    """A batch whose loss is 1.5 nats up, one whose norm is tenfold, and a run that a rate throws off course."""
    curve = [list(step) for step in generated(400, seed)]
    assert alarms(curve) == []  # type: ignore[arg-type]
    for later, step in enumerate(curve[at:]):
        if kind == "climb":
            step[0] += 0.5 * 2**later if later < 8 else 99.0
        elif later == 0:
            step[0] += 1.5 * (kind == "loss")
            step[1] *= 10.0 if kind == "norm" else 1.0
    found = alarms(curve)  # type: ignore[arg-type]
    assert found and at <= found[0] < at + 3
    assert kind == "climb" or found == [at]


def test_none_is_found_in_the_first_quarter_of_a_window_nor_after_the_data_changed() -> None:
    spikes = Spikes(SCORE, WINDOW)
    curve = generated(WINDOW // 4 - 1, seed=0)
    assert alarms([*curve, (99.0, 1e9)], spikes) == []
    spikes = Spikes(SCORE, WINDOW)
    assert alarms([*generated(200, seed=0), (99.0, 1.0)], spikes) == [200]
    spikes.forget()
    assert spikes.judge(99.0, 1e9) is None


def test_a_constant_curve_has_a_spike_above_the_floor_only_and_never_below() -> None:
    spikes = Spikes(SCORE, WINDOW)
    for _ in range(WINDOW):
        spikes.add(2.0, 1.0)
    assert spikes.judge(2.079, 4.9) is None and spikes.judge(0.0, 1e-9) is None
    assert "the loss is 2.081 where 2 was expected" in (spikes.judge(2.081, 1.0) or "")
    assert "the gradient norm is 5 where 1 was expected: 8.0 deviations above" in (spikes.judge(2.0, 5.0) or "")


def test_a_line_is_followed_and_noise_measured_around_it() -> None:
    falling = [10.0 - 0.05 * step for step in range(96)]
    expected, deviation = forecast(falling, floor=1e-3)
    assert 10.0 - 0.05 * 96 <= expected <= falling[-32] and deviation == pytest.approx(1e-3)
    rising = [0.05 * step for step in range(96)]
    assert forecast(rising, floor=1e-3)[0] == pytest.approx(0.05 * 96)
    noise = np.random.default_rng(0).normal(0, 0.3, 128)
    assert forecast(noise.tolist(), floor=1e-3)[1] == pytest.approx(0.3, rel=0.35)


@given(st.lists(st.tuples(st.floats(0.01, 20), st.floats(0, 1e6)), min_size=1, max_size=80), st.integers(0, 79))
def test_p5_a_detector_that_is_saved_and_loaded_judges_as_if_it_had_not_been(curve: Curve, cut: int) -> None:
    whole = Spikes(SCORE, 16)
    for step in curve:
        whole.add(*step)
    first, second = Spikes(SCORE, 16), Spikes(SCORE, 16)
    for step in curve[:cut]:
        first.add(*step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in curve[cut:]:
        second.add(*step)
    assert second.state_dict() == whole.state_dict()
    assert second.judge(9.0, 2.0) == whole.judge(9.0, 2.0)


def report(step: int, loss: float = 2.0, norm: float = 1.0, targets: int = 5) -> StepReport:
    return StepReport(step, loss, norm, targets, 5)


def accustomed(**guard: object) -> Health:
    health = Health(2, GuardSection(**guard))  # type: ignore[arg-type]
    for step in range(WINDOW):
        assert health.judge(report(step)) == "apply"
    return health


def test_each_policy_answers_a_spike_as_the_configuration_says() -> None:
    for policy, verdict in {"off": "apply", "skip": "skip", "rewind": "rewind", "stop": "stop"}.items():
        health = accustomed(spike=policy)
        assert health.judge(report(WINDOW, loss=9.0)) == verdict
        assert health.judge(report(WINDOW + 1, loss=math.nan)) == "skip", (
            "a number that is not finite is always skipped"
        )
        assert health.judge(report(WINDOW + 2)) == "apply" and health.skipped_in_a_row == 0


def test_spikes_that_are_skipped_are_no_measure_of_the_next_and_too_many_in_a_row_stop() -> None:
    health = accustomed(spike="skip")
    assert [health.judge(report(step, loss=9.0)) for step in range(3)] == ["skip", "skip", "stop"]
    assert (
        "3 steps in a row were skipped for their numbers (train.skip_limit=2), the first was step 0"
        in health.describe()
    )


def test_rewinds_beyond_the_limit_stop() -> None:
    health = accustomed(spike="rewind", max_rewinds=2)
    health.rewinds = 2
    assert health.judge(report(WINDOW, loss=9.0)) == "stop" and "after 2 rewinds" in health.describe()


def test_a_batch_without_a_target_is_neither_a_spike_nor_remembered() -> None:
    health = accustomed(spike="stop")
    before = health.state_dict()
    assert health.judge(report(WINDOW, loss=math.nan, targets=0)) == "skip"
    assert health.state_dict() == before


def test_p5_the_state_of_an_earlier_release_is_read() -> None:
    health = Health(2, GuardSection(spike="stop"))
    health.load_state_dict({"skipped_in_a_row": 1, "skipped": [4]})
    assert health.skipped == [4] and health.judge(report(5, loss=99.0)) == "apply"
