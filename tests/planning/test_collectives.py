"""Collectives: published measurements come out, simulations agree, and no improvement of a machine slows it down."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.hardware.collectives import (
    PUBLISHED,
    LinkEfficiency,
    Span,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    point_to_point_s,
    reduce_scatter_s,
    span,
)
from parallel.planning.plan import ORDERS, ParallelPlan
from parallel.planning.topology import HardwareTopology, load_hardware
from stoker.errors import Refusal

H100, NVL72, MI300X = (load_hardware(name) for name in ("h100", "gb200-nvl72", "mi300x"))
MIB = 2**20

#: NVIDIA dgxc-benchmarking, nccl/README.md: all-reduce on one DGX H100, out of place, float32; bytes to microseconds.
NCCL_8_H100 = {
    8: 13.7,
    1024: 16.9,
    16 * MIB: 123.8,
    32 * MIB: 199.3,
    64 * MIB: 324.7,
    128 * MIB: 586.4,
    256 * MIB: 1112.5,
    512 * MIB: 2151,
    1024 * MIB: 4029,
    4096 * MIB: 15749,
    16384 * MIB: 62648,
}


@pytest.mark.parametrize(("size", "measured_us"), NCCL_8_H100.items())
def test_all_reduce_on_8_h100_takes_what_nvidia_measured(size: int, measured_us: float) -> None:
    error = 1e6 * all_reduce_s(size, Span(8, 8), H100, PUBLISHED) / measured_us - 1
    print(f"{size} bytes: {error:+.1%}")
    assert abs(error) <= (0.10 if size >= 16 * MIB else 0.30)


@pytest.mark.parametrize(
    ("ranks", "measured"), [(2, 370e9), (4, 247e9), (5, 258e9), (6, 265e9), (7, 270e9), (8, 273e9)]
)
def test_all_reduce_by_the_switch_gains_with_ranks_as_measured(ranks: int, measured: float) -> None:
    """NVIDIA/nccl issue 1455: bandwidth of 2 to 4 GiB on 2 to 8 H100, a ring up to four and the switch from five on."""
    assert 4096 * MIB / all_reduce_s(4096 * MIB, Span(ranks, ranks), H100, PUBLISHED) == pytest.approx(
        measured, rel=0.06
    )


@pytest.mark.parametrize("ranks", [2, 8])
def test_all_gather_reaches_the_370_gb_s_of_nccl(ranks: int) -> None:
    """NVIDIA/nccl-tests issue 212: what rings reach of NVLink's 450 GB/s, whatever the number of ranks."""
    received = (1 - 1 / ranks) * 8192 * MIB
    assert received / all_gather_s(8192 * MIB, Span(ranks, ranks), H100, PUBLISHED) == pytest.approx(370e9, rel=0.06)


@pytest.mark.parametrize(
    ("hardware", "ranks", "element_bytes", "tokens", "measured"),
    [
        ("h100", 16, 1, 8192, 90e9),
        ("h100", 16, 2, 8192, 81e9),
        ("h100", 32, 1, 8192, 61e9),
        ("h100", 32, 2, 8192, 61e9),
        ("b200", 8, 1, 8192, 726e9),
        ("b200", 8, 2, 8192, 740e9),
        ("h800", 8, 1, 4096, 153e9),
        ("h800", 8, 2, 4096, 158e9),
    ],
)
def test_deepep_reaches_the_bandwidth_that_its_readme_states(
    hardware: str, ranks: int, element_bytes: int, tokens: int, measured: float
) -> None:
    """Its figures are logical: one copy for each rank (one domain) or each domain that a token goes to, its own too."""
    copy = 7168 * element_bytes
    seconds = max(all_to_all_s(tokens, copy, 8, 256, Span(ranks, 8), load_hardware(hardware), PUBLISHED))
    places = ranks if ranks == 8 else ranks // 8
    reached = places * (1 - np.prod([(256 - 256 / places - i) / (256 - i) for i in range(8)]))
    assert tokens * copy * reached / seconds == pytest.approx(measured, rel=0.12)


