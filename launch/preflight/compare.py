"""Which nodes of a launch can train, from what all of them state: a function of data, nothing else."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.facts import Facts
from launch.preflight.report import Verdict

#: Seconds that a node's wall clock may differ from the leader's. Nothing decides by it; logs are read by it.
CLOCK_TOLERANCE_S = 1.0
#: A node is slow if it lies so many deviations (1.4826 MAD, at least ``LEAST_SPREAD`` of the median) below the others'
#: median, and below ``SLOW`` of it. Of fewer than ``ENOUGH`` nodes a median says little: the best is the measure then.
DEVIATIONS, LEAST_SPREAD, SLOW, ENOUGH = 6.0, 0.02, 0.8, 4


@dataclass(frozen=True)
class Offset:
    """A node's wall clock less the leader's lies between these seconds: what reading and writing files could tell."""

    low_s: float
    high_s: float

    @property
    def wrong(self) -> str | None:
        if self.low_s > CLOCK_TOLERANCE_S:
            return f"its clock is at least {self.low_s:.1f} s ahead of the leader's: start NTP or chrony"
        if self.high_s < -CLOCK_TOLERANCE_S:
            return f"its clock is at least {-self.high_s:.1f} s behind the leader's: start NTP or chrony"
        return None


def judge(
    nodes: Sequence[str],
    needed: int,
    facts: Mapping[str, Facts],
    offsets: Mapping[str, Offset],
    silence: str,
    segment: int | None = None,
    share_hosts: bool = False,
) -> Verdict:
    """The verdict over ``nodes``, in the job's order, the leader first. ``silence``: why a node without facts is out.

    What is equal on most nodes is right; of two values equally common, the leader's. Slow nodes are excluded only as
    far as others are left in their place, and not compared where they share a host.
    """
    excluded = {node: silence for node in nodes if node not in facts}
    excluded |= {node: refused for node in nodes if node in facts and (refused := facts[node].refused)}
    warnings: list[str] = []

    def left() -> list[str]:
        return [node for node in nodes if node not in excluded]

    differing = _differing(left(), facts)
    excluded |= differing
    excluded |= {node: wrong for node in left() if node in offsets and (wrong := offsets[node].wrong)}
    for node, reason in _duplicates(left(), facts):
        if share_hosts:
            warnings.append(f"{node}: {reason}")
        else:
            excluded[node] = reason
    if segment:
        excluded |= dict(_strangers(nodes, left(), segment, facts))
    warnings += [f"{node}: {reason}" for node, reason in _minority(left(), lambda node: facts[node].remarks)]
    for node, reason in [] if share_hosts else _slow(left(), facts):
        if len(left()) > needed:
            excluded[node] = reason
        else:
            warnings.append(f"{node}: {reason}; no node is left to take its place")
    in_order = {node: excluded[node] for node in nodes if node in excluded}
    return Verdict(tuple(left()), in_order, needed, len(nodes), tuple(warnings))


def _differing(nodes: Sequence[str], facts: Mapping[str, Facts]) -> dict[str, str]:
    found = dict(_minority(nodes, lambda node: facts[node].hashes, brief=True))
    return found | dict(_minority(nodes, lambda node: facts[node].versions))  # a version says more than a hash


def _minority(
    nodes: Sequence[str], values: Callable[[str], Mapping[str, str | None]], brief: bool = False
) -> Iterator[tuple[str, str]]:
    """Nodes whose values differ from the usual ones, each once, with all that differs."""
    keys = list(dict.fromkeys(key for node in nodes for key in values(node)))
    usual = {key: usual_value([values(node).get(key) for node in nodes]) for key in keys}

    def shown(value: str | None) -> str:
        return "none" if value is None else value[:12] if brief else value

    for node in nodes:
        odd = [
            f"{key} {shown(values(node).get(key))} where {count} of {len(nodes)} nodes have {shown(value)}"
            for key, (value, count) in usual.items()
            if values(node).get(key) != value
        ]
        if odd:
            yield node, "; ".join(odd)


def usual_value(values: Sequence[str | None]) -> tuple[str | None, int]:
    """The most common value and how often it is there; of equally common ones the first."""
    return Counter(values).most_common(1)[0] if values else (None, 0)


def _duplicates(nodes: Sequence[str], facts: Mapping[str, Facts]) -> Iterator[tuple[str, str]]:
    """Nodes that are the host, or have a GPU, of one before them."""
    places: dict[str, str] = {}
    devices: dict[str, str] = {}
    for node in nodes:
        mine = facts[node]
        shared = next((devices[device] for device in mine.devices if device in devices), None)
        if shared is not None:
            yield node, f"has a GPU that {shared} has as well: one node was started twice"
        elif not mine.devices and mine.place in places:
            yield node, f"is the same host as {places[mine.place]} ({mine.host}): one node was started twice"
        places.setdefault(mine.place, node)
        for device in mine.devices:
            devices.setdefault(device, node)


def _strangers(
    nodes: Sequence[str], left: Sequence[str], segment: int, facts: Mapping[str, Facts]
) -> Iterator[tuple[str, str]]:
    """Nodes of a segment, which lies in one NVLink domain, with another ClusterUUID or clique than most of it."""
    for first in range(0, len(nodes), segment):
        group = [node for node in nodes[first : first + segment] if node in left and facts[node].clique]
        named = {node: " clique ".join(facts[node].clique or ()) for node in group}
        usual, count = usual_value(list(named.values()))
        for node, clique in named.items():
            if clique != usual:
                yield node, f"NVLink partition {clique} where {count} nodes of its segment have {usual}"


def _slow(nodes: Sequence[str], facts: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """Nodes far below the others in some rate, the slowest first."""
    found: dict[str, tuple[float, str]] = {}
    for what in dict.fromkeys(key for node in nodes for key in facts[node].rates):
        rates = {node: facts[node].rates[what] for node in nodes if what in facts[node].rates}
        for node, share in slow(rates).items():
            if node not in found or share < found[node][0]:
                found[node] = share, f"slow: {what} at {share:.0%} of the other nodes'"
    return [(node, reason) for node, (_, reason) in sorted(found.items(), key=lambda item: item[1][0])]


def slow(rates: Mapping[str, float]) -> dict[str, float]:
    """The nodes that are slow, and their rate as a share of the others' median (of the best, where nodes are few)."""
    if len(rates) < 2:
        return {}
    if len(rates) < ENOUGH:
        best = max(rates.values())
        return {node: rate / best for node, rate in rates.items() if rate < SLOW * SLOW * best}
    middle = statistics.median(rates.values())
    spread = 1.4826 * statistics.median(abs(rate - middle) for rate in rates.values())
    bound = min(middle - DEVIATIONS * max(spread, LEAST_SPREAD * middle), SLOW * middle)
    return {node: rate / middle for node, rate in rates.items() if rate < bound}
