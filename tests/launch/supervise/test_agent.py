"""The agent of one node, on ranks that train nothing: what it notices, what it does then, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.supervise import causes, heartbeats, journal, logs, processes
from launch.supervise import ranks as rank_module
from launch.supervise.agent import Agent, Work, asked_to_end
from launch.supervise.causes import Cause
from launch.supervise.node import Alone
from pretrain.attempt import Exit, read_exit
from pretrain.config_sections import LaunchSection
from pretrain.rundir import attempt_path, attempts
from tests.house.sources import HOME
from tests.launch.supervise import dummy
from tests.launch.supervise.scenes import wait_for

STEPS = 40


@dataclass
class Stage:
    """A run of ``dummy`` ranks in a folder."""

    folder: Path
    launch: LaunchSection

    @property
    def root(self) -> Path:
        return self.folder / "runs"

    def play(self, *faults: dict[str, Any], steps: int = STEPS, **more: Any) -> None:
        (self.folder / "play.json").write_text(json.dumps({"steps": steps, "faults": faults, **more}))

    def run(self, watch: Callable[[Agent], None] | None = None, ranks: int = 2, restarts: int = 10) -> int:
        others = set(psutil.Process().children(recursive=True))  # other tests' pools
        node = Alone(self.root, ranks, restarts)
        agent = Agent(Work(self.root, (str(self.root),), ranks, {}, self.launch), node)
        thread = threading.Thread(target=watch, args=(agent,)) if watch else None
        with asked_to_end(agent):
            if thread:
                thread.start()
            code = agent.run()
        if thread:
            thread.join()
        assert not set(psutil.Process().children(recursive=True)) - others, "no process is left behind"
        return code

    def done(self) -> list[tuple[int, int]]:
        """(attempt, step) as they were done."""
        path = self.folder / "done"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(attempt), int(step)) for attempt, step in map(str.split, lines)]

    def exit(self, attempt: int) -> Exit:
        found = read_exit(attempt_path(self.root, attempt))
        assert found is not None
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in journal.read(self.root) if line["event"] == name]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(processes, "MODULE", dummy.HERE)
    monkeypatch.setenv(dummy.VARIABLE, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    return Stage(tmp_path, LaunchSection())


def after(steps: int, stage: Stage, act: Callable[[Agent], None]) -> Callable[[Agent], None]:
    def watch(agent: Agent) -> None:
        wait_for(lambda: not agent.running or len(stage.done()) >= steps)
        act(agent)

    return watch


def fault(rank: int, step: int | str, what: str, times: int = 1) -> dict[str, Any]:
    return {"rank": rank, "step": step, "what": what, "times": times}


def test_a_run_that_goes_well_is_one_attempt_with_the_environment_of_torchrun(stage: Stage) -> None:
    stage.play(steps=3)
    assert stage.run(ranks=3) == 0
    assert stage.done() == [(1, 0), (1, 1), (1, 2)] and stage.exit(1).kind == "done"
    assert [line["event"] for line in journal.read(stage.root) if line["event"] != "spare_ready"] == [
        "start", "training", "end",
    ]  # fmt: skip
    for rank in range(3):
        text = logs.log_path(stage.root, 1, rank).read_text()
        assert text.split(" ", 1)[1] == f"out rank {rank} of 3\n"


TIMED_OUT = "watchdog: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE)"


def test_a_rank_that_nccl_ended_is_not_blamed_for_the_device_of_another_which_never_ends(stage: Stage) -> None:
    stage.play(fault(0, 5, TIMED_OUT), fault(1, 5, "device"))
    assert stage.run() == 0
    assert (stage.exit(1).kind, stage.exit(1).rank, stage.exit(1).cause) == ("device", 1, "uncorrectable ECC error")


def test_a_rank_that_said_why_it_failed_and_never_ends_is_not_waited_for(stage: Stage) -> None:
    stage.play(fault(1, 5, "device"))
    before = time.monotonic()
    assert stage.run() == 0
    assert stage.exit(1).kind == "device" and time.monotonic() - before < heartbeats.UNKNOWN_S


def test_ranks_that_lost_each_other_and_never_end_are_not_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "STARTING_S", 30.0)  # to tell it from
    monkeypatch.setattr(rank_module, "FOLLOW_S", 2.5)
    stage.play(fault(0, 5, "lost"), fault(1, 5, "lost"))
    assert stage.run() == 0
    ended = stage.exit(1)
    assert (ended.rank, ended.cause) == (None, "another rank is gone")


def test_a_rank_that_finds_no_device_after_a_restart_is_an_error_of_the_device_and_not_a_refusal(stage: Stage) -> None:
    stage.play(fault(0, 5, "SIGKILL"), fault(1, 6, "no device", times=2))
    assert stage.run() == 0
    found = [(stage.exit(attempt).kind, stage.exit(attempt).rank) for attempt in (1, 2, 3, 4)]
    assert found == [("signal", 0), ("device", 1), ("device", 1), ("done", None)], "never the same failure twice"
    assert "which has 1" in stage.exit(2).cause


def test_a_rank_that_nccl_ended_for_its_own_device_says_so_and_one_whose_peers_are_silent_blames_nobody(
    stage: Stage,
) -> None:
    ecc = "watchdog: CUDA error: uncorrectable ECC error encountered"
    stage.play(fault(0, 5, ecc), fault(0, 6, TIMED_OUT), fault(0, 7, "SIGABRT"))
    assert stage.run() == 0
    found = [(stage.exit(attempt).kind, stage.exit(attempt).rank) for attempt in (1, 2, 3)]
    assert found == [("device", 0), ("store", None), ("signal", 0)]
    assert "cudaErrorECCUncorrectable" in stage.exit(1).cause and "collective operation timeout" in stage.exit(2).cause


NOTICED = {
    "killed": ("SIGKILL", "signal", "rank 1 was killed by SIGKILL"),
    "crashed": ("SIGSEGV", "signal", "rank 1 was killed by SIGSEGV"),
    "stopped": ("SIGSTOP", "stopped", "the process of rank 1 was stopped"),
    "raised": ("exception", "exception", "cosmic ray"),
    "left": ("exit", "exception", "rank 1 ended with exit code 7: going home"),
}


@pytest.mark.parametrize("how", NOTICED)
def test_a_rank_that_is_lost_is_named_and_the_run_goes_on_from_where_it_was(how: str, stage: Stage) -> None:
    what, kind, cause = NOTICED[how]
    stage.play(fault(1, 7, what))
    assert stage.run() == 0
    ended = stage.exit(1)
    assert (ended.kind, ended.rank, ended.step) == (kind, 1, 7) and cause in ended.cause
    assert stage.exit(2).kind == "done" and attempts(stage.root) == [1, 2]
    assert [step for _, step in stage.done()] == list(range(STEPS)), "no step is lost, and none done twice"
    (found,) = stage.events("fault")
    assert (found["rank"], found["kind"], found["attempt"]) == (1, kind, 1)
    assert [line["attempt"] for line in stage.events("training") if "seconds" in line] == [2]


@pytest.mark.parametrize("what", ["asleep", "interpreter locked"])
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it_and_leaves_its_stack(
    what: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "FIRST_S", 1.0)
    monkeypatch.setattr(heartbeats, "LEAST_S", 1.0)
    stage.play(fault(1, 30, what))
    assert stage.run() == 0
    ended = stage.exit(1)
    assert (ended.kind, ended.rank, ended.step) == ("hang", 1, 30)
    assert "in compute of step 30, at strike (tests/launch/supervise/dummy.py:" in ended.cause
    assert list(ended.stacks) == ["logs/0001/stack_00000.txt", "logs/0001/stack_00001.txt"]
    assert "in strike" in (stage.root / ended.stacks[1]).read_text()
    assert "in all_reduce" in (stage.root / ended.stacks[0]).read_text()
    assert [step for _, step in stage.done()] == list(range(STEPS))
    assert not logs.stack_path(stage.root, 2, 0).exists(), "stacks that were not asked for leave no empty file"


def test_the_same_failure_twice_stops_the_run_and_says_so(stage: Stage) -> None:
    stage.play(fault(0, 5, "exception", times=100))
    assert stage.run() == 1
    assert attempts(stage.root) == [1, 2]
    (stop,) = stage.events("stop")
    assert stop["text"] == "the same failure twice, so it is not started again: rank 0: cosmic ray"


def test_an_exception_that_comes_back_at_another_step_is_another_failure(stage: Stage) -> None:
    stage.play(fault(0, 5, "exception"), fault(0, 9, "exception"), fault(0, 10, "exception"))
    assert stage.run() == 0 and attempts(stage.root) == [1, 2, 3, 4]


def test_a_refusal_is_never_tried_again_and_its_attempt_says_so_though_it_was_never_begun(stage: Stage) -> None:
    stage.play(fault(0, "start", "refuse", times=9), fault(1, "start", "refuse", times=9))
    assert stage.run() == 2
    ended = stage.exit(1)
    assert attempts(stage.root) == [1] and (ended.kind, ended.cause) == ("refused", "no such thing")


def test_restarts_end_at_the_number_that_was_given(stage: Stage) -> None:
    stage.play(*(fault(0, step, "SIGKILL") for step in (5, 10, 15)))
    assert stage.run(restarts=2) == 1
    assert attempts(stage.root) == [1, 2, 3] and "after 2 restarts" in stage.events("stop")[0]["text"]


def test_asked_to_end_the_ranks_save_and_the_code_is_4(stage: Stage) -> None:
    stage.play(step_s=0.05)
    assert stage.run(after(5, stage, lambda agent: os.kill(os.getpid(), signal.SIGUSR1))) == 4
    ended = stage.exit(1)
    assert ended.kind == "preempted" and ended.cause == f"step {len(stage.done())} is saved"
    assert 5 <= len(stage.done()) < STEPS and attempts(stage.root) == [1]


@pytest.mark.parametrize("late", [True, False])
def test_ranks_that_saved_are_believed_though_nobody_sees_what_rank_0_wrote(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Another node's file system shows it late, or never."""
    monkeypatch.setattr(rank_module, "FOLLOW_S", 1.5)
    told, begun = causes.said, time.monotonic()

    def said(run_dir: Path, attempt: int) -> Cause | None:
        ended = time.monotonic() - begun > 1.0 and late
        return told(run_dir, attempt) if ended else None

    def ask(agent: Agent) -> None:
        nonlocal begun
        begun = time.monotonic()
        agent.ask_to_end()

    monkeypatch.setattr(causes, "said", said)
    stage.play(step_s=0.05, steps=10_000)
    assert stage.run(after(5, stage, ask)) == 4
    assert stage.exit(1).kind == "preempted"


