"""What is done after an attempt has ended: again, or not. A function of causes and steps alone, never of a clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launch.supervise.causes import Cause
from pretrain.attempt import ExitClass

#: Attempts in a row that may end without a step that no attempt began before.
WITHOUT_PROGRESS = 5


@dataclass(frozen=True)
class Decision:
    """``again``: another attempt follows; else the launch ends with ``code``. ``text`` says why, for a person."""

    again: bool
    cause: Cause
    text: str

    @property
    def code(self) -> int:
        return self.cause.exit_class.code

    def to_dict(self) -> dict[str, Any]:
        return {"again": self.again, "cause": self.cause.to_dict(), "text": self.text}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Decision:
        return cls(bool(value["again"]), Cause.from_dict(value["cause"]), str(value["text"]))


@dataclass
class Policy:
    """Remembers what it must of the attempts before: ``furthest`` is the highest step that any of them began."""

    max_restarts: int
    restarts: int = 0
    furthest: int = -1
    without_progress: int = 0
    last_fingerprint: str | None = None
    ooms: int = 0

    def decide(self, cause: Cause, step: int | None) -> Decision:
        """After an attempt that ended by ``cause`` and began no step above ``step`` (None: it began none)."""
        if cause.exit_class is not ExitClass.FAULT:
            return Decision(False, cause, str(cause))
        reached = -1 if step is None else step
        self.without_progress = 0 if reached > self.furthest else self.without_progress + 1
        self.furthest = max(self.furthest, reached)
        same = cause.fingerprint is not None and cause.fingerprint == self.last_fingerprint
        self.last_fingerprint = cause.fingerprint
        self.ooms = self.ooms + 1 if cause.kind == "oom" else 0
        if same:
            return Decision(False, cause, f"the same failure twice, so it is not started again: {cause}")
        if cause.kind == "oom" and self.ooms > 1:
            return Decision(False, cause, f"out of memory twice in a row, so it is not started again: {cause}")
        if self.restarts >= self.max_restarts:
            after = f" after {self.restarts} restarts (launch.max_restarts)" if self.restarts else ""
            return Decision(False, cause, f"{cause}{after}")
        if self.without_progress >= WITHOUT_PROGRESS:
            return Decision(False, cause, f"{WITHOUT_PROGRESS} attempts in a row began no new step; the last: {cause}")
        self.restarts += 1
        return Decision(True, cause, str(cause))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Policy:
        return cls(**value)
