"""Launcher settings follow from plan and hardware as published runs set them, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.execution import Execution
from parallel.planning.hardware.settings import LaunchSettings, launch_settings
from parallel.planning.placement import local_block, place
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import hardware_names, load_hardware
from stoker.errors import Refusal


def settings(hardware: str, world: int, execution: Execution | None = None, **degrees: Any) -> LaunchSettings:
    plan = ParallelPlan(world, world, 1, num_layers=16, **degrees)
    return launch_settings(place(plan, load_hardware(hardware)), execution)


@pytest.mark.parametrize(
    ("world", "degrees", "segment"),
    [
        (512, {"ep": 64}, 16),  # MLPerf 405B, 8 racks
        (5120, {"tp": 4, "pp": 8}, 16),  # and 80 racks
        (72, {"cp": 2}, 18),  # MLPerf, small model
        (64, {}, 16),  # Megatron-Bridge: up to 18 trays, all of them
        (68, {}, 17),
        (256, {"tp": 2}, 16),  # Megatron-Bridge: the largest divisor of 64 trays that is at most 18
        (144, {}, 18),
        (10000, {}, 10),  # Megatron-Bridge: of 2500 trays
        (4, {}, 1),
    ],
)
def test_segment_is_what_published_nvl72_runs_use(world: int, degrees: dict[str, int], segment: int) -> None:
    found = settings("gb200-nvl72", world, **degrees)
    assert found.segment == segment and f"--segment={segment}" in found.slurm()
    assert found.ranks_per_node == 4 and found.nodes == world // 4


@given(st.integers(1, 600), st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 4, 8, 16, 32, 64)))
def test_a_segment_divides_the_nodes_and_holds_whole_groups(copies: int, tp: int, ep: int) -> None:
    plan = ParallelPlan(copies * max(tp, ep), copies * max(tp, ep), 1, num_layers=1, tp=tp, ep=ep)
    placement = place(plan, load_hardware("gb300-nvl72"))
    found = launch_settings(placement)
    assert found.nodes * found.ranks_per_node >= plan.world_size
    assert found.segment is not None and found.nodes % found.segment == 0 and found.segment <= 18
    if placement.domains > 1:
        assert found.segment * found.ranks_per_node % local_block(plan, placement.topology) == 0


def test_the_domain_fills_the_segment_and_its_reason_names_the_least() -> None:
    found = settings("gb200-nvl72", 512, ep=32)
    assert found.segment == 16 and "8 is the least" in found.reasons["--segment"]


def test_an_8_gpu_host_runs_eight_ranks_and_needs_no_segment() -> None:
    found = settings("h100", 64, tp=8)
    assert found.slurm() == ["--nodes=8", "--ntasks-per-node=8"] and found.segment is None


@pytest.mark.parametrize(
    ("hardware", "sharing"),
    [("gb200-nvl72", 2), ("gb300-nvl72", 2), ("h100", 4), ("b300", 4), ("cpu", None), ("mi300x", None)],
)
def test_ranks_are_bound_to_the_processor_of_their_gpu(hardware: str, sharing: int | None) -> None:
    node = f"$((SLURM_LOCALID/{sharing}))"
    wanted = f"numactl --cpunodebind={node} --membind={node}" if sharing else None
    assert settings(hardware, 8).numa == wanted


def test_hybrid_ep_is_told_the_domain() -> None:
    rack = settings("gb200-nvl72", 256, Execution(dispatcher="hybridep"), ep=32).environment
    assert rack["NVLINK_DOMAIN_SIZE"] == "72" and rack["USE_MNNVL"] == "1"
    assert rack["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] == "32"
    host = settings("b200", 64, Execution(dispatcher="hybridep"), ep=32).environment
    assert host["NVLINK_DOMAIN_SIZE"] == "8" and host["USE_MNNVL"] == "0"
    assert host["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] == "8"
    assert "USE_MNNVL" not in settings("gb200-nvl72", 256, ep=32).environment


def test_hybrid_ep_refuses_more_than_72_ranks() -> None:
    with pytest.raises(Refusal, match=r"etp\*ep=128: HybridEP takes at most 72"):
        settings("b200", 128, Execution(dispatcher="hybridep"), ep=128)


def test_deep_ep_in_a_rack_is_warned_of() -> None:
    deep = Execution(dispatcher="deepep")
    assert any("use hybridep" in words for words in settings("gb200-nvl72", 64, deep, ep=8).warnings)
    assert not settings("h100", 64, deep, ep=8).warnings


def test_queues_follow_what_must_be_ordered() -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert settings("h100", 64, tp=8).environment[name] == "1"
    assert settings("h100", 64, tp=2, ep=8).environment[name] == "1"
    assert settings("gb200-nvl72", 64, tp=2, ep=8).environment[name] == "32"
    assert settings("h100", 64, ep=8).environment[name] == "32"
    assert settings("h100", 64, zero=3).environment[name] == "32"


def test_a_rack_shares_memory_between_trays_and_checks_imex_first() -> None:
    rack, tray, host = settings("gb300-nvl72", 64), settings("gb300-nvl72", 4), settings("h100", 64)
    assert rack.environment["NCCL_CUMEM_ENABLE"] == "1" and "nvidia-imex" in rack.checks[0]
    for other in (tray, host):
        assert "NCCL_CUMEM_ENABLE" not in other.environment and not other.checks


def test_deterministic_runs_fix_the_workspace() -> None:
    assert settings("h100", 8, Execution(deterministic=True)).environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in settings("h100", 8).environment


@pytest.mark.parametrize("hardware", hardware_names())
def test_every_variable_has_a_reason_and_no_vendor_gets_those_of_another(hardware: str) -> None:
    everything = Execution(dispatcher="hybridep", graphs="partial", deterministic=True)
    found = settings(hardware, 64, everything, pp=2, ep=8)
    assert set(found.environment) <= set(found.reasons)
    vendor = load_hardware(hardware).device.vendor
    assert bool(found.environment) == (vendor == "nvidia")
    assert any(f"{vendor}'s libraries" in words for words in found.warnings) == (vendor in ("amd", "aws"))
    for line in (*found.slurm(), *(f"{name}={value}" for name, value in found.environment.items())):
        assert line in found.explain()
