"""What a run's steps came to, for the report: read from its metrics once, and again when they have changed. No torch.

``.measured`` in the sweep's folder keeps it: a line that says what of, then the runs. It is never trusted over a run:
what was kept of a file counts while the file's inode, size and times are what they were, and a damaged ``.measured`` is
no worse than none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from launch.sweep.definition import MetricSection
from launch.sweep.ledger import Ledger, Trial
from launch.sweep.metric import measured, metric
from pretrain import events
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.version import VERSION as RELEASE

FILE, FORMAT, VERSION = ".measured", "sweep-measured", 1
#: A file that was changed less than so many nanoseconds ago may change again without another time.
SETTLED_NS = 2_000_000_000
#: Points that a curve of a sweep is drawn with, at most; of several hundred runs, fewer.
CURVE_POINTS, ALL_POINTS = 120, 60_000


@dataclass(frozen=True)
class Measured:
    """``done``: steps that stand; ``value``: of the metric; ``steps`` and ``values``: its curve; ``problem``: why the
    metrics cannot be read."""

    done: int = 0
    value: float | None = None
    tokens_per_s: float | None = None
    steps: Sequence[float] = ()
    values: Sequence[float] = ()
    problem: str = ""


class Measurements:
    """Of the runs of a sweep: ``of`` each, and ``keep`` at the end."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._section = ledger, ledger.definition.metric
        self._points = max(12, min(CURVE_POINTS, ALL_POINTS // max(1, len(ledger.trials))))
        self._asked = {"metric": self._section.model_dump(mode="json"), "points": self._points, "release": RELEASE}
        self._before = _read(ledger.root / FILE, self._asked)
        self._now: dict[str, Any] = {}

    def of(self, trial: Trial) -> Measured:
        path = self._ledger.run_dir(trial) / events.METRICS
        try:
            found = os.stat(path)
        except OSError:
            return Measured()
        mark = [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        kept = self._before.get(trial.name)
        if kept is not None and kept["mark"] == mark:
            self._now[trial.name] = kept
            return Measured(**kept["measured"])
        settled = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS
        fresh = measure(path, self._section, self._points)
        if settled and not fresh.problem:
            self._now[trial.name] = {"mark": mark, "measured": asdict(fresh)}
        return fresh

    def keep(self) -> None:
        """For the next time. A folder that cannot be written costs time, and no report."""
        if self._now == self._before:
            return
        body = json.dumps(self._now, separators=(",", ":"))
        head = {"format": formats.stamp(FORMAT, VERSION), "of": self._asked, "sha256": _sha256(body)}
        try:
            write_atomic(self._ledger.root / FILE, f"{json.dumps(head)}\n{body}")
        except OSError:
            return


def measure(path: Path, section: MetricSection, points: int) -> Measured:
    """Of a metrics file; its curve is the measurements, or the means of ``points`` stretches, each at its last step."""
    try:
        steps = events.read(path)
    except Refusal as damaged:
        return Measured(problem=str(damaged))
    at, values = measured(steps, section.name)
    speeds = [event.timing.tokens_per_s for event in steps if event.timing.tokens_per_s is not None]
    size = max(1, -(-len(at) // points))
    first = np.arange(0, len(at), size)
    last = np.minimum(first + size, len(at)) - 1
    with np.errstate(invalid="ignore", over="ignore"):
        means = np.add.reduceat(values, first) / (last - first + 1) if len(at) else np.zeros(0)
    return Measured(
        steps[-1].step + 1 if steps else 0,
        metric(steps, section),
        median(speeds) if speeds else None,
        np.asarray(at, np.float64)[last].tolist(),
        means.tolist(),
    )


def _read(path: Path, asked: Any) -> dict[str, Any]:
    """What was kept for the same question; nothing where it cannot be read."""
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
        said = json.loads(head)
        known = said["format"] == formats.stamp(FORMAT, VERSION) and said["of"] == asked
        found: dict[str, Any] = json.loads(body) if known and said["sha256"] == _sha256(body) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