def test_ranks_that_do_not_end_are_killed_after_the_grace_and_at_once_when_asked_again(stage: Stage) -> None:
    """Killed, the code is 4 where the launch has saved a checkpoint, and else that of a fault: a scheduler that queues
    a 4 again would do so for ever."""
    stage.launch = LaunchSection(grace_s=0.5)
    stage.play(deaf=True, steps=10_000)
    assert stage.run(after(5, stage, lambda agent: agent.ask_to_end())) == 1
    cause = stage.exit(1).cause
    assert "after launch.grace_s=0.5 s" in cause and "has saved nothing" in cause

    def twice(agent: Agent) -> None:
        (committed := stage.root / "checkpoints" / "step_00000005").mkdir(parents=True)
        (committed / "COMMIT").touch()
        agent.ask_to_end()
        agent.ask_to_end()

    stage.launch = LaunchSection(grace_s=600)
    begun = time.monotonic()
    assert stage.run(after(len(stage.done()) + 3, stage, twice)) == 4
    assert "at once; step 5 is saved" in stage.exit(2).cause and time.monotonic() - begun < 60


def test_what_a_rank_has_started_ends_with_it(stage: Stage) -> None:
    stage.play(fault(1, 3, "child"))
    assert stage.run() == 0
    child = int((stage.folder / "child_1").read_text())
    wait_for(lambda: not alive(child), within_s=10)


