"""Two readers of the metrics' lines, and one answer: Arrow's for large blocks, ``json``'s for whatever is unusual."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launch.watch import columns
from launch.watch.series import Series
from pretrain import events
from pretrain.events import METRICS
from tests.launch.watch.runs import FakeRun

NAMES = st.sampled_from(["a", "b", "balance_loss", "heldout.code.nats_per_token", "é", "I", ""])
REALS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def lines(draw: st.DrawFn) -> str:
    """A step as it is written, with any numbers that its fields can hold."""
    value = {
        "applied": draw(st.booleans()),
        "attempt": draw(st.integers(1, 3)),
        "aux": draw(st.dictionaries(NAMES, REALS | st.integers(-(2**70), 2**70), max_size=3)),
        "draws": draw(st.dictionaries(NAMES, COUNTS, max_size=2)),
        "grad_norm": draw(REALS),
        "loss": draw(REALS | st.integers(-5, 5)),
        "lr": draw(REALS),
        "schema": 1,
        "step": draw(COUNTS),
        "timing": {name: draw(st.none() | REALS) for name in draw(st.sets(st.sampled_from(columns.CLOCK)))},
        "tokens": draw(COUNTS),
        "valid_targets": draw(COUNTS),
        "verdict": draw(st.sampled_from(["apply", "skip", "\u2028", ""])),
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def by_json(block: bytes) -> tuple[columns.Columns, int]:
    before, columns.LARGE = columns.LARGE, 1 << 60
    try:
        return columns.read(block)
    finally:
        columns.LARGE = before


def same(found: columns.Columns, expected: columns.Columns) -> None:
    assert list(found) == list(expected), "the same names, in the order in which they appear"
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        if values.dtype == np.float64:
            assert found[name].view(np.int64)[~np.isnan(values)].tolist() == (
                values.view(np.int64)[~np.isnan(values)].tolist()
            ), name
            assert np.isnan(found[name]).tolist() == np.isnan(values).tolist(), name
        else:
            assert found[name].tolist() == values.tolist(), name


@given(st.lists(lines(), min_size=1, max_size=12))
def test_arrow_reads_every_number_to_the_bit_as_json_does(written: Sequence[str]) -> None:
    block = ("\n".join(written) + "\n").encode()
    expected, damaged = by_json(block)
    found = columns.read_regular(block)
    if found is not None:
        assert damaged == 0
        same(found, expected)


LINE = (
    '{"applied":true,"attempt":1,"aux":{"a":1.5},"draws":{"code":5},"grad_norm":1.0,"loss":2.0,"lr":0.1,"schema":1,'
    '"step":7,"timing":{"mfu":null,"step_time_s":0.5,"tokens_per_s":10.0},"tokens":8,"valid_targets":7,'
    '"verdict":"apply"}'
)


@given(st.integers(0, len(LINE)), st.integers(0, 40), st.sampled_from(["", "\n", "0", "x", '"', "}", "{", "[", "\xff"]))
@example(LINE.index(":1.5") + 1, 3, "Inf")
@example(LINE.index(":1.5") + 1, 3, "NaN")
@example(LINE.index(":1.5") + 1, 3, "Infinity")
@example(LINE.index(":1.5") + 1, 3, '"nan"')
@example(LINE.index(":1.5") + 1, 3, '"2024-01-01"')
@example(LINE.index(":1.5") + 1, 3, "1e999")
@example(LINE.index(":5}") + 1, 1, "null")
@example(LINE.index(":5}") + 1, 1, "5.0")
@example(LINE.index(":5}") + 1, 1, "18446744073709551615")
@example(LINE.index(":5}") + 1, 1, "true")
@example(LINE.index(':1,"step"') + 1, 1, "2")
@example(LINE.index(':1,"step"') + 1, 1, "true")
@example(LINE.index('"aux"'), len('"aux":{"a":1.5},'), "")
@example(LINE.index('{"a"'), len('{"a":1.5}'), "null")
@example(LINE.index('{"a"'), len('{"a":1.5}'), "{}")
@example(LINE.index('{"code"'), len('{"code":5}'), "3")
@example(LINE.index('"tokens":'), 0, '"loss":3.0,')
@example(LINE.index('"tokens":'), 0, '"deep":' + "[" * 100_000)
@example(len(LINE), 0, LINE)
@example(len(LINE), 0, "\n" + LINE)
@example(LINE.index('"aux"'), 0, "\n")
def test_a_damaged_line_is_damaged_to_both(at: int, removed: int, put: str) -> None:
    """A line with a piece of it replaced, between two that are whole."""
    changed = LINE[:at] + put + LINE[at + removed :]
    block = f"{LINE}\n{changed}\n{LINE}\n".encode("latin-1")
    expected, damaged = by_json(block)
    found = columns.read_regular(block)
    if found is not None:
        assert damaged == 0
        same(found, expected)


def test_what_a_run_writes_is_read_by_arrow(tmp_path: Path) -> None:
    """Evaluations every few steps, sources that are not drawn at every step, no clock at the first one."""
    run = FakeRun(tmp_path / "run")
    more = {"aux": {"balance_loss": 0.25, "heldout.code.nats_per_token": 3.5}, "draws": {"code": 8}}
    for step in range(50):
        run.train(1, [step], **(more if step % 10 == 9 else {}), **({"timing": events.Timing()} if step == 0 else {}))
    block = (run.root / METRICS).read_bytes()
    found = columns.read_regular(block)
    assert found is not None
    same(found, by_json(block)[0])
    assert np.isnan(found["aux.heldout.code.nats_per_token"]).sum() == 45 and found["draws.prose"].tolist()[9] == 0


@pytest.mark.parametrize("attempts", [[(0, 700), (650, 900)], [(0, 900), (300, 400), (400, 1100)]])
def test_a_run_of_several_blocks_is_what_its_events_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[tuple[int, int]]
) -> None:
    """Attempts that overlap, a step that is not a number, and a torn last line, by both readers in turn."""
    monkeypatch.setattr(columns, "LARGE", 1 << 14)
    run = FakeRun(tmp_path / "run")
    for number, (first, last) in enumerate(attempts, start=1):
        run.train(number, range(first, last), seed=number)
        run.train(number, [last], loss=float("nan"), verdict="skip", applied=False)
    with open(run.root / METRICS, "a") as file:
        file.write(run.event(len(attempts), 5000).to_line()[:100])
    read: list[Any] = []
    arrow = columns.read_regular
    monkeypatch.setattr(columns, "read_regular", lambda block: read.append(arrow(block)) or read[-1])
    series = Series(run.root)
    series._tail._block = 1 << 15
    series.refresh()
    assert any(found is not None for found in read) and None in read, "some blocks by either"
    expected = events.read(run.root)
    assert series["step"].tolist() == [event.step for event in expected]
    assert np.array_equal(series["loss"], [event.loss for event in expected], equal_nan=True)
    assert series["attempt"].tolist() == [event.attempt for event in expected]
    assert series["tokens_per_s"].tolist() == [event.timing.tokens_per_s for event in expected]
    assert series.damaged == 0 and series.verdicts == {e.step: e.verdict for e in expected if not e.applied}
