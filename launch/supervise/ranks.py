"""The ranks of one attempt on one node: their output, how they ended, and whether they stand still."""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.supervise import causes, logs, stacks
from launch.supervise.causes import Cause
from launch.supervise.heartbeats import STARTING_S, Hanging, Patience, Silence, Standstill, guilty
from launch.supervise.journal import RankState
from launch.supervise.node import Assembly
from launch.supervise.processes import Worker, oom_kills
from pretrain.attempt import ExitClass
from pretrain.diagnosis import device_error, device_fingerprint

#: Seconds between two looks at the ranks' heartbeats and states.
LOOK_S = 0.25
#: Seconds for the others to end too, once one has refused, stopped or lost another; and for stacks to be written.
FOLLOW_S, STACKS_S = 10.0, 0.5
#: Seconds for a rank to say what was wrong with it, once another has only lost it; and for one that said so to end.
TELL_S = 2.0
#: What ranks that ended with one of these codes have agreed on, though none of them has left why.
_AGREED = {
    frozenset({ExitClass.PREEMPTED.code}): causes.PREEMPTED,
    frozenset({ExitClass.STOPPED.code}): Cause(ExitClass.STOPPED, "verdict", "a verdict that left no words"),
}


class Ranks:
    """Made of one worker for each local rank, which become ranks here. ``show``: rank 0's output is shown as it comes;
    ``terminal``: or it goes to the terminal by itself."""

    def __init__(
        self,
        workers: Sequence[Worker],
        met: Assembly,
        run_dir: Path,
        host: str,
        patience: Patience,
        terminal: bool = False,
    ) -> None:
        self.workers = {met.first_rank + local: worker for local, worker in enumerate(workers)}
        self.step: int | None = None
        self._met, self._run_dir, self._host, self._patience = met, run_dir, host, patience
        self._logs: dict[int, logs.RankLog] = {}
        self._selector = selectors.DefaultSelector()
        self._ended: dict[int, int] = {}
        self._first_end = 0.0
        self._oom_kills = oom_kills()
        self._silences = {rank: Silence() for rank in self.workers}
        self._standstills = {rank: Standstill() for rank in self.workers}
        self._standing = [Hanging(rank, None, 0.0, 0.0) for rank in self.workers]
        self._looked = time.monotonic()
        for local, (rank, worker) in enumerate(self.workers.items()):
            self._logs[rank] = logs.RankLog(logs.log_path(run_dir, met.attempt, rank), show_out=rank == 0)
            self._selector.register(worker.out, selectors.EVENT_READ, (rank, "out"))
            self._selector.register(worker.err, selectors.EVENT_READ, (rank, "err"))
            self._selector.register(worker.ended_fd, selectors.EVENT_READ, (rank, "end"))
            environment = met.environment(local, len(workers))
            file = logs.stack_path(run_dir, met.attempt, rank)
            worker.become(environment, file, terminal=terminal and rank == 0)

    def turn(self, timeout_s: float, wake: int | None = None) -> None:
        """Take what the ranks print and notice who has ended, waiting at most ``timeout_s``, or until ``wake`` can be
        read."""
        if wake is not None and wake not in self._selector.get_map():
            self._selector.register(wake, selectors.EVENT_READ, None)
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                continue
            rank, what = key.data
            if what == "end":
                self._selector.unregister(key.fd)
                code = self.workers[rank].exit_code
                assert code is not None
                self._take(rank, "err", self.workers[rank].err)  # why it ended
                self._first_end = self._first_end or time.monotonic()
                self._ended[rank] = code
            else:
                self._take(rank, what, key.fd)

    def _take(self, rank: int, what: logs.Stream, descriptor: int) -> None:
        data, more = logs.drain(descriptor)
        self._logs[rank].take(what, data)
        if not more and descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    @property
    def done_step(self) -> bool:
        """A step has been done since the ranks began."""
        return any(worker.pulse.ended("compute") for worker in self.workers.values())

    @property
    def all_ended(self) -> bool:
        return len(self._ended) == len(self.workers)

    def found(self) -> Cause | None:
        """Why the attempt is over on this node, once it is: all ranks have ended, or one has in a way that the others
        cannot survive, or one stands still."""
        return self._how_ended() if self._ended else self._look()

    def signal(self, number: signal.Signals) -> None:
        for rank, worker in self.workers.items():
            if rank not in self._ended:
                worker.signal(number)

    def dump_stacks(self) -> tuple[str, ...]:
        """Have every rank write what it does; the files, relative to the run directory. Works while a rank holds the
        interpreter; not for one that is stopped."""
        self.signal(signal.SIGUSR2)
        until = time.monotonic() + STACKS_S
        while (left := until - time.monotonic()) > 0:
            self.turn(left)
        return tuple(str(path.relative_to(self._run_dir)) for path in self._stack_files() if path.stat().st_size)

    def states(self) -> list[RankState]:
        """Where every rank stands."""
        now, found = time.monotonic(), []
        for rank, worker in self.workers.items():
            beat, alive = worker.beat, rank not in self._ended
            found.append(
                RankState(
                    rank=rank,
                    node=self._host,
                    pid=worker.pid,
                    alive=alive,
                    phase=beat.phase if beat else None,
                    step=beat.step if beat else None,
                    age_s=round(now - beat.since, 3) if beat else None,
                    busy_s=worker.busy_s(),
                    rss_bytes=worker.memory() if alive else None,
                )
            )
        return found

    def close(self) -> None:
        """End what is left, and take the last that was printed."""
        for worker in self.workers.values():
            worker.kill()
        until = time.monotonic() + STACKS_S
        while not self.all_ended and time.monotonic() < until:
            self.turn(0.05)
        self._progress()
        for rank, worker in self.workers.items():
            for what, descriptor in (("out", worker.out), ("err", worker.err)):
                self._logs[rank].take(what, logs.drain(descriptor)[0])  # type: ignore[arg-type]
            self._logs[rank].close()
            worker.close()
        self._selector.close()
        for path in self._stack_files():
            if not path.stat().st_size:
                path.unlink()

    def _stack_files(self) -> list[Path]:
        files = (logs.stack_path(self._run_dir, self._met.attempt, rank) for rank in self.workers)
        return [path for path in files if path.exists()]

    def _how_ended(self) -> Cause | None:
        """What follows from exit codes and what ranks have written into ``exit.json``."""
        for rank, code in self._ended.items():  # in the order in which they ended
            if code < 0 and (cause := self._killed(rank, code)).rank is not None:
                return cause
        waited = time.monotonic() - self._first_end
        said = causes.said(self._run_dir, self._met.attempt)
        failed = {rank: code for rank, code in self._ended.items() if code}
        if not failed:
            return (said or causes.DONE) if self.all_ended else self._look()
        if said is not None and said.exit_class is not ExitClass.FAULT:
            if said.exit_class is ExitClass.DONE:
                return self._unexplained(failed)
            return said if self.all_ended or waited > FOLLOW_S else None
        if said is not None and said.rank is not None:
            return said
        if said is None and (agreed := _AGREED.get(frozenset(failed.values()))) is not None:
            return agreed if waited > FOLLOW_S else None  # a file of rank 0's node is not seen at once everywhere
        if self.all_ended or waited > TELL_S:
            unexplained = self._unexplained(failed)
            return unexplained if said is None else causes.most_telling([unexplained, said])
        return None

    def _killed(self, rank: int, code: int) -> Cause:
        last = "\n".join(self._logs[rank].last_errors)
        return causes.killed(rank, -code, self._step_of(rank), self._host, oom_kills() > self._oom_kills, last)

    def _unexplained(self, failed: Mapping[int, int]) -> Cause:
        """Of ranks that ended with a code and wrote nothing down: what they printed last; a refusal one rank says."""
        found: list[Cause] = []
        for rank, code in failed.items():
            last = self._logs[rank].last_errors[-1] if self._logs[rank].last_errors else ""
            step = self._step_of(rank)
            if code < 0:
                found.append(self._killed(rank, code))
            elif code == ExitClass.REFUSED.code:
                refusal = Cause(
                    ExitClass.REFUSED, "refused", last.removeprefix("refused: ") or "refused", host=self._host
                )
                found.insert(0 if last else len(found), refusal)
            elif (device := device_error("\n".join(self._logs[rank].last_errors))) is not None:
                same = device_fingerprint(device, rank, step)
                known = {"rank": rank, "step": step, "host": self._host, "fingerprint": same}
                found.append(causes.fault("device", last or device.name, **known))
            elif "another rank is gone" in last:
                found.append(causes.fault("store", last, step=step, host=self._host))
            else:
                text = f"rank {rank} ended with exit code {code}" + (f": {last}" if last else "")
                print_of = f"exit code {code}, rank {rank}, {last}, step {step}"
                found.append(
                    causes.fault("exception", text, rank=rank, step=step, host=self._host, fingerprint=print_of)
                )
        return causes.most_telling(found)

    def _look(self) -> Cause | None:
        now = time.monotonic()
        if (elapsed := now - self._looked) < LOOK_S:
            return None
        self._looked = now
        self._progress()
        alive = {rank: worker for rank, worker in self.workers.items() if rank not in self._ended}
        for rank, worker in alive.items():
            if self._standstills[rank].look(worker.stopped(), now):
                text = f"the process of rank {rank} was stopped (SIGSTOP)"
                return causes.fault("stopped", text, rank=rank, step=self._step_of(rank), host=self._host)
        standing = []
        for rank, worker in alive.items():
            beat = worker.beat
            if beat and beat.phase == "end" and (said := self._failed(now - beat.since)) is not None:
                return said  # its process does not end: a device that failed may hold it for ever
            ended = worker.pulse.ended(beat.phase) if beat else 0
            limit = self._patience.limit(beat.phase, ended, beat.work) if beat else STARTING_S
            standing.append(Hanging(rank, beat, self._silences[rank].look(beat, elapsed), limit))
        self._standing = standing or self._standing
        return self.hanging() if any(rank.silent_s > rank.limit_s for rank in standing) else None

    def _failed(self, ending_s: float) -> Cause | None:
        """The fault by which a rank has been ending for ``ending_s``: soon one that a rank has blamed itself for, and
        later also that ranks only lost each other. None while there is none."""
        said = causes.said(self._run_dir, self._met.attempt) if ending_s > TELL_S else None
        if said is None or said.exit_class is not ExitClass.FAULT:
            return None
        return said if said.rank is not None or ending_s > FOLLOW_S else None

    def _progress(self) -> None:
        for worker in self.workers.values():
            beat = worker.beat
            self._patience.learn(worker.pulse.new_durations(), beat.setup if beat else 0)
            if beat is not None and beat.step is not None:
                self.step = beat.step if self.step is None else max(self.step, beat.step)

    def hanging(self) -> Cause:
        """Which rank of this node keeps the others waiting, where some do; every rank leaves its stacks."""
        files = self.dump_stacks()
        looked = []
        for found in self._standing:
            stack = stacks.read(logs.stack_path(self._run_dir, self._met.attempt, found.rank))
            looked.append(replace(found, waiting=stacks.waiting(stack), place=stacks.place(stack)))
        chosen = guilty(looked)
        beat = chosen.beat
        phase = beat.phase if beat else "start"
        where = phase + (f" of step {beat.step}" if beat and beat.step is not None else "")
        place = f", at {chosen.place}" if chosen.place else ""
        return causes.fault(
            "hang",
            f"rank {chosen.rank} made no progress for {chosen.silent_s:.1f} s in {where}{place}",
            rank=chosen.rank,
            step=beat.step if beat else None,
            host=self._host,
            fingerprint=f"hang, rank {chosen.rank}, {where}{place}",
            stacks=files,
            beats=chosen.beats,
            waiting=chosen.waiting,
        )

    def _step_of(self, rank: int) -> int | None:
        beat = self.workers[rank].beat
        return beat.step if beat else None