def test_the_kernel_ends_ranks_and_spares_when_the_agent_is_killed(stage: Stage) -> None:
    stage.play(steps=100_000)
    program = (
        "import sys; from pathlib import Path; from launch.supervise import processes\n"
        "from launch.supervise.agent import Agent, Work; from launch.supervise.node import Alone\n"
        "from pretrain.config_sections import LaunchSection; from tests.launch.supervise import dummy\n"
        "processes.MODULE = dummy.HERE; root = Path(sys.argv[1])\n"
        "Agent(Work(root, (str(root),), 2, {}, LaunchSection()), Alone(root, 2, 3)).run()\n"
    )
    shared = set(os.listdir("/dev/shm"))
    agent = subprocess.Popen([sys.executable, "-c", program, str(stage.root)], cwd=HOME)
    try:
        wait_for(lambda: len(stage.events("spare_ready")) == 2)
        family = psutil.Process(agent.pid).children(recursive=True)
        assert len(family) == 4, "two ranks and two spares"
    finally:
        agent.kill()
        agent.wait()
    wait_for(lambda: not any(alive(process.pid) for process in family), within_s=10)
    assert set(os.listdir("/dev/shm")) <= shared, "no shared memory is left"
    stage.play(steps=len(stage.done()) + 5)
    assert stage.run() == 0, "the same command goes on: no lock is left"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_no_secret_reaches_logs_journal_or_exit(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_KEY", "canary-canary-canary")
    stage.play(fault(1, 3, "secret"))
    assert stage.run() == 0
    written = [path.read_text(errors="replace") for path in stage.root.rglob("*") if path.is_file()]
    assert any("the key is ***" in text for text in written) and not any("canary" in text for text in written)


def test_spares_are_made_once_training_goes_on_and_take_over_without_a_new_start(stage: Stage) -> None:
    stage.play(step_s=0.02, steps=300)
    seen: list[set[int]] = []
    others = set(psutil.Process().children())

    def kill(agent: Agent) -> None:
        wait_for(lambda: len(stage.events("spare_ready")) == 2)
        family = {process.pid for process in set(psutil.Process().children()) - others}
        seen.append(family - set(agent.pids().values()))
        agent.signal(1, signal.SIGKILL)
        wait_for(lambda: len(stage.events("training")) == 2)
        seen.append(set(agent.pids().values()))
        stage.play(steps=0)
        agent.ask_to_end()

    assert stage.run(kill) == 4
    spares, ranks = seen
    assert len(spares) == 2 and ranks == spares


@pytest.mark.parametrize("spares", [True, False])
def test_spares_are_not_made_where_they_are_not_wanted(spares: bool, stage: Stage) -> None:
    stage.launch = LaunchSection(warm_spares=spares)
    stage.play(step_s=0.02)
    assert stage.run() == 0
    assert bool(stage.events("spare_ready")) == spares


def test_where_the_ranks_stand_can_be_read_while_they_train(stage: Stage) -> None:
    stage.play(steps=100_000)
    found: list[Any] = []

    def look(agent: Agent) -> None:
        wait_for(lambda: (state := journal.read_ranks(stage.root)) is not None and bool(state["ranks"][0]["step"]))
        found.append(journal.read_ranks(stage.root))
        agent.kill()

    assert stage.run(look) == 1
    (state,) = found
    assert state["state"] in ("starting", "running") and state["pid"] == os.getpid() and state["attempt"] == 1
    assert [rank["rank"] for rank in state["ranks"]] == [0, 1]
    assert all(rank["alive"] and rank["rss_bytes"] > 1e6 and rank["age_s"] < 60 for rank in state["ranks"])
    ended = journal.read_ranks(stage.root)
    assert ended is not None and ended["state"] == "ended"


def test_a_second_supervisor_of_a_run_is_refused(stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
    from stoker.errors import Refusal

    with journal.Journal(stage.root), pytest.raises(Refusal, match=rf"supervised by process {os.getpid()} on"):
        Alone(stage.root, 2, 0)
