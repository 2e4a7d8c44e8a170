"""The run directory: what a run leaves behind, attempt by attempt. No torch.

First ``inspect``, which only reads and refuses; then, on rank 0, ``begin``, which writes. Everything here has one
writer, rank 0, but ``exit.json``: there the first rank that knows why the attempt ended writes, and it stands; the
launcher adds the rank that was killed, which could not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from parallel.planning.plan import ParallelPlan
from pretrain.attempt import ExitClass, environment, lock_sha256, record_exit, write_json
from pretrain.checkpoint import folders
from pretrain.config import Change, RunConfig, allowed_changes, parse
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.version import code_commit
from stoker.yaml_core import parse_yaml

FORMAT, VERSION = "run", 1
STAMP, CONFIG, PLAN, LOCK = "format.json", "config.yaml", "plan.json", ".lock"
CHECKPOINTS, ATTEMPTS = "checkpoints", "attempts"
ENVIRONMENT = "environment.json"

#: Keys that a segment of the data log holds.
DATA_KEYS = ("data.blend", "data.seq_len", "train.global_batch")
#: Set by torchrun and Slurm to the number of times that they started this launch again by themselves.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
#: Set by the supervisor to the number that the next attempt is to have: its own records of the attempt carry it.
ATTEMPT_VARIABLE = "STOKER_ATTEMPT"

#: Seconds that a shared file system may hold the lock of a host that is gone (NFSv4 leases: 90).
LEASE_S = 120.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How the next attempt begins: ``resume_step`` is the checkpoint to load, None to start from nothing. ``changes``
    are the keys that differ from the run so far, all of them allowed."""

    root: Path
    attempt: int
    resume_step: int | None
    changes: tuple[Change, ...] = ()


def inspect(config: RunConfig, committed: Sequence[int] | None = None) -> Start:
    """How a run with this configuration would start; nothing is written.

    ``committed``: steps of the checkpoints that can be loaded, by default those with a COMMIT file. Refuses a directory
    that cannot be written, is something else, or was written by a newer release; one in use; changed keys that may not
    change; and a ``run.resume`` that cannot be done.
    """
    root = config.run_dir
    _refuse_unwritable(root)
    if not _entries(root):
        return Start(root, _next_attempt(root), _resume_step(config, committed or ()))
    try:
        stamp = json.loads((root / STAMP).read_bytes())
    except (OSError, ValueError):
        raise Refusal(
            f"{root} holds files and no readable {STAMP}: it is no run directory. Choose another run.name or run.dir"
        ) from None
    formats.require(stamp, FORMAT, VERSION, root / STAMP)
    refuse_in_use(root)
    changes: list[Change] = []
    if (root / CONFIG).exists():
        changes = allowed_changes(_read_config(root / CONFIG), config.masked())
    steps = committed_steps(root) if committed is None else committed
    return Start(root, _next_attempt(root), _resume_step(config, steps), tuple(changes))


class Attempt:
    """One launch that is under way: holds the directory's lock until it is closed or the process ends."""

    def __init__(self, root: Path, number: int, lock: IO[str]) -> None:
        self.root = root
        self.number = number
        self.path = attempt_path(root, number)
        self._lock = lock

    def finish(self, exit_class: ExitClass, cause: str = "", rank: int | None = None) -> None:
        """Record how the attempt ended and let the directory go."""
        record_exit(self.path, exit_class, cause, rank)
        self.close()

    def close(self) -> None:
        self._lock.close()


