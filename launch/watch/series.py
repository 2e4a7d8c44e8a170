"""The steps of a run as columns of numbers, read from ``metrics.jsonl`` as it grows.

What ``pretrain.events.read`` gives as objects, for runs of millions of steps and for looks every second: a look costs
what was written since the last one. Only steps that stand are kept; what a later attempt did again is counted.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from launch.watch.columns import AUX, CLOCK, COUNTS, REALS, Array, Columns, read
from launch.watch.tail import Tail
from pretrain.events import METRICS

#: Measurements by name that are kept; a run that has more shows the first.
MOST_NAMES = 200


class Series:
    """``series["loss"]`` is a float64 array over the steps that stand, in order; ``series["step"]`` says which.

    Not measured is NaN; a source that was not drawn is 0. ``verdicts``: of the steps that were not applied.
    """

    def __init__(self, run_dir: Path) -> None:
        self._tail = Tail(run_dir / METRICS)
        self._forget()

    def _forget(self) -> None:
        self.length = 0
        self.damaged = 0
        self.redone_steps, self.redone_s = 0, 0.0
        #: Seconds in steps by attempt, those done again included.
        self.spent_s: dict[int, float] = {}
        self.verdicts: dict[int, str] = {}
        self._newest_attempt = 0
        self._columns: dict[str, Array] = {
            **{name: np.zeros(0, np.int64) for name in COUNTS},
            **{name: np.zeros(0, np.float64) for name in (*REALS, *CLOCK)},
            "applied": np.zeros(0, bool),
        }

    def __getitem__(self, name: str) -> Array:
        return self._columns[name][: self.length]

    def __len__(self) -> int:
        return self.length

    def names(self, prefix: str) -> list[str]:
        """Of ``draws.`` or ``aux.`` columns, in the order of their first appearance."""
        return [name.removeprefix(prefix) for name in self._columns if name.startswith(prefix)]

    def last(self, name: str) -> float | None:
        """The newest value that was measured; None if there is none."""
        values = self[name][-1000:]
        known = np.flatnonzero(~np.isnan(values))
        return float(values[known[-1]]) if known.size else None

    def refresh(self) -> None:
        """Read what was written since the last look. OSError where the file cannot be read."""
        if self._tail.begins_anew():
            self._forget()
        for block in self._tail.blocks():
            found, damaged = read(block)
            self.damaged += damaged
            self._take(found)

    def _take(self, found: Columns) -> None:
        if not len(found["step"]):
            return
        newest = np.maximum.accumulate(np.maximum(found["attempt"], self._newest_attempt))
        current = found["attempt"] == newest  # a process of an older attempt that still writes is not listened to
        self._newest_attempt = int(newest[-1])
        if not current.all():
            found = {name: values[current] for name, values in found.items()}
        steps = found["step"]
        bounds = [0, *(np.flatnonzero(np.diff(steps) <= 0) + 1).tolist(), len(steps)]
        for start, stop in pairwise(bounds):
            if start < stop:
                self._go_back_to(int(steps[start]))
                self._append({name: values[start:stop] for name, values in found.items()})
        for attempt in np.unique(found["attempt"]).tolist():
            seconds = float(np.nansum(found["step_time_s"][found["attempt"] == attempt]))
            self.spent_s[attempt] = self.spent_s.get(attempt, 0.0) + seconds

    def _go_back_to(self, step: int) -> None:
        """Whoever writes a step again replaces everything from there on."""
        kept = int(np.searchsorted(self["step"], step))
        if kept < self.length:
            self.redone_steps += self.length - kept
            self.redone_s += float(np.nansum(self["step_time_s"][kept:]))
            self.verdicts = {at: verdict for at, verdict in self.verdicts.items() if at < step}
            self.length = kept

    def _append(self, found: dict[str, Array]) -> None:
        count = len(found["step"])
        for at in np.flatnonzero(~found["applied"]).tolist():
            self.verdicts[int(found["step"][at])] = str(found["verdict"][at])
        for name, values in found.items():
            if name != "verdict" and (name in self._columns or len(self._columns) < MOST_NAMES):
                self._room(name, values.dtype, count)[self.length : self.length + count] = values
        for name in self._columns.keys() - found.keys():
            self._room(name, self._columns[name].dtype, count)[self.length : self.length + count] = _absent(name)
        self.length += count

    def _room(self, name: str, dtype: Any, count: int) -> Array:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = np.full(self.length, _absent(name), dtype)
        if len(column) < self.length + count:
            grown = np.empty(max(2 * len(column), self.length + count, 1024), dtype)
            grown[: self.length] = column[: self.length]
            column = self._columns[name] = grown
        return column


def _absent(name: str) -> float:
    """What stands where a step has no value: only ``aux`` and ``draws`` can lack one."""
    return np.nan if name.startswith(AUX) else 0
