"""Programs that take turns, a thread each, in a time of their own: every look at a file takes as long as a random
number says, most often nothing and now and then a minute, and a program may be gone after any of them."""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launch.preflight import shared


class Killed(BaseException):
    """The program ends here."""


@dataclass
class Program:
    """Runs ``body`` once for each of its ``lives``: after so many looks at files it dies, None: it does not.
    ``outcomes``: of the lives that did not end so; ``wake``: when its turn is."""

    body: Callable[[], Any]
    lives: Sequence[int | None]
    wake: float = 0.0
    looks: float = 0.0
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    outcomes: list[Any] = field(default_factory=list)


class Turns:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.links = 0
        self._waiting: list[Program] = []
        self._current: Program
        self._back = threading.Semaphore(0)

    def start(self, body: Callable[[], Any], lives: Sequence[int | None]) -> Program:
        program = Program(body, lives)
        threading.Thread(target=self._run, args=(program,), daemon=True).start()
        self._waiting.append(program)
        return program

    def finish(self) -> None:
        """Until all programs have ended."""
        while self._waiting:
            self._current = min(self._waiting, key=lambda program: (program.wake, self.random.random()))
            self._waiting.remove(self._current)
            self.now = max(self.now, self._current.wake)
            self._current.turn.release()
            self._back.acquire()

    def _run(self, program: Program) -> None:
        program.turn.acquire()
        for looks in program.lives:
            self.sleep(self.random.choice([0.0, 0.3, 5.0, 30.0, 300.0]))
            program.looks = math.inf if looks is None else looks
            try:
                program.outcomes.append(program.body())
            except Killed:
                pass
            except Exception as error:
                program.outcomes.append(error)
        self._back.release()

    def sleep(self, seconds: float) -> None:
        program = self._current
        program.wake = self.now + seconds
        self._waiting.append(program)
        self._back.release()
        program.turn.acquire()

    def look(self) -> None:
        """A file system takes its time, and a program may not live to see the end of it."""
        program = self._current
        program.looks -= 1
        if program.looks < 0:
            raise Killed
        self.sleep(self.random.choice([0.0] * 20 + [0.01, 0.1, 0.5, 2.0, 12.0, 60.0]))

    @contextlib.contextmanager
    def of_shared(self) -> Iterator[None]:
        """Time and files of ``launch.preflight.shared``."""

        def write(path: Path, content: str) -> None:
            self.look()
            draft = path.with_name(f".{path.name}.{self.random.random()}")
            draft.write_text(content)
            self.look()
            draft.replace(path)
            self.look()

        def link(draft: Path, path: Path) -> None:
            self.look()
            os.link(draft, path)
            self.links += 1
            self.look()

        def looking(function: Callable[..., Any]) -> Callable[..., Any]:
            def looked(*arguments: Any) -> Any:
                self.look()
                found = function(*arguments)
                self.look()
                return found

            return looked

        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep, time=lambda: self.now)
        meeting = shared._Meeting
        with (
            patch.object(shared, "time", clock),
            patch.object(shared, "write_atomic", write),
            patch.object(shared, "os", types.SimpleNamespace(link=link)),
            patch.object(meeting, "_standing", looking(meeting._standing)),
            patch.object(meeting, "_read", looking(meeting._read)),
        ):
            yield
