"""Stragglers: a rank that takes longer than its peers for the same work, named within twenty steps.

Ranks wait for each other, so that a step takes every rank as long as the slowest: what is compared is the time that a
rank worked itself. On a CPU that is processor time of forward and backward (waiting for others costs none; neither does
sleep, so that a rank which is held up and not busy is for the heartbeat to see); on CUDA, device time between events
around them, in which waiting inside tensor and pipeline groups counts.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from parallel.engine.groups import Groups
from parallel.planning.plan import ParallelPlan
from pretrain.guards.findings import Finding

#: Steps that a score looks back over, and steps between two messages to rank 0.
WINDOW, EVERY = 20, 2
#: Steps before the window from which a rank's usual pace is taken.
USUAL = 200
#: A rank is named at the logarithm of ``slow_ratio``; or at the first share of it if it has become slower by the
#: second, since a core may be slower than another for long, and a score of twenty steps is not exact; it is well again
#: at the third. Of two ranks on two cores that had 15 processes to run (1,700 steps), clean scores lay up to 0.7 of the
#: logarithm of 1.3 from zero, but no more than 0.51 from their usual.
NAMED, SLOWER, WELL = 0.6, 0.55, 0.35
#: Peers from which a rank's own time is left in the median that it is compared with.
MANY = 16


class WorkClock:
    """Seconds that this rank works inside ``working()``; ``take`` returns them and starts again."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._on_cuda, self._seconds = device.type == "cuda", 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            before = time.process_time()
            yield
            self._seconds += time.process_time() - before

    def take(self) -> float:
        """Seconds since the last call. On CUDA the step must have ended: its report has been read."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        taken, self._seconds = self._seconds, 0.0
        return taken


def peers(plan: ParallelPlan) -> list[list[int]]:
    """Ranks with the same work: of one pipeline stage, one tensor rank and the same experts. Groups of one, which
    nobody can be compared with, are left out."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(plan.world_size):
        coords = plan.coords(rank)
        groups.setdefault(tuple(coords[axis] for axis in ("pp", "tp", "ep", "etp")), []).append(rank)
    return [ranks for ranks in groups.values() if len(ranks) > 1]


class Pace:
    """Robust ratio of each rank's work time to its peers': the mean of the middle half, over ``WINDOW`` steps, of the
    logarithm of its time over their median. Steps on which all are slow cancel, and one rank's saves, collections and
    other outliers are cut off."""

    def __init__(self, groups: Sequence[Sequence[int]], ratio: float) -> None:
        self._groups = [list(ranks) for ranks in groups]
        self._limit = math.log(ratio)
        self._recent: deque[NDArray[np.float64]] = deque(maxlen=WINDOW)
        self._older: deque[NDArray[np.float64]] = deque(maxlen=USUAL)
        self._usual: NDArray[np.float64] | None = None
        self._steps = 0
        self._slow: set[int] = set()

    def add(self, step: int, seconds: Sequence[float]) -> list[Finding]:
        """The work time of every rank in a step; who is slow from now on, and who no longer is."""
        times = np.maximum(np.asarray(seconds, np.float64), 1e-9)
        relative = np.zeros_like(times)
        for ranks in self._groups:
            relative[ranks] = np.log(times[ranks]) - _log_median_of_peers(times[ranks])
        if len(self._recent) == WINDOW:
            self._older.append(self._recent[0])
        self._recent.append(relative)
        self._steps += 1
        if len(self._recent) < WINDOW:
            return []
        if len(self._older) >= WINDOW and self._steps % WINDOW == 0:
            self._usual = np.median(np.stack(list(self._older)), axis=0)
        middle = np.sort(np.stack(list(self._recent)), axis=0)[WINDOW // 4 : -(WINDOW // 4)]
        return list(self._compare(step, middle.mean(0)))

    def _compare(self, step: int, scores: NDArray[np.float64]) -> Iterator[Finding]:
        slow = scores >= self._limit
        if self._usual is not None:
            slow |= (scores >= NAMED * self._limit) & (scores - self._usual >= SLOWER * self._limit)
        for rank in np.flatnonzero(slow).tolist():
            if rank not in self._slow:
                self._slow.add(rank)
                yield self._finding(
                    step, "slow", rank, float(scores[rank]), "takes {} times the work time of its peers"
                )
        for rank in sorted(self._slow):
            if scores[rank] < WELL * self._limit:
                self._slow.remove(rank)
                words = "is as fast as its peers again: {} times their work time"
                yield self._finding(step, "slow_over", rank, float(scores[rank]), words)

    def _finding(self, step: int, kind: str, rank: int, score: float, words: str) -> Finding:
        ratio = math.exp(score)
        text = f"rank {rank} {words.format(f'{ratio:.2f}')}, over {WINDOW} steps"
        return Finding(step, kind, text, rank, {"ratio": ratio})


def _log_median_of_peers(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each, the logarithm of the median of the others."""
    logs = np.log(times)
    if len(logs) >= MANY:
        return np.full_like(logs, np.median(logs))
    return np.array([np.median(np.delete(logs, i)) for i in range(len(logs))])


class Stragglers:
    """Tells rank 0 what every rank's work time was, behind the step's back: a message begun after one step is looked at
    after the next. Rank 0 gets the findings. Every rank calls ``add`` after every step."""

    def __init__(self, groups: Groups, ratio: float) -> None:
        self._groups = groups
        named = peers(groups.plan)
        self._pace = Pace(named, ratio) if named else None
        self._mine: list[float] = []
        self._under_way: tuple[int, dist.Work, torch.Tensor, list[torch.Tensor]] | None = None

    def add(self, step: int, seconds: float) -> list[Finding]:
        if self._pace is None:
            return []
        found = self.finish()
        self._mine.append(seconds)
        if len(self._mine) == EVERY:
            self._send(step)
        return found

    def _send(self, step: int) -> None:
        mine = torch.tensor(self._mine, dtype=torch.float64)
        self._mine = []
        everyone = [torch.empty_like(mine) for _ in range(self._groups.plan.world_size)] if self._first else []
        work = dist.gather(mine, everyone or None, group=self._groups.control, group_dst=0, async_op=True)
        assert work is not None  # every rank is in the group
        self._under_way = step, work, mine, everyone

    def finish(self) -> list[Finding]:
        """What the message under way says, if there is one: after it nothing is."""
        if self._under_way is None or self._pace is None:
            return []
        step, work, _, everyone = self._under_way
        self._under_way = None
        work.wait()
        if not self._first:
            return []
        by_step = torch.stack(everyone, dim=1).tolist()
        return [item for i, times in enumerate(by_step) for item in self._pace.add(step - EVERY + 1 + i, times)]

    @property
    def _first(self) -> bool:
        return self._groups.rank == 0
