"""A run in processes of its own, watched and struck from outside; and what it has left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from launch.supervise import journal
from launch.supervise.journal import LOCK
from pretrain.events import METRICS
from pretrain.heartbeat import Pulse
from stoker.files import read_jsonl
from tests.faults import rank as ranks_module
from tests.faults.box import Box, Network
from tests.faults.memory import Group
from tests.house.sources import HOME

#: Seconds of a step while a fault is being prepared (three are a hang in a phase that is short otherwise, unless the
#: run says what is one), and once it has struck.
WAITING_S, LONG_WAITING_S, STRIKING_S = 2.5, 120.0, 0.05
CHECKPOINT_EVERY, EVALUATE_EVERY = 4, 6
#: What the undisturbed run and every disturbed one have in common. No checkpoint is deleted: all are looked at.
OVERRIDES = (
    f"checkpoint.every={CHECKPOINT_EVERY}", f"eval.every={EVALUATE_EVERY}", "checkpoint.keep_last=100000",
    "log.every=100000",
)  # fmt: skip
#: Seconds that anything may take on a machine that does other things as well, before a test gives up.
LONG_S = 300.0


@dataclass
class Strike:
    """A fault as it was done: what must be said of it, and when it was (``time.time``; None: it is not timed)."""

    fault: str
    kinds: tuple[str, ...]
    rank: int | None
    attempt: int
    at: float | None = None
    host: str | None = None
    #: Seconds until the supervisor said so, and until the first step was done again.
    noticed_s: float | None = None
    training_s: float | None = None


@dataclass
class Run:
    """``config`` of a tiny model, ``folder`` of its history. On one node in ``box`` (None: no namespaces here), in a
    control ``group`` of memory where there is one."""

    config: Path
    name: str
    steps: int
    ranks: int = 2
    overrides: Sequence[str] = ()
    box: Box | None = None
    group: Group | None = None
    strikes: list[Strike] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    remembered: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def root(self) -> Path:
        return self.config.parent / "runs" / self.name

    @property
    def folder(self) -> Path:
        return self.config.parent / "history" / self.name

    @property
    def arguments(self) -> list[str]:
        return [*OVERRIDES, f"run.steps={self.steps}", f"run.name={self.name}", *self.overrides]

    def start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "tests.faults.program", str(self.ranks), str(self.config), *self.arguments]
        return self.spawn(argv if self.box is None else self.box.command(argv), "output.txt")

    def spawn(self, argv: Sequence[str], output: str, **more: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, ranks_module.FOLDER: str(self.folder), **self.environment, **more}
        with open(self.folder / output, "ab") as file:
            process = subprocess.Popen(
                argv, cwd=HOME, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self.processes.append(process)
        if self.group is not None:
            self.group.take(process.pid)
        return process

    def ask_to_end(self) -> None:
        """Tell every program that still runs to save and end, as a scheduler does."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def ended(self, within_s: float = LONG_S) -> int:
        """The exit code of the run, waiting for it."""
        try:
            return self.processes[-1].wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end within {within_s:.0f} s:\n{self.output()}") from None

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self.folder.glob("*.txt")))

    def close(self) -> None:
        """End what is left of it, whatever that is."""
        for process in self.family():
            process.kill()
        for process in self.processes:
            process.wait()

    def family(self) -> list[psutil.Process]:
        """Every process of the run, whoever its parent is now: each has the history's folder in its environment."""
        mark = f"{ranks_module.FOLDER}={self.folder}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(path.parent.name)))
            except (OSError, psutil.NoSuchProcess):
                continue
        return [process for process in found if process.pid != os.getpid()]

    def wait(self, condition: Callable[[], bool], what: str, within_s: float = LONG_S) -> None:
        until = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < until, f"waited {within_s:.0f} s for {what}:\n{self.output()}"
            alive = any(process.poll() is None for process in self.processes)
            assert alive or condition(), f"the run ended before {what}:\n{self.output()}"
            time.sleep(0.005)

    def pace(self, seconds: float) -> None:
        self._write("pace", str(seconds))

    def _write(self, name: str, text: str) -> None:
        (self.folder / f".{name}").write_text(text)
        (self.folder / f".{name}").rename(self.folder / name)

    # What is known of it from outside.

    def journal(self, event: str | None = None) -> list[dict[str, Any]]:
        return [line for line in journal.read(self.root) if event in (None, line["event"])]

    def lines(self) -> list[dict[str, Any]]:
        return read_jsonl(self.root / METRICS) if (self.root / METRICS).exists() else []

    def history(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"steps_{rank}.jsonl"
        return read_jsonl(path) if path.exists() else []

    @property
    def attempt(self) -> int:
        """The newest attempt in which a rank has begun."""
        return max((int(path.name.split("_")[1]) for path in self.folder.glob("pid_*")), default=0)

    def begun(self, rank: int) -> int:
        """The newest attempt in which this rank has begun."""
        return max((int(path.name.split("_")[1]) for path in self.folder.glob(f"pid_*_{rank}")), default=0)

    def pid(self, rank: int) -> int:
        """The process of a rank, in the newest attempt in which it has begun."""
        return int((self.folder / f"pid_{self.begun(rank)}_{rank}").read_text())

    def pulse(self, rank: int) -> Pulse:
        """The heartbeat of a rank, as its agent reads it."""
        for path in Path(f"/proc/{self.pid(rank)}/fd").iterdir():
            if "stoker-heartbeat" in os.readlink(path):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    return Pulse(descriptor)
                finally:
                    os.close(descriptor)
        raise FileNotFoundError(f"rank {rank} has no heartbeat")

    def trained(self, attempt: int) -> bool:
        """Every rank has done a step in this attempt."""
        return all((self.folder / f"trained_{attempt}_{rank}").exists() for rank in range(self.ranks))

    def wait_until_warm(self) -> int:
        """Until the newest attempt trains and every rank has a spare that waits; the attempt. Steps are slow
        meanwhile."""
        self.pace(LONG_WAITING_S if any(each.startswith("launch.hang_s=") for each in self.overrides) else WAITING_S)
        before = len(self.strikes)
        self.wait(lambda: len(self.journal("training")) > before, "the next attempt's first step")
        attempt = self.journal("training")[-1]["attempt"]

        def warm() -> bool:
            return sum(line["attempt"] == attempt for line in self.journal("spare_ready")) >= self.ranks

        self.wait(warm, "warm spares")
        return int(attempt)

    def next_step(self, phase: str, ahead: int = 2) -> int:
        """A step that is still to come, and in which the phase is there."""
        now = max((line["step"] for rank in range(self.ranks) for line in self.history(rank)[-1:]), default=0) + ahead
        if phase == "save":  # the state after so many steps
            return -(-now // CHECKPOINT_EVERY) * CHECKPOINT_EVERY
        if phase == "evaluate":  # after this step
            return -(-(now + 1) // EVALUATE_EVERY) * EVALUATE_EVERY - 1
        return now

    # What is done to it.

    def arm(self, rank: int, phase: str, what: str, step: int | None, times: int = 1, seconds: float = 60.0) -> int:
        """Something will happen to ``rank`` as it comes to this phase of this step. Its number."""
        path = self.folder / "faults.json"
        faults = json.loads(path.read_text()) if path.exists() else []
        number = len(faults)
        faults.append(
            {"number": number, "rank": rank, "phase": phase, "step": step, "what": what, "times": times,
             "seconds": seconds}
        )  # fmt: skip
        self._write("faults.json", json.dumps(faults))
        return number

    def wait_for_strike(self, number: int, nth: int = 0) -> float:
        """When the fault of this number happened."""
        path = self.folder / f"struck_{number}_{nth}"
        self.wait(path.exists, f"fault {number}")
        return path.stat().st_mtime

    def remember(self) -> None:
        """What is committed now must be there in the end as it is."""
        from tests.faults.oracles import checkpoint_hashes

        self.remembered |= checkpoint_hashes(self.root, known=self.remembered)

    def kill_at(self, rank: int, phase: str, after_s: float = 0.0, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to a rank that has come to ``phase``, ``after_s`` seconds into it (it is held there until then at
        the longest)."""
        attempt = self.wait_until_warm()
        step = self.next_step(phase)
        fault = self.arm(rank, phase, "hold", step, seconds=after_s or 60.0)
        self.pace(STRIKING_S)
        self.wait_for_strike(fault)
        self.remember()
        if after_s:
            time.sleep(after_s * 1.5)
        kind = {signal.SIGKILL: "signal", signal.SIGSTOP: "stopped"}[number]
        struck = Strike(f"{number.name} in {phase}", (kind,), rank, attempt, time.time())
        self.signal(rank, number)
        self.strikes.append(struck)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def happen(self, rank: int, phase: str, what: str, kinds: Sequence[str], **options: Any) -> None:
        """A fault inside of a rank."""
        attempt = self.wait_until_warm()
        self.remember()
        fault = self.arm(rank, phase, what, self.next_step(phase), **options)
        self.pace(STRIKING_S)
        at = self.wait_for_strike(fault)
        self.strikes.append(Strike(f"{what} in {phase}", tuple(kinds), rank, attempt, at))

    def finish(self, trained: int | None = None) -> int:
        """Let it run to its end at full speed, once ``trained`` attempts (one more than strikes) have begun to train;
        its exit code. The strikes' times are read off the journal."""
        expected = 1 + len(self.strikes) if trained is None else trained
        self.wait(lambda: len(self.journal("training")) >= expected, "training after the last fault")
        self.pace(0.0)
        code = self.ended()
        self.measure()
        return code

    def measure(self) -> None:
        """When each strike was noticed, and when training went on."""
        for strike in self.strikes:
            if strike.at is not None:
                strike.noticed_s = self._after("fault", strike.at)
                strike.training_s = self._after("training", strike.at)

    def _after(self, event: str, at: float) -> float | None:
        times = [datetime.fromisoformat(line["time"]).timestamp() for line in self.journal(event)]
        return next((round(max(when - at, 0.0), 3) for when in times if when >= at - 0.01), None)


@dataclass
class Launch(Run):
    """A run of several nodes of a rank each, as a scheduler starts it: a program each, in the boxes of ``network``."""

    nodes: int = 2
    spares: int = 1
    network: Network | None = None
    preflight: bool = False
    job: Path | None = None
    queued_again: int = 0
    programs: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def write_job(self) -> Path:
        """What ``stoker launch`` gives the nodes."""
        from launch.launching.folder import Folder
        from launch.launching.job import CONFIG, JOB, prepare
        from launch.launching.layout import Request

        more = (f"launch.spare_nodes={self.spares}", "launch.network_interface=eth0")
        request = Request(str(self.config), (*self.arguments, *more), "cpu", self.nodes, 1)
        ready = prepare(request, lambda text: None)
        folder = Folder.next(self.root)
        folder.make()
        job = ready.job(self.name, folder.path, folder.number)
        (folder.path / CONFIG).write_text(ready.config.masked().to_yaml())
        (folder.path / JOB).write_text(job.to_json())
        return folder.path / JOB

    def start(self) -> subprocess.Popen[bytes]:
        """Begin the job; or the same once more, as a scheduler that has queued it again does."""
        if self.job is None:
            self.job = self.write_job()
        else:
            self.queued_again += 1
        for index in range(self.nodes + self.spares):
            self.start_node(index)
        return self.programs[0]

    def start_node(self, index: int) -> None:
        """Start the program of a node; or again, where a scheduler does so after it has ended."""
        assert self.network is not None and self.job is not None
        count = self.nodes + self.spares
        slurm = {
            "SLURM_JOB_ID": f"fault-{self.name}", "SLURM_NODEID": str(index),
            "SLURM_JOB_NODELIST": f"stk[0-{count - 1}]", "SLURM_RESTART_COUNT": str(self.queued_again),
        }  # fmt: skip
        argv = [sys.executable, "-m", "tests.faults.node", str(self.job), *(["preflight"] if self.preflight else [])]
        self.programs[index] = self.spawn(self.network.boxes[index].command(argv), f"node_{index}.txt", **slurm)

    def on_node(self, index: int) -> list[psutil.Process]:
        """The processes of the run on a node."""
        assert self.network is not None
        there = os.readlink(f"/proc/{self.network.boxes[index].pid}/ns/net")
        found = []
        for process in self.family():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/net") == there:
                    found.append(process)
            except OSError:
                continue
        return found

    def places(self) -> dict[int, int]:
        """The rank that each node of the newest attempt runs."""
        here = {process.pid: index for index in range(self.nodes + self.spares) for process in self.on_node(index)}
        return {here[self.pid(rank)]: rank for rank in range(self.ranks)}

    def leading(self) -> int | None:
        """The node that leads the launch: its program holds the supervisor's lock. None where it is about to change."""
        found = []
        for index, program in self.programs.items():
            with suppress(OSError):
                held = {os.readlink(path) for path in Path(f"/proc/{program.pid}/fd").iterdir()}
                found += [index] if str(self.root.resolve() / LOCK) in held else []
        return found[0] if len(found) == 1 else None

    def kill_node(self, index: int, unplug: bool = False) -> None:
        """Agent, ranks and spares of a node are killed at once; ``unplug``: and nobody is told, as when it loses
        power."""
        assert self.network is not None
        attempt = self.wait_until_warm()
        self.remember()
        self.pace(STRIKING_S)
        how = "the power of a node is cut" if unplug else "all processes of a node are killed"
        host = self.network.names[index]
        doomed = self.on_node(index)
        strike = Strike(how, ("node",), None, attempt, time.time(), host)
        if unplug:
            self.network.pull(index)
        for process in doomed:
            process.kill()
        self.strikes.append(strike)

    def ended(self, within_s: float = LONG_S) -> int:
        """The exit code of the nodes' programs, on which they must agree: of each the newest, if it was not killed."""
        until = time.monotonic() + within_s
        while any(process.poll() is None for process in self.processes):
            assert time.monotonic() < until, f"the launch did not end within {within_s:.0f} s:\n{self.output()}"
            time.sleep(0.02)
        codes = {index: code for index, program in self.programs.items() if (code := program.returncode) >= 0}
        assert len(set(codes.values())) == 1, f"nodes ended with codes {codes}:\n{self.output()}"
        return next(iter(codes.values()))
