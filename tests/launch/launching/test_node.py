"""The program of a node: what it does before there are ranks, and what it hands to the agent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.launching import node
from launch.launching.folder import Folder
from launch.launching.job import CONFIG, JOB, Job
from launch.launching.slurm import submission
from launch.launching.where import Where
from launch.preflight import run, shared
from launch.preflight.report import Finding, Report, Verdict
from launch.supervise import outcome
from launch.supervise.nodes import Several
from pretrain.config import RunConfig, load
from stoker.errors import Refusal
from tests.launch.launching.jobs import prepared
from tests.launch.tiny import tiny

HOME = Path(__file__).parents[3]


def written(folder: Path, *overrides: str, **changed: Any) -> Path:
    """A launch.json of one node as ``submit`` writes it."""
    ready = prepared(*overrides, config=str(tiny(folder)), hardware="cpu", nodes=1, ranks=2)
    launch = Folder.next(ready.config.run_dir)
    submitted = submission(ready, launch)
    launch.make()
    (launch.path / CONFIG).write_text(submitted.config)
    (launch.path / JOB).write_text(replace(submitted.job, directory=str(folder), **changed).to_json())
    return launch.path / JOB


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the agent would be started with; the preflight finds nothing."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(node, "_fit", lambda config, job, here: here.hosts)
    monkeypatch.setattr(node, "_supervise", lambda *given: calls.append(given) or 3)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return calls


def test_the_agent_gets_the_configuration_with_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: list[tuple[Any, ...]]
) -> None:
    path = written(tmp_path, environment={"NCCL_DEBUG": "WARN", "HOME": "/not/this"})
    monkeypatch.chdir("/")
    monkeypatch.setenv("STOKER_CONFIG_SECRET", json.dumps({"launch.webhook": "https://x.example/canary"}))
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    before = os.environ["HOME"]
    assert node.main([str(path)]) == 3
    ((config, arguments, job, here, good),) = called
    assert config.launch.webhook == "https://x.example/canary" and arguments[0] == job.config
    assert Path.cwd() == tmp_path and good == here.hosts and here.index == 0
    assert os.environ["NCCL_DEBUG"] == "WARN" and os.environ["HOME"] == before
    monkeypatch.delenv("NCCL_DEBUG")


def test_what_is_not_there_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], called: list[tuple[Any, ...]]
) -> None:
    assert node.main([str(tmp_path / "absent.json")]) == 2
    assert "shared path" in capfd.readouterr().err
    path = written(tmp_path)
    gone = replace(Job.read(path), directory=str(tmp_path / "gone"))
    path.write_text(gone.to_json())
    assert node.main([str(path)]) == 2
    assert "where `stoker launch` was called" in capfd.readouterr().err
    assert node.main([]) == 2 and not called


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end_before_ranks_have_begun_it_has_saved_nothing_and_says_so(
    tmp_path: Path, number: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "launch.json")  # whose reader waits
    argv = [sys.executable, "-m", "launch.launching.node", str(tmp_path / "launch.json")]
    process = subprocess.Popen(argv, cwd=HOME, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not handled(process.pid, number):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 4 and number.name in said


def handled(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc(5), SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_node_without_numactl_says_what_that_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = replace(Job.read(written(tmp_path)), ranks_per_numa=1)
    monkeypatch.setenv("PATH", "")
    assert node._prefixes(job) == () and "numactl" in capfd.readouterr().err
    (tmp_path / "numactl").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    bound = [("numactl", "--cpunodebind=0", "--membind=0"), ("numactl", "--cpunodebind=1", "--membind=1")]
    assert list(node._prefixes(job)) == bound and node._prefixes(replace(job, ranks_per_numa=None)) == ((), ())


def preflight_of(monkeypatch: pytest.MonkeyPatch, good: tuple[str, ...], own: Finding) -> None:
    """What the preflight of this node, n2 of three of which two are needed, says."""
    excluded = {name: "12 bit errors" for name in ("n1", "n2", "n3") if name not in good}
    verdict = Verdict(good, excluded, needed=2, total=3, warnings=("drivers differ",))
    aside = None if verdict.trouble or "n2" in good else excluded["n2"]
    monkeypatch.setattr(run, "preflight", lambda config, ranks, launch: Report("n2", (own,), 0.1, verdict, aside))


def test_a_node_that_is_not_fit_leaves_the_run_to_a_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = replace(Job.read(written(tmp_path)), spares=2)
    config = load(job.config)
    here = Where(1, ("n1", "n2", "n3"), ("n1", "n2", "n3"), "7-0")
    preflight_of(monkeypatch, ("n1", "n3"), Finding("memory", "refuse", "12 bit errors"))
    assert node._fit(config, job, here) is None
    assert "n2 takes no part: 12 bit errors" in capfd.readouterr().err
    preflight_of(monkeypatch, ("n1", "n2", "n3"), Finding("numa", "warn", "slow"))
    assert node._fit(config, job, here) == ("n1", "n2", "n3")
    assert "n2: numa: slow" in capfd.readouterr().err
    preflight_of(monkeypatch, ("n1",), Finding("memory", "refuse", "12 bit errors"))
    with pytest.raises(Refusal, match="12 bit errors"):
        node._fit(config, job, here)


class Ends:
    """An agent that is asked by ``signals`` and ends by ``code``; ``nodes`` are those that agents were given."""

    def __init__(self, code: int, signals: Sequence[signal.Signals] = ()) -> None:
        self.code, self.signals = code, signals
        self.nodes: list[Any] = []
        self._asked = 0
        self.decision = SimpleNamespace(text="no node leads")

    def __call__(self, work: object, node: Any) -> Ends:
        self.nodes.append(node)
        return self

    def run(self) -> int:
        for number in self.signals:
            signal.raise_signal(number)
        return self.code

    def ask_to_end(self) -> None:
        self._asked += 1

    @property
    def asked(self) -> bool:
        return self._asked > 0


ASKED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)


def supervised(folder: Path, monkeypatch: pytest.MonkeyPatch, agent: Ends, alone: bool, **pod: bool) -> int | None:
    """What the part of n2 in a launch comes to, which ended ``alone`` or with the others."""
    own = Several.__new__(Several)
    own.alone = alone
    monkeypatch.setattr("launch.supervise.agent.Agent", agent)
    monkeypatch.setattr(node, "_node", lambda *given: own)
    job = replace(Job.read(written(folder)), spares=1)
    here = Where(1, ("n1", "n2"), ("n1", "n2"), "uid-0.g0", **pod)
    return node._supervise(load(job.config), [], job, here, here.hosts)


def test_the_agent_is_asked_once_however_often_the_scheduler_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in ASKED]
    agent = Ends(0, ASKED)
    assert supervised(tmp_path, monkeypatch, agent, alone=False) == 0
    assert agent._asked == 1 and [signal.getsignal(number) for number in ASKED] == before


@pytest.mark.parametrize("code", [1, 2, 4])
def test_an_end_that_a_pod_came_to_alone_is_not_that_of_a_launch_which_others_lead(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "_led", lambda run_dir, launch: True)
    ends = partial(supervised, tmp_path, monkeypatch)
    assert ends(Ends(code), alone=True, comes_back=True) is None
    assert "n2 takes no part, and waits for the end of the launch: no node leads" in capfd.readouterr().err
    assert ends(Ends(code, ASKED), alone=True, comes_back=True) == 4
    assert ends(Ends(code), alone=False, comes_back=True) == code
    assert ends(Ends(code), alone=True) == code, "on Slurm it does not count against the others"
    monkeypatch.setattr(node, "_led", lambda run_dir, launch: False)
    assert ends(Ends(code), alone=True, comes_back=True) == code, "nobody leads"


def test_a_launch_was_led_where_somebody_said_after_the_verdict_where_ranks_stand(tmp_path: Path) -> None:
    verdict, ranks = tmp_path / shared.FOLDER / "l" / shared.VERDICT, tmp_path / "ranks.json"
    verdict.parent.mkdir(parents=True)
    assert not node._led(tmp_path, "l")
    ranks.touch()
    assert not node._led(tmp_path, "l")
    verdict.touch()
    os.utime(ranks, (1, 1))
    assert not node._led(tmp_path, "l"), "those of the launch before"
    ranks.touch()
    assert node._led(tmp_path, "l") and not node._led(tmp_path, "k")


@dataclass
class Pod:
    """A node program that a JobSet has started, of a launch that goes on as ``plays`` say: what the others do while
    this one takes no part."""

    path: Path
    run_dir: Path
    plays: list[Callable[[], None]] = field(default_factory=list)
    supervised: list[str] = field(default_factory=list)

    def ends(self, number: int, code: int) -> Callable[[], None]:
        return lambda: outcome.record(self.run_dir, f"uid-0.g{number}", code)


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pod:
    path = written(tmp_path)
    made = Pod(path, load(Job.read(path).config).run_dir)
    here = Where(0, ("n1",), ("n1",), "uid-0", comes_back=True)

    def supervise(config: RunConfig, arguments: list[str], job: Job, here: Where, good: tuple[str, ...]) -> int:
        made.supervised.append(here.start)
        return 4

    monkeypatch.setattr("launch.launching.where.where", lambda job, environment: here)
    monkeypatch.setattr(node, "_fit", lambda config, job, here: None if made.plays else here.hosts)
    monkeypatch.setattr(node, "_supervise", supervise)
    monkeypatch.setattr(node, "time", SimpleNamespace(sleep=lambda seconds: made.plays.pop(0)()))
    return made


@pytest.mark.parametrize("end", [None, Refusal("n1 cannot listen"), OSError(5, "Input/output error")])
def test_a_pod_that_is_cut_off_tries_again_and_ends_no_launch_that_is_led(
    end: Exception | None, pod: Pod, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once a minute, where the launch counts on it; and its code is in the end that of the others."""
    ends = [end, end, 3]

    def supervise(*given: object) -> int | None:
        if isinstance(now := ends.pop(0), Exception):
            raise now
        return now

    led, counts = [True], [True]
    monkeypatch.setattr(node, "_led", lambda run_dir, launch: led[0])
    monkeypatch.setattr(shared, "goes_on", lambda launch, run_dir, host: counts[0] and host == "n1")
    monkeypatch.setattr(node, "_supervise", supervise)
    monkeypatch.setattr(node, "_fit", lambda config, job, here: here.hosts)
    looks = round(node.AGAIN_S / node.LOOK_S)
    pod.plays = [lambda: None] * (2 * looks)
    assert node.run(str(pod.path)) == 3 and not pod.plays and not ends
    said = capfd.readouterr().err
    assert said.count("n1 takes no part, and waits") == (0 if end is None else 2) and str(end or "") in said
    ends[:], counts[0] = [end], False
    pod.plays = [*[lambda: None] * (2 * looks), pod.ends(0, 1)]
    assert node.run(str(pod.path)) == 1 and not pod.plays, "it tries no more"
    ends[:], led[0] = [OSError("nobody leads")], False
    (pod.run_dir / ".launch/uid-0.g0.ended").unlink()
    with pytest.raises(OSError, match="nobody leads"):
        node.run(str(pod.path))


