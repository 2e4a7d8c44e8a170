"""Pipeline schedules as tables: what each pipeline rank runs, in which order. No torch.

p ranks, m micro-batches, v chunks a rank. A *stage* is a place in the model's order; a *route* says where stages live:
looped (stage s on rank s % p) or folded (a V, down the ranks and up again). When things happen is ``simulator.py``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Literal, NamedTuple

from parallel.planning.execution import Execution
from parallel.planning.plan import ParallelPlan
from stoker.errors import Refusal

#: Forward; whole backward; or its halves, the gradient of the input and, any time later, that of the weights.
Kind = Literal["F", "B", "I", "W"]
#: (rank, chunk) of each stage, in the order in which a forward pass meets them.
Route = tuple[tuple[int, int], ...]
#: Phases of one rank: how often, and which works.
Figure = Iterable[tuple[int, str]]


class Work(NamedTuple):
    """One chunk of a rank over one micro-batch. ``joined``: run together with the work that follows it in the order, so
    that each hides the other's exchanges."""

    kind: Kind
    chunk: int
    micro_batch: int
    joined: bool = False

    def __str__(self) -> str:
        return f"{self.kind} of chunk {self.chunk}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Table:
    """``orders[rank]``: its works from first to last. Micro-batches take the ``routes`` in equal consecutive shares.

    Holds: each (stage, micro-batch) goes forward once, on the rank of its route, and back once, whole or in halves; or
    nothing goes back. Refusal otherwise. Whether ranks wait for one another for ever is seen by ``simulate``.
    """

    name: str
    num_micro_batches: int
    routes: tuple[Route, ...]
    orders: tuple[tuple[Work, ...], ...]

    def __post_init__(self) -> None:
        places = {(*place, index) for index in range(self.num_micro_batches) for place in self.route(index)}
        forward, back, owed, paid = ([*self._places(kinds)] for kinds in ("F", "BI", "I", "W"))
        once = all(len(works) == len(set(works)) for works in (forward, back, paid))
        if not once or set(forward) != places or (back and set(back) != places) or set(owed) != set(paid):
            raise Refusal(
                f"schedule {self.name}: each stage takes each of the {self.num_micro_batches} micro-batches forward "
                "once and back once, as B or as I and W; this table leaves some out or repeats them"
            )
        for rank, order in enumerate(self.orders):
            for work, follower in zip(order, (*order[1:], None)):
                if work.joined and (work.kind != "F" or follower is None or follower.kind not in "BI"):
                    raise Refusal(f"schedule {self.name}, rank {rank}: {work} is joined and no backward pass follows")

    def _places(self, kinds: str) -> Iterator[tuple[int, int, int]]:
        for rank, order in enumerate(self.orders):
            for kind, chunk, micro_batch, _ in order:
                if kind in kinds:
                    yield rank, chunk, micro_batch

    @property
    def num_ranks(self) -> int:
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        return len(self.routes[0])

    def route(self, micro_batch: int) -> Route:
        return self.routes[micro_batch * len(self.routes) // self.num_micro_batches]

    @cached_property
    def stages(self) -> dict[tuple[int, int], int]:
        """(rank, chunk) -> the stage that lives there."""
        return {place: stage for route in self.routes for stage, place in enumerate(route)}

    @property
    def forward_only(self) -> bool:
        return all(work.kind == "F" for order in self.orders for work in order)


def looped(p: int, v: int = 1) -> Route:
    return tuple((stage % p, stage // p) for stage in range(p * v))


def folded(p: int) -> Route:
    return tuple(chain(((rank, 0) for rank in range(p)), ((rank, 1) for rank in reversed(range(p)))))


def table_of(plan: ParallelPlan, execution: Execution) -> Table:
    """The schedule that a plan runs; its stage s is ``plan.stages[s]``. Refusal for zero bubble with vpp > 1."""
    p, m, joined = plan.pp, plan.num_micro_batches, execution.expert_overlap
    if execution.schedule == "zero_bubble":
        if plan.vpp > 1:
            raise Refusal(f"schedule zero_bubble (ZB-H1) runs one chunk a rank and vpp={plan.vpp}: set vpp=1")
        return zb_h1(p, m)
    if plan.vpp > 1:
        return interleaved(p, plan.vpp, m, plan.microbatch_group_size(), joined)
    return one_f_one_b(p, m, joined)


@lru_cache(maxsize=32)
def one_f_one_b(p: int, m: int, joined: bool = False) -> Table:
    """1F1B (PipeDream-flush; Narayanan et al., arXiv 2104.04473, figure 4 above), as Megatron-core runs it.

    ``joined``: each forward runs with a backward, for which more micro-batches are under way (``warm_up``).
    """
    return _warm_steady_cool("1f1b", p, m, 1, 1, joined)


@lru_cache(maxsize=32)
def interleaved(p: int, v: int, m: int, group: int, joined: bool = False) -> Table:
    """Interleaved 1F1B (arXiv 2104.04473, figure 4 below), as Megatron-core 0.16.1 runs it.

    A chunk takes ``group`` micro-batches (``ParallelPlan.microbatch_group_size``) before the rank's next chunk does,
    the last group those that are left. ``joined``: Megatron's ``overlap_moe_expert_parallel_comm``.
    """
    return _warm_steady_cool("interleaved", p, m, v, group, joined)


@lru_cache(maxsize=32)
def forward_only(p: int, m: int, v: int = 1, group: int = 1) -> Table:
    """Evaluation: the forward half of ``one_f_one_b`` or ``interleaved``."""
    forwards = tuple(Work("F", chunk, micro_batch) for chunk, micro_batch in _grouped(m, v, group))
    return Table("forward only", m, (looped(p, v),), (forwards,) * p)


def _warm_steady_cool(name: str, p: int, m: int, v: int, group: int, joined: bool) -> Table:
    forwards = [Work("F", chunk, micro_batch) for chunk, micro_batch in _grouped(m, v, group)]
    backwards = [Work("B", v - 1 - chunk, micro_batch) for chunk, micro_batch in _grouped(m, v, group)]
    orders = []
    for rank in range(p):
        warm = warm_up(p, m, v, group, rank, joined)
        pairs = zip(forwards[warm:], backwards[: m * v - warm])
        steady = ((forward._replace(joined=joined), backward) for forward, backward in pairs)
        orders.append((*forwards[:warm], *chain.from_iterable(steady), *backwards[m * v - warm :]))
    return Table(name, m, (looped(p, v),), tuple(orders))


def _grouped(m: int, v: int, group: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order of forward passes."""
    return [
        (chunk, micro_batch)
        for first in range(0, m, group)
        for chunk in range(v)
        for micro_batch in range(first, min(first + group, m))
    ]


def warm_up(p: int, m: int, v: int = 1, group: int = 1, rank: int = 0, joined: bool = False) -> int:
    """Forward passes of ``rank`` before forward and backward alternate, in 1F1B (v = 1) and interleaved 1F1B.

    Megatron-core 0.16.1, ``get_pp_rank_microbatches``. Interleaved ranks run two ahead of the next one, not one, and so
    do joined ones: a whole pair lies between a gradient and the next rank's. (Megatron asks for v > 1 to join.)
    """
    ahead = p - 1 - rank if v == 1 and not joined else 2 * (p - 1 - rank) + (v - 1) * group
    return min(ahead + joined, m * v)


@lru_cache(maxsize=32)
def zb_h1(p: int, m: int) -> Table:
    """ZB-H1 (zero bubble, arXiv 2401.10241, figure 3 above): 1F1B whose weight gradients wait, on rank r, until r more
    micro-batches have come back; the last of them fill the end of the step."""
    n = max(m, p)

    def figure(rank: int) -> Figure:
        ahead = p - 1 - rank
        return (ahead, "F0"), (rank, "F0 I0"), (n - p + 1, "F0 I0 W"), (ahead, "I0 W"), (rank, "W")

    return Table("zb-h1", m, (looped(p),), tuple(_drawn(figure(rank), m) for rank in range(p)))


@lru_cache(maxsize=32)
def zb_v(p: int, m: int) -> Table:
    """ZB-V (arXiv 2401.10241, section 6): two chunks a rank on a folded route, so the first rank holds the last stage.

    Where F, I and W take equally long, no rank waits between its first work and its last.
    """
    n = max(m, 2 * p - 1)

    def figure(rank: int) -> Figure:
        below = p - rank
        return (
            (2 * below - 1, "F0"),
            (rank, "F1 F0"),
            (below, "F1 I1 W"),
            (n - 2 * p + 1 + rank, "F0 I0 W F1 I1 W"),
            (below - 1, "I0 W F1 I1 W"),
            (rank, "I0 I1"),
            (below, "I0 W"),
            (2 * rank, "W"),
        )

    return Table("zb-v", m, (folded(p),), tuple(_drawn(figure(rank), m) for rank in range(p)))


@lru_cache(maxsize=32)
def dual_pipe(p: int, m: int) -> Table:
    """DualPipe (DeepSeek-V3, arXiv 2412.19437, figure 5): the model lies on the ranks twice, in both directions, and
    each direction takes half of the micro-batches; a forward pass of one runs joined with a backward pass of the other.

    Chunk 0 of rank r is stage r, chunk 1 stage p - 1 - r. p and m are even and m at least 2p; Refusal otherwise.
    """
    if p % 2 or m % 2 or m < 2 * p:
        raise Refusal(
            f"DualPipe on pp={p} ranks with {m} micro-batches: it wants an even pp, and an even number of "
            f"micro-batches of at least 2*pp = {2 * p}"
        )

    def figure(near: int) -> Figure:
        """``near``: ranks to the nearer end. Chunk 0 is that of the direction which starts there."""
        inner = p // 2 - 1 - near
        turn = [("B" if place <= near else "I") + "10"[place % 2] for place in range(2 * near + 2)]
        return (
            (2 * inner, "F0"),
            (near + 1, "F0 F1"),
            (inner, "I1 W F1"),
            (m // 2 - p + near + 1, "F0+ B1 F1+ B0"),
            (inner, "B1 F1+ B0"),
            (1, " ".join(turn)),
            (inner, "W I0"),
            (near + 1, "W"),
        )

    down, up = looped(p), tuple((rank, 1) for rank in reversed(range(p)))
    upper = [_drawn(figure(rank), m // 2, (0, 1), m // 2) for rank in range(p // 2)]
    lower = [_drawn(figure(p - 1 - rank), m // 2, (1, 0), m // 2) for rank in range(p // 2, p)]
    return Table("dualpipe", m, (down, up), (*upper, *lower))


def _drawn(figure: Figure, m: int, chunks: tuple[int, int] = (0, 1), shift: int = 0) -> tuple[Work, ...]:
    """A rank's works as its figure has them, without those of micro-batches beyond the ``m`` of a chunk.

    In a figure ``F0`` is the next forward pass of ``chunks[0]``, ``+`` joins it to what follows, and ``W`` is the
    weight gradient that has waited longest. Chunk 1 counts its micro-batches from ``shift``.
    """
    taken: Counter[tuple[bool, int]] = Counter()
    owed: deque[tuple[int, int]] = deque()
    order = []
    for word in chain.from_iterable(words.split() * times for times, words in figure):
        kind: Kind = word[0]  # type: ignore[assignment]
        if kind == "W":
            chunk, index = owed.popleft()
        else:
            chunk = chunks[int(word[1])]
            index = taken[kind == "F", chunk]
            taken[kind == "F", chunk] += 1
        if kind == "I":
            owed.append((chunk, index))
        if index < m:
            order.append(Work(kind, chunk, index + chunk * shift, word.endswith("+")))
    return tuple(order)


def in_flight(table: Table, weights: Sequence[float] | None = None) -> list[list[int]]:
    """``[rank][chunk]``: micro-batches whose activations a rank holds when it holds the most, counted from the start of
    the forward pass to the end of the backward pass (of the weights' half, where it has halves).

    ``weights``: bytes that a micro-batch leaves on each stage; equal if left out. The first such moment counts.
    """
    chunks = 1 + max(chunk for _, chunk in table.stages)
    most = []
    for rank, order in enumerate(table.orders):
        weight = [weights[table.stages[rank, chunk]] if weights else 1.0 for chunk in range(chunks)]
        held, heaviest, highest = [0] * chunks, [0] * chunks, 0.0
        total = 0.0
        for work in order:
            if work.kind == "F":
                held[work.chunk] += 1
                total += weight[work.chunk]
                if total > highest * (1 + 1e-12):
                    heaviest, highest = list(held), total
            elif work.kind in ("B", "W"):
                held[work.chunk] -= 1
                total -= weight[work.chunk]
        most.append(heaviest)
    return most


def peak_in_flight(p: int, m: int, v: int = 1, group: int = 1, joined: bool = False) -> list[list[int]]:
    """``in_flight`` of 1F1B (v = 1) and interleaved 1F1B without their table, for a planner in a hurry: a rank holds
    the most when it has run its warm-up and one more forward pass."""
    peaks = []
    for rank in range(p):
        passes = min(warm_up(p, m, v, group, rank, joined) + 1, m * v)
        held, first = [0] * v, 0
        while passes:
            for chunk in range(v):
                taken = min(group, m - first, passes)
                held[chunk] += taken
                passes -= taken
            first += group
        peaks.append(held)
    return peaks
