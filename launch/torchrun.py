"""torchrun as a child process: its command line, its ranks, and what it says when one of them fails."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import psutil


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, as torchrun saw it; ``exit_code`` is negative for the signal that killed it."""

    rank: int
    exit_code: int

    @property
    def killed(self) -> bool:
        return self.exit_code < 0

    def __str__(self) -> str:
        if self.killed:
            return f"rank {self.rank} was killed by {signal.Signals(-self.exit_code).name}"
        return f"rank {self.rank} ended with exit code {self.exit_code}"


class Torchrun:
    """``arguments`` for ``python -m pretrain`` on ``ranks`` processes of this machine, started at once.

    Ranks write to this process's stdout and stderr, but torchrun's own forty lines about a failed rank are kept apart
    in ``report``. torchrun leads a session of its own, so that Ctrl-C reaches nobody but the caller, who decides. Where
    a block is left with it still running, by an exception, nothing of it stays behind.
    """

    def __init__(
        self, arguments: Sequence[str], ranks: int, environment: Mapping[str, str], max_restarts: int = 0
    ) -> None:
        self.command = command(arguments, ranks, max_restarts)
        self._process = subprocess.Popen(
            self.command,
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._sorter = Sorter()
        self._relay = threading.Thread(target=self._relay_stderr, daemon=True)
        self._relay.start()

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.running:
            self.kill()
            self.wait()

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks that are alive, by rank."""
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # gone while they were looked at
            for process in psutil.Process(self._process.pid).children():
                if (rank := process.environ().get("RANK")) is not None:
                    found[int(rank)] = process
        return found

    def ask_to_end(self) -> None:
        """Every rank finishes its step, saves and exits. They are asked directly: torchrun kills what has not ended 30
        seconds after it was asked itself."""
        ranks = self.ranks()
        for process in ranks.values():
            _signal(process, signal.SIGTERM)
        if not ranks:
            self._process.terminate()

    def kill(self) -> None:
        """End everything now. Ranks lead sessions of their own and would outlive torchrun."""
        ranks = self.ranks()
        self._process.kill()
        for process in ranks.values():
            _signal(process, signal.SIGKILL)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """torchrun's exit code: 0, or 1 if any rank failed, whatever the rank's own code."""
        code = self._process.wait()
        self._relay.join()
        return code

    @property
    def report(self) -> str:
        """What torchrun itself said; whole after ``wait``."""
        return "".join(self._sorter.own)

    @property
    def failure(self) -> Failure | None:
        return failure(self.report)

    def _relay_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if text := self._sorter.take(line):
                sys.stderr.write(text)
                sys.stderr.flush()
        sys.stderr.write(self._sorter.rest())


def command(arguments: Sequence[str], ranks: int, max_restarts: int = 0) -> list[str]:
    """The command line; ``torchrun`` as a module, so that it is this environment's."""
    restarts = [f"--max-restarts={max_restarts}"] if max_restarts else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *restarts]
    return [*torchrun, "-m", "pretrain", *arguments]


def command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as a person types it into a shell, with the variables that were set for it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(arguments)])


class Sorter:
    """Parts torchrun's own lines from those of the ranks, which share its stderr. Nothing is lost: ``own`` keeps them.

    torchrun logs (``E1122 12:07:16 ... torch/distributed/elastic/...``), then dies of an exception whose traceback
    ends in its summary between two rules.
    """

    LOG_LINE = re.compile(r"[IWE]\d{4} [\d:.]+ \d+ \S*torch/distributed/(elastic|run|launcher)")
    TRACEBACK = "Traceback (most recent call last):"
    EXCEPTION = "torch.distributed.elastic."
    RULE = "======"

    def __init__(self) -> None:
        self.own: list[str] = []
        self._traceback: list[str] = []
        self._rules_left = 0

    def take(self, line: str) -> str:
        """The next line; returns what is certainly not torchrun's, perhaps of lines before."""
        if self._rules_left:
            self._rules_left -= line.startswith(self.RULE)
            self.own.append(line)
            return ""
        if self.LOG_LINE.match(line):
            self.own.append(line)
            return ""
        if line.startswith(self.TRACEBACK):
            passed, self._traceback = self.rest(), [line]
            return passed
        if not self._traceback:
            return line
        self._traceback.append(line)
        if line[0].isspace():
            return ""
        if not line.startswith(self.EXCEPTION):
            return self.rest()
        self.own += self._traceback
        self._traceback = []
        self._rules_left = 2 * ("ChildFailedError" in line)
        return ""

    def rest(self) -> str:
        """Lines that were held back in case they were torchrun's."""
        held, self._traceback = self._traceback, []
        return "".join(held)


def failure(report: str) -> Failure | None:
    """The first failure in torchrun's summary; None where it has none."""
    found = re.search(r"Root Cause.*?rank\s*: (\d+) .*?exitcode\s*: (-?\d+)", report, re.DOTALL)
    return Failure(int(found[1]), int(found[2])) if found else None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
        process.send_signal(number)
