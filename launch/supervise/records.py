"""The files of a run as the agent that leads several nodes writes them: in a thread of its own, one after another, so
that a file system that stalls holds up no word between the nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.supervise import outcome
from launch.supervise.causes import Cause, record
from launch.supervise.journal import Journal, RankState
from pretrain.rundir import attempts
from stoker.errors import Refusal


class Records:
    """``refusal``: why the journal could not be opened when it was last tried; events wait until it is."""

    def __init__(self, run_dir: Path, listeners: Sequence[Callable[[dict[str, Any]], None]]) -> None:
        self.refusal: str | None = None
        self._run_dir, self._listeners = run_dir, listeners
        self._thread = ThreadPoolExecutor(1, "stoker-records")
        self._journal: Journal | None = None
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._opening: Future[None] | None = None
        self._shown: Future[None] | None = None
        self._counted: Future[int] | None = None

    @property
    def is_open(self) -> bool:
        return self._journal is not None

    def open(self) -> None:
        """Take the journal, if nobody has it; called again and again."""
        if self._journal is None and (self._opening is None or self._opening.done()):
            self._opening = self._thread.submit(self._open)

    def write(self, event: str, **fields: Any) -> None:
        self._thread.submit(self._write, event, fields)

    def record(self, attempt: int, cause: Cause) -> None:
        self._thread.submit(record, self._run_dir, attempt, cause)

    def ended(self, launch: str, code: int) -> None:
        self._thread.submit(outcome.record, self._run_dir, launch, code)

    def ranks(self, attempt: int, state: str, ranks: Sequence[RankState]) -> None:
        """Where ranks stand; left out while an earlier one is still being written."""
        if self._shown is None or self._shown.done():
            self._shown = self._thread.submit(self._show, attempt, state, ranks)

    def newest_attempt(self) -> int | None:
        """The newest attempt of the run, after all that was written before; None while it is looked up."""
        if self._counted is None:
            self._counted = self._thread.submit(lambda: max(attempts(self._run_dir), default=0))
        if not self._counted.done():
            return None
        counted, self._counted = self._counted, None
        return counted.result() if counted.exception() is None else None  # the next time, then

    def release(self) -> None:
        """Let the journal go: another node leads now."""
        self._thread.submit(self._release)

    def close(self) -> None:
        """Everything is written before the process ends."""
        self._thread.submit(self._release)
        self._thread.shutdown(wait=False)

    def _open(self) -> None:
        try:
            journal = Journal(self._run_dir, self._listeners)
        except (Refusal, OSError) as error:
            self.refusal = str(error)
            return
        self.refusal, self._journal = None, journal
        lines, self._waiting = self._waiting, []
        for event, fields in lines:
            journal.write(event, **fields)

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        if self._journal is None:
            self._waiting.append((event, fields))
        else:
            self._journal.write(event, **fields)

    def _show(self, attempt: int, state: str, ranks: Sequence[RankState]) -> None:
        if self._journal is not None:
            self._journal.ranks(attempt, state, ranks)

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
