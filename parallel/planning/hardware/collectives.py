"""Seconds that collectives take: inside a scale-up domain, between domains, and both. No torch.

A link moves ``S`` bytes in ``steps * latency + S / bandwidth``. Collectives inside a domain also take
``sqrt(2 * SWITCH_STEPS * latency * S / bandwidth)`` to come up to speed: the best cut into chunks of a pipeline whose
every chunk costs something. Where a library has several ways, the fastest is taken.

Sizes are bytes, numbers or numpy arrays of them; what one rank alone does, and no bytes at all, take no time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, NamedTuple, Protocol

import numpy as np

from parallel.planning.plan import ORDERS
from parallel.planning.topology import HardwareTopology
from stoker.errors import Refusal

#: Steps of a ring that a reduction in the switch takes to begin, and a transfer to come up to speed: 15 us of 2.3 us.
#: NCCL all-reduce on 8 H100, NVIDIA dgxc-benchmarking nccl/README.md, 2026-08: 13.7 us for 8 bytes, 16.9 us for 1 KiB,
#: and from 16 MiB to 16 GiB within 8 % of what follows from it.
SWITCH_STEPS = 6.5
#: What a link carries, against a ring's stream, where a device talks to all others at once: through the switch 307 of
#: 370 GB/s (NVIDIA/nccl issue 1455, 2024-09, H100: 273 GB/s * (1 + 1/8)); all-to-all on H800 134 of 160 GB/s (DeepEP
#: README, 2025-02: 153 GB/s logical at EP 8, an eighth of it local).
SCATTERED = 0.83

#: Bytes or seconds: one number, or an array of them.
Amount = Any


@dataclass(frozen=True)
class LinkEfficiency:
    """Share of their bandwidth that links reach, in the domain and across. NCCL's rings: 0.82 of NVLink 4 (370 of 450
    GB/s, NVIDIA/nccl-tests issue 212, 2024-05); DeepEP: 0.90 of a 400 Gb/s card (its README, V2: EP 16 and 32)."""

    domain: float = 1.0
    network: float = 1.0


IDEAL = LinkEfficiency()
PUBLISHED = LinkEfficiency(domain=0.82, network=0.90)


@dataclass(frozen=True)
class Span:
    """A group of ``ranks``, of which ``per_domain`` lie in each domain (fewer in the last, if need be)."""

    ranks: int
    per_domain: int

    @property
    def domains(self) -> int:
        return -(-self.ranks // self.per_domain)


class Degrees(Protocol):
    """A plan, as far as its groups go."""

    @property
    def world_size(self) -> int: ...

    def degree(self, axis: str) -> int: ...


def span(plan: Degrees, axes: Sequence[str], topology: HardwareTopology, domain_ranks: int | None = None) -> Span:
    """The group over ``axes`` (of one family and pp) that touches the most domains, ranks filling domains in order.

    ``domain_ranks``: ranks that a domain takes; left out, all of its devices, less spares where the world is larger.

    >>> from parallel.planning.plan import ParallelPlan
    >>> from parallel.planning.topology import load_hardware
    >>> plan = ParallelPlan(64, 64, 1, tp=4, num_layers=8)
    >>> span(plan, ("tp",), load_hardware("h100")), span(plan, ("dp",), load_hardware("h100"))
    (Span(ranks=4, per_domain=4), Span(ranks=16, per_domain=2))
    """
    order = next((order for order in ORDERS if set(axes) <= set(order)), None)
    if order is None:
        raise Refusal(f"group over {tuple(axes)}: take the axes from one of {', '.join(map(str, ORDERS))}")
    if domain_ranks is None:
        domain = topology.domain
        domain_ranks = domain.size - topology.spares * (plan.world_size > domain.size)
    return _span(tuple((plan.degree(axis), axis in axes) for axis in order), domain_ranks)


@lru_cache(maxsize=65536)
def _span(order: tuple[tuple[int, bool], ...], domain: int) -> Span:
    """``order``: degree of each axis, fastest first, and whether the group runs over it."""
    inside: list[tuple[int, int]] = []
    outside: list[tuple[int, int]] = []
    stride = 1
    for degree, chosen in order:
        runs = inside if chosen else outside
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] * degree)
        elif degree > 1:
            runs.append((stride, degree))
        stride *= degree
    ranks = math.prod(degree for _, degree in inside)
    if stride <= domain or ranks == 1:
        return Span(ranks, ranks)
    if len(inside) == 1:
        step = inside[0][0]
        if domain % (step * ranks) == 0:
            return Span(ranks, ranks)
        if step % domain == 0:
            return Span(ranks, 1)
        if domain % step == 0 and step * ranks % domain == 0:
            return Span(ranks, domain // step)
    members = np.sort(_sums(inside))
    # Only where a group begins within a domain matters, and that comes again after a few steps of each outer axis.
    starts = _sums([(step, min(degree, domain // math.gcd(step, domain))) for step, degree in outside])
    domains = (np.unique(starts % domain)[:, None] + members) // domain
    touched = int((np.diff(domains, axis=1) != 0).sum(axis=1).max()) + 1
    return Span(ranks, -(-ranks // touched))


def _sums(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Every sum of one multiple of each step: ((1, 2), (8, 2)) -> 0, 1, 8, 9."""
    return reduce(lambda sums, run: (sums + np.arange(run[1])[:, None] * run[0]).ravel(), runs, np.zeros(1, int))


