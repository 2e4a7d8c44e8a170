"""Real runs of two ranks under the supervisor: after every fault the curve is that of the run without one (P5)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launch.supervise.agent import Agent
from pretrain.attempt import read_exit
from pretrain.rundir import attempt_path, attempts
from tests.launch.supervise.scenes import STEPS, Scene, scene, wait_for


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    found = scene(tmp_path_factory.mktemp("whole"), name="whole")
    assert found.run() == 0
    return found


def cut(whole: Scene, name: str) -> Scene:
    """The same run, about to be disturbed."""
    return Scene(whole.config, name=name)


def kinds(found: Scene) -> list[str]:
    return [line["kind"] for line in found.journal("fault")]


def test_p5_a_rank_killed_and_one_stopped_cost_an_attempt_each_and_change_nothing(whole: Scene) -> None:
    run = cut(whole, "killed")

    def watch(agent: Agent) -> None:
        wait_for(run.trained(6))
        agent.signal(1, signal.SIGKILL)
        wait_for(lambda: len(run.journal("training")) == 2)
        agent.signal(0, signal.SIGSTOP)

    assert run.run(watch) == 0
    assert kinds(run) == ["signal", "stopped"] and attempts(run.root) == [1, 2, 3]
    assert run.curve() == whole.curve() and len(run.curve()) == STEPS


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        pytest.param("exception", "exception", marks=pytest.mark.verify),
        pytest.param("no memory", "oom", marks=pytest.mark.verify),
        pytest.param("uncorrectable ECC error encountered", "device", marks=pytest.mark.verify),
        pytest.param("segmentation fault", "signal", marks=pytest.mark.verify),
        pytest.param("exit", "exception", marks=pytest.mark.verify),
        pytest.param("interpreter locked", "hang", marks=pytest.mark.verify),
        pytest.param("asleep", "hang", marks=pytest.mark.verify),
    ],
)
def test_p5_a_fault_inside_of_a_rank_is_named_and_changes_nothing(
    what: str, kind: str, whole: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cut(whole, what.replace(" ", "-"))
    run.faults(monkeypatch, rank=1, step=17, what=what)
    assert run.run() == 0
    ended = read_exit(attempt_path(run.root, 1))
    assert ended is not None and (ended.kind, ended.rank, ended.step) == (kind, 1, 17)
    assert run.curve() == whole.curve() and len(run.curve()) == STEPS


@pytest.mark.verify
@pytest.mark.parametrize(
    ("what", "kind"), [("exception", "exception"), ("an illegal memory access was encountered", "device")]
)
def test_a_fault_that_comes_back_stops_the_run_after_two_attempts(
    what: str, kind: str, whole: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = cut(whole, f"deterministic-{kind}")
    run.faults(monkeypatch, rank=0, step=9, what=what, once=False)
    assert run.run() == 1
    assert attempts(run.root) == [1, 2]
    assert "fault: the same failure twice" in capfd.readouterr().err
    assert run.journal("stop")[0]["kind"] == kind


@pytest.mark.verify
def test_p5_asked_to_end_it_saves_and_the_same_command_goes_on(whole: Scene) -> None:
    run = cut(whole, "asked")
    assert run.run(run.strike_when(run.trained(7), lambda agent: os.kill(os.getpid(), signal.SIGTERM))) == 4
    assert run.run() == 0
    assert run.curve() == whole.curve()
    assert len(run.lines()) == STEPS, "no step is done twice"


@pytest.mark.verify
def test_notice_and_recovery_times_are_those_that_are_promised(tmp_path: Path) -> None:
    """kill -9: noticed within 0.5 s, training again within 5 s; a stopped process within 10 s (quiet machine)."""
    run = scene(tmp_path, overrides=("run.steps=400", "checkpoint.every=4", "log.every=1000"))
    took: dict[str, float] = {}

    def watch(agent: Agent) -> None:
        for number, sent in enumerate((signal.SIGKILL, signal.SIGSTOP)):
            wait_for(lambda number=number: len(run.journal("spare_ready")) >= 2 * (number + 1))  # type: ignore[misc]
            agent.signal(1, sent)
            wait_for(lambda number=number: len(run.journal("training")) >= number + 2)  # type: ignore[misc]
            took[sent.name] = run.journal("training")[-1]["seconds"]
        agent.ask_to_end()

    assert run.run(watch) == 4
    print({name: f"{seconds:.2f} s" for name, seconds in took.items()})
    assert took["SIGKILL"] < 5 and took["SIGSTOP"] < 10
