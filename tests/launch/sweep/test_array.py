"""A sweep on Slurm at its edges: what is submitted once, how it is stopped, and what its runs then say."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from launch.commands_sweep import sweep as command
from launch.launching import slurm
from launch.supervise.agent import asked_to_end
from launch.sweep import array, task
from launch.sweep.history import Outcome, State, state
from launch.sweep.ledger import Ledger
from launch.sweep.run import sweep
from pretrain import events
from pretrain.rundir import committed_steps
from stoker.errors import Refusal
from tests.launch.launching.slurm_cluster import Cluster
from tests.launch.sweep.sweeps import planned, until, write
from tests.launch.sweep.trainers import no_op

APP = typer.Typer()
APP.command()(command)


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a command in the place of Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "ASK_S", 3)

    def put(name: str, text: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    put("sinfo", "echo 'batch|4'")
    put("sbatch", f'for word; do [[ $word == --comment=* ]] && echo "${{word#*=}}" > {tmp_path}/mark; done; echo 12')
    put("scancel", f'echo "$@" >> {tmp_path}/cancelled')
    put("scontrol", "exit 0")
    return put


def queue(folder: Path, put: Callable[[str, str], None], *tasks: str) -> None:
    """Slurm's queue holds these tasks of the array that was submitted last: ``index|STATE``."""
    lines = [f'echo "12|{one}|$(cat {folder}/mark)"' for one in tasks]
    put("squeue", "\n".join(lines))


def test_what_is_in_the_queue_already_is_not_submitted_again(tmp_path: Path, put: Callable[[str, str], None]) -> None:
    ledger = planned(tmp_path, seeds=4)
    assert "job 12: 4 runs" in array.submit(ledger, 10**9)
    assert '"--array=1-4%4"' in (ledger.root / "array-12.json").read_text()
    no_op(ledger.arguments(ledger.trials[0]))
    queue(tmp_path, put, "2|PENDING", "4|RUNNING")
    assert "job 12: 1 runs" in array.submit(ledger)
    assert '"--array=3%1"' in (ledger.root / "array-12.json").read_text()
    queue(tmp_path, put, "2|PENDING", "3|RUNNING", "4|PENDING")
    assert array.submit(ledger).endswith("3 runs are in Slurm's queue already, and nothing is left to run")


def test_an_image_that_no_task_would_run_in_is_refused(tmp_path: Path) -> None:
    ledger = planned(tmp_path, base={"launch.container": "ghcr.io/x/stoker:1"})
    with pytest.raises(Refusal, match="the tasks of an array run"):
        array.submit(ledger)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("launch.container", "ghcr.io/x/stoker:1", "run 2: launch.container: the tasks of an array run"),
        ("launch.time_limit_min", 600, "launch.time_limit_min is None in run 1 and 600 in run 2: an array has one"),
    ],
)
def test_runs_that_ask_for_what_an_array_has_once_are_refused(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    ledger = planned(tmp_path, list=[{"train.lr": 0.01}, {key: value}])
    with pytest.raises(Refusal, match=said):
        array.submit(ledger)


def test_stop_with_dry_run_is_refused(tmp_path: Path, put: Callable[[str, str], None]) -> None:
    ledger = planned(tmp_path, seeds=3)
    array.submit(ledger)
    done = CliRunner().invoke(APP, [str(ledger.root), "--stop", "--dry-run"])
    assert isinstance(done.exception, Refusal) and not (tmp_path / "cancelled").exists()


def test_the_command_stops_an_array_by_its_file_or_its_folder(tmp_path: Path, put: Callable[[str, str], None]) -> None:
    ledger = planned(tmp_path, seeds=3)
    array.submit(ledger)
    queue(tmp_path, put, "1|RUNNING", "2|PENDING", "3|PENDING")
    for path in (tmp_path / "sweep.yaml", ledger.root):
        done = CliRunner().invoke(APP, [str(path), "--stop"])
        assert done.exit_code == 0, done.output
        assert "2 runs were taken out of Slurm's queue, 1 are asked to save" in done.output
    assert (tmp_path / "cancelled").read_text().splitlines()[:2] == ["--state=PENDING 12", "--full --signal=TERM 12"]
    queue(tmp_path, put)
    assert "none of its runs is in Slurm's queue" in CliRunner().invoke(APP, [str(ledger.root), "--stop"]).output


def test_where_there_is_nothing_to_stop_it_is_said_and_slurm_not_asked(tmp_path: Path) -> None:
    ledger = planned(tmp_path, seeds=3)
    with pytest.raises(Refusal, match="has no array job: what runs on this machine"):
        array.stop(ledger.root)
    for path in (tmp_path, tmp_path / "absent.yaml"):
        done = CliRunner().invoke(APP, [str(path), "--stop"])
        assert isinstance(done.exception, Refusal)


def test_a_scheduler_that_cannot_be_reached_is_one_message(tmp_path: Path, put: Callable[[str, str], None]) -> None:
    ledger = planned(tmp_path, seeds=3)
    array.submit(ledger)
    put("squeue", "echo 'Unable to contact\nslurm controller' >&2; exit 1")
    with pytest.raises(Refusal, match="Unable to contact slurm controller; nothing was changed"):
        array.stop(ledger.root)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in task.ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_task_that_is_asked_before_its_run_has_begun_is_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None, number: signal.Signals
) -> None:
    ledger = planned(tmp_path, seeds=1)

    def begins(*given: Any, **more: Any) -> int:
        os.kill(os.getpid(), number)
        time.sleep(60)
        return 0

    monkeypatch.setattr(task, "train", begins)
    monkeypatch.setenv(task.ARRAY_INDEX, "1")
    assert task.main([str(ledger.root)]) == 4
    assert state(ledger, ledger.trials[0]) == State(Outcome.PREEMPTED, task.NOTHING_TO_SAVE)