def simulate_ring(ranks: int, size: float, bandwidth: float, latency_s: float, trips: int) -> float:
    """Seconds until every rank has all: each waits for its left neighbour and hands on what came last."""
    clock = np.zeros(ranks)
    for _ in range(trips):
        held, last = [{rank} for rank in range(ranks)], list(range(ranks))
        while any(len(shares) < ranks for shares in held):
            clock = np.maximum(clock, np.roll(clock, 1)) + latency_s + size / ranks / bandwidth
            last = [last[rank - 1] for rank in range(ranks)]
            for shares, new in zip(held, last, strict=True):
                shares.add(new)
    return float(clock.max())


@given(
    ranks=st.integers(2, 64),
    size=st.floats(1e3, 1e10),
    bandwidth=st.floats(1e9, 1e12),
    latency_s=st.floats(1e-7, 1e-4),
)
@settings(deadline=None, max_examples=60)
def test_a_ring_takes_what_its_steps_take(ranks: int, size: float, bandwidth: float, latency_s: float) -> None:
    machine = with_network(H100, bandwidth, latency_s)
    rings = [simulate_ring(ranks, size, bandwidth, latency_s, trips) for trips in (1, 2)]
    assert all_gather_s(size, Span(ranks, 1), machine) == pytest.approx(rings[0], rel=1e-12)
    assert reduce_scatter_s(size, Span(ranks, 1), machine) == pytest.approx(rings[0], rel=1e-12)
    tree = 2 * int(ranks - 1).bit_length() * latency_s + 2 * size / bandwidth
    assert all_reduce_s(size, Span(ranks, 1), machine) == pytest.approx(min(rings[1], tree), rel=1e-12)


@given(
    ranks=st.integers(2, 72),
    size=st.floats(1, 1e11),
    latency_s=st.floats(1e-7, 1e-4),
)
@settings(deadline=None, max_examples=60)
def test_a_ring_in_a_domain_takes_its_steps_and_comes_up_to_speed(ranks: int, size: float, latency_s: float) -> None:
    domain = replace(NVL72.domain, latency_s=latency_s, in_network_reduction=False)
    machine = replace(NVL72, domain=domain)
    steps = simulate_ring(ranks, size, 900e9, latency_s, 1)
    ramp = (2 * 6.5 * latency_s * size * (1 - 1 / ranks) / 900e9) ** 0.5
    assert all_gather_s(size, Span(ranks, ranks), machine) == pytest.approx(steps + ramp, rel=1e-9)


@pytest.mark.parametrize(("cards", "hosts"), [(50e9, 2), (50e9, 32), (12.5e9, 32)])
def test_a_ring_over_hosts_is_as_fast_as_all_cards_of_a_host_together(cards: float, hosts: int) -> None:
    machine, size = with_network(H100, cards, 1e-6), 64e9
    ring_s = (1 - 1 / (8 * hosts)) * size / min(8 * cards, H100.domain.bandwidth or 0)
    assert all_gather_s(size, Span(8 * hosts, 8), machine) == pytest.approx(ring_s, rel=0.02)
    assert all_reduce_s(size, Span(8 * hosts, 8), machine) == pytest.approx(2 * ring_s, rel=0.02)


def test_over_slow_cards_little_crosses_and_each_host_gathers_the_rest() -> None:
    machine, size = with_network(H100, 12.5e9, 1e-6), 64e9
    apart_s = size / 8 / 2 / 12.5e9 + all_gather_s(size, Span(8, 8), machine)
    assert all_gather_s(size, Span(16, 8), machine) == pytest.approx(apart_s, rel=1e-4)


def test_a_small_all_reduce_goes_through_each_host_and_a_tree_of_hosts() -> None:
    """Its steps alone: scatter and gather through the switch, and up and down a tree of 64 hosts."""
    steps_s = 2 * 6.5 * H100.domain.latency_s + 2 * 6 * H100.network.latency_s
    assert all_reduce_s(1e-3, Span(512, 8), H100) == pytest.approx(steps_s, rel=1e-3)


