"""The steps of a run as columns: what ``pretrain.events.read`` says, however the file grew."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.watch.figures import downsample
from launch.watch.series import Series
from pretrain import events
from pretrain.events import METRICS
from tests.launch.watch.runs import FakeRun


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(attempt, step) of each line: attempts resume at or before the step after the last one, and now and then go back
    within themselves, as a rewind does."""
    lines: list[tuple[int, int]] = []
    reached = 0
    for attempt in range(1, draw(st.integers(1, 5)) + 1):
        step = draw(st.integers(0, reached))
        for _ in range(draw(st.integers(0, 12))):
            if draw(st.integers(0, 9)) == 0:
                step = draw(st.integers(0, step))
            lines.append((attempt, step))
            step += 1
        reached = max(reached, step)
    return lines


@given(histories(), st.data())
def test_columns_are_the_events_that_stand_wherever_the_file_was_cut_between_looks(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int]], data: st.DataObject
) -> None:
    run = FakeRun(tmp_path_factory.mktemp("run"))
    content = "".join(
        run.event(attempt, step, seed=place, aux={} if place % 3 else {f"a{place % 2}": 1.0 + place}).to_line() + "\n"
        for place, (attempt, step) in enumerate(history)
    ).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    series = Series(run.root)
    for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True):
        with open(run.root / METRICS, "ab") as file:
            file.write(content[start:stop])
        series.refresh()
    expected = events.read(run.root) if history else []
    assert series["step"].tolist() == [event.step for event in expected]
    assert series["attempt"].tolist() == [event.attempt for event in expected]
    assert series["loss"].tolist() == [event.loss for event in expected]
    assert series["draws.code"].tolist() == [5] * len(expected) if expected else True
    for name in series.names("aux."):
        values = [event.aux.get(name, math.nan) for event in expected]
        assert np.array_equal(series["aux." + name], values, equal_nan=True)
    assert series.redone_steps == len(history) - len(expected)


def test_numbers_that_are_not_finite_and_skipped_steps_are_kept(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.train(1, [0], loss=float("nan"), grad_norm=float("inf"), verdict="skip", applied=False)
    run.train(1, [1])
    series = Series(run.root)
    series.refresh()
    assert math.isnan(series["loss"][0]) and series["grad_norm"][0] == math.inf and math.isfinite(series["loss"][1])
    assert series.verdicts == {0: "skip"}


def test_a_line_of_an_attempt_that_was_replaced_is_not_listened_to(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.train(1, range(5))
    run.train(2, range(3, 6))
    run.train(1, [5], loss=99.0)
    series = Series(run.root)
    series.refresh()
    assert series["attempt"].tolist() == [1, 1, 1, 2, 2, 2]
    assert 99.0 not in series["loss"].tolist()


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"schema":1}', '{"schema":9}', "\x00\xff", '{"schema":1,"step":"x","attempt":1}', "[" * 10**5]
)
def test_a_damaged_line_is_counted_and_the_others_are_read(tmp_path: Path, line: str) -> None:
    run = FakeRun(tmp_path / "run")
    run.train(1, range(3))
    with open(run.root / METRICS, "a", encoding="latin-1") as file:
        file.write(line + "\n")
    run.train(1, range(3, 6))
    series = Series(run.root)
    series.refresh()
    assert series["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert series.damaged == 1


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.train(1, range(10))
    series = Series(run.root)
    series.refresh()
    (run.root / METRICS).unlink()
    series.refresh()
    assert len(series) == 0
    run.train(1, range(3))
    series.refresh()
    assert series["step"].tolist() == [0, 1, 2]


def test_a_look_reads_only_what_is_new(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.train(1, range(50))
    series = Series(run.root)
    series.refresh()
    size = (run.root / METRICS).stat().st_size
    with open(run.root / METRICS, "r+b") as file:  # a reader that began at the start would find this damaged
        file.write(b"x" * (size - 1))
    run.train(1, [50])
    series.refresh()
    assert len(series) == 51 and series.damaged == 0


@given(st.integers(1, 12_000), st.integers(0, 2**32), st.floats(0, 1))
def test_a_curve_of_two_thousand_points_keeps_every_extreme(count: int, seed: int, missing: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=count)
    values[rng.random(count) < missing] = np.nan
    steps = np.arange(count) * 3
    kept_steps, kept = downsample(steps, values)
    assert len(kept) <= 2000 and (np.diff(kept_steps) > 0).all()
    assert np.array_equal(kept, values[kept_steps // 3], equal_nan=True)
    if np.isfinite(values).any():
        assert np.nanmin(kept) == np.nanmin(values) and np.nanmax(kept) == np.nanmax(values)


def test_metrics_of_another_schema_are_said_to_be(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    line = json.loads(run.event(1, 0).to_line())
    (run.root / METRICS).write_text(json.dumps({**line, "schema": 2}) + "\n")
    series = Series(run.root)
    series.refresh()
    assert len(series) == 0 and series.damaged == 1
