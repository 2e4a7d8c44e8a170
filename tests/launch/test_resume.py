"""P5: a run that is killed, or asked to end, goes on as the run that was not, to the last bit. Under real torchrun."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.demo import Kill, num_lines
from launch.local import train
from launch.torchrun import Torchrun
from pretrain.attempt import Exit, ExitClass, read_exit
from pretrain.config import load
from pretrain.rundir import attempt_path, attempts, committed_steps
from tests.launch.tiny import fixed, tiny

STEPS = 30
OVERRIDES = [f"run.steps={STEPS}", "parallel.ep=2", "checkpoint.every=5"]


def wait_for(condition: Callable[[], bool], torchrun: Torchrun) -> None:
    while torchrun.running and not condition():
        time.sleep(0.01)


@pytest.mark.timeout(900)
def test_p5_killed_then_asked_to_end_then_finished_is_the_run_that_was_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny(tmp_path))
    assert train(path, [*OVERRIDES, "run.name=whole"], 2) == 0
    overrides = [*OVERRIDES, "run.name=cut"]
    root = tmp_path / "runs" / "cut"
    kill = Kill(load(path, overrides), pause_s=0.1)
    assert train(path, overrides, 2, watch=kill.watch) == 1
    assert kill.rank is not None
    said = capfd.readouterr()
    assert f"fault: rank {kill.rank} was killed by SIGKILL" in said.err
    assert f"rank {1 - kill.rank}: another rank is gone (" in said.err and "Traceback" not in said.err
    assert read_exit(attempt_path(root, 1)) == Exit(
        ExitClass.FAULT, f"rank {kill.rank} was killed by SIGKILL", kill.rank
    )
    assert (
        "ChildFailedError" not in said.err and "ChildFailedError" in (root / "attempts/0001/torchrun.log").read_text()
    )

    def ask(torchrun: Torchrun) -> None:
        begun = num_lines(root)
        wait_for(lambda: num_lines(root) > begun + 1, torchrun)
        os.kill(os.getpid(), signal.SIGTERM)

    assert train(path, overrides, 2, watch=ask) == 4
    ended = read_exit(attempt_path(root, 2))
    assert ended is not None and ended.exit_class.value == "preempted"
    assert f"preempted: asked to end; step {max(committed_steps(root))} is saved" in capfd.readouterr().err
    assert max(committed_steps(root)) < STEPS

    capfd.readouterr()
    assert train(path, overrides, 2) == 0
    said = capfd.readouterr()
    assert "-m torch.distributed.run --standalone --nproc-per-node=2 -m pretrain" in said.out
    assert said.err == "", "a run that goes well has nothing to say on stderr"
    assert attempts(root) == [1, 2, 3]
    assert fixed(root) == fixed(tmp_path / "runs" / "whole")


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_p5_ten_kills_at_random_moments_and_in_saves_change_nothing(tmp_path: Path) -> None:
    path = str(tiny(tmp_path))
    steps = [*OVERRIDES, "run.steps=120", "checkpoint.every=4"]
    assert train(path, [*steps, "run.name=whole"], 2) == 0

    overrides = [*steps, "run.name=cut"]
    root = tmp_path / "runs" / "cut"
    chance = random.Random(time.time_ns())
    in_saves = 0
    for number in range(10):
        struck: list[bool] = []

        def strike(torchrun: Torchrun, in_save: bool = number % 2 == 0, struck: list[bool] = struck) -> None:
            saves = set(root.glob("checkpoints/*.tmp.*"))  # what a killed save has left
            begun = num_lines(root)
            wait_for(lambda: num_lines(root) > begun + chance.randint(0, 5), torchrun)
            if in_save:
                wait_for(lambda: bool(set(root.glob("checkpoints/*.tmp.*")) - saves), torchrun)
            else:
                time.sleep(chance.uniform(0, 0.3))
            struck.append(bool(set(root.glob("checkpoints/*.tmp.*")) - saves))
            chance.choice(list(torchrun.ranks().values())).kill()

        assert train(path, overrides, 2, watch=strike) == 1
        in_saves += struck[0]
    assert in_saves >= 3, "kills meet saves"
    assert train(path, overrides, 2) == 0
    assert fixed(root) == fixed(tmp_path / "runs" / "whole")