class _Link(NamedTuple):
    """What one rank of a group can send, how long a step takes and how long links take to come up to speed."""

    bandwidth: float
    latency_s: float
    ramp_s: float

    def time(self, steps: float, carried: Amount) -> Amount:
        transfer = carried / self.bandwidth
        return steps * self.latency_s + transfer + (2 * self.ramp_s * transfer) ** 0.5

    def scattered(self) -> _Link:
        return self._replace(bandwidth=self.bandwidth * SCATTERED)


def _domain_link(topology: HardwareTopology, ranks: int, efficiency: LinkEfficiency) -> _Link:
    """Links between ``ranks`` devices of a domain; without a switch a device has one link to each of the others."""
    domain = topology.domain
    bandwidth = domain.bandwidth or topology.known("domain.bandwidth")
    latency_s = domain.latency_s or topology.known("domain.latency_s")
    links = 1.0 if domain.switched else (ranks - 1) / (domain.size - 1)
    return _Link(bandwidth * links * efficiency.domain, latency_s, SWITCH_STEPS * latency_s)


def _network_link(topology: HardwareTopology, efficiency: LinkEfficiency) -> _Link:
    """A device's network card. Its queues are deep: a transfer needs no time to come up to speed."""
    bandwidth = topology.network.bandwidth or topology.known("network.bandwidth")
    latency_s = topology.network.latency_s or topology.known("network.latency_s")
    return _Link(bandwidth * efficiency.network, latency_s, 0.0)


def all_gather_s(size: Amount, group: Span, topology: HardwareTopology, efficiency: LinkEfficiency = IDEAL) -> Amount:
    """Every rank ends with all ``size`` bytes, having begun with its share of them.

    Across domains either one ring over all ranks, which enters and leaves a domain by all its cards at once, or each
    rank's share across first and then the domain's.
    """
    ranks, inside = group.ranks, group.per_domain
    if ranks == 1:
        return size * 0.0
    if group.domains == 1:
        return _fastest(size, _gather_in_domain(size, ranks, topology, efficiency))
    network = _network_link(topology, efficiency)
    across = network.time(group.domains - 1, (1 - 1 / group.domains) * size / inside)
    if inside == 1:
        return _fastest(size, across)
    ring = _ring_across(size, 1, group, topology, efficiency)
    return _fastest(size, ring, across + _gather_in_domain(size, inside, topology, efficiency))


def reduce_scatter_s(
    size: Amount, group: Span, topology: HardwareTopology, efficiency: LinkEfficiency = IDEAL
) -> Amount:
    """Every rank begins with ``size`` bytes and ends with its share of their sum: an all-gather backwards."""
    return all_gather_s(size, group, topology, efficiency)


def all_reduce_s(size: Amount, group: Span, topology: HardwareTopology, efficiency: LinkEfficiency = IDEAL) -> Amount:
    """Every rank ends with the sum of everyone's ``size`` bytes.

    In a domain by a ring, a tree, or the switch: it reads all ranks' parts of what one rank is to sum, and writes the
    sum to all, so that ``size * (1 + 1/ranks)`` goes over each link. Across domains by one ring over all ranks, or
    reduce-scatter in the domain, all-reduce of a rank's part across (ring or tree), all-gather in the domain.
    """
    ranks, inside, domains = group.ranks, group.per_domain, group.domains
    if ranks == 1:
        return size * 0.0
    if domains == 1:
        link = _domain_link(topology, ranks, efficiency)
        ways = [_ring(link, 2, ranks, size), _tree(link, ranks, size)]
        if topology.domain.in_network_reduction:
            ways.append(link.scattered().time(SWITCH_STEPS, size * (1 + 1 / ranks)))
        return _fastest(size, *ways)
    network = _network_link(topology, efficiency)
    ways = [_ring(network, 2, domains, size / inside), _tree(network, domains, size / inside)]
    if inside > 1:
        both = 2 * _gather_in_domain(size, inside, topology, efficiency)
        ways = [both + way for way in ways] + [_ring_across(size, 2, group, topology, efficiency)]
    return _fastest(size, *ways)


