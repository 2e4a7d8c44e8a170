"""Ranks on devices: every rank has one device, groups that must share a domain do, and what cannot be is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.placement import Placement, domain_local, place
from parallel.planning.plan import ORDERS, ParallelPlan
from parallel.planning.topology import hardware_names, load_hardware
from stoker.errors import Refusal

DEGREES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 64, 72)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any plan that fits any hardware, on a few domains at most."""
    topology = load_hardware(draw(st.sampled_from(hardware_names())))
    tp, cp, etp, ep = (draw(st.sampled_from([n for n in DEGREES if n <= topology.domain.size])) for _ in range(4))
    pp = draw(st.sampled_from((1, 2, 3)))
    unit = _multiple(tp * cp, etp * ep)
    world = pp * unit * draw(st.integers(1, max(1, 4 * topology.domain.size // (pp * unit))))
    plan = ParallelPlan(world, world, 1, num_layers=pp, tp=tp, cp=cp, etp=etp, ep=ep, pp=pp)
    domain_ranks = draw(st.none() | st.integers(1, topology.domain.size))
    try:
        return place(plan, topology, domain_ranks)
    except Refusal as refusal:
        if near := re.search(r"^domain_ranks.* are (\d+)", str(refusal)):
            return place(plan, topology, int(near[1]))  # what a refusal offers must work
        smaller = ParallelPlan(world, world, 1, num_layers=pp, pp=pp)
        return place(smaller, topology)


def _multiple(a: int, b: int) -> int:
    return next(n for n in range(max(a, b), a * b + 1) if n % a == 0 and n % b == 0)


def crossings(placement: Placement, axes: Sequence[str]) -> bool:
    """By brute force: ranks that differ on `axes` only, and the domains they lie in."""
    fixed = [axis for order in ORDERS if set(axes) <= set(order) for axis in order if axis not in axes]
    domains: dict[tuple[int, ...], set[int]] = {}
    for rank in range(placement.plan.world_size):
        coords = placement.plan.coords(rank)
        domains.setdefault(tuple(coords[axis] for axis in fixed), set()).add(placement.domain(rank))
    return any(len(found) > 1 for found in domains.values())


@given(placements())
def test_rank_and_device_are_inverse_and_no_device_runs_two_ranks(placement: Placement) -> None:
    shape, world = placement.topology.domain, placement.plan.world_size
    devices = [(placement.domain(rank), placement.host(rank), placement.device(rank)) for rank in range(world)]
    assert [placement.rank(*device) for device in devices] == list(range(world))
    everywhere = [
        placement.rank(domain, host, device)
        for domain in range(placement.domains)
        for host in range(shape.size // shape.per_host)
        for device in range(shape.per_host)
    ]
    assert [rank for rank in everywhere if rank is not None] == list(range(world))
    assert placement.hosts == len({device[:2] for device in devices})


@given(placements())
def test_no_domain_local_group_crosses_a_domain(placement: Placement) -> None:
    local = domain_local(placement.topology)
    for order in ORDERS:
        assert not crossings(placement, [axis for axis in order if axis in local])


@given(placements())
def test_crossing_says_what_brute_force_finds(placement: Placement) -> None:
    for axis in (axis for order in ORDERS for axis in order):
        assert placement.crossing(axis) == crossings(placement, [axis]), axis


def plan(world: int, **degrees: int) -> ParallelPlan:
    return ParallelPlan(world, world, 1, num_layers=16, **degrees)


@pytest.mark.parametrize(
    ("world", "degrees", "used"),
    [
        (512, {"ep": 64}, 64),  # MLPerf: 512 GPUs are 8 racks of 16 trays
        (5120, {"tp": 4, "pp": 8}, 64),  # and 5,120 are 80 racks
        (72, {"cp": 2}, 72),  # MLPerf, small model: 72 GPUs with --segment=18
        (144, {}, 72),  # two whole racks, as nothing else fills them
        (144, {"ep": 48}, 48),
        (576, {"ep": 64}, 64),
        (576, {"ep": 72}, 72),
        (24, {}, 24),
    ],
)
def test_an_nvl72_is_used_as_published_runs_use_it(world: int, degrees: dict[str, int], used: int) -> None:
    placement = place(plan(world, **degrees), load_hardware("gb200-nvl72"))
    assert placement.domain_ranks == used and placement.domains == world // used
    assert any("no spares" in words for words in placement.warnings) == (used == 72 and world > 72)


def test_an_idle_part_of_the_domain_is_said() -> None:
    (words,) = place(plan(80, ep=40), load_hardware("gb200-nvl72")).warnings
    assert "groups of 40 ranks divide none of 64, 72" in words and "32 of 72 stay idle" in words


def test_a_world_that_splits_badly_is_told_the_nearest_that_splits_well() -> None:
    (words,) = place(plan(10000), load_hardware("gb200-nvl72")).warnings
    assert "9984 or 10048 ranks" in words
    assert not place(plan(9984), load_hardware("gb200-nvl72")).warnings


def test_an_expert_group_stays_in_its_rack_and_may_leave_an_8_gpu_host() -> None:
    with pytest.raises(Refusal, match=r"etp 1 x ep 128 ranks must share one domain of gb200-nvl72.* ep=64"):
        place(plan(256, ep=128), load_hardware("gb200-nvl72"))
    hopper = place(plan(1024, tp=2, pp=8, ep=64), load_hardware("h100"))  # DeepSeek-V3 on 8-GPU hosts
    assert hopper.crossing("ep") and not hopper.crossing("tp")
    assert "reach over 8 domains of h100" in hopper.warnings[0] and "1/9 of the bandwidth" in hopper.warnings[0]


def test_a_tensor_group_larger_than_a_host_is_refused_with_the_nearest_that_fits() -> None:
    with pytest.raises(Refusal, match=r"tp 16 ranks must share one domain of h100, which has 8.* tp=8"):
        place(plan(64, tp=16), load_hardware("h100"))
    with pytest.raises(Refusal, match="tp=18, or cp=2"):
        place(plan(288, tp=36, cp=4), load_hardware("gb200-nvl72"))


def test_a_domain_size_that_cuts_a_group_is_refused_with_the_nearest_that_do_not() -> None:
    topology = load_hardware("gb200-nvl72")
    with pytest.raises(Refusal, match=r"domain_ranks=60 .* groups of 16 .* 48 or 64"):
        place(plan(128, ep=16), topology, 60)
    assert place(plan(64, ep=16), topology, 32).domains == 2


def test_hosts_are_used_evenly_where_tensor_groups_do_not_divide_them() -> None:
    placement = place(plan(24, tp=3), load_hardware("h100"))
    assert (placement.domain_ranks, placement.host_ranks, placement.hosts) == (6, 6, 4)
    assert placement.rank(0, 0, 7) is None
    with pytest.raises(Refusal, match="no device 8 of host 0"):
        placement.rank(0, 0, 8)


def test_the_explanation_names_the_axes_on_each_side() -> None:
    words = place(plan(256, pp=2, ep=64), load_hardware("gb200-nvl72")).explain().splitlines()
    assert words[0].startswith("256 ranks on 64 hosts in 4 domains of gb200-nvl72")
    assert words[1] == "inside a domain: ep; across domains: dp, pp, edp"
