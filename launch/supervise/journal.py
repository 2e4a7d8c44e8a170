"""``supervisor.jsonl`` and ``ranks.json`` of a run: what its supervisor saw and did, and where its ranks stand now.

One writer: the agent of the leading node, which holds ``.supervisor.lock`` for as long as the launch takes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pretrain.rundir import prepare
from stoker import formats
from stoker.errors import Refusal
from stoker.files import append_line, read_jsonl
from stoker.secrets import mask

JOURNAL, RANKS, LOCK = "supervisor.jsonl", "ranks.json", ".supervisor.lock"
RANKS_VERSION = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankState:
    """Where a rank stands. ``age_s``: since its last beat; ``busy_s``: processor seconds of its process."""

    rank: int
    node: str
    pid: int
    alive: bool
    phase: str | None
    step: int | None
    age_s: float | None
    busy_s: float | None
    rss_bytes: int | None


class Journal:
    """The supervisor's records of a run; a context. Raises Refusal where another supervisor holds the run.

    ``listeners`` are given every line as it is written; what they raise is logged and the launch goes on.
    """

    def __init__(self, run_dir: Path, listeners: Sequence[Callable[[dict[str, Any]], None]] = ()) -> None:
        self.run_dir = run_dir
        self._listeners = listeners
        prepare(run_dir)
        self._lock = _locked(run_dir)

    def write(
        self,
        event: str,
        attempt: int | None = None,
        rank: int | None = None,
        node: str | None = None,
        kind: str | None = None,
        text: str = "",
        **figures: Any,
    ) -> None:
        """Append a line. That the disk is full costs the line, not the run."""
        line = mask(
            {
                "time": _now(),
                "event": event,
                "attempt": attempt,
                "rank": rank,
                "node": node,
                "kind": kind,
                "text": text,
                **figures,
            }
        )
        try:
            append_line(self.run_dir / JOURNAL, json.dumps(line, allow_nan=False))
        except OSError as error:
            _log.warning("%s: %s", self.run_dir / JOURNAL, error)
        for listener in self._listeners:
            try:
                listener(line)
            except Exception as error:
                _log.warning("a listener to the supervisor failed: %s", mask(str(error)))

    def ranks(self, attempt: int, state: str, ranks: Sequence[RankState]) -> None:
        """Replace ``ranks.json``. ``state``: starting, running, restarting, stopping or ended."""
        content = {
            "format": formats.stamp("ranks", RANKS_VERSION),
            "time": _now(),
            "host": platform.node(),
            "pid": os.getpid(),
            "attempt": attempt,
            "state": state,
            "ranks": [asdict(rank) for rank in ranks],
        }
        replacement = self.run_dir / f".{RANKS}.tmp"
        try:  # whole for a reader; that it outlives a power failure is nobody's wish
            replacement.write_text(json.dumps(content), encoding="utf-8")
            os.replace(replacement, self.run_dir / RANKS)
        except OSError as error:
            _log.warning("%s: %s", self.run_dir / RANKS, error)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The supervisor's lines, oldest first; none where a run has had no supervisor."""
    path = run_dir / JOURNAL
    return read_jsonl(path) if path.exists() else []


def read_ranks(run_dir: Path) -> Mapping[str, Any] | None:
    """``ranks.json``; None where there is none. Raises Refusal where it is not what this release can read."""
    path = run_dir / RANKS
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Refusal(f"{path} is damaged ({error}): delete it") from None
    formats.require(content, "ranks", RANKS_VERSION, path)
    return dict(content)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _locked(run_dir: Path) -> IO[str]:
    file = open(run_dir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the launch
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        file.close()
        raise Refusal(f"{run_dir} is supervised by {holder}: wait for it, or choose another run.name") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            file.close()
            raise
        _log.warning("%s: this file system has no locks (%s): a second launch at once is not noticed", run_dir, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