def point_to_point_s(
    size: Amount, crosses_domain: bool, topology: HardwareTopology, efficiency: LinkEfficiency = IDEAL
) -> Amount:
    """One rank sends ``size`` bytes to one other."""
    link = _network_link(topology, efficiency) if crosses_domain else _domain_link(topology, 2, efficiency)
    return _fastest(size, link.time(1, size))


def all_to_all_s(
    tokens: Amount,
    copy_bytes: float,
    visits: int,
    experts: int,
    group: Span,
    topology: HardwareTopology,
    efficiency: LinkEfficiency = IDEAL,
    *,
    node_limit: int | None = None,
    deduplicated: bool = True,
) -> tuple[Amount, Amount]:
    """Seconds in the domain and on the network of sending each rank's ``tokens`` to the ranks of their experts.

    A token of ``copy_bytes`` visits that many distinct ``experts``, balanced, which lie evenly over the group, and at
    most ``node_limit`` domains. ``deduplicated`` (DeepEP, HybridEP): it crosses to each domain once, and reaches each
    rank once; else every visit is a copy sent by itself. The two parts can overlap; the way back costs the same.
    """
    ranks, inside, domains = group.ranks, group.per_domain, group.domains
    if ranks == 1:
        return tokens * 0.0, tokens * 0.0
    met_ranks = met_domains = float(visits)
    local = inside / ranks
    if deduplicated:
        reach = min(node_limit or domains, domains) / domains
        met_ranks = _distinct(ranks * reach, visits, experts * reach)
        met_domains = _distinct(domains * reach, visits, experts * reach)
        local = 1.0  # what comes over the network is handed on inside the domain
    domain_s = network_s = tokens * 0.0
    if inside > 1:
        link = _domain_link(topology, inside, efficiency).scattered()._replace(ramp_s=0.0)  # not cut into chunks
        sent = tokens * copy_bytes * met_ranks * local * (1 - 1 / inside)
        domain_s = _fastest(sent, link.time(1, sent))
    if domains > 1:
        sent = tokens * copy_bytes * met_domains * (1 - 1 / domains)
        network_s = _fastest(sent, _network_link(topology, efficiency).time(1, sent))
    return domain_s, network_s


@lru_cache(maxsize=4096)
def _distinct(parts: float, visits: int, experts: float) -> float:
    """How many of ``parts`` hold at least one of ``visits`` distinct experts, on average, drawn from all."""
    others = experts - experts / parts
    missed = math.prod(max(0.0, others - drawn) / (experts - drawn) for drawn in range(min(visits, int(experts))))
    return parts * (1 - missed)


def _ring(link: _Link, trips: int, ranks: int, size: Amount) -> Amount:
    """``trips`` times round: 1 gathers or scatters, 2 reduce; a step moves one rank's share."""
    return link.time(trips * (ranks - 1), trips * (1 - 1 / ranks) * size)


def _tree(link: _Link, ranks: int, size: Amount) -> Amount:
    """Up to the root and down again, in chunks that follow one another."""
    return link.time(2 * math.ceil(math.log2(ranks)), 2 * size)


def _ring_across(
    size: Amount, trips: int, group: Span, topology: HardwareTopology, efficiency: LinkEfficiency
) -> Amount:
    """One ring over all ranks, as slow as the slower of a device's links and a domain's cards together."""
    link, network = _domain_link(topology, group.per_domain, efficiency), _network_link(topology, efficiency)
    slower = min(link.bandwidth, group.per_domain * network.bandwidth)
    steps_s = (group.ranks - group.domains) * link.latency_s + (group.domains - 1) * network.latency_s
    return trips * steps_s + link._replace(bandwidth=slower).time(0, trips * (1 - 1 / group.ranks) * size)


def _gather_in_domain(size: Amount, ranks: int, topology: HardwareTopology, efficiency: LinkEfficiency) -> Amount:
    link = _domain_link(topology, ranks, efficiency)
    ring = _ring(link, 1, ranks, size)
    if not topology.domain.in_network_reduction:
        return ring
    return _fastest(size, ring, link.scattered().time(SWITCH_STEPS, size))


def _fastest(size: Amount, *ways: Amount) -> Amount:
    if isinstance(size, np.ndarray):
        return np.where(size > 0, reduce(np.minimum, ways), 0.0)
    return min(ways) if size > 0 else 0.0
