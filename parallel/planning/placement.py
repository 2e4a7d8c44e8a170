"""Which rank runs on which device: ranks fill hosts in order, hosts fill NVLink domains. No torch.

Ranks are ordered from the fastest axis to the slowest (``plan.ORDERS``), so a group over the fastest axes is a block of
consecutive ranks, and it stays on NVLink where the ranks of a domain are a multiple of that block. The pipeline is the
slowest axis and goes across. All is arithmetic on the rank: nothing is stored per rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from parallel.planning.plan import ORDERS, ParallelPlan, nearest_multiples
from parallel.planning.topology import HardwareTopology
from stoker.errors import Refusal


def domain_local(topology: HardwareTopology) -> tuple[str, ...]:
    """Axes whose groups may never leave an NVLink domain of this hardware.

    Tensor groups talk in every product, so they never do. Context and expert groups leave an 8-GPU host where they are
    larger than it (DeepSeek-V3 ran EP64 over such hosts, arXiv 2412.19437), but not a rack: an expert exchange that
    mixes two racks stalls NCCL until its watchdog (NeMo-RL pull request 2986), and HybridEP refuses it.
    """
    return ("tp", "cp", "etp", "ep") if topology.rack_scale else ("tp", "etp")


@dataclass(frozen=True)
class Placement:
    """Ranks on devices. ``host_ranks`` of each host are used, ``domain_ranks`` of each domain.

    Holds: ``rank(domain(r), host(r), device(r)) == r``, hosts counted within their domain, devices within their host;
    no group over the domain-local axes of the topology crosses a domain.

    >>> from parallel.planning.topology import load_hardware
    >>> placement = place(ParallelPlan(256, 512, 1, num_layers=8, pp=2, ep=64), load_hardware("gb200-nvl72"))
    >>> placement.domain_ranks, placement.domains, placement.crossing("ep"), placement.crossing("edp")
    (64, 4, False, True)
    """

    plan: ParallelPlan
    topology: HardwareTopology
    domain_ranks: int
    host_ranks: int
    warnings: tuple[str, ...] = ()

    @property
    def domains(self) -> int:
        """Domains that hold at least one rank."""
        return -(-self.plan.world_size // self.domain_ranks)

    @property
    def hosts(self) -> int:
        """Hosts (trays) that hold at least one rank, over all domains."""
        return -(-self.plan.world_size // self.host_ranks)

    def domain(self, rank: int) -> int:
        return self._checked(rank) // self.domain_ranks

    def host(self, rank: int) -> int:
        """Within its domain."""
        return self._checked(rank) % self.domain_ranks // self.host_ranks

    def device(self, rank: int) -> int:
        """Within its host: the local rank."""
        return self._checked(rank) % self.domain_ranks % self.host_ranks

    def rank(self, domain: int, host: int, device: int) -> int | None:
        """The rank there; None where the device is kept aside or left over. Refusal where there is no such device."""
        shape = self.topology.domain
        if not (
            0 <= domain < self.domains and 0 <= host < shape.size // shape.per_host and 0 <= device < shape.per_host
        ):
            raise Refusal(
                f"no device {device} of host {host} in domain {domain}: there are {self.domains} domains of "
                f"{shape.size // shape.per_host} hosts with {shape.per_host} devices"
            )
        place = host * self.host_ranks + device
        rank = domain * self.domain_ranks + place
        used = device < self.host_ranks and place < self.domain_ranks and rank < self.plan.world_size
        return rank if used else None

    def crossing(self, axis: str) -> bool:
        """Whether any group of the axis has ranks in two domains."""
        if self.plan.degree(axis) == 1:
            return False
        return self.domains > 1 and self.domain_ranks % extent(self.plan, axis) != 0

    def explain(self) -> str:
        """The placement in words, a line for each thing that it decides."""
        axes = [axis for axis in dict.fromkeys(sum(ORDERS, ())) if self.plan.degree(axis) > 1]
        across = [axis for axis in axes if self.crossing(axis)]
        inside = [axis for axis in axes if axis not in across]
        used = min(self.domain_ranks, self.plan.world_size)
        return "\n".join(
            (
                f"{_count(self.plan.world_size, 'rank')} on {_count(self.hosts, 'host')} in "
                f"{_count(self.domains, 'domain')} of {self.topology.name}: up to {self.host_ranks} a host, "
                f"{used} of the {self.topology.domain.size} devices of a domain",
                f"inside a domain: {', '.join(inside) or 'no axis'}; across domains: {', '.join(across) or 'no axis'}",
                *self.warnings,
            )
        )

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.plan.world_size:
            raise Refusal(f"rank {rank} is outside the world of {self.plan.world_size} ranks")
        return rank


def extent(plan: ParallelPlan, axis: str) -> int:
    """Size of the aligned block of consecutive ranks that the groups of an axis tile: its degree times faster ones."""
    order = next(order for order in ORDERS if axis in order)
    return math.prod(plan.degree(faster) for faster in order[: order.index(axis) + 1])


def local_block(plan: ParallelPlan, topology: HardwareTopology) -> int:
    """Consecutive ranks that are kept in one domain: the largest blocks over tp, cp and over etp, ep that fit one."""
    sizes = [[extent(plan, axis) for axis in order[:2]] for order in ORDERS]
    return math.lcm(*(max(size for size in family if size <= topology.domain.size) for family in sizes))


def place(plan: ParallelPlan, topology: HardwareTopology, domain_ranks: int | None = None) -> Placement:
    """Put the ranks of a plan on hardware; ``domain_ranks`` of each domain are used, chosen here if not given.

    One domain, if the world fits. Over several, the first size of ``domain.practice`` that the world divides and the
    domain-local groups fill evenly (64 of an NVL72's 72, with the rest as spares), else the largest such size.
    Raises Refusal where a domain-local group is larger than a domain, or ``domain_ranks`` cuts one in two.
    """
    _refuse_large_groups(plan, topology)
    domain, world = topology.domain, plan.world_size
    block = local_block(plan, topology)
    if world <= min(domain.size, domain_ranks or world):
        hosts = -(-world // domain.per_host)
        used, host_ranks = world, domain.per_host if world % hosts else world // hosts
    else:
        host_ranks, sizes = _even_sizes(world, topology, block)
        used = domain_ranks or _usual(world, topology, sizes)
        if used not in sizes:
            near = sorted(sorted(sizes, key=lambda size: (abs(size - used), -size))[:2])
            raise Refusal(
                f"domain_ranks={used} does not hold whole groups of {block} ranks on whole hosts of "
                f"{topology.name}: nearest that do are {' or '.join(map(str, near))}"
            )
    return Placement(plan, topology, used, host_ranks, tuple(_warnings(plan, topology, block, used, host_ranks)))


def _refuse_large_groups(plan: ParallelPlan, topology: HardwareTopology) -> None:
    size = topology.domain.size
    for order in ORDERS:
        local = [axis for axis in order if axis in domain_local(topology)]
        together = math.prod(plan.degree(axis) for axis in local)
        if together <= size:
            continue
        advice = []
        for axis in local:
            degree, room = plan.degree(axis), size * plan.degree(axis) // together
            if fits := [part for part in range(1, room + 1) if degree % part == 0]:
                advice.append(f"{axis}={fits[-1]}")
        raise Refusal(
            f"{' x '.join(f'{axis} {plan.degree(axis)}' for axis in local)} ranks must share one domain of "
            f"{topology.name}, which has {size}: nearest that fit are {', or '.join(advice) or 'smaller of each'}"
        )


def _even_sizes(world: int, topology: HardwareTopology, block: int) -> tuple[int, range]:
    """Ranks of each host, and how many ranks a domain may hold: whole blocks on evenly used hosts, which are used as
    fully as they can be."""
    domain = topology.domain
    for host_ranks in range(domain.per_host, 0, -1):
        step, room = math.lcm(block, host_ranks), host_ranks * (domain.size // domain.per_host)
        if world % host_ranks == 0 and step <= room:
            return host_ranks, range(step, room + 1, step)
    raise Refusal(
        f"groups of {block} ranks do not fill whole hosts of {domain.per_host} within the {domain.size} devices of a "
        f"domain of {topology.name}: choose tp, cp, ep and etp whose products divide "
        f"{' or '.join(map(str, domain.practice))}"
    )


def _usual(world: int, topology: HardwareTopology, sizes: range) -> int:
    even = [size for size in sizes if world % size == 0]
    usual = [size for size in topology.domain.practice if size in even]
    sparing = [size for size in even if size <= topology.domain.size - topology.spares]
    return (usual or sparing[-1:] or even[-1:] or sizes[-1:])[0]


def _warnings(
    plan: ParallelPlan, topology: HardwareTopology, block: int, domain_ranks: int, host_ranks: int
) -> Iterator[str]:
    domain, world = topology.domain, plan.world_size
    for axes in (("tp", "cp"), ("etp", "ep")):
        if (group := extent(plan, axes[1])) > domain.size:
            yield (
                f"{'*'.join(axes)} = {group} ranks reach over {-(-group // domain.size)} domains of {topology.name}: "
                f"what {axes[1]} exchanges goes over the network, at {_share(topology)} of the bandwidth"
            )
    if world <= domain_ranks:
        if rest := world % host_ranks:
            yield f"the last host runs {rest} ranks, the others {host_ranks}"
        return
    sparing, even = domain.size - topology.spares, [size for size in domain.practice if size % block == 0]
    if not even:
        yield (
            f"groups of {block} ranks divide none of {', '.join(map(str, domain.practice))}, the devices of a domain "
            f"in use elsewhere: {domain.size - domain_ranks} of {domain.size} stay idle"
        )
    elif domain_ranks > sparing:
        cause = f"groups of {block} ranks do not divide {sparing}" if sparing % block else f"{world} ranks"
        yield f"{cause}: {domain_ranks} of the {domain.size} devices of a domain are used, which leaves no spares"
    elif domain_ranks < even[0]:
        near = " or ".join(map(str, nearest_multiples(world, even[0])))
        yield (
            f"{world} ranks divide evenly only into {domain_ranks} of the {domain.size} devices of a domain; "
            f"{near} ranks would use {even[0]} of each"
        )
    if host_ranks < domain.per_host:
        yield f"{host_ranks} of the {domain.per_host} devices of a host are used"


def _share(topology: HardwareTopology) -> str:
    network, links = topology.network.bandwidth, topology.domain.bandwidth
    return "an unknown share" if network is None or links is None else f"1/{links / network:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
