"""The GPU benchmark without a GPU: its counts against published ones, its rows for whatever a peer may do."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import bench, registry
from kernels.bench import gpu, peers
from kernels.bench.peers import Peer
from kernels.bench.problems import Problem
from kernels.bench.roofline import Ceilings, delta_work, epilogue_work, prologue_work
from kernels.bench.rows import Row
from kernels.bench.shapes import LONG, MAIN, SWEEP, TARGETS, Phase, Shape
from kernels.bench.timing import Meter, Timing

CPU, H200 = torch.device("cpu"), Ceilings(4.3e12, 790e12)
TINY = Shape(128, 2, (1, 2), (64, 64))


class Clockwork:
    """A Timer that runs each call once and says that it took ``ms``, twice as long every time."""

    def __init__(self, ms: float = 1.0) -> None:
        self.ms = ms

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, call: Callable[[], object]) -> Timing:
        call()
        self.ms *= 2
        return Timing(self.ms / 2)


def rows(*tasks: gpu.Task, deadline: float = float("inf")) -> list[Row]:
    return list(gpu.rows(tasks, Clockwork(), H200, CPU, deadline))


@pytest.mark.parametrize(
    ("op", "phase", "gigabytes", "bound_ms"),
    [
        ("gated_delta", "forward", 1.08, 0.252),
        ("gated_delta", "backward", 1.90, 0.631),
        ("kda", "forward", 1.61, 0.376),
        ("kda", "backward", 2.96, 0.689),
    ],
)
def test_work_and_limit_at_the_targets_shape(op: str, phase: Phase, gigabytes: float, bound_ms: float) -> None:
    """As worked out by hand for 32,768 tokens of 32 heads, K = V = 128, 4.3 TB/s and 790 TFLOP/s."""
    work = delta_work(op, MAIN, phase)
    assert work.bytes / 1e9 == pytest.approx(gigabytes, abs=6e-3)
    assert work.floor_ms(H200) == pytest.approx(bound_ms, abs=1e-3)


def test_grouped_heads_read_queries_and_keys_once() -> None:
    whole, grouped = (delta_work("gated_delta", Shape(64, 1, (heads, 8)), "forward") for heads in (8, 2))
    assert whole.flops == grouped.flops
    assert whole.bytes - grouped.bytes == 64 * 6 * 2 * (128 + 128)


def test_rows_move_what_they_must() -> None:
    """Per token and head of 128: 768 bytes of q, k, v; o, z and y of 256."""
    one = Shape(1, 1, (1, 1))
    assert prologue_work(one, "forward").bytes == 2 * 768 + 12
    assert prologue_work(one, "backward").bytes == 3 * 768 + 16
    assert epilogue_work(one, "forward + backward").bytes == 8 * 256


def test_every_kind_builds_runs_and_differentiates() -> None:
    """On CPU, tiny: ours against its limit, and every peer either measured or with a reason."""
    tasks = [gpu.Task(kind, TINY, with_peers) for kind in gpu.BUILD if kind != "decode" for with_peers in (False, True)]
    tasks += [gpu.Task("decode", Shape(3, 3, (1, 2), (64, 64)), with_peers) for with_peers in (False, True)]
    found = rows(*tasks)
    assert all(row.ratio is not None or "not measured, " in row.note for row in found), bench.table(found)
    assert not any("failed" in row.note or "differ" in row.note for row in found), bench.table(found)
    measured = {(row.op, row.peer) for row in found if row.ratio is not None}
    assert {("prologue", "unfused torch"), ("epilogue", "unfused torch")} <= measured
    assert {op for op, peer in measured if peer.startswith(gpu.LIMIT)} == {
        *("gated_delta", "kda", "prologue", "epilogue", "decode")
    }


def test_every_implementation_at_home_has_rows_and_the_chosen_ones_come_first_and_bare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer is timed beside the chosen one alone."""
    ran: list[str] = []

    def implementation(name: str, **more: Any) -> registry.Implementation:
        return registry.Implementation(name, lambda o, z, weight, *_: ran.append(name) or o * z * weight, **more)

    known = [
        implementation("narrow", supports=lambda device, dtype, shape: shape[0] % 128 == 0),
        implementation("first"),
        implementation("slow", cost={"cpu": "much"}),
        implementation("second"),
        implementation("reference"),
    ]
    monkeypatch.setitem(registry._implementations, "epilogue", known)
    found = rows(gpu.Task("epilogue", TINY, False))
    phases = ("forward", "backward", "forward + backward")
    assert [row.case.removeprefix(f"{TINY}, ") for row in found] == [*phases, *(f"{x}, by 'second'" for x in phases)]
    assert ["'first'" in row.note for row in found] == [True] * 3 + [False] * 3
    assert list(dict.fromkeys(ran)) == ["first", "second"]
    ran.clear()
    with registry.force("epilogue", "slow"):
        assert gpu._implementations(gpu.BUILD["epilogue"](TINY, CPU)) == ["slow", "first", "second"]
    assert len(with_peer(monkeypatch, lambda problem: problem.ours)) == 3 and {*ran} == {"first"}


