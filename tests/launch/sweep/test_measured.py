"""A second report reads only what has changed, and says what the first one would."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from launch.sweep import measured
from launch.sweep.history import ended, started
from launch.sweep.ledger import Ledger
from launch.sweep.report import page
from launch.sweep.results import results
from pretrain import events
from pretrain.attempt import ExitClass, record_exit
from pretrain.events import METRICS, StepEvent, Timing
from tests.launch.sweep.sweeps import again, planned


def finished(folder: Path, steps: int = 30, **keys: Any) -> Ledger:
    """A sweep whose runs have all ended, written and not run."""
    ledger = planned(folder, base={"run.steps": steps}, **keys)
    for trial in ledger.trials:
        started(ledger, trial)
        attempt = ledger.run_dir(trial) / "attempts/0001"
        attempt.mkdir(parents=True)
        timing = Timing(0.5, 768.0, None)
        lines = [
            StepEvent(1, step, trial.number + 1 / (step + 1), 1.0, 0.1, 384, 384, {}, "apply", True, {}, timing)
            for step in range(steps)
        ]
        (ledger.run_dir(trial) / METRICS).write_text("".join(line.to_line() + "\n" for line in lines))
        record_exit(attempt, ExitClass.DONE)
        ended(ledger, trial, 0)
    return ledger


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a moment ago count as old."""
    monkeypatch.setattr(measured, "SETTLED_NS", 0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs whose metrics were read, by name."""
    found: list[str] = []
    real = events.read
    monkeypatch.setattr(events, "read", lambda path: found.append(path.parent.name) or real(path))
    return found


def test_a_second_report_reads_no_metrics_and_is_the_same_to_the_byte(
    tmp_path: Path, settled: None, read: list[str]
) -> None:
    ledger = finished(tmp_path, grid={"train.lr": [1e-2, 1e-3, 1e-4]})
    first = page(results(ledger))
    assert len(read) == 3
    assert page(results(again(tmp_path))) == first and len(read) == 3


def test_a_run_that_changed_is_read_again_though_size_and_time_say_otherwise(
    tmp_path: Path, settled: None, read: list[str]
) -> None:
    ledger = finished(tmp_path, grid={"train.lr": [1e-2, 1e-3]})
    results(ledger)
    path = ledger.run_dir(ledger.trials[1]) / METRICS
    before = path.stat()
    last = path.read_text().splitlines()[-1]
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_text(path.read_text().replace(last, last.replace('"lr":0.1', '"lr":0.2').replace('loss":2', 'loss":7')))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    del read[:]
    found = {row.number: row.value for row in results(ledger).rows}
    assert read == [ledger.trials[1].name]
    assert found[2] == pytest.approx(sum(2 + 1 / (s + 1) for s in range(14, 29)) / 16 + (7 + 1 / 30) / 16)


def test_what_may_still_change_within_a_tick_of_the_clock_is_not_kept(tmp_path: Path, read: list[str]) -> None:
    ledger = finished(tmp_path)
    results(ledger)
    results(ledger)
    assert len(read) == 2, "its metrics are a moment old"


def test_another_metric_is_another_question(tmp_path: Path, settled: None, read: list[str]) -> None:
    ledger = finished(tmp_path, seeds=2)
    results(ledger)
    other = planned(tmp_path, base={"run.steps": 30}, seeds=2, metric={"name": "loss", "window": 1})
    assert {row.value for row in results(other).rows} == {1 + 1 / 30, 2 + 1 / 30} and len(read) == 4


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other", "numbers", "nested", "folder"])
def test_a_damaged_memory_is_none(tmp_path: Path, settled: None, read: list[str], damage: str) -> None:
    ledger = finished(tmp_path, seeds=2)
    expected = page(results(ledger))
    path = ledger.root / measured.FILE
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        changed = {
            "cut": content[:-40],
            "bit": content.replace(b'"value":1', b'"value":0'),
            "empty": b"",
            "other": b"[]\n{}",
            "numbers": b"3\n4",
            "nested": b"[" * 100_000,
        }[damage]
        assert changed != content
        path.write_bytes(changed)
    del read[:]
    assert page(results(ledger)) == expected and len(read) == 2
    assert damage == "folder" or path.read_bytes() == content, "and is there again"


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_a_thousand_finished_runs_are_reported_again_in_2_s_of_processor_time(tmp_path: Path, settled: None) -> None:
    rates = [round(1e-4 * (i + 1), 6) for i in range(250)]
    ledger = finished(tmp_path, 300, grid={"train.lr": rates, "train.clip": [0.5, 1.0]}, seeds=2)
    took = []
    for _ in range(2):
        before = time.process_time()
        page(results(again(tmp_path)))
        took.append(time.process_time() - before)
    print(f"1,000 finished runs of 300 steps: {took[0]:.2f} s, then {took[1]:.2f} s")
    assert len(ledger.trials) == 1000 and took[1] < 2.0
