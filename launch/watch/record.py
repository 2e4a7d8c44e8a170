"""What is said of a run at one moment: plain values, which terminal, page and Prometheus each show their way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from stoker import formats

FORMAT, VERSION = "status", 1


class State(Enum):
    """What a run is doing, or how it ended."""

    NOT_STARTED = "not started"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    DONE = "done"
    REFUSED = "refused"
    STOPPED = "stopped"
    PREEMPTED = "preempted"
    FAULT = "fault"
    KILLED = "killed"
    UNKNOWN = "unknown"

    @property
    def is_under_way(self) -> bool:
        return self in (State.STARTING, State.RUNNING, State.RESTARTING)

    @property
    def is_bad(self) -> bool:
        return self in (State.REFUSED, State.STOPPED, State.FAULT, State.KILLED)


class Health(Enum):
    """Of a rank, the worst that is known. Quiet: no heartbeat for longer than its steps explain. Gone: its process has
    ended while others run."""

    WELL = "well"
    UNKNOWN = "unknown"
    QUIET = "quiet"
    SLOW = "slow"
    GONE = "gone"
    GUILTY = "guilty"


@dataclass(frozen=True)
class AttemptStatus:
    """One launch. Its steps that stand are ``first_step`` to ``last_step``, None if none does. ``seconds``: from its
    begin to its end or now, by the times of its files; None if they do not say. ``began``: Unix time. ``outcome``: a
    class of exit.json, or a word of ``State`` where there is none."""

    number: int
    outcome: str | None
    kind: str | None
    rank: int | None
    cause: str
    resume_step: int | None
    first_step: int | None
    last_step: int | None
    host: str | None
    began: float | None
    seconds: float | None


@dataclass(frozen=True)
class RankStatus:
    """A rank as its heartbeat says; None where that is not known. ``age_s``: seconds since its last beat; ``busy_s``:
    of its processor; ``step``: the one that it works on."""

    rank: int
    node: str | None
    phase: str | None
    step: int | None
    age_s: float | None
    busy_s: float | None
    rss_bytes: int | None
    health: Health


@dataclass(frozen=True)
class Note:
    """Something that a guard or the supervisor said. ``time``: as written, ISO 8601 UTC."""

    time: str | None
    by: str
    kind: str
    attempt: int | None
    step: int | None
    rank: int | None
    text: str


@dataclass(frozen=True)
class Useful:
    """Where the time went. ``useful_s``: in steps that stand; ``redone_s``: in steps that a later attempt did again;
    ``elapsed_s``: since the first start, the time between two launches apart; None if it is not known."""

    useful_s: float
    redone_s: float
    redone_steps: int
    elapsed_s: float | None

    @property
    def share(self) -> float | None:
        """None too where the times cannot be true: files that were copied have the times of the copy."""
        elapsed = self.elapsed_s
        if not elapsed or self.useful_s > 1.02 * elapsed + 1.0:
            return None
        return min(1.0, self.useful_s / elapsed)


@dataclass(frozen=True)
class Disk:
    """Bytes. ``run``: of the run directory, ``checkpoints`` among them; ``free``: of its file system."""

    run: int
    checkpoints: int
    free: int


@dataclass(frozen=True)
class Status:
    """A run at one moment. ``step``: steps done that stand, of ``steps``; ``loss`` to ``mfu``: of the newest step that
    has them; ``step_time_s``: the median of the last steps; None: not known.

    ``restarts``: launches after the first; ``faults``: by kind, of all attempts; ``skipped``: steps not applied;
    ``committed``: steps of the checkpoints; ``unreadable``: what is missing from this, in sentences.
    """

    name: str
    path: str
    state: State
    words: str
    attempt: int | None
    step: int
    steps: int | None
    loss: float | None
    grad_norm: float | None
    lr: float | None
    tokens: int
    tokens_per_s: float | None
    step_time_s: float | None
    mfu: float | None
    time_left_s: float | None
    restarts: int
    faults: Mapping[str, int]
    skipped: int
    useful: Useful
    attempts: Sequence[AttemptStatus]
    ranks: Sequence[RankStatus]
    slow_ranks: Sequence[int]
    notes: Sequence[Note]
    committed: Sequence[int]
    disk: Disk | None
    unreadable: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Values of JSON: enums as their words, numbers that are not finite as the texts "nan", "inf" and "-inf"."""
        value = {"format": formats.stamp(FORMAT, VERSION), **asdict(self)}
        value["useful"]["share"] = self.useful.share
        plain: dict[str, Any] = _plain(value)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