def with_peer(monkeypatch: pytest.MonkeyPatch, make: Callable[[Problem], Callable[[], torch.Tensor]]) -> list[Row]:
    monkeypatch.setitem(peers.PEERS, "epilogue", (Peer("theirs", make),))
    return rows(gpu.Task("epilogue", TINY, True))


def test_ratio_is_the_peers_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_peer(monkeypatch, lambda problem: problem.ours)
    assert [row.case.rpartition(", ")[2] for row in found] == ["forward", "backward", "forward + backward"]
    assert [(row.ours_ms, row.peer_ms, row.ratio) for row in found[:2]] == [(1, 2, 2), (4, 8, 2)]


def test_a_peer_that_is_missing_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(problem: Problem) -> Callable[[], torch.Tensor]:
        raise ModuleNotFoundError("No module named 'theirs'")

    (row,) = with_peer(monkeypatch, absent)
    assert row.ratio is None and row.note == "not measured, ModuleNotFoundError: No module named 'theirs'"


def test_a_peer_without_a_backward_keeps_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_peer(monkeypatch, lambda problem: lambda: problem.ours().detach())
    assert [row.ratio is None for row in found] == [False, True, True]
    assert all("it failed: RuntimeError" in row.note and row.ours_ms for row in found[1:])


def test_a_peer_that_computes_something_else_is_told_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_peer(monkeypatch, lambda problem: lambda: 1.1 * problem.ours())
    assert all("its outputs differ from ours by 1e-01" in row.note for row in found)


def test_ours_that_fails_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shape: Shape, device: torch.device) -> Problem:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(gpu.BUILD, "kda", broken)
    first, *others = rows(gpu.Task("kda", TINY, False), gpu.Task("epilogue", TINY, False))
    assert first.note == "not measured, OutOfMemoryError: no room"
    assert others and all(row.op == "epilogue" and row.ratio for row in others)


def test_what_time_does_not_reach_is_said() -> None:
    (row,) = rows(gpu.Task("epilogue", TINY, False), gpu.Task("kda", TINY, True), deadline=time.monotonic() - 1)
    assert row.note == "not measured: time was up before 2 of 2 tasks"


def test_a_quick_run_begins_with_the_targets() -> None:
    quick, whole = gpu.tasks(quick=True), gpu.tasks(quick=False)
    assert whole[: len(quick)] == quick
    first = [(task.kind, task.shape) for task in quick[: len(TARGETS) // 2]]
    assert set(first) == {(target.op, target.shape) for target in TARGETS}
    assert {(task.kind, task.shape) for task in whole} >= {
        (op, shape) for op in ("gated_delta", "kda") for shape in SWEEP
    }
    assert {shape.tokens for shape in SWEEP} == {8192, 32768} and {shape.sequences for shape in SWEEP} == {1, 4, 8}


def test_targets_are_those_of_the_design() -> None:
    at = {(target.op, target.shape, target.phase): target.ms for target in TARGETS}
    assert (at["gated_delta", MAIN, "forward"], at["gated_delta", MAIN, "backward"]) == (0.5, 1.5)
    assert (at["kda", MAIN, "forward"], at["kda", MAIN, "backward"]) == (0.7, 2.0)
    assert at["kda", LONG, "backward"] == pytest.approx(2.8)


def test_without_a_gpu_targets_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.measure, "cpu_rows", lambda rounds, tokens: [])
    found = bench.run(device="cpu")
    assert len(found) == len(TARGETS) and all("not measured: no CUDA device" in row.note for row in found)
    assert "unknown" in bench.table(found)


def test_no_driver_no_clock() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    assert Meter("0").read() is None
    assert str(Timing(1.0, 0.01, 100)) == "100 runs, spread 1.0%, CUDA graph, clock unknown"