def test_a_pod_that_takes_no_part_waits_for_the_end_and_ends_like_the_others(pod: Pod) -> None:
    pod.plays = [lambda: None, lambda: None, pod.ends(0, 3)]
    assert node.run(str(pod.path)) == 3 and not pod.supervised and not pod.plays


def test_a_pod_that_took_no_part_may_take_it_in_the_next_launch(pod: Pod) -> None:
    pod.plays = [pod.ends(0, 4)]
    assert node.run(str(pod.path)) == 4 and pod.supervised == ["uid-0.g1"]


def test_a_pod_that_the_others_count_on_joins_them_as_soon_as_it_is_fit(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "goes_on", lambda launch, run_dir, host: (launch, host) == ("uid-0.g0", "n1"))
    looks = round(node.AGAIN_S / node.LOOK_S)
    pod.plays = [lambda: None] * (2 * looks)
    assert node.run(str(pod.path)) == 4 and not pod.plays and pod.supervised == ["uid-0.g0"]


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_a_pod_that_comes_when_all_is_over_returns_what_the_others_did(pod: Pod, code: int) -> None:
    outcome.record(pod.run_dir, "uid-0.g0", 4)
    outcome.record(pod.run_dir, "uid-0.g1", code)
    assert node.run(str(pod.path)) == code and not pod.supervised


