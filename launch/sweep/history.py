"""What became of a run: its own directory says, and ``trials/NNNN.jsonl``, written by whoever runs it. No torch.

A line for each start, each end, and for the rule that stopped it. The directory cannot say everything: a run that is
refused never has one, and one that the rule stopped says that it was asked to end.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from launch.sweep.ledger import Ledger, Trial
from pretrain.attempt import ExitClass, read_exit
from pretrain.rundir import attempt_path, attempts, refuse_in_use
from stoker import canonical
from stoker.errors import Refusal
from stoker.files import append_line, read_jsonl
from stoker.secrets import mask


class Outcome(Enum):
    """How far a run of a sweep has come."""

    WAITING = "waiting"
    """Not started."""
    RUNNING = "running"
    DONE = "done"
    CUT = "stopped by the rule"
    """Among the worse at a rung: not finished on purpose."""
    STOPPED = "stopped by a verdict"
    """Its numbers went wrong; the same would happen again."""
    PREEMPTED = "to go on"
    """Asked to end, and saved."""
    REFUSED = "refused"
    BROKEN = "broken"
    """A fault, or killed."""

    @property
    def over(self) -> bool:
        """It will not be started again, however often the command is given."""
        return self in (Outcome.DONE, Outcome.CUT, Outcome.STOPPED)


OUTCOMES = {
    ExitClass.DONE: Outcome.DONE,
    ExitClass.STOPPED: Outcome.STOPPED,
    ExitClass.PREEMPTED: Outcome.PREEMPTED,
    ExitClass.REFUSED: Outcome.REFUSED,
    ExitClass.FAULT: Outcome.BROKEN,
}


@dataclass(frozen=True)
class State:
    """``attempts``: how often it was launched and made a directory for it; ``fingerprint``: equal for two failures that
    are the same, None where that cannot be said."""

    outcome: Outcome
    cause: str = ""
    attempts: int = 0
    fingerprint: str | None = None


@dataclass(frozen=True)
class Cut:
    """The rule's decision: at the rung of ``step`` steps the run was number ``place`` of ``of``."""

    step: int
    value: float | None
    place: int
    of: int

    def __str__(self) -> str:
        return f"number {self.place} of {self.of} at step {self.step}"


def started(ledger: Ledger, trial: Trial) -> None:
    """Record that the run is started; for the one process that runs it."""
    _write(ledger, trial, {"event": "start", "attempt": _newest(ledger, trial)})


def ended(ledger: Ledger, trial: Trial, code: int, cause: str = "") -> State:
    """Record how a start of the run ended, and return it. ``code``: as ``subprocess`` has it, negative for a signal."""
    before = next((line for line in reversed(_lines(ledger.history(trial))) if line["event"] == "start"), None)
    newest = _newest(ledger, trial)
    state = _said(ledger, trial, newest) if before is None or newest > before["attempt"] else None
    if state is None:
        outcome, reason = _of_code(code)
        state = State(outcome, cause or reason, newest)
    _write(
        ledger,
        trial,
        {"event": "end", "attempt": newest, "code": code, "outcome": state.outcome.value, "cause": state.cause},
    )
    return state


def record_cut(ledger: Ledger, trial: Trial, found: Cut) -> None:
    """Record that the rule stops the run: before it is asked to end, so that nobody starts it again."""
    _write(ledger, trial, {"event": "cut", **vars(found)})


def cut(path: Path) -> Cut | None:
    """The rule's decision in a run's history; None where it has not stopped it."""
    for line in _lines(path):
        if line["event"] == "cut":
            return Cut(line["step"], line["value"], line["place"], line["of"])
    return None


def state(ledger: Ledger, trial: Trial) -> State:
    """What became of a run so far, whoever ran it."""
    lines = _lines(ledger.history(trial))
    newest = _newest(ledger, trial)
    if any(line["event"] == "cut" for line in lines):
        found = cut(ledger.history(trial))
        return State(Outcome.CUT, str(found), newest)
    if newest and (said := _said(ledger, trial, newest)) is not None and said.outcome is Outcome.DONE:
        return said
    if newest and _in_use(ledger.run_dir(trial)):
        return State(Outcome.RUNNING, "", newest)
    last = lines[-1] if lines else None
    if last is not None and last["event"] == "end" and last["attempt"] >= newest:
        return State(Outcome(last["outcome"]), last["cause"], newest)
    if newest:
        return _said(ledger, trial, newest) or State(Outcome.BROKEN, "killed: it left no record of its end", newest)
    if last is not None:
        return State(Outcome.BROKEN, "killed before it began", newest)
    return State(Outcome.WAITING)


def _said(ledger: Ledger, trial: Trial, attempt: int) -> State | None:
    """What an attempt recorded of its end."""
    try:
        found = read_exit(attempt_path(ledger.run_dir(trial), attempt))
    except Refusal as damaged:
        return State(Outcome.BROKEN, str(damaged), attempt)
    if found is None:
        return None
    rank = "" if found.rank is None else f"rank {found.rank}: "
    return State(OUTCOMES[found.exit_class], f"{rank}{found.cause}", attempt, found.fingerprint)


def _of_code(code: int) -> tuple[Outcome, str]:
    """What an exit code alone says."""
    if code < 0:
        return Outcome.BROKEN, f"killed by {signal.Signals(-code).name}"
    for exit_class, outcome in OUTCOMES.items():
        if code == exit_class.code:
            return outcome, "" if code == 0 else f"exit code {code}; its log says why"
    return Outcome.BROKEN, f"exit code {code}; its log says why"


def _newest(ledger: Ledger, trial: Trial) -> int:
    return max(attempts(ledger.run_dir(trial)), default=0)


def _in_use(run_dir: Path) -> bool:
    try:
        refuse_in_use(run_dir)
    except Refusal:
        return True
    return False


def _write(ledger: Ledger, trial: Trial, line: Mapping[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    append_line(ledger.history(trial), canonical.dumps(mask({"time": now, **line})))


def _lines(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        return read_jsonl(path)
    except FileNotFoundError:
        return []
