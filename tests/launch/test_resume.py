"""P5: a run that is killed, or asked to end, goes on as the run that was not, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.demo import Kill, num_lines
from launch.local import train
from launch.supervise import journal
from launch.supervise.agent import Agent
from pretrain.attempt import read_exit
from pretrain.config import load
from pretrain.rundir import attempt_path, attempts, committed_steps
from tests.house.sources import HOME
from tests.launch.tiny import fixed, tiny
from tests.launch.torchrun import command

STEPS = 30
OVERRIDES = [f"run.steps={STEPS}", "parallel.ep=2", "checkpoint.every=5"]


def wait_for(condition: Callable[[], bool], agent: Agent) -> None:
    while agent.running and not condition():
        time.sleep(0.01)


@pytest.mark.timeout(900)
def test_p5_killed_then_asked_to_end_then_finished_under_torchrun_is_the_run_that_was_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny(tmp_path))
    by_hand = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command([path, *OVERRIDES, "run.name=whole"], 2), cwd=HOME, env=by_hand, check=True)
    overrides = [*OVERRIDES, "run.name=cut"]
    root = tmp_path / "runs" / "cut"
    kill = Kill(load(path, overrides), pause_s=0.1)

    def kill_and_then_ask(agent: Agent) -> None:
        kill.watch(agent)
        wait_for(lambda: len(attempts(root)) == 2 and num_lines(root) > kill.step + 1, agent)
        os.kill(os.getpid(), signal.SIGTERM)

    capfd.readouterr()
    assert train(path, overrides, 2, watch=kill_and_then_ask) == 4
    assert kill.rank is not None
    said = capfd.readouterr()
    assert f"rank {kill.rank} was killed by SIGKILL; starting again" in said.err and "Traceback" not in said.err
    assert "-m pretrain" in said.out.splitlines()[0]
    first, second = (read_exit(attempt_path(root, number)) for number in (1, 2))
    assert first is not None and (first.kind, first.rank) == ("signal", kill.rank)
    assert second is not None and second.exit_class.value == "preempted"
    assert f"preempted: asked to end; step {max(committed_steps(root))} is saved" in said.err
    assert max(committed_steps(root)) < STEPS
    assert [line["event"] for line in journal.read(root) if line["event"] in ("fault", "restart", "stop")] == [
        "fault", "restart", "stop",
    ]  # fmt: skip

    subprocess.run(command([path, *overrides], 2), cwd=HOME, env=by_hand, check=True)
    assert attempts(root) == [1, 2, 3]
    assert fixed(root) == fixed(tmp_path / "runs" / "whole")


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_p5_ten_kills_at_random_moments_and_in_saves_in_one_launch_change_nothing(tmp_path: Path) -> None:
    path = str(tiny(tmp_path))
    steps = [*OVERRIDES, "run.steps=120", "checkpoint.every=4"]
    assert train(path, [*steps, "run.name=whole"], 2) == 0

    root = tmp_path / "runs" / "cut"
    chance = random.Random(time.time_ns())
    in_saves: list[bool] = []

    def strike(agent: Agent) -> None:
        for number in range(10):
            saves = set(root.glob("checkpoints/*.tmp.*"))  # what a killed save has left
            last = max(committed_steps(root), default=0)
            if number % 2 == 0:
                begun = num_lines(root)
                wait_for(lambda begun=begun: num_lines(root) > begun + chance.randint(0, 5), agent)  # type: ignore[misc]
                wait_for(lambda saves=saves: bool(set(root.glob("checkpoints/*.tmp.*")) - saves), agent)  # type: ignore[misc]
            else:  # past a checkpoint: a launch whose attempts begin no new step is ended, as it should be
                wait_for(lambda last=last: max(committed_steps(root), default=0) > last, agent)  # type: ignore[misc]
                time.sleep(chance.uniform(0, 1.0))
            in_saves.append(bool(set(root.glob("checkpoints/*.tmp.*")) - saves))
            agent.signal(chance.choice([0, 1]), signal.SIGKILL)
            wait_for(lambda number=number: len(attempts(root)) > number + 1, agent)  # type: ignore[misc]

    assert train(path, [*steps, "run.name=cut"], 2, watch=strike) == 0
    assert sum(in_saves) >= 3, "kills meet saves"
    assert attempts(root) == list(range(1, 12))
    assert fixed(root) == fixed(tmp_path / "runs" / "whole")
