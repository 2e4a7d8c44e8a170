"""Real runs through the whole of it: killed, resumed, and bit-equal to the same run alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.sweep.history import Outcome, state
from launch.sweep.ledger import Ledger, Trial
from launch.sweep.run import sweep
from pretrain import events
from pretrain.config import load
from pretrain.rundir import attempts
from tests.launch.sweep.sweeps import again, command, family, gone, until, write
from tests.launch.tiny import fixed


def alone(ledger: Ledger, folder: Path) -> dict[int, Path]:
    """Every run of the sweep by itself, in a fresh process that knows nothing of sweeps; their directories."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(ledger.threads)}

    def run(trial: Trial) -> Path:
        source, *overrides = [*ledger.arguments(trial), f"run.dir={folder}"]
        command = [sys.executable, "-m", "pretrain", source, *overrides]
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return load(source, overrides).run_dir

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((trial.number for trial in ledger.trials), pool.map(run, ledger.trials)))


def kill_and_resume(tmp_path: Path, kills: list[int], **keys: Any) -> Ledger:
    """A sweep whose every process is killed with -9 when so many runs are done, each time, and then finished."""
    path = write(tmp_path, **keys)
    root = tmp_path / "runs" / "sweep"
    for done in kills:
        pool = command(path, 2)
        try:
            until(
                lambda done=done: (
                    sum(1 for _ in root.glob("0*/attempts/*/exit.json")) >= done
                    and any(_torn(run) for run in root.glob("0*"))
                ),
                f"{done} runs are done and one is in the middle",
                patience_s=1200.0 if done > 1 else 240.0,
            )
            everybody = [psutil.Process(pool.pid), *family(pool)]
            for process in everybody:
                process.kill()
        finally:
            pool.kill()
            pool.wait()
        until(lambda everybody=everybody: gone(everybody), "all are gone")
    pool = command(path, 2)
    said, _ = pool.communicate()
    assert pool.returncode == 0, said
    return again(tmp_path)


def _torn(run_dir: Path) -> bool:
    """A run is under way: it has measured a step, and its last attempt has not ended."""
    newest = max(attempts(run_dir), default=0)
    under_way = newest > 0 and not (run_dir / f"attempts/{newest:04d}/exit.json").exists()
    return under_way and (run_dir / events.METRICS).exists()


def same_as_alone(ledger: Ledger, folder: Path) -> None:
    for number, run_dir in alone(ledger, folder).items():
        trial = ledger.trial(number)
        assert state(ledger, trial).outcome is Outcome.DONE
        assert fixed(ledger.run_dir(trial)) == fixed(run_dir), trial.name
        assert len(fixed(run_dir)) == trial.facts.steps


COMMON = {"run.steps": 12, "checkpoint.every": 3}


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_p5_a_sweep_killed_with_9_and_resumed_is_every_run_alone(tmp_path: Path) -> None:
    ledger = kill_and_resume(tmp_path, [1], base=COMMON, grid={"train.lr": [1e-2, 1e-3, 1e-4]})
    assert max(len(attempts(ledger.run_dir(trial))) for trial in ledger.trials) == 2, "a kill has met a run"
    same_as_alone(ledger, tmp_path / "alone")


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_p5_24_runs_killed_three_times_are_every_run_alone(tmp_path: Path) -> None:
    grid = {"train.lr": [1e-2, 3e-3, 1e-3], "train.clip": [0.5, 1.0], "train.schedule.kind": ["wsd", "cosine"]}
    ledger = kill_and_resume(tmp_path, [2, 9, 17], base=COMMON, grid=grid, seeds=2)
    assert len(ledger.trials) == 24
    assert sum(len(attempts(ledger.run_dir(trial))) for trial in ledger.trials) >= 24 + 3
    same_as_alone(ledger, tmp_path / "alone")


@pytest.mark.verify
@pytest.mark.timeout(1200)
def test_a_thousand_runs_of_a_trainer_that_computes_nothing(tmp_path: Path) -> None:
    """Target: two minutes on two cores of its own. Asserted as processor time, which others do not change."""
    rates = [round(1e-4 * (i + 1), 6) for i in range(250)]
    path = write(tmp_path, base={"run.steps": 20}, grid={"train.lr": rates, "train.clip": [0.5, 1.0]}, seeds=2)
    before = os.times()
    found = sweep(path, 4, trainer="tests.launch.sweep.heavy:no_op", announce=lambda text: None)
    after = os.times()
    assert found.counts == {Outcome.DONE: 1000} and found.code == 0
    used = sum(after[:4]) - sum(before[:4])
    took = after.elapsed - before.elapsed
    print(f"1,000 runs: {took:.0f} s, {used:.0f} s of two cores' 240")
    assert used < 2 * 120


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_runs_of_several_ranks_have_a_process_each(tmp_path: Path) -> None:
    path = write(tmp_path, base={"run.steps": 4}, ranks=2, grid={"train.lr": [1e-2, 1e-3]})
    found = sweep(path, 1)
    assert not isinstance(found, str) and found.counts == {Outcome.DONE: 2}, found
    ledger = again(tmp_path)
    said = ledger.log(ledger.trials[0]).read_text()
    assert re.search(r"2 ranks \(tp 1, pp 1, dp 2", said), said


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_no_rank_outlives_a_sweep_that_is_killed_with_9(tmp_path: Path) -> None:
    path = write(tmp_path, base={"run.steps": 100_000}, ranks=2)
    pool = command(path, 1)
    try:
        until(lambda: list((tmp_path / "runs/sweep").glob(f"0*/{events.METRICS}")), "two ranks train")
        everybody = family(pool)
        assert len(everybody) >= 3, "the run's process and its two ranks"
        pool.kill()
        until(lambda: gone(everybody), "nothing of it is left")
    finally:
        pool.kill()
        pool.wait()
    ledger = again(tmp_path)
    assert state(ledger, ledger.trials[0]).outcome is Outcome.BROKEN
