"""When each work of a pipeline schedule runs: a table and durations in, a timeline out. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from parallel.planning.schedule import Kind, Table, Work
from stoker.errors import Refusal


@dataclass(frozen=True)
class Durations:
    """Seconds of one micro-batch on each stage, in the order of the model.

    ``weight``: the part of ``backward`` that is the gradient of the weights, for schedules that part the two.
    ``forward_exchange``, ``backward_exchange``: the part of each that a joined partner's computation can hide.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...] = ()
    forward_exchange: tuple[float, ...] = ()
    backward_exchange: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        num_stages = len(self.forward)
        for name in ("weight", "forward_exchange", "backward_exchange"):
            object.__setattr__(self, name, getattr(self, name) or (0.0,) * num_stages)
        for name in ("backward", "weight", "forward_exchange", "backward_exchange"):
            if len(getattr(self, name)) != num_stages:
                raise Refusal(f"durations: {name} is given for {len(getattr(self, name))} of {num_stages} stages")

    def joined(self, forward: int, backward: int) -> float:
        """Seconds of the forward pass of one stage together with the backward pass of another: each hides its exchanges
        under the other's computation, as far as that lasts."""
        there, there_exchange = self.forward[forward], self.forward_exchange[forward]
        back, back_exchange = self.backward[backward], self.backward_exchange[backward]
        hidden = min(there_exchange, back - back_exchange) + min(back_exchange, there - there_exchange)
        return there + back - hidden


@dataclass(frozen=True)
class Event:
    rank: int
    work: Work
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """``starts_s[rank][i]``, ``ends_s[rank][i]``: of the i-th work of ``table.orders[rank]``. The step starts at 0."""

    table: Table
    starts_s: tuple[tuple[float, ...], ...]
    ends_s: tuple[tuple[float, ...], ...]
    busy_s: tuple[float, ...]
    makespan_s: float

    @property
    def idle_s(self) -> tuple[float, ...]:
        return tuple(self.makespan_s - busy for busy in self.busy_s)

    @property
    def bubble(self) -> float:
        """Share of the step that ranks wait, over all of them."""
        return sum(self.idle_s) / (self.makespan_s * len(self.busy_s))

    @property
    def events(self) -> Iterator[Event]:
        for rank, works in enumerate(self.table.orders):
            for work, start, end in zip(works, self.starts_s[rank], self.ends_s[rank], strict=True):
                yield Event(rank, work, start, end)


@dataclass(frozen=True)
class _Leg:
    """A leg of every micro-batch's way over S stages: ``number`` (down 0 to S-1, back to 2S-1, then the weights of each
    stage), and the legs whose input is its output, with the seconds that it travels."""

    number: int
    stage: int
    seconds: float
    outputs: tuple[tuple[int, float], ...]


def simulate(table: Table, durations: Durations, p2p_s: float = 0.0) -> Timeline:
    """Run ``table``: a rank takes its works in order, each as soon as its input is there.

    An output is on another rank ``p2p_s`` after its work ended; sending occupies nobody. Joined works start when the
    inputs of both are there and end together. Refusal where ranks wait for one another for ever: who, and for what.
    """
    if len(durations.forward) != table.num_stages:
        raise Refusal(f"durations of {len(durations.forward)} stages for a schedule of {table.num_stages}")
    m, legs = table.num_micro_batches, _legs(table, durations, p2p_s)
    # arrived[leg * m + micro_batch]: when the input of that leg is there; None is not yet.
    arrived: list[float | None] = [0.0] * m + [None] * (m * (3 * table.num_stages - 1))
    waiting: dict[int, int] = {}
    awake = list(range(table.num_ranks))
    starts: list[list[float]] = [[] for _ in awake]
    ends: list[list[float]] = [[] for _ in awake]
    busy = [0.0] * len(awake)

    def run(rank: int) -> Iterator[int]:
        """Yields the input that it waits for, to be resumed when that is there."""
        clock = 0.0
        together: list[tuple[_Leg, int]] = []
        for kind, chunk, micro_batch, joined in table.orders[rank]:
            leg = legs[rank, chunk, kind]
            needed = leg.number * m + micro_batch
            if arrived[needed] is None:
                yield needed
            clock = max(clock, arrived[needed] or 0.0)
            together.append((leg, micro_batch))
            if joined:
                continue
            seconds = leg.seconds if len(together) == 1 else durations.joined(together[0][0].stage, leg.stage)
            starts[rank] += [clock] * len(together)
            clock += seconds
            busy[rank] += seconds
            ends[rank] += [clock] * len(together)
            for leg, micro_batch in together:
                for number, travel_s in leg.outputs:
                    sent = number * m + micro_batch
                    arrived[sent] = clock + travel_s
                    if sent in waiting:
                        awake.append(waiting.pop(sent))
            together = []

    runs = [run(rank) for rank in awake]
    while awake:
        rank = awake.pop()
        for needed in runs[rank]:
            waiting[needed] = rank
            break
    if waiting:
        stuck = (f"rank {rank} before {table.orders[rank][len(ends[rank])]}" for rank in sorted(waiting.values()))
        raise Refusal(f"schedule {table.name} never ends: its ranks wait for one another, {'; '.join(stuck)}")
    return Timeline(
        table, tuple(map(tuple, starts)), tuple(map(tuple, ends)), tuple(busy), max(each[-1] for each in ends)
    )


def _legs(table: Table, durations: Durations, p2p_s: float) -> dict[tuple[int, int, Kind], _Leg]:
    """By (rank, chunk, kind)."""
    num_stages = table.num_stages
    legs: dict[tuple[int, int, Kind], _Leg] = {}
    for route in table.routes:
        ranks = [rank for rank, _ in route]
        hops = [p2p_s if here != there else 0.0 for here, there in pairwise(ranks)]
        # Down the stages, the turn at the last, and up again; what leaves stage 0 on the way back goes nowhere.
        travel = [*hops, 0.0, *reversed(hops)]
        for stage, (rank, chunk) in enumerate(route):
            back, weights = 2 * num_stages - 1 - stage, 2 * num_stages + stage
            onward = ((back + 1, travel[back]),) if stage else ()
            whole, half = durations.backward[stage], durations.weight[stage]
            legs[rank, chunk, "F"] = _Leg(stage, stage, durations.forward[stage], ((stage + 1, travel[stage]),))
            legs[rank, chunk, "B"] = _Leg(back, stage, whole, onward)
            legs[rank, chunk, "I"] = _Leg(back, stage, whole - half, (*onward, (weights, 0.0)))
            legs[rank, chunk, "W"] = _Leg(weights, stage, half, ())
    return legs
