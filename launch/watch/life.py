"""Whether a run is under way, and what it is doing: from its attempts, its supervisor's journal and its processes."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from launch.supervise.journal import LOCK
from launch.watch.record import AttemptStatus, State

#: Seconds without a sign on another host, where its processes cannot be asked, after which a run may be dead.
SILENT_S = 60.0
#: Events of the journal that begin and end what the supervisor does.
BEGIN, END = "start", "end"


def seconds_of(moment: Any) -> float | None:
    """Unix time of an ISO 8601 text; without an offset it is UTC. None if it is none."""
    try:
        parsed = datetime.fromisoformat(moment)
    except (TypeError, ValueError):
        return None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def is_alive(pid: Any, host: Any, since: float) -> bool | None:
    """Whether the process that said so at ``since`` (Unix time) still is; None if it is another host's. One that was
    born later has only inherited its number."""
    if host != platform.node():
        return None
    try:
        process = psutil.Process(int(pid))
        return process.create_time() <= since + 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, TypeError, ValueError, OverflowError):
        return False
    except psutil.AccessDenied:
        return None


def holder_is_alive(lock: Path) -> bool | None:
    """Whether the process that took a lock file last still is; None if that cannot be known from here.

    The lock itself is not touched: to try it would refuse a launch that tries it at that moment.
    """
    try:
        text, taken = lock.read_text("utf-8", "replace"), lock.stat().st_mtime
    except OSError:
        return None
    said = re.fullmatch(r"process (\d+) on (.*)", text.strip())
    return is_alive(said[1], said[2], taken) if said else None


def supervisor_is_alive(root: Path, beats: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a supervisor is at work: its last start has no end, and it lives; on another host, it wrote of late how
    its ranks do."""
    last = next((event["event"] for event in reversed(events) if event.get("event") in (BEGIN, END)), None)
    if last != BEGIN:
        return False
    alive = holder_is_alive(root / LOCK)
    if alive is not None:
        return alive
    written = seconds_of(beats.get("time")) if beats is not None else None
    return written is not None and time.time() - written < SILENT_S


def state_of(
    attempts: Sequence[AttemptStatus],
    has_steps: bool,
    supervised: bool,
    holder: bool | None,
    last_sign: float | None,
    ending: str = "",
) -> tuple[State, str]:
    """What the run does, and a sentence about it where the state does not say all.

    ``has_steps``: the newest attempt has recorded one; ``last_sign``: Unix time of the last thing that was written;
    ``ending``: what the supervisor said at its end.
    """
    if not attempts:
        if supervised:
            return State.STARTING, "no attempt has begun yet"
        return (State.FAULT, ending) if ending else (State.NOT_STARTED, "")
    last = attempts[-1]
    if last.outcome is not None:
        if supervised and last.outcome == State.FAULT.value:
            whose = "" if last.rank is None else f" of rank {last.rank}"
            return State.RESTARTING, f"after {last.kind or 'a fault'}{whose}"
        return State(last.outcome), last.cause
    if supervised or holder:
        return (State.RUNNING, "") if has_steps else (State.STARTING, "")
    if holder is False:
        return State.KILLED, "it left no record of its end; the same command goes on from the newest checkpoint"
    if last_sign is None:
        return State.UNKNOWN, "no sign of life is there"
    silent = time.time() - last_sign
    if silent < SILENT_S:
        return (State.RUNNING, "") if has_steps else (State.STARTING, "")
    return State.UNKNOWN, f"nothing was written for {silent:,.0f} s: it was killed, or hangs on another host"
