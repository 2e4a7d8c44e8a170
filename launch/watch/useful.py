"""Where a run's time went: the share of it in steps that stand (goodput, or effective training time ratio)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.watch.life import BEGIN, END, seconds_of
from launch.watch.record import AttemptStatus, State, Useful
from launch.watch.series import Series

Span = tuple[float, float]

#: The event after which the same supervisor starts an attempt again.
RESTART = "restart"


def useful_time(
    series: Series, attempts: Sequence[AttemptStatus], events: Sequence[Mapping[str, Any]], state: State
) -> Useful:
    """Elapsed is the time under a supervisor, by its journal, and of attempts without one, by the times of their files;
    what lies between two launches is nobody's and is left out."""
    useful = float(np.nansum(series["step_time_s"]))
    spans = [*supervised_spans(events, state.is_under_way), *_attempt_spans(attempts, series.spent_s)]
    return Useful(useful, series.redone_s, series.redone_steps, covered(spans) if spans else None)


def supervised_spans(events: Sequence[Mapping[str, Any]], is_under_way: bool) -> list[Span]:
    """From the first start of each supervisor to its end, restarts within; one that was killed ends with the last thing
    that it wrote."""
    spans: list[Span] = []
    begun = seen = last = None
    for event in events:
        moment, name = seconds_of(event.get("time")), event.get("event")
        if moment is None:
            continue
        if name == BEGIN and begun is not None and seen is not None and last != RESTART:
            spans.append((begun, seen))
            begun = None
        if name == BEGIN and begun is None:
            begun = moment
        if name == END and begun is not None:
            spans.append((begun, moment))
            begun = None
        seen, last = moment, name
    if begun is not None and seen is not None:
        spans.append((begun, time.time() if is_under_way else seen))
    return spans


def _attempt_spans(attempts: Sequence[AttemptStatus], spent_s: Mapping[int, float]) -> list[Span]:
    """An attempt that was killed lasted at least as long as its steps."""
    return [
        (attempt.began, attempt.began + (spent_s.get(attempt.number, 0.0) if seconds is None else seconds))
        for attempt in attempts
        if attempt.began is not None
        for seconds in [attempt.seconds]
    ]


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of intervals.

    >>> covered([(0, 3), (2, 5), (10, 11)])
    6.0
    """
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
