"""Why an attempt ended: what one node found, which of several findings is the guilty one, and ``exit.json``."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.attempt import KINDS, Exit, ExitClass, read_exit, settle_exit
from pretrain.diagnosis import device_error, device_fingerprint, lost_peer
from pretrain.rundir import attempt_path
from stoker.errors import Refusal

_log = logging.getLogger(__name__)

#: Signals that a program brings on itself: the same one again at the same step is the same failure. Others are sent.
OWN_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)


@dataclass(frozen=True)
class Cause:
    """Why the ranks of a node ended, or were ended; the fields of ``exit.json``, and what tells the guilty node.

    ``beats``: phases that the guilty rank of a hang had begun, of which the least is the guilty one among nodes;
    ``waiting``: it waited for others, as its stack says.
    """

    exit_class: ExitClass
    kind: str
    text: str
    rank: int | None = None
    step: int | None = None
    host: str | None = None
    fingerprint: str | None = None
    stacks: tuple[str, ...] = ()
    beats: int | None = None
    waiting: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exit_class": self.exit_class.value, "stacks": list(self.stacks)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Cause:
        return cls(**{**value, "exit_class": ExitClass(value["exit_class"]), "stacks": tuple(value["stacks"])})

    def __str__(self) -> str:
        where = "" if self.rank is None or f"rank {self.rank}" in self.text else f"rank {self.rank}: "
        return where + " ".join(self.text.split())


def fault(kind: str, text: str, **known: Any) -> Cause:
    return Cause(ExitClass.FAULT, kind, text, **known)


DONE = Cause(ExitClass.DONE, "done", "")
PREEMPTED = Cause(ExitClass.PREEMPTED, "preempted", "asked to end")


def killed(rank: int, number: int, step: int | None, host: str, no_memory: bool, last: str = "") -> Cause:
    """``rank`` was killed by signal ``number``; ``no_memory``: the kernel killed for memory meanwhile; ``last``: lines
    that it printed last, which tell why NCCL's watchdog aborted it: its device, or a peer that is gone."""
    name = signal.Signals(number).name
    if number == signal.SIGABRT and "ProcessGroupNCCL" in last:
        if (device := device_error(last)) is not None:
            text, same = f"rank {rank} was aborted: {device.name}", device_fingerprint(device, rank, step)
            return fault("device", text, rank=rank, step=step, host=host, fingerprint=same)
        if (line := lost_peer(last)) is not None:
            return fault("store", f"another rank is gone ({line})", step=step, host=host)
    if no_memory and number == signal.SIGKILL:
        text = f"rank {rank} was killed by the kernel: out of memory"
        return fault("oom", text, rank=rank, step=step, host=host, fingerprint=f"oom, rank {rank}, step {step}")
    own = f"signal, rank {rank}, {name}, step {step}" if number in OWN_SIGNALS else None
    return fault("signal", f"rank {rank} was killed by {name}", rank=rank, step=step, host=host, fingerprint=own)


def said(run_dir: Path, attempt: int) -> Cause | None:
    """What the ranks themselves wrote into ``exit.json`` of this attempt; None where it cannot be read: torn by a rank
    that was killed while it wrote, or replaced by another node just now."""
    try:
        ended = read_exit(attempt_path(run_dir, attempt))
    except (OSError, Refusal):
        return None
    if ended is None:
        return None
    return Cause(
        ended.exit_class, ended.kind, ended.cause, ended.rank, ended.step, ended.host, ended.fingerprint,
        tuple(ended.stacks),
    )  # fmt: skip


def most_telling(causes: Iterable[Cause]) -> Cause:
    """The guilty one of what several observers found: one that blames a rank before one that only lost it; of hanging
    ranks the one with the least beats, where equal the one that does not wait for others."""

    def rank(cause: Cause) -> tuple[Any, ...]:
        kind = KINDS.index(cause.kind)
        consequence = cause.exit_class is ExitClass.FAULT and cause.rank is None and cause.kind in ("store", "unknown")
        beats = cause.beats if cause.beats is not None else float("inf")
        return consequence, kind, beats, cause.waiting

    return min(causes, key=rank)


def record(run_dir: Path, attempt: int, cause: Cause) -> None:
    """Complete ``exit.json`` of an attempt once its ranks have ended: where it says more than ``cause``, it stands.

    For the leader's agent. An attempt whose ranks ended before they began it gets its directory here. That the disk is
    full costs the file, not the run."""
    try:
        _record(run_dir, attempt, cause)
    except OSError as error:
        _log.warning("%s: %s", attempt_path(run_dir, attempt), error)


def _record(run_dir: Path, attempt: int, cause: Cause) -> None:
    path = attempt_path(run_dir, attempt)
    path.mkdir(parents=True, exist_ok=True)
    before = said(run_dir, attempt)
    if before is not None and before.exit_class is not ExitClass.FAULT and cause.exit_class is ExitClass.FAULT:
        before = None  # it ended well, and then did not end
    kept = cause if before is None else most_telling([before, cause])
    if kept != before:
        kept = replace(kept, stacks=kept.stacks or cause.stacks)
        settle_exit(
            path,
            Exit(kept.exit_class, kept.text, kept.rank, kept.kind, kept.step, kept.host, kept.fingerprint, kept.stacks),
        )
