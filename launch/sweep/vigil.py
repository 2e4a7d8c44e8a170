"""Whether a forked run still makes progress, judged by its heartbeat as an agent judges a rank's. No torch.

A run of a sweep has nobody waiting for it, so it is given more time than a rank that others wait for.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import time

from launch.supervise import causes, stacks
from launch.supervise.causes import Cause
from launch.supervise.heartbeats import Patience, Silence, Standstill
from launch.sweep.processes import is_stopped
from pretrain.heartbeat import SIZE, VARIABLE, Pulse

#: Least seconds without a beat that are a hang, where launch.hang_s does not say.
LEAST_S = 30.0
#: Seconds for a run that hangs to write its stack.
STACK_S = 0.5


class Vigil:
    """Made before the fork, and used on both sides of it: ``listen`` in the run, the rest in the one that forked it.

    ``patience``: what earlier starts of this run took; ``hang_s``: launch.hang_s of its configuration.
    """

    def __init__(self, patience: Patience, hang_s: float | None) -> None:
        self.descriptors = (os.memfd_create("stoker-heartbeat"), os.memfd_create("stoker-stack"))
        self._page, self._stack = self.descriptors
        os.ftruncate(self._page, SIZE)
        self._pulse = Pulse(self._page)
        self._patience, self._least_s = patience, LEAST_S if hang_s is None else 0.0
        self._silence, self._standstill = Silence(), Standstill()

    def listen(self) -> None:
        """In the run's process: its beats are read from now on, and it writes its stack when it is asked to."""
        os.environ[VARIABLE] = f"/proc/self/fd/{self._page}"
        faulthandler.register(signal.SIGUSR2, self._stack)

    def look(self, pid: int, pidfd: int, elapsed_s: float) -> Cause | None:
        """Why the run must be ended; None while it makes progress. ``elapsed_s``: since the last look."""
        beat = self._pulse.read()
        self._patience.learn(self._pulse.new_durations(), beat.setup if beat else 0)
        phase, step = (beat.phase, beat.step) if beat else ("start", None)
        if self._standstill.look(is_stopped(pid), time.monotonic()):
            text = "the process of the run was stopped (SIGSTOP)"
            return causes.fault("stopped", text, rank=0, step=step, host=platform.node())
        ended, work = (self._pulse.ended(phase), beat.work) if beat else (0, 0.0)
        limit = max(self._patience.limit(phase, ended, work), self._least_s)
        silent = self._silence.look(beat, elapsed_s)
        if silent <= limit:
            return None
        place = stacks.place(stacks.frames(self._dumped(pidfd)))
        where = phase + ("" if step is None else f" of step {step}") + (f", at {place}" if place else "")
        text = f"no progress for {silent:.1f} s in {where}"
        return causes.fault("hang", text, rank=0, step=step, host=platform.node(), fingerprint=f"hang, rank 0, {where}")

    def stack(self) -> str:
        """Where the run stood when it was found to hang; empty before."""
        return os.pread(self._stack, os.fstat(self._stack).st_size, 0).decode("utf-8", "replace")

    def close(self) -> None:
        self._pulse.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def _dumped(self, pidfd: int) -> str:
        """Its stack, once it has written it: it does so while it holds the interpreter, but not while it is stopped."""
        signal.pidfd_send_signal(pidfd, signal.SIGUSR2)
        until, before = time.monotonic() + STACK_S, ""
        while (found := self.stack()) == "" or found != before:
            if time.monotonic() > until:
                break
            before = found
            time.sleep(0.02)
        return found