def test_a_task_that_is_asked_twice_saves_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    """Slurm asks at the time limit, and again at its end; ``--stop`` may be given twice."""
    ledger = planned(tmp_path, seeds=1)
    agent = SimpleNamespace(_asked=0)
    agent.ask_to_end = lambda: setattr(agent, "_asked", agent._asked + 1)

    def trains(*given: Any, insist: bool) -> int:
        with asked_to_end(agent, insist):
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return 4

    monkeypatch.setattr(task, "train", trains)
    monkeypatch.setenv(task.ARRAY_INDEX, "1")
    assert task.main([str(ledger.root)]) == 4
    assert agent._asked == 1
    assert state(ledger, ledger.trials[0]).outcome is Outcome.PREEMPTED


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "s" * 300}, "the sweep's folder: 'sss.* has 300 bytes"),
        ({"dir": "d/" * 5000}, "the sweep's folder .* has 10,005 characters"),
        ({"dir": "a\0b"}, "the sweep's folder .* control character"),
        ({"dir": "tiny.yaml/runs"}, "the sweep's folder tiny.yaml/runs/sweep: Not a directory"),
        ({"config": "a\0b.yaml"}, "cannot be read"),
        ({"seeds": 10**30}, "a number of seeds"),
        ({"base": {"launch.container": "docker://me:hunter22@reg#img"}}, "hold a secret"),
        ({"base": {"launch.container": "me:hunter22@reg#img"}}, "launch.container holds a password"),
        ({"grid": {"launch.container": ["me:hunter22@reg/img"]}}, "launch.container holds a password"),
        ({"list": [{"launch": {"webhook": "https://x.example/hunter22"}}]}, "launch.webhook is kept out"),
        ({"zip": {"launch.webhook": ["https://x.example/hunter22"]}}, "launch.webhook is kept out"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_message_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, **keys)
    with pytest.raises(Refusal, match=said) as refusal:
        sweep(path, 1, "slurm")
    assert "hunter22" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_a_sweep_stopped_on_slurm_has_saved_and_the_same_command_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    ledger: Ledger = planned(tmp_path, base={"run.steps": 100_000}, seeds=2)
    first, second = ledger.trials
    sweep(tmp_path / "sweep.yaml", 1, "slurm")
    until(lambda: (ledger.run_dir(first) / events.METRICS).exists(), "the first run trains")
    said = array.stop(ledger.root)
    assert "1 runs were taken out of Slurm's queue, 1 are asked to save" in said
    array.stop(ledger.root)
    until(lambda: not cluster.run("squeue", "--noheader"), "the queue is empty")
    found = state(ledger, first)
    assert found.outcome is Outcome.PREEMPTED and committed_steps(ledger.run_dir(first)), found
    assert state(ledger, second).outcome is Outcome.WAITING
    assert "none of its runs" in array.stop(ledger.root)
    again = sweep(tmp_path / "sweep.yaml", 1, "slurm")
    assert isinstance(again, str) and ": 2 runs of" in again
    array.stop(ledger.root)
    until(lambda: not cluster.run("squeue", "--noheader"), "the queue is empty")
