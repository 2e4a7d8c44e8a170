"""Slots on this machine that do not pay for the import of torch: the client of ``server.py``."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from launch.supervise import causes, logs
from launch.supervise.causes import Cause
from launch.supervise.heartbeats import Standstill
from launch.sweep.ledger import Ledger, Trial
from launch.sweep.processes import is_stopped
from launch.sweep.slots import Ended
from pretrain.rundir import attempts
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.secrets import mask

#: What a run is: ``module:function`` that takes the arguments of ``python -m pretrain`` and returns its exit code.
TRAINER = "pretrain.run:main"
#: Seconds that the server may take to import everything.
WARM_UP_S = 300.0


class ForkSlots:
    """Runs of one rank on the CPU, ``count`` at a time, each a fork of one process that has imported everything.

    A run that stands still is ended, and starts again as one that was killed does. How long that takes to notice, its
    heartbeat decides (``pretrain.heartbeat``): a trainer that has none has ten minutes.
    Where that process dies, its runs die with it: they end as killed, and the next one that is started makes another.
    """

    def __init__(
        self,
        ledger: Ledger,
        count: int,
        environment: Mapping[str, str],
        trainer: str = TRAINER,
        announce: Callable[[str], None] = print,
    ) -> None:
        self.count = count
        self._ledger, self._environment, self._trainer, self._announce = ledger, environment, trainer, announce
        self._server: subprocess.Popen[bytes] | None = None
        self._running: dict[int, int] = {}  # to the number of its last attempt before
        self._standstill = Standstill()
        self._answered = b""
        self._selector = selectors.DefaultSelector()

    def start(self, trial: Trial) -> None:
        if self._server is None:
            self._warm_up()
        self._running[trial.number] = self._newest(trial)
        arguments, log = self._ledger.arguments(trial), str(self._ledger.log(trial))
        hang_s = self._ledger.config(trial).launch.hang_s
        self._ask({"run": trial.number, "arguments": arguments, "log": log, "hang_s": hang_s})

    def wait(self, timeout_s: float) -> list[Ended]:
        if self._server is None:
            time.sleep(timeout_s)
            return []
        if self._standstill.look(is_stopped(self._server.pid), time.monotonic()):
            self._server.kill()  # nobody would hear of its runs
        answers = self._answers(timeout_s)
        return self._lost() if answers is None else [self._ended(answer) for answer in answers]

    def ask_to_end(self, number: int) -> None:
        self._ask({"run": number, "signal": signal.SIGTERM})

    def kill(self, number: int) -> None:
        self._ask({"run": number, "signal": signal.SIGKILL})

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()  # its runs go with it
            self._forget()
        self._selector.close()

    def _ended(self, answer: Mapping[str, Any]) -> Ended:
        """Of a run that was ended since it stood still, its attempt says so."""
        trial = self._ledger.trial(answer["ended"])
        before = self._running.pop(trial.number)
        if "cause" not in answer:
            return Ended(trial.number, answer["code"])
        cause, attempt = Cause.from_dict(answer["cause"]), self._newest(trial)
        if attempt > before:
            run_dir = self._ledger.run_dir(trial)
            if answer["stack"]:
                path = logs.stack_path(run_dir, attempt, 0)
                with contextlib.suppress(OSError):  # a disk that is full costs the stack, not the sweep
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(path, mask(answer["stack"]))
                    cause = replace(cause, stacks=(str(path.relative_to(run_dir)),))
            causes.record(run_dir, attempt, cause)
        return Ended(trial.number, answer["code"], cause.text)

    def _newest(self, trial: Trial) -> int:
        return max(attempts(self._ledger.run_dir(trial)), default=0)

    def _warm_up(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "launch.sweep.server", self._trainer, str(os.getpid())],
            env={**os.environ, **self._environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches nobody but this process, which decides
        )
        assert self._server.stdout is not None
        os.set_blocking(self._server.stdout.fileno(), False)
        self._selector.register(self._server.stdout, selectors.EVENT_READ)
        deadline = time.monotonic() + WARM_UP_S
        while not (answers := self._answers(1.0)):
            if answers is None or time.monotonic() > deadline:
                self.close()
                raise Refusal("the process that runs are forked from could not start: what it said stands above")
        if (threads := answers[0]["threads"]) > 1:
            self._announce(
                f"the process that runs are forked from has {threads} threads after its imports, where it should have "
                "one: a lock that another one holds would stay held in a run; if runs hang, say --fresh"
            )

    def _answers(self, timeout_s: float) -> list[Any] | None:
        """What the server has said since; None where it is gone."""
        assert self._server is not None and self._server.stdout is not None
        if not self._selector.select(timeout_s):
            return []
        data = os.read(self._server.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._answered = (self._answered + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _lost(self) -> list[Ended]:
        """Its runs are gone with it; the next one that is started makes another server."""
        assert self._server is not None
        code = self._server.wait()
        lost, self._running = sorted(self._running), {}
        self._forget()
        return [
            Ended(number, -signal.SIGKILL, f"the process it was forked from ended (code {code})") for number in lost
        ]

    def _forget(self) -> None:
        server, self._server, self._answered = self._server, None, b""
        assert server is not None and server.stdin is not None and server.stdout is not None
        self._selector.unregister(server.stdout)
        server.wait()
        for stream in (server.stdin, server.stdout):
            stream.close()

    def _ask(self, what: Mapping[str, Any]) -> None:
        assert self._server is not None and self._server.stdin is not None
        try:
            self._server.stdin.write(json.dumps(what).encode() + b"\n")
            self._server.stdin.flush()
        except BrokenPipeError:  # it is gone, and the next ``wait`` says so
            return
