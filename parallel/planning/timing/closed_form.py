"""Pipeline schedules in closed form: the time of a step from that of its stages, without playing it. No torch.

p ranks, m micro-batches, v chunks a rank; stage s lives on rank s % p as its chunk s // p.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from parallel.planning.schedule import warm_up
from parallel.planning.timing.simulator import Durations

#: Seconds by chunk, then by rank.
Rows = Sequence[Sequence[float]]


def bubble_fraction(p: int, m: int, v: int = 1) -> float:
    """Share of a step that a rank waits where stages are even: (p-1) / (m+p-1) in 1F1B.

    Narayanan et al., arXiv 2104.04473, section 2.2, whose (p-1) / (v m) is over the work instead of the step.
    """
    return (p - 1) / (v * m + p - 1)


def zero_bubble_step_s(durations: Durations, m: int, p2p_s: float = 0.0) -> float:
    """Seconds of a step of ZB-H1 with one stage a rank and m >= p: the work of some rank, and of every other a forward
    pass and a gradient of the input, less the weight gradient that this rank runs meanwhile.

    For even stages that is (p-1)(F + I - W) over the work (arXiv 2401.10241, table 2). Messages are in the way once
    down and once up; in between weight gradients hide most of them. Stages as plans lay them: within 0.6 % of
    ``simulate`` in the median, 9 % at worst.
    """
    passes = [f + b - w for f, b, w in zip(durations.forward, durations.backward, durations.weight)]
    others = len(passes) - 1
    return (
        max(m * (own + w) + sum(passes) - own - others * w for own, w in zip(passes, durations.weight))
        + 2 * others * p2p_s
    )


def closed_step_s(
    durations: Durations, p: int, m: int, group: int = 1, p2p_s: float = 0.0, joined: bool = False
) -> float:
    """Seconds of a step of 1F1B, or of interleaved 1F1B where there are more stages than ranks.

    The longest of the chains of works that fill the pipeline down to some rank, stay there while forward and backward
    alternate, and drain it. Every step contains them, so ``simulate`` never finds less; it finds the same where stages
    are even, and in 1F1B with free messages as good as always. Ranks whose chunks differ also wait for one another in
    the middle, which no such chain sees: 7 % at worst of stages as plans lay them, nothing in the median. ``joined``
    is an estimate, 0.7 % in the median and 8 % at worst.
    """
    v = len(durations.forward) // p
    forward = [durations.forward[first : first + p] for first in range(0, v * p, p)]
    backward = [durations.backward[first : first + p] for first in range(0, v * p, p)]
    size = group if v > 1 else m
    # Of each rank's forward passes the last before a backward pass; of its backward passes, seen from the end, as well.
    slots = [min(warm_up(p, m, v, group, rank, joined) - joined, m * v - 1) for rank in range(p)]
    fill = _ramp(forward, slots, size, size, p2p_s)
    drain = _ramp(backward, slots, (m - 1) % size + 1, size, p2p_s)
    work = [sum(seconds) for seconds in zip(*forward, *backward)]
    turns = forward[-1], backward[-1]
    if joined:
        both_s = [durations.joined(stage, stage) for stage in range(v * p)]
        turns = (tuple(both_s[-p:]),) * 2
        pair_s = _joined_pairs([sum(both_s[rank::p]) / v for rank in range(p)], p2p_s)
    span = _slowest_span(work, p2p_s) if v == 1 and p2p_s and not joined else None
    longest, filled, drained = 0.0, fill.turn_s, drain.turn_s
    for rank in reversed(range(p)):
        filled, drained = max(filled, fill.own_s[rank]), max(drained, drain.own_s[rank])
        pairs = m * v - 1 - slots[rank]
        if pairs:
            between = m * work[rank] - fill.work_s[rank] - drain.work_s[rank]
            if joined:
                between += pairs * (pair_s[rank] - work[rank] / v)
            elif span and span.first <= rank <= span.last:
                rounds = (pairs - (rank < span.last)) // (span.last - span.first + 1)
                between += rounds * (span.seconds - (span.last - span.first + 1) * work[rank])
            longest = max(longest, filled + between + drained)
        else:
            longest = max(longest, fill.own_s[rank] + drained, filled + drain.own_s[rank])
        filled += turns[1][rank] + p2p_s
        drained += turns[0][rank] + p2p_s
    return longest


class _Ramp(NamedTuple):
    """``turn_s``: when the first micro-batch is through all stages. By rank, ``own_s``: when it ends its slot at the
    earliest, and ``work_s``: its work up to then."""

    turn_s: float
    own_s: list[float]
    work_s: list[float]


def _ramp(rows: Rows, slots: Sequence[int], first: int, group: int, p2p_s: float) -> _Ramp:
    """The start of a step, while ranks only go forward (or its end seen backwards, when they only go back), up to the
    end of the slot ``slots[rank]``. The chunks take ``first`` micro-batches in turn, and then ``group`` at a time."""
    # When each rank has run the first and the last of the micro-batches through a chunk.
    heads, tails = [0.0] * len(slots), [0.0] * len(slots)
    head = tail = -p2p_s
    for row in rows:
        for rank, seconds in enumerate(row):
            head += p2p_s
            if tails[rank] > head:
                head = tails[rank]
            head += seconds
            tail += p2p_s + seconds
            if (busy := head + (first - 1) * seconds) > tail:
                tail = busy
            heads[rank], tails[rank] = head, tail
    slowest = max(map(max, rows))
    own_s, work_s = [], []
    for rank, seconds in enumerate(rows[-1]):
        inside = slots[rank] - (len(rows) - 1) * first
        earlier = first * sum([row[rank] for row in rows[:-1]])
        later = 0.0
        if inside >= first:
            later = _leading([row[rank] for row in rows], inside - first + 1, group)
            inside = first - 1
        own_s.append(max(heads[rank] + inside * seconds, tails[rank] - (first - 1 - inside) * slowest) + later)
        work_s.append(earlier + (inside + 1) * seconds + later)
    return _Ramp(heads[-1], own_s, work_s)


def _leading(column: Sequence[float], slots: int, group: int) -> float:
    """Seconds of a rank's first ``slots`` passes, ``group`` micro-batches through each chunk in turn."""
    total = 0.0
    while slots:
        for seconds in column:
            taken = min(slots, group)
            total += taken * seconds
            slots -= taken
    return total


