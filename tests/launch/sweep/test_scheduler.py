"""What runs when, what runs again, and what a death of any process leaves: trainers that compute nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.supervise.heartbeats import Patience
from launch.sweep.history import Outcome, state
from launch.sweep.ledger import Ledger, Trial
from launch.sweep.run import sweep
from launch.sweep.scheduler import Scheduler, Summary
from launch.sweep.vigil import Vigil
from pretrain import events
from pretrain.attempt import read_exit
from pretrain.heartbeat import VARIABLE, Heartbeat
from pretrain.rundir import attempt_path, attempts
from stoker.errors import Refusal
from tests.launch.sweep.sweeps import again, command, family, forks, gone, planned, until, write


def run(ledger: Ledger, trainer: str, count: int = 2, meanwhile: Callable[[], None] | None = None) -> Summary:
    slots = forks(ledger, trainer, count)
    thread = threading.Thread(target=meanwhile) if meanwhile is not None else None
    try:
        if thread is not None:
            thread.start()
        return Scheduler(ledger, slots, announce=lambda text: None).run()
    finally:
        if thread is not None:
            thread.join()
        slots.close()


def test_done_is_left_what_broke_is_tried_again_and_what_cannot_work_is_not(tmp_path: Path) -> None:
    ledger = planned(tmp_path, seeds=5)
    found = run(ledger, "broken")
    assert [found.states[n].outcome for n in range(1, 6)] == [
        Outcome.DONE, Outcome.BROKEN, Outcome.DONE, Outcome.STOPPED, Outcome.REFUSED
    ]  # fmt: skip
    assert found.code == 1
    tried = [len(attempts(ledger.run_dir(trial))) for trial in ledger.trials]
    assert tried == [1, 3, 2, 1, 1], "a fault without a fingerprint is tried as often as retries say"
    assert "ArithmeticError: always the same" in ledger.log(ledger.trials[1]).read_text()
    # Given again: only what broke or was refused.
    run(again(tmp_path), "broken")
    assert [len(attempts(ledger.run_dir(trial))) for trial in ledger.trials] == [1, 6, 2, 1, 2]


def test_a_secret_that_a_run_prints_is_masked_in_its_log(tmp_path: Path) -> None:
    ledger = planned(tmp_path, seeds=[1], retries=0)
    run(ledger, "broken")
    said = ledger.log(ledger.trials[0]).read_text()
    assert "about to fail" in said and "0123456789abcdef" not in said


def test_asked_to_end_runs_save_none_is_started_and_the_same_command_goes_on(tmp_path: Path) -> None:
    ledger = planned(tmp_path, base={"run.steps": 100_000}, seeds=4)

    def ask() -> None:
        until(lambda: all((ledger.run_dir(t) / events.METRICS).exists() for t in ledger.trials[:2]), "two runs train")
        os.kill(os.getpid(), signal.SIGTERM)

    found = run(ledger, "slow", meanwhile=ask)
    outcomes = [found.states[trial.number].outcome for trial in ledger.trials]
    assert outcomes == [Outcome.PREEMPTED] * 2 + [Outcome.WAITING] * 2 and found.code == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done = run(again(tmp_path), "broken", count=4)
    assert done.states[1].outcome is Outcome.DONE, "seed 0"


def test_the_rule_stops_the_worse_runs_and_says_so(tmp_path: Path) -> None:
    ledger = planned(
        tmp_path,
        base={"run.steps": 400},
        grid={"train.lr": [0.01, 0.02, 0.9, 0.011, 0.5, 0.7]},
        stop={"first": 20, "factor": 3},
        metric={"name": "loss", "window": 1},
    )
    found = run(ledger, "slow", count=3)
    outcomes = {trial.overrides["train.lr"]: found.states[trial.number] for trial in ledger.trials}
    assert outcomes[0.01].outcome is Outcome.DONE, "the best is never stopped"
    assert {outcomes[lr].outcome for lr in (0.5, 0.7)} == {Outcome.CUT}, "they came when better ones had"
    assert found.code == 0
    for trial in ledger.trials:
        steps = len(events.read(ledger.run_dir(trial)))
        assert (steps < 400) == (found.states[trial.number].outcome is Outcome.CUT)
    assert "at step 20" in outcomes[0.7].cause or "at step 60" in outcomes[0.7].cause
    # Stopped runs stay stopped.
    before = {trial.number: len(attempts(ledger.run_dir(trial))) for trial in ledger.trials}
    assert run(again(tmp_path), "slow").states == found.states
    assert {trial.number: len(attempts(ledger.run_dir(trial))) for trial in ledger.trials} == before


def test_a_process_killed_with_9_leaves_no_orphan_whichever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, base={"run.steps": 100_000}, seeds=2)
    pool = command(path, 2, "tests.launch.sweep.trainers:slow")
    runs = tmp_path / "runs" / "sweep"
    try:
        until(lambda: len(list(runs.glob(f"0*/{events.METRICS}"))) == 2, "two runs train")
        (server,) = psutil.Process(pool.pid).children()
        children = server.children()
        assert len(children) == 2
        server.kill()  # its runs go with it, and are started again under another
        until(lambda: gone(children), "the runs of a dead server are gone")
        until(lambda: len(list(runs.glob("0*/attempts/0002"))) == 2, "both are started again")
        everybody = family(pool)
        assert len(everybody) == 3
        pool.kill()
        until(lambda: gone(everybody), "nothing of a dead pool is left")
    finally:
        pool.kill()
        pool.wait()
    ledger = again(tmp_path)
    assert {state(ledger, trial).outcome for trial in ledger.trials} == {Outcome.BROKEN}


def test_one_run_killed_with_9_is_recorded_and_started_again(tmp_path: Path) -> None:
    ledger = planned(tmp_path, base={"run.steps": 150}, seeds=[1])
    killed: list[int] = []

    def kill() -> None:
        until(lambda: (ledger.run_dir(ledger.trials[0]) / events.METRICS).exists(), "it trains")
        (server,) = [p for p in psutil.Process().children() if "launch.sweep.server" in " ".join(p.cmdline())]
        (child,) = server.children()
        killed.append(child.pid)
        child.kill()

    found = run(ledger, "slow", meanwhile=kill)
    assert found.states[1].outcome is Outcome.DONE and found.states[1].attempts == 2
    history = ledger.history(ledger.trials[0]).read_text()
    assert killed and "killed by SIGKILL" in history


def test_a_run_that_hangs_or_is_stopped_is_ended_and_named_while_others_go_on(tmp_path: Path) -> None:
    ledger = planned(tmp_path, base={"launch.hang_s": 0.7}, seeds=5)
    found = run(ledger, "standing", count=3)
    _, hung, stopped, always, early = ledger.trials
    assert [found.states[n].outcome for n in range(1, 6)] == [Outcome.DONE] * 3 + [Outcome.BROKEN, Outcome.DONE]
    ends = {trial.number: [read_exit(path) for path in _attempts(ledger, trial)] for trial in ledger.trials}
    kinds = {number: [end.kind for end in ended if end is not None] for number, ended in ends.items()}
    assert kinds == {1: ["done"], 2: ["hang", "done"], 3: ["stopped", "done"], 4: ["hang"] * 2, 5: ["done"]}
    for trial in (hung, always):
        end = ends[trial.number][0]
        assert end is not None and end.step == 2 and end.rank == 0
        assert "no progress for" in end.cause and "compute of step 2" in end.cause and "_sleep_for_ever" in end.cause
        assert "in _sleep_for_ever" in (ledger.run_dir(trial) / end.stacks[0]).read_text()
    assert "in compute of step 2" in ledger.history(hung).read_text()
    assert "SIGSTOP" in ledger.history(stopped).read_text()
    assert "no progress for" in ledger.history(early).read_text(), "it hung before it had a directory"


def test_the_process_that_runs_are_forked_from_is_replaced_when_it_is_stopped(tmp_path: Path) -> None:
    ledger = planned(tmp_path, base={"run.steps": 150}, seeds=[1])

    def stop() -> None:
        until(lambda: (ledger.run_dir(ledger.trials[0]) / events.METRICS).exists(), "it trains")
        (server,) = [p for p in psutil.Process().children() if "launch.sweep.server" in " ".join(p.cmdline())]
        server.suspend()

    found = run(ledger, "slow", meanwhile=stop)
    assert found.states[1].outcome is Outcome.DONE and found.states[1].attempts == 2


def test_a_run_without_a_limit_of_its_own_has_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """However quick its steps are: a run of a sweep shares the machine, and nobody waits for it."""
    vigil = Vigil(Patience(), None)
    monkeypatch.setenv(VARIABLE, f"/proc/self/fd/{vigil.descriptors[0]}")
    heartbeat = Heartbeat.from_environment()
    for step in range(50):
        heartbeat.at("compute", step)
        heartbeat.at("record", step)
    with subprocess.Popen(["sleep", "1000"]) as child:
        looks, pidfd = 0, os.pidfd_open(child.pid)
        while vigil.look(child.pid, pidfd, 0.5) is None:
            looks += 1
        child.kill()
        os.close(pidfd)
    vigil.close()
    assert looks == 60 + 1, "half a second at each look, and the first hears a beat"


def _attempts(ledger: Ledger, trial: Trial) -> list[Path]:
    run_dir = ledger.run_dir(trial)
    return [attempt_path(run_dir, number) for number in attempts(run_dir)]


def test_a_second_command_on_a_sweep_is_refused_while_one_runs(tmp_path: Path) -> None:
    path = write(tmp_path, base={"run.steps": 100_000}, seeds=[1])
    pool = command(path, 1, "tests.launch.sweep.trainers:slow")
    try:
        until(lambda: list((tmp_path / "runs/sweep").glob(f"0*/{events.METRICS}")), "a run trains")
        with pytest.raises(Refusal, match=f"is run by process {pool.pid} on .* already"):
            sweep(path, 1)
    finally:
        pool.kill()
        pool.wait()
