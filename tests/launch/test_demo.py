"""The demo does not pass for what it did not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import demo
from launch.demo import Redone
from tests.launch.tiny import tiny


@pytest.mark.parametrize(("redone", "code"), [(Redone(3, 3), 0), (Redone(3, 2), 1), (Redone(0, 0), 1)])
def test_steps_must_be_done_twice_and_come_out_the_same(redone: Redone, code: int) -> None:
    class Last:
        aux = {"heldout.code.nats_per_token": 1.0, "load_max_over_mean": 1.1}  # noqa: RUF012

    run: Any = [Last]
    assert demo._judge(run, {"code": (3.0, 2.0)}, {"unigram_entropy": 2.5}, redone) == code


@pytest.mark.parametrize(("code", "ends"), [(1, 1), (2, 2), (3, 3), (0, 2)])
def test_a_run_that_ends_before_the_kill_ends_the_demo_with_its_code(
    code: int, ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def train(*arguments: Any, **options: Any) -> int:
        calls.append(arguments)
        return code

    monkeypatch.setattr(demo, "_corpus", dict)
    monkeypatch.setattr(demo, "PRESET", str(tiny(tmp_path)))
    monkeypatch.setattr(demo, "train", train)
    assert demo.main([]) == ends and len(calls) == 1
    assert ("raise run.steps" in capfd.readouterr().err) == (code == 0)
