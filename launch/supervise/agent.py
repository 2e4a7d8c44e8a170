"""The agent of a node: starts its ranks, watches them, and starts them again until the run is done or must not go on.

Everything happens in one thread, which waits for whatever comes first: output, the end of a rank, a signal, or the next
look at the heartbeats. What other nodes have to do with it is behind ``node.Node``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from launch.supervise import causes
from launch.supervise.causes import Cause
from launch.supervise.heartbeats import Patience
from launch.supervise.node import Assembly, Node
from launch.supervise.policy import Decision
from launch.supervise.processes import Worker
from launch.supervise.ranks import Ranks
from pretrain.attempt import ExitClass
from pretrain.config_sections import LaunchSection
from pretrain.rundir import committed_steps

#: Seconds between two turns of the loop while nothing happens, and between two reports of where the ranks stand.
TURN_S, STATES_S = 0.05, 2.0
#: Spares that may end before they were ready; then there are none.
LOST_SPARES = 3
#: Signals that ask a launch to end: of a person, a scheduler, and Slurm before its time limit.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Work:
    """What the ranks of a node are to do. ``arguments``: of ``python -m pretrain``; ``ranks``: on this node;
    ``environment``: set for them beside the agent's own; ``prefixes``: a command before each local rank's interpreter,
    such as numactl and what it is told."""

    run_dir: Path
    arguments: tuple[str, ...]
    ranks: int
    environment: Mapping[str, str]
    launch: LaunchSection
    prefixes: Sequence[Sequence[str]] = ()

    def prefix(self, local: int) -> Sequence[str]:
        return self.prefixes[local] if self.prefixes else ()


class Agent:
    """``run`` in the main thread: the kernel ends ranks with the thread that started them. The other methods may be
    called from any thread, and ``ask_to_end`` from a signal handler."""

    def __init__(self, work: Work, node: Node) -> None:
        self.work, self.node = work, node
        self.running = True
        self._asked = 0
        self._ranks: Ranks | None = None
        self._spares: dict[int, Worker] = {}
        self._spare_began: dict[int, float] = {}
        self._ready: set[int] = set()
        self._lost_spares = 0
        self._patience = Patience(work.launch.hang_s)
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._terminal = sys.stdout.fileno() if _is_terminal() else None
        self._fault_at: float | None = None
        self._states_at = 0.0
        self._newest_before = max(committed_steps(work.run_dir), default=-1)

    def run(self) -> int:
        """The exit code of DESIGN section 8. Leaves no process behind."""
        decision = Decision(False, causes.fault("unknown", "the agent ended"), "the agent ended")
        try:
            decision = self._launch()
        finally:
            self.running = False
            if self._ranks is not None:
                self._ranks.close()
            for worker in self._spares.values():
                worker.close()
            self.node.close(decision)
            for descriptor in (self._wake, self._waker):
                os.close(descriptor)
        self.decision = decision
        return decision.code

    def ask_to_end(self) -> None:
        """The ranks finish their step, save and end; a second call ends them at once."""
        self._asked += 1
        with suppress(BlockingIOError, OSError):
            os.write(self._waker, b"!")

    @property
    def asked(self) -> bool:
        """Whether it was asked to end."""
        return self._asked > 0

    def kill(self) -> None:
        """End everything at once."""
        self._asked += 2
        with suppress(BlockingIOError, OSError):
            os.write(self._waker, b"!")

    def pids(self) -> dict[int, int]:
        """The processes of this node's ranks, by rank; empty between attempts."""
        ranks = self._ranks
        return {} if ranks is None else {rank: worker.pid for rank, worker in ranks.workers.items()}

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank of this node; KeyError where it has none of that number."""
        ranks = self._ranks
        if ranks is None:
            raise KeyError(rank)
        ranks.workers[rank].signal(number)

    def _launch(self) -> Decision:
        while True:
            for local in range(self.work.ranks):
                self._spawn(local)
            met = self.node.meet(lambda: self._asked > 0)
            if isinstance(met, Decision):
                return met
            decision = self._attempt(met)
            leads = met.group_rank == 0
            if not decision.again:
                if leads:
                    event = "end" if decision.cause.exit_class is ExitClass.DONE else "stop"
                    self._told(event, met, decision.cause, decision.text)
                return decision
            if leads:
                print(f"{decision.text}; starting again", file=sys.stderr, flush=True)
                self._told("restart", met, decision.cause, decision.text)

    def _attempt(self, met: Assembly) -> Decision:
        workers = [self._take(local) for local in range(self.work.ranks)]
        self._ranks = Ranks(
            workers, met, self.work.run_dir, self.node.host, self._patience,
            terminal=self._terminal is not None,
        )  # fmt: skip
        if met.group_rank == 0:
            self._told("start", met, text=f"attempt {met.attempt} on {met.world_size} ranks")
        found, mine = self._watch(self._ranks, met)
        if found.exit_class is ExitClass.FAULT:
            self._fault_at = time.monotonic()
            if mine:
                self._told("fault", met, found, str(found))
        ranks = self._ranks
        last = [replace(rank, alive=False) for rank in ranks.states()]
        ranks.close()
        self._ranks = None
        decision = self.node.agree(found, ranks.step)
        if decision.again and self._asked:
            ended = self._asked_and(decision.cause)
            decision = Decision(False, ended, ended.text)
        self.node.states("restarting" if decision.again else "ended", last)
        return decision

    def _asked_and(self, found: Cause) -> Cause:
        """Asked to end, and it ended by a fault: preempted where this launch has saved something to go on from, so that
        a scheduler which queues it again does not do so for ever."""
        newest = max(committed_steps(self.work.run_dir), default=-1)
        if newest > self._newest_before:
            return replace(causes.PREEMPTED, text=f"asked to end; {found}; step {newest} is saved")
        text = f"asked to end; {found}; this launch has saved nothing"
        return replace(found, text=text, exit_class=ExitClass.FAULT)

    def _watch(self, ranks: Ranks, met: Assembly) -> tuple[Cause, bool]:
        """Until the attempt is over on this node: why, and whether that was found here."""
        killing_at: float | None = None
        training = False
        while True:
            ranks.turn(TURN_S, self._wake)
            if self._asked and killing_at is None:
                ranks.signal(signal.SIGTERM)
                killing_at = time.monotonic() + self.work.launch.grace_s
                self._told("notice", met, text="asked to end: the ranks finish their step and save")
            self._calm()
            if ranks.done_step and not training:
                training = True
                self._training(met)
            if found := ranks.found():
                if self._asked and found.exit_class is ExitClass.FAULT:
                    return self._asked_and(found), True
                return found, True
            if killing_at is not None and (self._asked > 1 or time.monotonic() >= killing_at):
                why = "at once" if self._asked > 1 else f"after launch.grace_s={self.work.launch.grace_s:g} s"
                return self._asked_and(causes.fault("unknown", f"the ranks were killed {why}")), True
            if other := self.node.notice():
                # Of a hang every node says which of its ranks is the furthest behind; the leader finds the guilty one.
                return ranks.hanging() if other.kind == "hang" else other, False
            if training and self.work.launch.warm_spares and not self._asked:
                self._grow_spares(met)
            self._report("stopping" if self._asked else "running" if training else "starting")

    def _training(self, met: Assembly) -> None:
        if met.group_rank != 0:
            return
        after: dict[str, Any] = {}
        if self._fault_at is not None:
            after["seconds"] = round(time.monotonic() - self._fault_at, 3)
        self._told("training", met, text="the first step is done", **after)

    def _spawn(self, local: int) -> None:
        if local in self._spares and self._spares[local].exit_code is None:
            return
        if local in self._spares:
            self._spares.pop(local).close()
        environment = {**os.environ, **self.work.environment}
        self._spares[local] = Worker(self.work.prefix(local), self.work.arguments, environment, self._terminal)
        self._spare_began[local] = time.monotonic()
        self._ready.discard(local)

    def _take(self, local: int) -> Worker:
        self._spawn(local)
        return self._spares.pop(local)

    def _grow_spares(self, met: Assembly) -> None:
        """One after another, so that they take little from those that train."""
        for local in range(self.work.ranks):
            spare = self._spares.get(local)
            if spare is None:
                if self._lost_spares < LOST_SPARES:
                    self._spawn(local)
                return
            if spare.exit_code is not None:
                self._lost_spares += 1
                code = spare.exit_code
                self._spares.pop(local).close()
                self._told("notice", met, text=f"a warm spare ended with exit code {code} before it was needed")
                return
            if not spare.ready:
                return
            if local not in self._ready:
                self._ready.add(local)
                seconds = round(time.monotonic() - self._spare_began[local], 3)
                self._told("spare_ready", met, text=f"of local rank {local}", seconds=seconds, rss_bytes=spare.memory())

    def _calm(self) -> None:
        """Empty the pipe that wakes the loop."""
        with suppress(BlockingIOError):
            while os.read(self._wake, 64):
                pass

    def _report(self, state: str) -> None:
        if self._ranks is not None and time.monotonic() >= self._states_at:
            self._states_at = time.monotonic() + STATES_S
            self.node.states(state, self._ranks.states())

    def _told(self, event: str, met: Assembly, cause: Cause | None = None, text: str = "", **figures: Any) -> None:
        rank, kind = (cause.rank, cause.kind) if cause else (None, None)
        self.node.told(event, attempt=met.attempt, rank=rank, node=self.node.host, kind=kind, text=text, **figures)


@contextmanager
def asked_to_end(agent: Agent, insist: bool = True) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 ask the launch to end while the block runs; a second one ends it at once, unless not
    to ``insist``: a scheduler tells twice."""

    def handle(number: int, frame: FrameType | None) -> None:
        if agent._asked and not insist:
            return
        agent.ask_to_end()
        if agent._asked == 1:
            again = f"; {signal.Signals(number).name} again ends it at once" if insist else ""
            text = f"asked to end: the ranks finish their step and save{again}\n"
            with suppress(OSError):
                os.write(2, text.encode())

    before = {number: signal.signal(number, handle) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_terminal() -> bool:
    try:
        return os.isatty(sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return False