class _Span(NamedTuple):
    """Ranks ``first`` to ``last`` round which a chain goes, and its seconds for as many micro-batches as ranks."""

    first: int
    last: int
    seconds: float


def _slowest_span(work: Sequence[float], p2p_s: float) -> _Span:
    """In 1F1B a micro-batch down and up a span of n ranks makes room for the n-th after it: n micro-batches cost at
    least the work of these ranks and 2 (n-1) messages. The span with the most for each micro-batch, grown greedily."""
    slowest = max(range(len(work)), key=work.__getitem__)
    first = last = slowest
    seconds = work[slowest]
    best = _Span(first, last, seconds)
    while last - first + 1 < len(work):
        if last + 1 == len(work) or (first and work[first - 1] >= work[last + 1]):
            first -= 1
            seconds += work[first] + 2 * p2p_s
        else:
            last += 1
            seconds += work[last] + 2 * p2p_s
        if seconds * (best.last - best.first + 1) > best.seconds * (last - first + 1):
            best = _Span(first, last, seconds)
    return best


def _joined_pairs(pair_s: Sequence[float], p2p_s: float) -> list[float]:
    """Joined, a rank's pair waits for one of each neighbour, which waited for one of its own two pairs before: two
    neighbours take turns, and a message lies between."""
    turns = [(here + there) / 2 + p2p_s for here, there in pairwise(pair_s)]
    return [max(own, before, after) for own, before, after in zip(pair_s, [0.0, *turns], [*turns, 0.0])]
