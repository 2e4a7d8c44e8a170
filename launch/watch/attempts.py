"""The launches of a run, as their directories tell: read again at each look only where they can still change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.watch.record import AttemptStatus
from pretrain.attempt import Exit, read_exit
from pretrain.rundir import attempt_path, attempts
from stoker.errors import Refusal

NO_RECORD = "it left no record of its end"


class AttemptReader:
    """Attempts before the newest are as they will be, and are read once."""

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir
        self._past: dict[int, AttemptStatus] = {}

    def read(self, standing: Mapping[int, tuple[int, int]], unreadable: list[str]) -> list[AttemptStatus]:
        """Every attempt, in order. ``standing``: first and last step that stand, by attempt. The newest has no
        ``outcome`` where it has not said how it ended. What cannot be read is told to ``unreadable``."""
        found = []
        numbers = attempts(self._root)
        for number in numbers:
            status = self._past.get(number)
            if status is None:
                before = len(unreadable)
                status = self._attempt(number, number == numbers[-1], unreadable)
                if number != numbers[-1] and len(unreadable) == before:
                    self._past[number] = status
            first, last = standing.get(number, (None, None))
            found.append(replace(status, first_step=first, last_step=last))
        return found

    def _attempt(self, number: int, is_newest: bool, unreadable: list[str]) -> AttemptStatus:
        path = attempt_path(self._root, number)
        ended: Exit | None = None
        known: Mapping[str, Any] = {}
        try:
            ended = read_exit(path)
        except (Refusal, OSError, TypeError, AttributeError) as error:
            unreadable.append(f"end of attempt {number}: {error}")
        try:
            known = dict(json.loads((path / "environment.json").read_bytes()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            unreadable.append(f"environment of attempt {number}: {error}")
        began, finished = _written(path / "environment.json"), _written(path / "exit.json")
        outcome, cause = (None, "") if is_newest else ("killed", NO_RECORD)
        if ended is not None:
            outcome, cause = ended.exit_class.value, ended.cause
        start = known.get("start")
        return AttemptStatus(
            number=number,
            outcome=outcome,
            kind=getattr(ended, "kind", None),
            rank=ended.rank if ended is not None else None,
            cause=cause,
            resume_step=start.get("resume_step") if isinstance(start, Mapping) else None,
            first_step=None,
            last_step=None,
            host=known.get("host"),
            began=began,
            seconds=max(0.0, finished - began) if began is not None and finished is not None else None,
        )


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
