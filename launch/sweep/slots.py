"""Where runs are executed: a few places at once, each for one run at a time.

``ForkSlots`` (``forks.py``) forks a process that has imported torch already, for runs of one rank on a CPU;
``ProcessSlots`` starts a process of its own for each run, which may have several ranks and devices; ``RaySlots``
(``on_ray.py``) does that on a cluster.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from launch.sweep.ledger import Ledger, Trial
from stoker.secrets import mask


@dataclass(frozen=True)
class Ended:
    """A run whose process has ended; ``code`` as ``subprocess`` has it, ``cause`` where only the slot knows."""

    number: int
    code: int
    cause: str = ""


class Slots(Protocol):
    """``count`` runs at a time; a context that leaves nothing running behind."""

    count: int

    def start(self, trial: Trial) -> None: ...
    def wait(self, timeout_s: float) -> list[Ended]:
        """The runs that have ended since; waits so long at most until there is one."""

    def ask_to_end(self, number: int) -> None:
        """The run finishes its step, saves and ends."""

    def kill(self, number: int) -> None: ...
    def close(self) -> None: ...


def append(log: IO[bytes], line: bytes) -> None:
    """A line of a run's output into its log, secrets masked."""
    log.write(mask(line.decode("utf-8", "replace")).encode("utf-8", "replace"))
    log.flush()


class Pipe:
    """What a process writes, line by line into a log; a line without its end is kept until it ends."""

    def __init__(self, descriptor: int, log: Path) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor, self._rest = descriptor, b""
        self._log: IO[bytes] = open(log, "ab")  # noqa: SIM115 - closed with the pipe

    def read(self) -> bool:
        """Take over what is there; False at its end."""
        while True:
            try:
                data = os.read(self.descriptor, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                append(self._log, line + b"\n")

    def close(self) -> None:
        self.read()
        if self._rest:
            append(self._log, self._rest + b"\n")
        self._log.close()
        os.close(self.descriptor)


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    pipe: Pipe
    pidfd: int
    slot: int


class ProcessSlots:
    """A process for each run: ``python -m launch.sweep.task``, which calls ``launch.local.train``.

    ``devices``: the CUDA devices of each slot, by the names that CUDA_VISIBLE_DEVICES takes; empty on a CPU.
    """

    def __init__(
        self, ledger: Ledger, count: int, environment: Mapping[str, str], devices: Sequence[Sequence[str]] = ()
    ) -> None:
        self.count = count
        self._ledger, self._environment, self.devices = ledger, environment, devices
        self._running: dict[int, _Running] = {}
        self._selector = selectors.DefaultSelector()

    def start(self, trial: Trial) -> None:
        slot = min({*range(self.count)} - {running.slot for running in self._running.values()})
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(self.devices[slot])} if self.devices else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.sweep.task", str(self._ledger.root), str(trial.number), str(os.getpid())],
            env={**os.environ, **self._environment, **visible},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        pipe = Pipe(os.dup(process.stdout.fileno()), self._ledger.log(trial))
        process.stdout.close()
        running = _Running(process, pipe, os.pidfd_open(process.pid), slot)
        self._running[trial.number] = running
        self._selector.register(pipe.descriptor, selectors.EVENT_READ, (trial.number, "output"))
        self._selector.register(running.pidfd, selectors.EVENT_READ, (trial.number, "end"))

    def wait(self, timeout_s: float) -> list[Ended]:
        ended: list[Ended] = []
        for key, _ in self._selector.select(timeout_s):
            number, what = key.data
            if what == "output":
                if number in self._running and not self._running[number].pipe.read():
                    self._selector.unregister(key.fd)
            elif number in self._running:
                ended.append(self._end(number))
        return ended

    def _end(self, number: int) -> Ended:
        running = self._running.pop(number)
        code = running.process.wait()
        for descriptor in (running.pipe.descriptor, running.pidfd):
            with contextlib.suppress(KeyError):  # the end of its output was seen before
                self._selector.unregister(descriptor)
        running.pipe.close()
        os.close(running.pidfd)
        return Ended(number, code)

    def ask_to_end(self, number: int) -> None:
        self._signal(number, signal.SIGTERM)

    def kill(self, number: int) -> None:
        """Its ranks go with it: none outlives the agent that started it."""
        self._signal(number, signal.SIGKILL)

    def _signal(self, number: int, what: signal.Signals) -> None:
        if number in self._running:
            self._running[number].process.send_signal(what)

    def close(self) -> None:
        for number in list(self._running):
            self.kill(number)
            self._end(number)
        self._selector.close()
