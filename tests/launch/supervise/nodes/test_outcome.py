"""How a launch ended is written once, by those who decided it, and found by a node that comes when all is over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.supervise import causes, outcome
from launch.supervise.nodes import Several
from launch.supervise.policy import Decision
from tests.launch.supervise.nodes.agents import Launch, launched, until

CODES = {0: causes.DONE, 3: causes.Cause(causes.ExitClass.STOPPED, "verdict", "spikes"), 4: causes.PREEMPTED}


def running(launch: Launch, count: int) -> None:
    until(lambda: len(launch.places()) == count)


@pytest.mark.parametrize("code", CODES)
def test_the_code_that_all_nodes_agreed_on_is_written_and_the_token_is_gone(code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(run, 3, spares=[2]) as launch:
        running(launch, 2)
        token = outcome.token_path(run, launch.agents[0].node._facts.launch)
        token.parent.mkdir()
        token.write_bytes(b"t")
        assert outcome.ended(run, "launch") is None
        for agent in launch.agents[:2]:
            agent.fault = CODES[code]
        until(lambda: all(agent.ended for agent in launch.agents))
    until(lambda: outcome.ended(run, "launch") == code)
    assert (run / ".launch/launch.ended").read_text() == f"{code}\n"
    until(lambda: not token.exists())


def test_what_is_left_of_a_launch_says_nothing_for_the_rest(tmp_path: Path) -> None:
    with launched(tmp_path / "run", 4, spares=[3], rejoin_s=5.0) as launch:
        running(launch, 3)
        launch.cut([0])
        until(lambda: launch.agents[0].ended is not None)
        assert launch.agents[0].ended.code == 1 and launch.agents[0].node.alone  # type: ignore[union-attr]
        running(launch, 3)
        assert outcome.ended(tmp_path / "run", "launch") is None
        for agent in launch.agents[1:]:
            agent.fault = causes.DONE
        until(lambda: outcome.ended(tmp_path / "run", "launch") == 0)
        until(lambda: all(agent.ended for agent in launch.agents))
        assert not any(agent.node.alone for agent in launch.agents[1:])


@pytest.mark.parametrize("code", range(5))
def test_a_node_that_comes_when_all_is_over_learns_how_it_ended(code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".launch").mkdir(parents=True)
    with launched(run, 3) as launch:
        running(launch, 3)
        facts = launch.agents[2].node._facts
        launch.die(2)
        launch.agents[2].node.close(Decision(False, causes.DONE, ""))
        (run / ".launch/launch.ended").write_text(f"{code}\n")
        outcome.token_path(run, "launch").touch()  # as it comes it makes one, since there is none
        late = Several(facts, 2)
        met = late.meet(lambda: False)
        late.close(met)  # type: ignore[arg-type]
        assert isinstance(met, Decision) and not met.again and met.code == code and not late.alone
        assert not outcome.token_path(run, "launch").exists()


@pytest.mark.parametrize("text", ["", "4", "40\n", "x\n", "9\n", "-1\n", "\xff\n"])
def test_a_torn_outcome_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / ".launch").mkdir()
    (tmp_path / ".launch/l.ended").write_text(text, encoding="latin-1")
    assert outcome.ended(tmp_path, "l") is None


def test_pods_that_have_saved_begin_the_next_launch_and_others_belong_to_theirs(tmp_path: Path) -> None:
    assert outcome.generation(tmp_path, "uid-0") == "uid-0.g0"
    for number in range(2):
        outcome.record(tmp_path, f"uid-0.g{number}", 4)
    assert outcome.generation(tmp_path, "uid-0") == "uid-0.g2" and outcome.generation(tmp_path, "uid-1") == "uid-1.g0"
    outcome.record(tmp_path, "uid-0.g2", 1)
    assert outcome.generation(tmp_path, "uid-0") == "uid-0.g2" and outcome.ended(tmp_path, "uid-0.g2") == 1


def test_old_outcomes_are_cleared_away_but_none_of_the_same_start(tmp_path: Path) -> None:
    for number in range(outcome.KEPT + 20):
        outcome.record(tmp_path, f"{number}-7-0", 0)
        os.utime(tmp_path / f".launch/{number}-7-0.ended", (1000.0, 1000.0 + number))
    assert outcome.ended(tmp_path, "0-7-0") is None and outcome.ended(tmp_path, f"{outcome.KEPT}-7-0") == 0
    for number in range(outcome.KEPT + 20):
        outcome.record(tmp_path, f"uid-0.g{number}", 4)
    assert outcome.generation(tmp_path, "uid-0") == f"uid-0.g{outcome.KEPT + 20}"


def test_a_disk_that_is_full_costs_the_outcome_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outcome, "write_atomic", full)
    outcome.record(tmp_path, "l", 0)
    assert "No space left" in caplog.text and outcome.ended(tmp_path, "l") is None
