"""The processes of ranks, as the agent that started them has them: hand over, look at, signal, end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.heartbeat import SIZE, Beat, Pulse

MODULE = "launch.supervise.worker"
#: Seconds for the kernel to end a process that was killed.
UNKILLABLE_S = 10.0


class Worker:
    """A process that waits to become a rank, or is one. It leads a session of its own, so that Ctrl-C at a terminal
    reaches the agent alone, and so that what it has started ends with it.

    ``command``: what stands before the interpreter, such as numactl; ``arguments``: of ``python -m pretrain``, told on
    a pipe, since a command line is for everybody to read. Made by the thread that lives longest: the kernel
    kills a rank when the *thread* ends that started it.
    """

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        terminal: int | None = None,
    ) -> None:
        page = os.memfd_create("stoker-heartbeat")
        try:
            os.ftruncate(page, SIZE)
            handed = [page] if terminal is None else [page, terminal]
            self._process = subprocess.Popen(
                [*command, sys.executable, "-m", MODULE, str(os.getpid()), *map(str, handed)],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=handed,
                start_new_session=True,
            )
            self.pulse = Pulse(page)
        finally:
            os.close(page)
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin = self._process.stdin
        self.out, self.err = self._process.stdout.fileno(), self._process.stderr.fileno()
        for descriptor in (self.out, self.err):
            os.set_blocking(descriptor, False)
        self.ended_fd = os.pidfd_open(self.pid)
        self._tell(list(arguments))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def beat(self) -> Beat | None:
        return self.pulse.read()

    @property
    def ready(self) -> bool:
        """It has imported what it needs."""
        return self.exit_code is None and self.beat is not None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that killed it. It stays a zombie until ``close``, so that its
        number, and that of what it has started, is nobody else's meanwhile."""
        if self._process.returncode is None:
            found = os.waitid(os.P_PIDFD, self.ended_fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                return None
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return self._process.returncode

    def become(self, environment: Mapping[str, str], stacks: Path, terminal: bool = False) -> None:
        """Be the rank that ``environment`` says; ``stacks`` takes its stacks when it is asked for them."""
        self._tell({"environment": dict(environment), "stacks": str(stacks), "terminal": terminal})

    def _tell(self, word: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is noticed as such
            self._stdin.write(json.dumps(word).encode() + b"\n")
            self._stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself; none where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.ended_fd, number)

    def stopped(self) -> bool:
        """It was stopped (SIGSTOP), and not by a debugger, which is there for a purpose."""
        return self._status("State") == "T (stopped)"

    def memory(self) -> int | None:
        """Resident bytes."""
        found = self._status("VmRSS")
        return int(found.split()[0]) * 1024 if found else None

    def busy_s(self) -> float | None:
        """Processor seconds so far."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return None
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End it and all that it started, now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left of it and let everything of it go. One that the kernel cannot end (it waits for a device or
        a file system) is left behind."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(UNKILLABLE_S)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        assert self._process.stdout and self._process.stderr
        self._process.stdout.close()
        self._process.stderr.close()
        os.close(self.ended_fd)
        self.pulse.close()

    def _status(self, key: str) -> str | None:
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{key}:")), None)


def oom_kills() -> int:
    """Processes of this control group that the kernel has killed for want of memory; 0 where it does not count."""
    for path in _memory_events():
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0


def _memory_events() -> list[Path]:
    root, found = Path("/sys/fs/cgroup"), []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                found.append(root / group.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(root / "memory" / group.lstrip("/") / "memory.oom_control")
    return [*found, root / "memory.events", root / "memory" / "memory.oom_control"]
