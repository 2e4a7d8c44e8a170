"""Pods that are started again: node programs as processes on loopback, with the environment that a JobSet gives."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from launch.launching.folder import Folder
from launch.launching.job import CONFIG, JOB
from launch.preflight.shared import FOLDER, VERDICT
from launch.supervise import journal, outcome
from pretrain.rundir import attempts
from tests.house.sources import HOME
from tests.launch.launching import program
from tests.launch.launching.jobs import prepared
from tests.launch.supervise import dummy
from tests.launch.supervise.scenes import wait_for
from tests.launch.tiny import tiny

UID = "0e6f0b3c-5d5f-4e5a-9a53-1f6f3c1f2a77"
STEPS = 150


def ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        first = random.randrange(20_000, 30_000)
        with suppress(OSError), ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


@dataclass
class Pods:
    """Two nodes of a rank each, and ``spares``."""

    folder: Path
    spares: int = 0
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        play = {"steps": STEPS, "step_s": 0.03, "faults": []}
        (self.folder / "play.json").write_text(json.dumps(play))
        spare = f"launch.spare_nodes={self.spares}"
        ready = prepared(spare, config=str(tiny(self.folder)), hardware="cpu", nodes=2, ranks=1)
        self.run_dir = ready.config.run_dir
        launch = Folder.next(self.run_dir)
        launch.make()
        hosts = tuple(f"127.0.0.{index + 1}" for index in range(2 + self.spares))
        job = replace(ready.job("tiny", launch.path, launch.number, hosts=hosts), port=ports(len(hosts)))
        (launch.path / CONFIG).write_text(ready.config.masked().to_yaml())
        self.job = launch.path / JOB
        self.job.write_text(job.to_json())
        self.port = job.port

    def start(self, index: int) -> subprocess.Popen[str]:
        pod = {"JOB_COMPLETION_INDEX": str(index), "STOKER_DOMAIN": "0", "STOKER_START": "0", "STOKER_SET": UID}
        argv = [sys.executable, "-m", program.HERE, str(self.job)]
        with open(self.folder / f"said_{index}", "a") as said:
            process = subprocess.Popen(
                argv, cwd=self.folder, stdout=said, stderr=said, text=True,
                env={**os.environ, **pod, dummy.VARIABLE: str(self.folder), "PYTHONPATH": str(HOME)},
            )  # fmt: skip
        self.started.append(process)
        return process

    def steps(self) -> list[int]:
        path = self.folder / "done"
        return [int(line.split()[1]) for line in path.read_text().splitlines()] if path.exists() else []

    def code(self, process: subprocess.Popen[str]) -> int:
        wait_for(lambda: process.poll() is not None)
        return process.returncode

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("said_*")))

    def wait(self, condition: Callable[[], bool]) -> None:
        wait_for(lambda: condition() or any(process.poll() is not None for process in self.started))
        assert condition(), self.said()


@pytest.fixture
def pods(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pods]:
    made = Pods(tmp_path, getattr(request, "param", 0))
    yield made
    for process in made.started:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_pod_that_is_killed_joins_the_launch_that_runs(lost: int, pods: Pods) -> None:
    both = [pods.start(0), pods.start(1)]
    pods.wait(lambda: len(pods.steps()) >= 5)
    verdict = (pods.run_dir / FOLDER / f"{UID}-0.g0" / VERDICT).read_bytes()
    both[lost].kill()
    both[lost].wait()
    pods.started.remove(both[lost])
    both[lost] = pods.start(lost)
    assert [pods.code(process) for process in both] == [0, 0], pods.said()
    assert sorted(set(pods.steps())) == list(range(STEPS)) and attempts(pods.run_dir) == [1, 2]
    assert (pods.run_dir / FOLDER / f"{UID}-0.g0" / VERDICT).read_bytes() == verdict
    assert outcome.ended(pods.run_dir, f"{UID}-0.g0") == 0
    assert journal.read(pods.run_dir)[-1]["event"] == "end"
    assert not list((pods.run_dir / ".launch").glob("*.token"))
    again = pods.start(lost)
    assert pods.code(again) == 0 and "has ended with 0" in pods.said() and attempts(pods.run_dir) == [1, 2]


def test_pods_that_have_saved_go_on_in_a_launch_of_their_own(pods: Pods) -> None:
    both = [pods.start(0), pods.start(1)]
    pods.wait(lambda: len(pods.steps()) >= 5)
    both[1].send_signal(signal.SIGTERM)
    assert [pods.code(process) for process in both] == [4, 4], pods.said()
    pods.started.clear()
    saved = len(pods.steps())
    assert outcome.ended(pods.run_dir, f"{UID}-0.g0") == 4 and saved < STEPS
    both = [pods.start(1), pods.start(0)]
    assert [pods.code(process) for process in both] == [0, 0], pods.said()
    assert pods.steps() == list(range(STEPS)) and attempts(pods.run_dir) == [1, 2]
    assert outcome.ended(pods.run_dir, f"{UID}-0.g1") == 0 and outcome.ended(pods.run_dir, f"{UID}-0.g0") == 4
    assert {path.name for path in (pods.run_dir / FOLDER).iterdir()} == {f"{UID}-0.g0", f"{UID}-0.g1"}


@pytest.mark.parametrize("pods", [1], indirect=True)
def test_a_pod_that_cannot_join_ends_nothing_and_ends_like_the_others(pods: Pods) -> None:
    """Its exit code, 2 before, would end the whole set."""
    all_three = [pods.start(index) for index in range(3)]
    pods.wait(lambda: len(pods.steps()) >= 5)
    all_three[2].kill()
    all_three[2].wait()
    pods.started.remove(all_three[2])
    with socket.create_server(("127.0.0.3", pods.port + 2)):  # of somebody else
        all_three[2] = pods.start(2)
        pods.wait(lambda: "127.0.0.3 takes no part" in pods.said())
        assert "cannot listen" in pods.said() and outcome.ended(pods.run_dir, f"{UID}-0.g0") is None
        assert [pods.code(process) for process in all_three] == [0, 0, 0], pods.said()
    assert pods.steps() == list(range(STEPS)) and attempts(pods.run_dir) == [1]
