"""The process that is forked for every run of one rank: ``python -m launch.sweep.server TRAINER PARENT``.

It imports torch, Megatron and the trainer once, starts no thread, and then takes JSON lines on stdin:
``{"run": 7, "arguments": [...], "log": "...", "hang_s": null}`` and ``{"signal": 15, "run": 7}``; it answers on stdout
with ``{"ready": ...}`` and ``{"ended": 7, "code": 0}``. A run that stands still is killed, and the answer says why:
``"cause": {...}, "stack": "..."``. Runs end with it, and it ends with the process that started it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.supervise.causes import Cause
from launch.supervise.heartbeats import Patience
from launch.sweep.processes import end_with
from launch.sweep.slots import Pipe
from launch.sweep.vigil import Vigil

#: Modules that a trainer imports late, where whatever needs no torch is to start without it.
LATE = {"pretrain.run": ("pretrain.loop", "pretrain.session", "pretrain.determinism", "pretrain.kernel_check")}

Trainer = Callable[[Sequence[str]], int]

#: Seconds between two looks at whether runs make progress.
LOOK_S = 0.25


@dataclass
class _Child:
    number: int
    pid: int
    pidfd: int
    pipe: Pipe
    vigil: Vigil
    cause: Cause | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.pidfd, self.pipe.descriptor, *self.vigil.descriptors)


def warm(trainer: str) -> Trainer:
    """Import what a run needs, and find out once what is the same for all: versions, commit, machine."""
    from pretrain.attempt import environment

    module, _, name = trainer.partition(":")
    for needed in LATE.get(module, ()):
        importlib.import_module(needed)
    found: Trainer = getattr(importlib.import_module(module), name)
    environment()
    return found


class Server:
    """Forks, and waits for what it has forked."""

    def __init__(self, trainer: Trainer, answers: int) -> None:
        self._trainer, self._answers = trainer, answers
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._asked = b""
        self._patience: dict[int, Patience] = {}
        self._looked = 0.0

    def serve(self) -> None:
        """Until stdin is closed."""
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ, None)
        while True:
            for key, _ in self._selector.select(LOOK_S if self._children else None):
                if key.data is None:
                    if not self._take():
                        return
                    continue
                child, what = key.data
                if what == "end":
                    self._reap(child)
                elif child.number in self._children and not child.pipe.read():
                    self._selector.unregister(child.pipe.descriptor)
            self._look()

    def _look(self) -> None:
        """End the runs that stand still."""
        now = time.monotonic()
        if (elapsed := now - self._looked) < LOOK_S:
            return
        self._looked = now
        for child in self._children.values():
            if child.cause is None and (cause := child.vigil.look(child.pid, child.pidfd, elapsed)) is not None:
                child.cause = cause
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _take(self) -> bool:
        """Do what is asked; False at the end of stdin."""
        data = os.read(0, 1 << 16)
        *lines, self._asked = (self._asked + data).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if "signal" in asked:
                if (child := self._children.get(asked["run"])) is not None:
                    signal.pidfd_send_signal(child.pidfd, asked["signal"])
            else:
                self._fork(asked["run"], asked["arguments"], Path(asked["log"]), asked["hang_s"])
        return bool(data)

    def _fork(self, number: int, arguments: Sequence[str], log: Path, hang_s: float | None) -> None:
        vigil = Vigil(self._patience.setdefault(number, Patience(hang_s)), hang_s)
        ours, theirs = os.pipe()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(server, ours, theirs, vigil, arguments)
        os.close(theirs)
        child = _Child(number, pid, os.pidfd_open(pid), Pipe(ours, log), vigil)
        self._children[number] = child
        self._selector.register(ours, selectors.EVENT_READ, (child, "output"))
        self._selector.register(child.pidfd, selectors.EVENT_READ, (child, "end"))

    def _become(self, server: int, input_side: int, output: int, vigil: Vigil, arguments: Sequence[str]) -> None:
        """The rest of a run's process; never returns."""
        code = 1
        try:
            end_with(server)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for descriptor, wanted in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(descriptor, wanted)
            self._selector.close()
            # What is open of other runs too: a pipe that is held open here would never end.
            others = [descriptor for child in self._children.values() for descriptor in child.descriptors]
            for descriptor in (nothing, output, input_side, self._answers, *others):
                os.close(descriptor)
            vigil.listen()
            code = self._trainer(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            atexit._run_exitfuncs()  # os._exit leaves them out
            os._exit(code)

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.number]
        for descriptor in (child.pipe.descriptor, child.pidfd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        child.pipe.close()
        os.close(child.pidfd)
        answer: dict[str, Any] = {"ended": child.number, "code": os.waitstatus_to_exitcode(status)}
        if child.cause is not None:
            answer |= {"cause": child.cause.to_dict(), "stack": child.vigil.stack()}
        child.vigil.close()
        self.say(answer)

    def say(self, answer: Any) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")


def main(arguments: Sequence[str]) -> int:
    trainer, parent = arguments
    end_with(int(parent))
    began = time.monotonic()
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    server = Server(warm(trainer), answers)
    gc.collect()
    gc.freeze()  # a collection in a run would write to, and so copy, every page that it shares
    threads = len(os.listdir("/proc/self/task"))
    server.say({"ready": True, "seconds": round(time.monotonic() - began, 3), "threads": threads})
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
