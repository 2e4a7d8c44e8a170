"""Ranks are chosen to fit layout and machine, and what they need of it is set before they start."""

from __future__ import annotations

import pytest

from launch import machine
from pretrain.config import load


@pytest.mark.parametrize(
    ("overrides", "cores", "devices", "ranks"),
    [
        ([], 1, 0, 1),
        ([], 64, 0, 2),
        (["parallel.ep=3"], 2, 0, 3),
        (["parallel.pp=2", "parallel.tp=2", "parallel.ep=4", "parallel.sequence_parallel=true"], 2, 0, 8),
        ([], 64, 8, 8),
        (["parallel.tp=3", "parallel.sequence_parallel=true"], 64, 8, 6),
        (["parallel.ep=16"], 64, 8, 8),  # left to the plan, which refuses it by name
    ],
)
def test_ranks_fit_the_layout_and_the_machine(
    overrides: list[str], cores: int, devices: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "cuda_devices", lambda: devices)
    told: list[str] = []
    assert machine.choose_ranks(load("demo", overrides), told.append) == ranks
    assert bool(told) == (not devices and ranks > cores), "more ranks than cores is said"


def test_what_the_caller_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.setattr(machine, "cuda_devices", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.environment_for(load("demo"), 2) == {"OMP_NUM_THREADS": "3", **machine.KEEP_MEMORY}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert machine.environment_for(load("demo"), 2) == machine.KEEP_MEMORY


def test_a_node_keeps_its_caches_and_its_interface_to_itself() -> None:
    found = machine.environment_for(load("demo", ["launch.scratch=/local/x/", "launch.network_interface=ib0"]), 2)
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ib0"
    assert found["TRITON_CACHE_DIR"].startswith("/local/x/stoker-") and found["TRITON_CACHE_DIR"].endswith("/triton")
    assert not {"TRITON_CACHE_DIR", "GLOO_SOCKET_IFNAME"} & set(machine.environment_for(load("demo"), 2))
