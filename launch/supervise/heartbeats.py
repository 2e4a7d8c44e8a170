"""Which rank is stopped, and which hangs: judged from heartbeats, of which the agent reads every one.

How long a phase may take is learnt from the run itself: three times the 99th percentile of what that phase took so
far, and three seconds at least. Reading and recording wait for file systems, and may take as long as a whole step. The
first phases of an attempt compile and connect: they are learnt apart, over all attempts of the launch. Within a launch
a step may become several times as long at once, where a segment of the data log has longer windows or more of them:
what is learnt is learnt of steps of equal work, and where there were none yet, the time of others grows with the work.
Evaluations and checkpoints are of one size. An attempt with another layout or configuration (the file was edited
between two attempts) learns anew. No clock of the day is looked at, and time in which the agent itself got no processor
does not count against a rank.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pretrain.heartbeat import Beat

#: Least seconds that are a hang, times the 99th percentile of a phase, and how many of a kind, beyond each rank's first
#: ones, it is known from.
LEAST_S, TIMES, KNOWN_AFTER = 3.0, 3.0, 4
#: Phases of a kind that an attempt may take longer for, while kernels are compiled, ranks connect and caches fill; and
#: the least seconds that are a hang in them.
FIRST, FIRST_S = 2, 30.0
#: Seconds of a phase of which nothing is known yet: to start and to load; to save and to evaluate, which may take any
#: time; and any other, of which the first compiles kernels.
STARTING_S, LONG_S, UNKNOWN_S = 600.0, 1800.0, 300.0
STARTING = ("start", "load", "end")
#: Phases that wait for disks that others use too, and the least seconds that are a hang in them.
LONG, LEAST_LONG_S = ("save", "evaluate"), 60.0
#: Phases that take the longer, the more work the step is; and phases of a step that wait for files.
WORKING, FILES = ("read", "compute"), ("read", "record")
#: Durations of a phase that are remembered of one amount of work, and how many amounts are.
REMEMBERED, AMOUNTS = 1024, 8
#: Looks in a row, and seconds between the first and the last, that find a process stopped.
STOPPED_LOOKS, STOPPED_S = 2, 0.5
#: Longest time between two looks that counts as silence: beyond it the agent itself was kept from running.
LONGEST_LOOK_S = 0.5


class Patience:
    """How long each phase may take; one for a launch, it goes on learning from attempt to attempt."""

    def __init__(self, hang_s: float | None = None) -> None:
        self._hang_s = hang_s
        self._setup = 0
        self._seen: dict[str, dict[float, deque[float]]] = defaultdict(dict)
        self._usual: dict[str, dict[float, float]] = defaultdict(dict)
        self._longest_first: dict[str, float] = {}

    def learn(self, took: Mapping[str, Iterable[tuple[int, float, float]]], setup: int = 0) -> None:
        """What phases took, by phase, as ``Pulse.new_durations`` has it. Under another ``setup`` those before say
        nothing, but for how long first phases took."""
        if setup and setup != self._setup:
            self._setup = setup
            self._seen.clear()
            self._usual.clear()
        for phase, ended in took.items():
            seen = self._seen[phase]
            for number, seconds, work in ended:
                if number < FIRST:
                    self._longest_first[phase] = max(seconds, self._longest_first.get(phase, 0.0))
                    continue
                key = work if phase in WORKING else 0.0
                durations = seen.setdefault(key, deque(maxlen=REMEMBERED))
                durations.append(seconds)
                if len(seen) > AMOUNTS:
                    del seen[min(seen.keys() - {key}, key=lambda work: len(seen[work]))]
            self._usual[phase] = {
                work: sorted(durations)[int(0.99 * (len(durations) - 1) + 0.5)]
                for work, durations in seen.items()
                if len(durations) >= KNOWN_AFTER
            }

    def limit(self, phase: str, ended: int, work: float = 0.0) -> float:
        """Seconds without a beat that are a hang in ``phase`` of a step of ``work``, where ``ended`` phases of the kind
        are over in this attempt."""
        if phase in STARTING:
            return STARTING_S
        if self._hang_s is not None:
            return self._hang_s
        key = work if phase in WORKING else 0.0
        usual, longest = self._usual[phase], self._longest_first.get(phase)
        first = UNKNOWN_S if longest is None else max(FIRST_S, TIMES * longest)
        if not usual:
            return max(first, LONG_S if phase in LONG else UNKNOWN_S)
        if key in usual:
            # Files are waited for as long as a step takes: a stall of them delays no more than a slow step does.
            long = max(usual[key], self._step_s(work)) if phase in FILES else usual[key]
            known = max(LEAST_LONG_S if phase in LONG else LEAST_S, TIMES * long)
            return known if ended >= FIRST else max(known, first)
        # Not less for less work: part of what a step takes does not shrink with it. Other shapes compile anew.
        grown = [seconds * max(1.0, key / of if of else 1.0) for of, seconds in usual.items()]
        return max(first, TIMES * max(grown))

    def _step_s(self, work: float) -> float:
        """What a step of ``work`` takes, as far as it is known: to read and to compute it."""
        return sum(self._usual[phase].get(work, 0.0) for phase in WORKING)


@dataclass
class Silence:
    """How long a rank has said nothing, in seconds in which the agent looked."""

    beats: int = 0
    seconds: float = 0.0

    def look(self, beat: Beat | None, elapsed: float) -> float:
        beats = beat.beats if beat else 0
        if beats != self.beats:
            self.beats, self.seconds = beats, 0.0
        else:
            self.seconds += min(elapsed, LONGEST_LOOK_S)
        return self.seconds


class Standstill:
    """Whether a process has been stopped for a while; told at every look whether it is now."""

    def __init__(self) -> None:
        self._looks = 0
        self._since = 0.0

    def look(self, stopped: bool, now: float) -> bool:
        if not stopped:
            self._looks = 0
            return False
        if not self._looks:
            self._since = now
        self._looks += 1
        return self._looks >= STOPPED_LOOKS and now - self._since >= STOPPED_S


@dataclass(frozen=True)
class Hanging:
    """A rank as it stood when a hang was noticed. ``waiting``: it waited for others, as far as its stack says."""

    rank: int
    beat: Beat | None
    silent_s: float
    limit_s: float
    waiting: bool = False
    place: str = ""

    @property
    def beats(self) -> int:
        return self.beat.beats if self.beat else 0


def guilty(ranks: Iterable[Hanging]) -> Hanging:
    """Of ranks that make no progress together the one that keeps the others waiting: with the least beats; where equal,
    the one that is not in a collective."""
    return min(ranks, key=lambda found: (found.beats, found.waiting, -found.silent_s, found.rank))