def test_on_slurm_a_node_that_takes_no_part_leaves_and_no_launch_follows(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Where(0, ("n1",), ("n1",), "1-7-0")
    monkeypatch.setattr("launch.launching.where.where", lambda job, environment: slurm)
    pod.plays = [lambda: None]
    assert node.run(str(pod.path)) == 0 and len(pod.plays) == 1
    outcome.record(pod.run_dir, "1-7-0", 4)
    assert node.run(str(pod.path)) == 4 and not pod.supervised


def test_a_pod_that_cannot_begin_does_not_end_a_launch_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuses(config: RunConfig, ranks: int, launch: object) -> Report:
        raise Refusal("no such plan")

    job = replace(Job.read(written(tmp_path)), spares=1)
    config = load(job.config)
    monkeypatch.setattr(run, "preflight", refuses)
    here = Where(0, ("n1", "n2"), ("n1", "n2"), "uid-0.g0", comes_back=True)
    with pytest.raises(Refusal, match="no such plan"):  # all nodes begin, or none
        node._fit(config, job, here)
    monkeypatch.setattr(shared, "goes_on", lambda launch, run_dir: (launch, run_dir) == (here.start, config.run_dir))
    assert node._fit(config, job, here) is None
    assert "n1 takes no part, and waits for the end of the launch: no such plan" in capfd.readouterr().err
    with pytest.raises(Refusal, match="no such plan"):
        node._fit(config, job, replace(here, comes_back=False))