def begin(
    start: Start,
    config: RunConfig,
    plan: ParallelPlan,
    predictions: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Attempt:
    """Make the directory of the next attempt and write what it is: rank 0 only, after ``inspect``.

    ``predictions``: memory and step time of this plan, to compare with what is measured; what is not known is left out.
    ``device``: what its ranks compute on, "cuda" or "cpu".
    """
    root = start.root
    prepare(root)
    lock = _lock(root)
    attempt = Attempt(root, start.attempt, lock)
    try:
        attempt.path.mkdir()
    except FileExistsError:
        lock.close()
        raise Refusal(f"{attempt.path} was begun by another launch: start again") from None
    config = config.masked()
    layout = {"plan": plan.to_dict(), "predictions": dict(predictions or {})}
    started = {"resume_step": start.resume_step, "changes": [[c.key, c.old, c.new] for c in start.changes]}
    write_atomic(attempt.path / CONFIG, config.to_yaml(code_commit=code_commit(), lock_sha256=lock_sha256()))
    write_json(attempt.path / PLAN, "plan", layout)
    write_json(attempt.path / ENVIRONMENT, "environment", environment() | {"device": device, "start": started})
    write_json(root / PLAN, "plan", layout)
    write_atomic(root / CONFIG, config.to_yaml())
    return attempt


def prepare(root: Path) -> None:
    """Make the directory of a run and say in it that it is one; nothing is changed where it is there. Refusal if it
    cannot be made."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not (root / STAMP).exists():  # the first file: without it the directory is not a run's
            write_atomic(root / STAMP, canonical.dumps({"format": formats.stamp(FORMAT, VERSION)}) + "\n")
        (root / ATTEMPTS).mkdir(exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise Refusal(f"run directory {root} cannot be made: {error}. Choose another run.dir or run.name") from None


def attempts(root: Path) -> list[int]:
    """Numbers of the attempts so far, ascending."""
    return sorted(int(path.name) for path in (root / ATTEMPTS).glob("*") if path.name.isdigit())


def attempt_path(root: Path, number: int) -> Path:
    return root / ATTEMPTS / f"{number:04d}"


def _next_attempt(root: Path) -> int:
    newest = max(attempts(root), default=0)
    given = os.environ.get(ATTEMPT_VARIABLE)
    if given is None:
        return newest + 1
    if int(given) <= newest:
        raise Refusal(f"{attempt_path(root, newest)} was begun by another launch, and this one was to be {given}")
    return int(given)


def last_plan(config: RunConfig, world_size: int) -> ParallelPlan | None:
    """The layout of the newest attempt that began, of a run that has checkpoints, where ``parallel: auto`` chose it for
    as many ranks and for the same batches."""
    root = config.run_dir
    if not committed_steps(root):
        return None
    try:
        begun = (path for number in reversed(attempts(root)) if ((path := attempt_path(root, number)) / PLAN).exists())
        path = next(begun)
        plan = ParallelPlan.from_dict(json.loads((path / PLAN).read_bytes())["plan"])
        before = _read_config(path / CONFIG)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):  # what is damaged is decided anew
        return None
    kept = plan.world_size == world_size and before.parallel == "auto"
    return plan if kept and _batches(before) == _batches(config) else None


def last_device(root: Path) -> str | None:
    """What the ranks of the newest attempt that began computed on, "cuda" or "cpu"; None where that is not known."""
    for number in reversed(attempts(root)):
        try:
            return str(json.loads((attempt_path(root, number) / ENVIRONMENT).read_bytes())["device"])
        except FileNotFoundError:  # it ended before it began
            continue
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return None


def _batches(config: RunConfig) -> tuple[int, int, int]:
    return config.train.global_batch, config.train.micro_batch, config.data.seq_len


def committed_steps(root: Path) -> list[int]:
    """Steps of the checkpoints of a run that were committed, ascending; that they are intact is not looked at."""
    return folders.committed(root / CHECKPOINTS)


def data_changed(changes: Sequence[Change]) -> bool:
    """Some change is one of the data, which the data log is to record."""
    return any(change.key.startswith(DATA_KEYS) for change in changes)


def _resume_step(config: RunConfig, committed: Sequence[int]) -> int | None:
    resume, root = config.run.resume, config.run_dir
    newest = max(committed, default=None)
    if resume != "auto" and any(int(os.environ.get(name) or 0) for name in RESTART_COUNTS):
        # The launch has begun anew, or gone back to its step, already; a restart of it goes on from there.
        resume = "auto"
    if resume == "never":
        if newest is not None:
            raise Refusal(
                f"run.resume=never and {root} holds checkpoints up to step {newest}: they would be mixed with another "
                "run. Choose another run.name, or run.resume=auto"
            )
        return None
    if newest is None and (damaged := folders.damaged(root / CHECKPOINTS)):
        raise Refusal(
            f"{root / CHECKPOINTS} holds checkpoints and none of them is whole ({', '.join(damaged)}): training would "
            "begin from nothing. Restore one, or choose another run.name"
        )
    if isinstance(resume, int) and resume not in committed:
        held = ", ".join(map(str, sorted(committed))) or "none"
        raise Refusal(f"run.resume={resume}: {root} holds no committed checkpoint of that step (it holds {held})")
    step = resume if isinstance(resume, int) else newest
    if step is not None and step > config.run.steps:
        raise Refusal(
            f"{root} would resume at step {step}, beyond run.steps={config.run.steps}: "
            "raise run.steps, or give run.resume=<earlier step>"
        )
    return step


def _entries(root: Path) -> list[str]:
    """What a directory holds, hidden files apart (a crash can leave a temporary one); empty if it is not there."""
    return [path.name for path in root.iterdir() if not path.name.startswith(".")] if root.exists() else []


def _refuse_unwritable(root: Path) -> None:
    try:
        existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    except OSError as error:
        raise Refusal(
            f"run directory {root} cannot be made: {error.strerror}. Choose another run.dir or run.name"
        ) from None
    if not existing.is_dir():
        raise Refusal(f"run directory {root} cannot be made: {existing} is a file. Choose another run.dir or run.name")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Refusal(f"run directory {root}: {existing} cannot be written. Choose another run.dir, or its permissions")


def refuse_in_use(root: Path) -> None:
    """Raise Refusal where another launch holds the directory."""
    if (root / LOCK).exists():
        with open(root / LOCK, encoding="utf-8") as file:
            _take(file, fcntl.LOCK_SH, root)


def _lock(root: Path) -> IO[str]:
    file = open(root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the attempt
    try:
        _take(file, fcntl.LOCK_EX, root)
    except Refusal:
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def _take(file: IO[str], kind: int, root: Path) -> None:
    """Lock, or refuse. Started again by a supervisor, wait: a shared file system holds the lock of a node that was lost
    until its lease is over."""
    until = time.monotonic() + (LEASE_S if os.environ.get(ATTEMPT_VARIABLE) else 0.0)
    while True:
        try:
            return _take_now(file, kind, root)
        except Refusal:
            if time.monotonic() >= until:
                raise
            time.sleep(0.5)


def _take_now(file: IO[str], kind: int, root: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise Refusal(f"{root} is in use by {file.read()}: wait for it, or choose another run.name") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _log.warning("%s: this file system has no locks (%s): a second launch at once is not noticed", root, error)


def _read_config(path: Path) -> RunConfig:
    return parse(parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
