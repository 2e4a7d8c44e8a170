"""Watching a run directory: ``Observer(run_dir).look()`` says how the run is doing, as often as one likes.

A look reads what was written since the last one, and never writes: a run is watched while it trains, on any machine
that sees its directory, with the supervisor's files or (under plain torchrun) without. What is missing or damaged
becomes a sentence of ``Status.unreadable``; only a directory that is no run's is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from launch.supervise.journal import JOURNAL, RANKS
from launch.watch.attempts import AttemptReader
from launch.watch.life import holder_is_alive, seconds_of, state_of, supervisor_is_alive
from launch.watch.ranks import rank_statuses, slow_ranks
from launch.watch.record import AttemptStatus, Disk, Note, State, Status
from launch.watch.series import Series
from launch.watch.tail import Journal
from launch.watch.useful import useful_time
from parallel.planning.plan import ParallelPlan
from pretrain.checkpoint import folders
from pretrain.events import METRICS
from pretrain.rundir import CHECKPOINTS, CONFIG, FORMAT, LOCK, PLAN, STAMP, VERSION
from stoker import formats
from stoker.errors import Refusal
from stoker.secrets import mask
from stoker.yaml_core import parse_yaml

T = TypeVar("T")

GUARDS = "guards.jsonl"
#: Steps whose median says how long one takes; notes that are kept.
RECENT, NOTES = 32, 200
#: Seconds between two countings of the run's bytes.
DISK_EVERY_S = 30.0
#: Events of the supervisor that are worth a note by themselves.
NOTED = ("fault", "notice", "kill", "restart", "training", "slow", "stop", "end")


class Observer:
    """A run directory that is looked at again and again. Not for several threads at once.

    ``series``, ``plan``, ``steps`` (the length of the run) and ``layers`` (the kind of each) are those of the last
    look. Refuses a path that is no run directory, or one of a newer release.
    """

    def __init__(self, run_dir: Path) -> None:
        require_run(run_dir)
        self.root = run_dir
        self.series = Series(run_dir)
        self.plan: ParallelPlan | None = None
        self.steps: int | None = None
        self.layers: list[str] = []
        self._supervisor = Journal(run_dir / JOURNAL)
        self._guards = Journal(run_dir / GUARDS)
        self._attempts = AttemptReader(run_dir)
        self._read_at: dict[Path, tuple[int, int]] = {}
        self._disk: Disk | None = None
        self._disk_at = -math.inf
        self._unreadable: list[str] = []

    def look(self) -> Status:
        """The run now. Its bytes are counted at most every half minute."""
        require_run(self.root)
        self._unreadable = []
        self._read_logs()
        self._when_changed(CONFIG, self._read_config)
        self._when_changed(PLAN, self._read_plan)
        beats = self._tried(RANKS, self._read_ranks, None)
        if time.monotonic() - self._disk_at > DISK_EVERY_S:
            self._disk = self._tried("disk", lambda: disk_of(self.root), None)
            self._disk_at = time.monotonic()

        series, events = self.series, self._supervisor.entries
        found = self._attempts.read(self._standing(), self._unreadable)
        newest = found[-1].number if found else None
        supervised = supervisor_is_alive(self.root, beats, events)
        sign = self._last_sign()
        holder = holder_is_alive(self.root / LOCK)
        state, words = state_of(found, newest in series.spent_s, supervised, holder, sign, _ending(events))
        if found and found[-1].outcome is None:
            found[-1] = _without_record(found[-1], state, sign)
        slow = slow_ranks(self._guards.entries, events, newest) if state.is_under_way else []
        ended = found[-1] if found and found[-1].outcome in ("fault", "stopped") else None
        step_time = self._step_time()
        done = int(series["step"][-1]) + 1 if len(series) else 0
        left = None if self.steps is None or step_time is None else max(0, self.steps - done) * step_time
        status = Status(
            name=self.root.resolve().name,
            path=str(self.root),
            state=state,
            words=words,
            attempt=newest,
            step=done,
            steps=self.steps,
            loss=_newest(series, "loss"),
            grad_norm=_newest(series, "grad_norm"),
            lr=_newest(series, "lr"),
            tokens=int(series["tokens"].sum()),
            tokens_per_s=series.last("tokens_per_s"),
            step_time_s=step_time,
            mfu=series.last("mfu"),
            time_left_s=left,
            restarts=max(0, len(found) - 1),
            faults=dict(Counter(a.kind or "unknown" for a in found if a.outcome in ("fault", "killed"))),
            skipped=len(series.verdicts),
            useful=useful_time(series, found, events, state),
            attempts=found,
            ranks=rank_statuses(beats, self.plan, slow, ended, step_time, state),
            slow_ranks=slow,
            notes=self._notes(),
            committed=self._tried(CHECKPOINTS, lambda: folders.committed(self.root / CHECKPOINTS), []),
            disk=self._disk,
            unreadable=tuple(self._unreadable),
        )
        return _masked(status)

    def is_under_way(self) -> bool:
        """Whether more is to come of the run: a look at its life alone."""
        self._supervisor.refresh()
        events, found = self._supervisor.entries, self._attempts.read({}, [])
        supervised = supervisor_is_alive(self.root, self._tried(RANKS, self._read_ranks, None), events)
        holder = holder_is_alive(self.root / LOCK)
        return state_of(found, True, supervised, holder, self._last_sign())[0].is_under_way

    def _tried(self, what: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (Refusal, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._unreadable.append(f"{what}: {error}")
        return otherwise

    def _read_logs(self) -> None:
        logs: dict[str, Series | Journal] = {METRICS: self.series, JOURNAL: self._supervisor, GUARDS: self._guards}
        for name, log in logs.items():
            self._tried(name, log.refresh, None)
            if log.damaged:
                lines = "1 line is" if log.damaged == 1 else f"{log.damaged:,} lines are"
                self._unreadable.append(f"{name}: {lines} damaged, or of a newer release, and left out")

    def _when_changed(self, name: str, read: Callable[[Path], None]) -> None:
        """Read a file that is not as it was when it was last read without fault."""
        path = self.root / name

        def attempt() -> None:
            if not path.exists():
                return
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if self._read_at.get(path) != stamp:
                read(path)
                self._read_at[path] = stamp

        self._tried(name, attempt, None)

    def _read_config(self, path: Path) -> None:
        """Only what is shown, so that a configuration of any release will do."""
        values = parse_yaml(path.read_text("utf-8"), CONFIG)
        self.steps = int(values["run"]["steps"])
        self.layers = [str(kind) for kind in values["model"]["layers"]]

    def _read_plan(self, path: Path) -> None:
        self.plan = ParallelPlan.from_dict(json.loads(path.read_bytes())["plan"])

    def _read_ranks(self) -> Mapping[str, Any] | None:
        path = self.root / RANKS
        if not path.exists():
            return None
        value = json.loads(path.read_bytes())
        formats.require(value, "ranks", 1, path)
        return dict(value)

    def _standing(self) -> dict[int, tuple[int, int]]:
        """First and last step that stand, by attempt."""
        attempt_of, steps = self.series["attempt"], self.series["step"]
        starts = np.flatnonzero(np.diff(attempt_of, prepend=-1)).tolist()
        stops = [*starts[1:], len(steps)]
        return {int(attempt_of[a]): (int(steps[a]), int(steps[b - 1])) for a, b in zip(starts, stops) if a < b}

    def _step_time(self) -> float | None:
        recent = self.series["step_time_s"][-RECENT:]
        known = recent[np.isfinite(recent)]
        return statistics.median(known.tolist()) if known.size else None

    def _last_sign(self) -> float | None:
        """Unix time of the newest of what a living run writes."""
        signs = []
        for name in (METRICS, RANKS, JOURNAL, CONFIG):
            try:
                signs.append((self.root / name).stat().st_mtime)
            except OSError:
                continue
        return max(signs, default=None)

    def _notes(self) -> list[Note]:
        notes = [_note(entry, "guard", entry.get("kind")) for entry in self._guards.entries[-NOTES:]]
        noted = [entry for entry in self._supervisor.entries if entry.get("event") in NOTED]
        notes += [_note(entry, "supervisor", entry.get("event")) for entry in noted[-NOTES:]]
        return sorted(notes, key=lambda note: seconds_of(note.time) or 0.0)[-NOTES:]


def require_run(root: Path) -> None:
    """Raise Refusal where ``root`` is no run directory, or one of a newer release."""
    if not root.is_dir():
        raise Refusal(f"{root} is no directory: give the path of a run directory, such as runs/demo")
    try:
        stamp = json.loads((root / STAMP).read_bytes())
    except (OSError, ValueError):
        runs = sorted(path.parent.name for path in root.glob(f"*/{STAMP}"))
        hint = f"; it holds the runs {', '.join(runs[:8])}" if runs else ""
        raise Refusal(f"{root} holds no readable {STAMP}: it is no run directory; give the path of one{hint}") from None
    formats.require(stamp, FORMAT, VERSION, root / STAMP)


def disk_of(root: Path) -> Disk:
    """What a run takes; files that vanish meanwhile (a checkpoint that is pruned) count nothing."""
    total = checkpoints = 0
    inside = str(root / CHECKPOINTS)
    for folder, _, names in os.walk(root):
        size = 0
        for name in names:
            try:
                size += os.lstat(os.path.join(folder, name)).st_blocks * 512  # POSIX: in units of 512 bytes
            except FileNotFoundError:
                continue
        total += size
        if folder == inside or folder.startswith(inside + os.sep):
            checkpoints += size
    return Disk(total, checkpoints, shutil.disk_usage(root).free)


def _without_record(attempt: AttemptStatus, state: State, last_sign: float | None) -> AttemptStatus:
    """The newest attempt where it has not said how it ended: it lasts until now, or lasted until its last sign."""
    until = time.time() if state.is_under_way else last_sign
    seconds = max(0.0, until - attempt.began) if until is not None and attempt.began is not None else None
    return replace(attempt, outcome=state.value, seconds=seconds)


def _masked(status: Status) -> Status:
    """With the secrets masked that a cause or a note may hold: they were when they were written, but for what the
    environment of this process knows."""
    return replace(
        status,
        words=mask(status.words),
        attempts=[replace(attempt, cause=mask(attempt.cause)) for attempt in status.attempts],
        notes=[replace(note, text=mask(note.text)) for note in status.notes],
        unreadable=[mask(text) for text in status.unreadable],
    )


def _newest(series: Series, name: str) -> float | None:
    """Of the newest step, NaN included: that a loss is not finite is to be seen."""
    return float(series[name][-1]) if len(series) else None


def _ending(events: list[dict[str, Any]]) -> str:
    """What the supervisor said last, if it has ended."""
    last = events[-1] if events else {}
    return str(last.get("text") or "") if last.get("event") in ("stop", "end") else ""


def _note(entry: Mapping[str, Any], by: str, kind: Any) -> Note:
    numbers = {name: entry.get(name) for name in ("attempt", "step", "rank")}
    known = {name: value if isinstance(value, int) else None for name, value in numbers.items()}
    moment, text = entry.get("time"), entry.get("text") or entry.get("kind") or kind
    return Note(time=str(moment) if moment else None, by=by, kind=str(kind), text=str(text), **known)
