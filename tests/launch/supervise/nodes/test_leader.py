"""What the leader of a launch decides, told by words alone: no connections, no ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.launching.job import Role
from launch.supervise import causes, journal, leader, records
from launch.supervise.causes import Cause
from launch.supervise.leader import Facts, Leader
from pretrain.attempt import read_exit
from pretrain.rundir import attempt_path
from tests.launch.supervise.nodes.agents import launched, until


class Ear:
    """The other end of a connection: what the leader said. Where ``answers``, it confirms what is to be."""

    def __init__(self) -> None:
        self.heard: list[Mapping[str, Any]] = []
        self.answers = True
        self.unanswered: list[int] = []

    def send(self, message: Mapping[str, Any]) -> None:
        self.heard.append(message)
        if "confirm" in message:
            self.unanswered.append(message["confirm"])

    def close(self) -> None:
        pass

    @property
    def place(self) -> int | None:
        """Of the newest attempt that it is part of."""
        return next((said["assembly"]["group_rank"] for said in reversed(self.heard) if "assembly" in said), None)


class Scene:
    """Nodes n0 and n1 train, n2 is the spare; each runs two ranks."""

    def __init__(self, run_dir: Path, rejoin_s: float = leader.REJOIN_S) -> None:
        roles = [Role(None, False), Role(None, False), Role(None, True)]
        hosts, ports = ("n0", "n1", "n2"), (1, 2, 3)
        facts = Facts(
            hosts, hosts, ports, roles, frozenset(range(3)), 2, run_dir, 9, 1.0, b"", rejoin_s=rejoin_s
        )  # fmt: skip
        self.leader = Leader(facts)
        self.ears = [Ear() for _ in range(3)]
        for node in range(3):
            self.join(node)

    def join(self, node: int) -> None:
        self.leader.join(node, self.ears[node], {})  # type: ignore[arg-type]

    def ready(self, *nodes: int, cause: Cause | None = None, attempt: int = 0) -> None:
        for node in nodes:
            told = cause.to_dict() if cause else None
            self.leader.take(node, {"ready": {"port": 1000, "attempt": attempt, "cause": told, "step": None}})

    def found(self, node: int, cause: Cause | None, attempt: int) -> None:
        told = cause.to_dict() if cause else None
        self.leader.take(node, {"found": {"attempt": attempt, "cause": told, "step": attempt}})

    def turn(self, seconds: float = 0.3) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for node, seat in self.leader.seats.items():
                seat.heard = time.monotonic()
                while self.ears[node].answers and self.ears[node].unanswered:
                    self.leader.take(node, {"confirmed": self.ears[node].unanswered.pop()})
            self.leader.tick()
            time.sleep(0.01)

    def code(self) -> int | None:
        """Of the launch, where its end is decided."""
        return self.leader.final.code if self.leader.final else None

    def attempt(self) -> int | None:
        running = self.leader._running
        return running.attempt if running else None


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path / "run")
    scene.ready(0, 1, 2)
    begun = time.monotonic()
    while scene.attempt() is None and time.monotonic() - begun < 20:  # the run's files are opened
        scene.turn(0.05)
    assert scene.attempt() == 1 and [ear.place for ear in scene.ears] == [0, 1, None]
    return scene


def test_a_connection_that_is_lost_is_judged_once(scene: Scene) -> None:
    scene.leader.leave(1, "a cable")
    scene.found(0, None, 1)
    scene.turn()
    assert scene.leader._policy.restarts == 1
    scene.join(1)
    scene.ready(1, cause=causes.fault("node", "n1 was cut off from n0", host="n0"), attempt=1)
    scene.ready(0)
    scene.turn()
    assert scene.attempt() == 2
    assert scene.leader._policy.restarts == 1 and scene.leader._faults == {1: 1}, "the leader's host is blameless"


def test_a_leader_that_nobody_hears_any_more_blames_nobody(scene: Scene) -> None:
    """It hears the others close their connections, one after the other."""
    for ear in scene.ears[1:]:
        ear.answers = False
    scene.leader.leave(1, "the connection was closed")
    scene.found(0, None, 1)
    scene.turn()
    scene.leader.leave(2, "the connection was closed")
    scene.turn()
    assert read_exit(attempt_path(scene.leader.facts.run_dir, 1)) is None and scene.leader._policy.restarts == 0


def test_a_lost_node_is_judged_once_the_others_have_answered(scene: Scene) -> None:
    scene.ears[2].answers = False
    scene.leader.leave(1, "a cable")
    scene.found(0, None, 1)
    scene.turn()
    assert scene.leader._policy.restarts == 0
    scene.ears[2].answers = True
    scene.turn()
    assert scene.leader._policy.restarts == 1


def test_a_node_that_never_gets_ready_is_replaced(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "CONCLUDE_S", 0.4)
    scene.found(0, causes.fault("hang", "rank 2 made no progress", rank=2, host="n1"), 1)
    scene.turn(0.6)  # n1 does not answer: its agent waits for a process that the kernel cannot end
    scene.join(1)
    scene.ready(0)
    scene.turn(0.2)
    assert scene.attempt() is None, "it is given a while"
    scene.turn(0.8)
    assert scene.attempt() == 2 and [ear.place for ear in scene.ears] == [0, 1, 1]
    assert scene.leader._places == {0: 0, 1: 2}


def test_asked_to_end_while_ranks_save_the_launch_ends_after_them(scene: Scene) -> None:
    scene.leader.take(2, {"asked": 2})
    scene.turn()
    assert scene.code() is None and scene.attempt() == 1
    scene.found(0, causes.PREEMPTED, 1)
    scene.found(1, causes.PREEMPTED, 1)
    scene.turn()
    assert scene.code() == 4


def test_a_spare_that_is_taken_away_ends_nothing(scene: Scene) -> None:
    scene.leader.take(2, {"asked": 2})
    scene.found(0, causes.fault("signal", "rank 0 was killed", rank=0, host="n0"), 1)
    scene.found(1, None, 1)
    scene.turn()
    scene.ready(0, 1)
    scene.turn()
    assert scene.code() is None and scene.attempt() == 2


def test_asked_between_attempts_nothing_is_started(scene: Scene) -> None:
    scene.found(0, causes.fault("signal", "rank 0 was killed", rank=0, host="n0"), 1)
    scene.found(1, None, 1)
    scene.leader.take(0, {"asked": 0})
    scene.leader.take(2, {"asked": 2})
    scene.turn()
    scene.ready(0, 1)
    scene.turn()
    assert scene.code() == 4


def test_wrong_numbers_count_against_the_node_of_the_rank_that_made_them(scene: Scene) -> None:
    for attempt in (1, 2):
        scene.found(1, causes.fault("mismatch", "rank 3 holds another weight", rank=3), attempt)
        scene.found(0, None, attempt)
        scene.turn()
        scene.ready(0, 1)
        scene.turn()
    assert scene.attempt() == 3 and scene.leader._places == {0: 0, 1: 2}, "after two the spare serves"


def test_a_failure_that_comes_back_is_tried_on_a_spare_before_the_launch_gives_up(scene: Scene) -> None:
    def hang(attempt: int) -> None:
        told = causes.fault("hang", "rank 2 made no progress in load", rank=2, host=f"n{scene.leader._places[1]}")
        scene.found(1 if attempt == 1 else 2, replace(told, fingerprint="hang, rank 2, load"), attempt)
        scene.found(0, None, attempt)
        scene.turn()
        scene.ready(0, 1, 2)
        scene.turn()

    hang(1)
    assert scene.attempt() == 2 and scene.leader._places == {0: 0, 1: 2}, "the spare is tried at once"
    hang(2)
    hang(3)
    assert scene.code() == 1, "there too, and again: it is not the node"


def test_replicas_that_differ_are_told_though_nobody_is_to_blame() -> None:
    mismatch = causes.fault("mismatch", "two replicas differ, and nothing says which is right")
    echo = causes.fault("exception", "rank 1 ended with exit code 1", rank=1)
    gone = causes.fault("store", "another rank is gone")
    assert causes.most_telling([echo, gone, mismatch]) is mismatch and causes.most_telling([gone, echo]) is echo


def test_a_file_system_that_stalls_costs_no_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled: list[float] = []

    def ranks(self: object, *told: object) -> None:
        stalled.append(time.monotonic())
        time.sleep(leader.LOST_S + 1.0)

    monkeypatch.setattr(records.Journal, "ranks", ranks)
    with launched(tmp_path / "run", 2) as launch:
        until(lambda: len(launch.places()) == 2)
        until(lambda: bool(stalled))
        time.sleep(leader.LOST_S + 1.0)
        assert [agent.met for agent in launch.agents] == [[(1, 0)], [(1, 1)]]


def test_a_spare_waits_until_the_others_have_saved(tmp_path: Path) -> None:
    with launched(tmp_path / "run", 3, spares=[2]) as launch:
        until(lambda: len(launch.places()) == 2)
        launch.agents[2].asked = True
        time.sleep(3.5)
        assert launch.agents[2].ended is None and len(launch.places()) == 2
        for agent in launch.agents[:2]:
            agent.fault = causes.PREEMPTED
        until(lambda: all(agent.ended for agent in launch.agents))
        assert {agent.ended.code for agent in launch.agents if agent.ended} == {4}


def test_words_that_come_when_the_others_have_left_are_written(scene: Scene, tmp_path: Path) -> None:
    for node in (0, 1):
        scene.found(node, causes.DONE, 1)
    scene.turn()
    assert scene.code() == 0
    for node in (1, 2):
        scene.leader.leave(node, "it has left")
    scene.turn()
    scene.leader.take(0, {"told": {"event": "end", "fields": {"text": "the run is done"}}})
    scene.leader.close()
    until(lambda: journal.read(tmp_path / "run")[-1]["text"] == "the run is done")


def cut_off_from(host: str, node: str) -> Cause:
    return causes.fault("node", f"{node} was cut off from {host}, which led the launch", host=host)


def faults(scene: Scene) -> list[tuple[int, str, str]]:
    lines = journal.read(scene.leader.facts.run_dir)
    return [(line["attempt"], line["kind"], line["node"]) for line in lines if line["event"] == "fault"]


def test_one_that_led_before_another_did_goes_on_from_what_the_other_decided(scene: Scene) -> None:
    scene.leader.leave(1, "cut off")
    scene.leader.leave(2, "cut off")  # n1 and n2 go on by themselves with attempt 2, led by n1, which is then lost
    scene.turn(0.1)
    memory = {**scene.leader._memory, "attempt": 2, "places": {0: 2, 1: 1}, "faults": {0: 1}}
    scene.leader.join(2, scene.ears[2], {"memory": memory})  # type: ignore[arg-type]
    scene.ready(0)
    scene.ready(2, cause=cut_off_from("n1", "n2"), attempt=2)
    scene.turn(leader.SETTLE_S + 0.5)
    assert scene.attempt() == 3 and scene.leader._policy.restarts == 1
    assert [scene.ears[node].place for node in (0, 2)] == [1, 0]
    until(lambda: read_exit(attempt_path(scene.leader.facts.run_dir, 2)) is not None)
    ended = read_exit(attempt_path(scene.leader.facts.run_dir, 2))
    assert ended is not None and (ended.kind, ended.host) == ("node", "n1")


def test_the_loss_of_a_leader_that_ran_no_rank_is_told(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run")
    memory = {**scene.leader._memory, "attempt": 4, "places": {0: 0, 1: 2}}
    scene.leader.leave(1, "lost")
    scene.leader.join(2, scene.ears[2], {"memory": memory})  # type: ignore[arg-type]
    for node in (0, 2):
        scene.ready(node, cause=cut_off_from("n1", f"n{node}"), attempt=4)
    while scene.attempt() is None:
        scene.turn(0.1)
    assert scene.attempt() == 5
    until(lambda: bool(faults(scene)))
    assert faults(scene) == [(4, "node", "n1")]


@pytest.mark.parametrize(("lost", "waits"), [("n0", False), ("n1", True)])
def test_the_leader_that_was_lost_is_not_waited_for_and_others_are(tmp_path: Path, lost: str, waits: bool) -> None:
    """n0 trained and is not there; it led, or another did."""
    scene = Scene(tmp_path / "run")
    memory = {**scene.leader._memory, "attempt": 4, "places": {0: 0, 1: 1}}
    scene.leader.leave(0, "lost")
    scene.leader.join(2, scene.ears[2], {"memory": memory})  # type: ignore[arg-type]
    until(lambda: scene.turn(0.01) or scene.leader._records.is_open)
    scene.join(2)
    for node in (1, 2):
        scene.ready(node, cause=cut_off_from(lost, f"n{node}"), attempt=4)
    scene.turn(leader.SETTLE_S / 2)
    assert scene.attempt() == (None if waits else 5)
    scene.turn(leader.SETTLE_S)
    assert scene.attempt() == 5


def test_an_attempt_is_judged_once_by_whom_ever(scene: Scene) -> None:
    """n0 led, was cut off, and comes back with what it remembers of before: n1 has judged meanwhile."""
    before = scene.leader._memory
    scene.leader.leave(0, "cut off")
    scene.found(1, None, 1)
    scene.turn()
    after = scene.leader._memory
    assert scene.leader._policy.restarts == 1 and scene.leader._faults == {0: 1}
    scene.leader.join(0, scene.ears[0], {"memory": before})  # type: ignore[arg-type]
    scene.ready(0, cause=cut_off_from("n1", "n0"), attempt=1)
    assert scene.leader._memory == after
    again = Leader(scene.leader.facts)
    again.join(2, scene.ears[2], {"memory": after})  # type: ignore[arg-type]
    again.join(0, scene.ears[0], {"memory": before})  # type: ignore[arg-type]
    again.take(0, {"ready": {"port": 1, "attempt": 1, "cause": cut_off_from("n1", "n0").to_dict(), "step": None}})
    assert again._judge_pending() and again._memory == after
    again.close()


def test_a_node_that_is_slow_to_end_its_ranks_is_left_out_and_not_blamed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "CONCLUDE_S", 0.2)
    scene.found(0, causes.fault("device", "rank 0: ECC", rank=0, host="n0"), 1)
    scene.turn(1.0)
    ended = read_exit(attempt_path(scene.leader.facts.run_dir, 1))
    assert ended is not None and (ended.kind, ended.host) == ("device", "n0")
    assert 0 in scene.leader._faults and 1 not in scene.leader._faults


def test_files_that_cannot_be_opened_end_the_launch_and_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", ".supervisor.lock")

    monkeypatch.setattr(records, "Journal", denied)
    monkeypatch.setattr(leader, "LEASE_S", 0.2)
    scene = Scene(tmp_path / "run")
    scene.ready(0, 1, 2)
    begun = time.monotonic()
    while scene.code() is None and time.monotonic() - begun < 20:
        scene.turn(0.05)
    assert scene.code() == 2 and scene.leader.final is not None and "Permission denied" in scene.leader.final.text


def test_a_run_directory_that_cannot_be_read_ends_the_launch_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(records, "attempts", gone)
    scene = Scene(tmp_path / "run", rejoin_s=1.0)
    scene.ready(0, 1, 2)
    scene.turn(2.0)
    assert scene.code() == 1 and scene.leader.final is not None and "was not read" in scene.leader.final.text


def test_a_node_that_joins_again_and_again_does_not_put_off_the_end_of_waiting(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run", rejoin_s=1.0)
    scene.ready(0, 1, 2)
    while scene.attempt() is None:
        scene.turn(0.05)
    scene.leader.leave(1, "gone")
    scene.leader.leave(2, "gone")
    scene.join(2)
    scene.found(0, None, 1)
    begun = time.monotonic()
    while scene.code() is None and time.monotonic() - begun < 5:
        scene.ready(0)
        scene.join(2)  # and never becomes ready
        scene.turn(0.1)
    assert scene.code() == 1 and time.monotonic() - begun < 3


def test_who_asked_to_end_and_comes_back_without_asking_is_chosen_again(scene: Scene) -> None:
    scene.leader.take(2, {"asked": 2})
    scene.leader.leave(2, "drained")
    scene.join(2)
    scene.leader.leave(1, "a cable")
    scene.found(0, None, 1)
    scene.ready(0, 2)
    scene.turn()
    assert scene.code() is None and scene.attempt() == 2
    scene.leader.take(0, {"asked": 0})
    scene.leader.leave(0, "cut off")
    scene.leader.join(0, scene.ears[0], {"asked": True})  # type: ignore[arg-type]
    assert scene.leader._asked == {0}
