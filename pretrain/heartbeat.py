"""The heartbeat of a rank: where it stands, written to a page of memory that the agent of its node shares. No torch.

A rank says ``at(phase, step)`` whenever it goes from one phase to the next. The agent reads how often, where, since
when, and how long the last phases of each kind took; it asks nothing of the rank, which may hang with the interpreter
locked. Without an agent (``STOKER_HEARTBEAT`` not set) nothing is written. Since a step may become several times as
long as those before it (a segment of the data log has longer windows or more of them), a rank also says how much work
it is.

Layout, little-endian: a head (beats, step, phase, since, busy_s, setup, work), then for each phase how many have ended
and a ring of the seconds that the last ``RING`` of them took, and of their work.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

VARIABLE = "STOKER_HEARTBEAT"
#: ``compute`` ends with a collective that every rank takes part in; ``record`` begins when a step is done.
PHASES = ("start", "load", "read", "compute", "record", "evaluate", "save", "end")
#: Durations of a phase that are kept; the agent looks at least once a second.
RING = 128

_HEAD = struct.Struct("<QqQddQd")
_COUNT, _TOOK = struct.Struct("<Q"), struct.Struct("<dd")
_PHASE_BYTES = _COUNT.size + RING * _TOOK.size
SIZE = _HEAD.size + len(PHASES) * _PHASE_BYTES
_NO_STEP = -1


@dataclass(frozen=True)
class Beat:
    """What a rank said last. ``beats``: phases it has begun; ``since``: CLOCK_MONOTONIC seconds when it began this one;
    ``busy_s``: processor seconds of the process until then; ``step``: None outside of steps; ``setup`` and ``work``: as
    ``Heartbeat.works`` has them, 0 before."""

    beats: int
    phase: str
    step: int | None
    since: float
    busy_s: float
    setup: int = 0
    work: float = 0.0


class Heartbeat:
    """The rank's side. Several objects of one process write to one page: the counts are in the page.

    >>> heartbeat = Heartbeat.from_environment()
    >>> heartbeat.at("compute", step=17)
    """

    def __init__(self, page: mmap.mmap | None) -> None:
        self._page = page

    @classmethod
    def from_environment(cls) -> Heartbeat:
        """The heartbeat of this process; one that does nothing where no agent listens."""
        path = os.environ.get(VARIABLE)
        if not path:
            return cls(None)
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(mmap.mmap(descriptor, SIZE))
        finally:
            os.close(descriptor)

    @property
    def step(self) -> int | None:
        """The step that this rank is in; None outside of steps, and where nobody listens."""
        if self._page is None:
            return None
        beats, step, *_ = _HEAD.unpack_from(self._page)
        return step if beats and step != _NO_STEP else None

    def at(self, phase: str, step: int | None = None) -> None:
        """This rank now begins ``phase`` (one of ``PHASES``), of ``step`` where it belongs to one."""
        if phase not in PHASES:
            raise ValueError(f"{phase!r} is no phase: {', '.join(PHASES)}")
        page = self._page
        if page is None:
            return
        index, now = PHASES.index(phase), time.monotonic()
        beats, _, before, since, _, setup, work = _HEAD.unpack_from(page)
        if beats:
            _keep(page, before, now - since, work)
        # One store of the whole head: a reader meets the old or the new, and reads twice to be sure.
        said = beats + 1, _NO_STEP if step is None else step, index, now, time.process_time(), setup, work
        page[: _HEAD.size] = _HEAD.pack(*said)

    def works(self, work: float, setup: int) -> None:
        """The step that this phase belongs to is ``work`` (model FLOPs); no beat. ``setup``: a number that is the same
        where equal work takes the same time: same configuration and layout."""
        if self._page is not None:
            *said, _, _ = _HEAD.unpack_from(self._page)
            self._page[: _HEAD.size] = _HEAD.pack(*said, setup, work)


class Pulse:
    """The agent's side: reads what a rank writes to the page behind a file descriptor of at least ``SIZE`` bytes."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, SIZE, prot=mmap.PROT_READ)
        self._seen = [0] * len(PHASES)

    def read(self) -> Beat | None:
        """The last beat; None before the first."""
        head = self._page[: _HEAD.size]
        while (again := self._page[: _HEAD.size]) != head:
            head = again
        beats, step, phase, *said = _HEAD.unpack(head)
        return Beat(beats, PHASES[phase], None if step == _NO_STEP else step, *said) if beats else None

    def ended(self, phase: str) -> int:
        """How many phases of this kind have ended in this process."""
        return int(_COUNT.unpack_from(self._page, _offset(PHASES.index(phase)))[0])

    def new_durations(self) -> dict[str, Sequence[tuple[int, float, float]]]:
        """Of phases that ended since this was asked last: how many of the kind had ended before in this process, how
        many seconds it took, and its work; the newest ``RING`` of each kind."""
        found: dict[str, Sequence[tuple[int, float, float]]] = {}
        for index, phase in enumerate(PHASES):
            at = _offset(index)
            count = int(_COUNT.unpack_from(self._page, at)[0])
            first = max(self._seen[index], count - RING)
            if count > first:
                ring = at + _COUNT.size
                found[phase] = [
                    (number, *_TOOK.unpack_from(self._page, ring + number % RING * _TOOK.size))
                    for number in range(first, count)
                ]
            self._seen[index] = count
        return found

    def close(self) -> None:
        self._page.close()


def _offset(phase: int) -> int:
    return _HEAD.size + phase * _PHASE_BYTES


def _keep(page: mmap.mmap, phase: int, seconds: float, work: float) -> None:
    at = _offset(phase)
    count = int(_COUNT.unpack_from(page, at)[0])
    _TOOK.pack_into(page, at + _COUNT.size + count % RING * _TOOK.size, seconds, work)
    _COUNT.pack_into(page, at, count + 1)