@pytest.mark.parametrize(("experts", "visits", "places"), [(6, 2, 3), (8, 3, 4), (12, 4, 2), (6, 6, 3), (5, 1, 5)])
def test_a_token_crosses_once_to_each_domain_that_it_visits(experts: int, visits: int, places: int) -> None:
    """Against every choice of experts there is."""
    met = np.mean([len({expert * places // experts for expert in chosen}) for chosen in choices(experts, visits)])
    _, network_s = all_to_all_s(1e6, 512, visits, experts, Span(places, 1), H100)
    crossing = met * (places - 1) / places
    assert network_s == pytest.approx(H100.network.latency_s + 1e6 * 512 * crossing / H100.network.bandwidth, rel=1e-12)
    _, copies_s = all_to_all_s(1e6, 512, visits, experts, Span(places, 1), H100, deduplicated=False)
    copies = visits * (places - 1) / places
    assert copies_s == pytest.approx(H100.network.latency_s + 1e6 * 512 * copies / H100.network.bandwidth, rel=1e-12)


def choices(experts: int, visits: int) -> list[tuple[int, ...]]:
    return list(combinations(range(experts), visits))


def test_a_limit_of_domains_bounds_what_crosses() -> None:
    """DeepSeek-V3: 8 of 256 experts from at most 4 of 8 nodes."""
    free, limited = (all_to_all_s(4096, 7168, 8, 256, Span(64, 8), H100, node_limit=limit)[1] for limit in (None, 4))
    assert limited < free
    assert limited * H100.network.bandwidth / (4096 * 7168) < 4


def test_expert_groups_inside_a_rack_use_no_network() -> None:
    domain_s, network_s = all_to_all_s(8192, 7168, 8, 256, Span(64, 64), NVL72)
    assert network_s == 0 < domain_s
    assert max(all_to_all_s(8192, 7168, 8, 256, Span(64, 8), H100)) > 3 * domain_s


def with_network(topology: HardwareTopology, bandwidth: float, latency_s: float) -> HardwareTopology:
    return replace(topology, network=replace(topology.network, bandwidth=bandwidth, latency_s=latency_s))


COLLECTIVES = (all_gather_s, reduce_scatter_s, all_reduce_s)
MACHINES = st.sampled_from([H100, NVL72, MI300X, load_hardware("trainium2")])


@given(
    machine=MACHINES,
    inside=st.integers(1, 8),
    domains=st.integers(1, 40),
    size=st.floats(0, 1e11),
    grow=st.floats(1, 9),
)
@settings(deadline=None, max_examples=150)
def test_more_bytes_or_more_domains_are_never_faster_and_more_bandwidth_never_slower(
    machine: HardwareTopology, inside: int, domains: int, size: float, grow: float
) -> None:
    group, wider = Span(inside * domains, inside), Span(inside * (domains + 1), inside)
    domain, network = machine.domain, machine.network
    faster = [
        replace(machine, domain=replace(domain, bandwidth=domain.bandwidth * grow)),
        replace(machine, network=replace(network, bandwidth=network.bandwidth * grow)),
    ]
    for collective in COLLECTIVES:
        now = collective(size, group, machine)
        assert collective(size * grow, group, machine) >= now
        assert collective(size, wider, machine) >= now * (1 - 1e-12)
        assert all(collective(size, group, better) <= now for better in faster)
        assert collective(size, group, machine, LinkEfficiency(1 / grow, 1 / grow)) >= now
    now = all_to_all_s(size, 1, 4, 3 * 64, group, machine)
    for better in faster:
        assert all(new <= old for new, old in zip(all_to_all_s(size, 1, 4, 3 * 64, group, better), now, strict=True))
    further = all_to_all_s(size, 1, 4, 3 * 64, wider, machine)
    assert all(new >= old * (1 - 1e-9) for new, old in zip(further, now, strict=True))


@given(machine=MACHINES, ranks=st.integers(2, 8), size=st.floats(1, 1e11))
@settings(deadline=None, max_examples=50)
def test_an_all_reduce_is_never_slower_than_scattering_and_gathering(
    machine: HardwareTopology, ranks: int, size: float
) -> None:
    for group in (Span(ranks, ranks), Span(4 * ranks, ranks), Span(ranks, 1)):
        apart = reduce_scatter_s(size, group, machine) + all_gather_s(size, group, machine)
        assert all_reduce_s(size, group, machine) <= apart * (1 + 1e-12)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_devices_of_a_full_mesh_use_only_their_links_to_one_another(ranks: int) -> None:
    received = (1 - 1 / ranks) * 64e9
    reached = received / all_gather_s(64e9, Span(ranks, ranks), MI300X)
    assert reached == pytest.approx(MI300X.domain.bandwidth * (ranks - 1) / 7, rel=0.03)
    assert 64e9 / point_to_point_s(64e9, False, MI300X) == pytest.approx(MI300X.domain.bandwidth / 7, rel=0.03)


@pytest.mark.parametrize("machine", [H100, NVL72, MI300X], ids=lambda machine: machine.name)
@pytest.mark.parametrize("group", [Span(1, 1), Span(8, 8), Span(24, 8), Span(6, 1)], ids=str)
def test_arrays_of_sizes_give_what_each_size_gives(machine: HardwareTopology, group: Span) -> None:
    sizes = np.array([0.0, 1.0, 500.0, 65536.0, 1e9])
    for collective in COLLECTIVES:
        assert collective(sizes, group, machine).tolist() == [
            collective(size, group, machine) for size in sizes.tolist()
        ]
    together = all_to_all_s(sizes, 2, 3, 24, group, machine)
    alone = [all_to_all_s(size, 2, 3, 24, group, machine) for size in sizes.tolist()]
    assert [part.tolist() for part in together] == [list(part) for part in zip(*alone, strict=True)]


def test_one_rank_or_nothing_to_send_takes_no_time() -> None:
    for collective in COLLECTIVES:
        assert collective(1e9, Span(1, 1), H100) == 0
        assert collective(0, Span(24, 8), H100) == 0
    assert all_to_all_s(64, 512, 2, 8, Span(1, 1), H100) == (0, 0)
    assert all_to_all_s(0, 512, 2, 8, Span(16, 8), H100) == (0, 0)
    assert point_to_point_s(0, True, H100) == 0


def test_an_unknown_link_is_refused_by_name() -> None:
    slow = replace(H100, name="mine", network=replace(H100.network, bandwidth=None))
    assert all_gather_s(1e6, Span(8, 8), slow) > 0
    with pytest.raises(Refusal, match=r"mine: network\.bandwidth is unknown"):
        all_gather_s(1e6, Span(16, 8), slow)


def touched_domains(plan: ParallelPlan, axes: tuple[str, ...], domain: int) -> int:
    return max(len({rank // domain for rank in ranks}) for ranks in plan.group(axes))


@given(
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    cp=st.sampled_from([1, 2, 3]),
    pp=st.sampled_from([1, 2, 5]),
    dp=st.sampled_from([1, 2, 3, 7, 12]),
    ep=st.sampled_from([1, 2, 4, 6]),
    domain=st.sampled_from([3, 4, 8, 12, 64, 72]),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_a_span_is_that_of_the_group_that_touches_most_domains(
    tp: int, cp: int, pp: int, dp: int, ep: int, domain: int, data: st.DataObject
) -> None:
    world = tp * cp * pp * dp * ep
    plan = ParallelPlan(world, dp * ep, 1, tp=tp, cp=cp, pp=pp, ep=ep, num_layers=pp)
    order = data.draw(st.sampled_from(ORDERS))
    axes = tuple(data.draw(st.lists(st.sampled_from(order), min_size=1, max_size=4, unique=True)))
    found = span(plan, axes, H100, domain_ranks=domain)
    assert found.ranks == len(plan.group(axes)[0])
    assert found.per_domain == -(-found.ranks // touched_domains(plan, axes, domain))


def test_a_world_beyond_one_rack_leaves_its_spares_out() -> None:
    inside, beyond = (ParallelPlan(world, world, 1, ep=world // 8, num_layers=1) for world in (72, 576))
    assert NVL72.spares == 8
    assert span(inside, ("dp",), NVL72) == Span(72, 72)
    assert span(beyond, ("ep",), NVL72) == Span(72, 36)
    assert span(ParallelPlan(512, 512, 1, ep=64, num_layers=1), ("ep",), NVL72) == Span(64, 64)


def test_a_group_over_axes_of_both_families_is_refused() -> None:
    with pytest.raises(Refusal, match="take the axes from one of"):
        span(ParallelPlan(8, 8, 1, num_layers=1), ("tp", "ep"), H100)
