"""Choice of implementation, selfcheck and benchmark: what they say must be able to be bad news."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from kernels import bench, registry, selfcheck, tolerance, toolchain
from kernels.cases import Case
from kernels.gated_delta.op import gated_delta
from kernels.samples import cu_seqlens_of, gated_delta_inputs
from stoker.errors import Refusal

CPU = torch.device("cpu")


@pytest.fixture
def scratch_op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator with a narrow implementation, preferred, and one that runs anywhere at a cost on CPU."""
    monkeypatch.setattr(registry, "_implementations", {})
    monkeypatch.setattr(registry, "_announced", set())
    narrow = registry.Implementation("narrow", abs, lambda device, dtype, shape: shape[0] % 16 == 0)
    registry.register("scratch", narrow)
    registry.register("scratch", registry.Implementation("wide", abs, cost={"cpu": "ten times slower"}))
    return "scratch"


def test_the_first_implementation_that_supports_the_call_is_chosen(scratch_op: str) -> None:
    assert registry.choose(scratch_op, CPU, torch.float32, (64,)).name == "narrow"
    assert registry.choose(scratch_op, CPU, torch.float32, (65,)).name == "wide"


def test_a_fallback_is_announced_once_with_its_cost(scratch_op: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for shape in ((64,), (65,), (65,)):
        registry.choose(scratch_op, CPU, torch.float32, shape)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "kernel scratch on cpu float32: narrow"),
        ("WARNING", "kernel scratch on cpu float32: wide (ten times slower)"),
    ]


def test_forcing_holds_inside_the_context_only_and_nests(scratch_op: str) -> None:
    def chosen() -> str:
        return registry.choose(scratch_op, CPU, torch.float32, (64,)).name

    with registry.force(scratch_op, "wide"):
        assert chosen() == "wide"
        with registry.force(scratch_op, "narrow"):
            assert chosen() == "narrow"
        assert chosen() == "wide"
    assert chosen() == "narrow"


def test_one_that_does_not_take_a_call_gives_way_and_that_is_said(
    scratch_op: str, caplog: pytest.LogCaptureFixture
) -> None:
    def takes(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        return dtype == torch.bfloat16

    registry.register(scratch_op, registry.Implementation("half", lambda: None, registry.anywhere, takes=takes))
    with caplog.at_level(logging.INFO, logger="kernels.registry"), registry.force(scratch_op, "half"):
        assert registry.choose(scratch_op, CPU, torch.bfloat16, (64,)).name == "half"
        assert registry.choose(scratch_op, CPU, torch.float32, (64,)).name == "narrow"
    assert "narrow (half was asked for and does not take this)" in caplog.text


@pytest.mark.parametrize("op", ["gated_delta", "kda"])
@pytest.mark.parametrize("name", ["cuda", "hopper", "wgmma", "compiled", "emulated", "emulated_hopper", "model"])
def test_compiled_delta_rules_take_only_what_they_are_compiled_for(op: str, name: str) -> None:
    (known,) = (i for i in registry.implementations(op) if i.name == name)
    device = "cuda" if name in ("cuda", "hopper", "wgmma") else "cpu"
    other = "cpu" if device == "cuda" else "cuda"
    wrong = {"compiled": torch.float64, "model": torch.float32}.get(name, torch.float32)
    assert known.takes(device, torch.bfloat16, (64, 64))
    assert not known.takes(other, torch.bfloat16, (64, 64))
    assert not known.takes(device, wrong, (64, 64))
    assert not known.takes(device, torch.bfloat16, (64, 65))


def test_unknown_names_are_refused_with_the_known_ones(scratch_op: str) -> None:
    with pytest.raises(Refusal, match="choose one of narrow, wide"), registry.force(scratch_op, "cuda"):
        pass
    with pytest.raises(Refusal, match="known are scratch"):
        registry.choose("gated_delta", CPU, torch.float32, (64,))


def test_cuda_fallback_states_its_cost() -> None:
    for op in ("gated_delta", "kda", "prologue", "epilogue"):
        (closed_form,) = (i for i in registry.implementations(op) if i.name == "chunked")
        assert "many small launches" in closed_form.cost["cuda"]


def test_forcing_is_honoured_by_a_function_compiled_before() -> None:
    x = gated_delta_inputs([9], (1, 1), (4, 4), torch.float32)
    compiled = torch.compile(gated_delta, backend="eager")
    cu_seqlens = cu_seqlens_of([9])
    free, _ = compiled(**x, cu_seqlens=cu_seqlens)
    with registry.force("gated_delta", "reference"):
        forced, _ = compiled(**x, cu_seqlens=cu_seqlens)
        expected, _ = gated_delta(**x, cu_seqlens=cu_seqlens)
    assert torch.equal(forced, expected) and not torch.equal(forced, free)


def test_selfcheck_passes_on_this_machine() -> None:
    rows = selfcheck.check(short=True, device="cpu")
    assert {row.op for row in rows} == set(registry.operators())
    assert all(row.passed for row in rows), selfcheck.table(rows)


def test_selfcheck_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that is off by one part in 100,000 is named, and the command exits 1."""
    right = registry.choose("gated_delta", CPU, torch.float32, (16, 24))

    def wrong(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = right.run(*args)
        return o * (1 + 1e-5), state

    known = registry.implementations("gated_delta")
    monkeypatch.setitem(registry._implementations, "gated_delta", [registry.Implementation("wrong", wrong), *known])
    monkeypatch.setattr(sys, "argv", ["selfcheck", "--short", "--device", "cpu"])
    assert selfcheck.main() == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["gated_delta", "kda"])
def test_hopper_can_run_where_the_library_has_it_and_is_not_preferred(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, *names: str) -> None:
            self.has = {f"stoker_{op}_forward{name}" for name in names}.__contains__

    def able() -> list[str]:
        return [i.name for i in registry.able(op, torch.device("cuda"), torch.bfloat16, (128, 128))]

    torch_only = ["chunked", "reference"]
    for library, expected in (
        (Fake("", "_hopper", "_wgmma"), ["cuda", "hopper", "wgmma", *torch_only]),
        (Fake(""), ["cuda", *torch_only]),
        (None, torch_only),
    ):
        monkeypatch.setattr(toolchain, "cuda_library", lambda library=library: library)
        assert able() == expected
    assert {"emulated", "emulated_hopper", "emulated_wgmma"} < {i.name for i in registry.implementations(op)}


def test_in_full_every_implementation_that_can_run_is_checked_and_in_short_the_chosen_one() -> None:
    """So a kernel that nobody chooses yet cannot be wrong unnoticed."""
    inputs = gated_delta_inputs([65], (1, 2), (64, 64), torch.float32)
    case = Case("gated_delta", "one", gated_delta, inputs, {"cu_seqlens": cu_seqlens_of([65])}, ("o", "S"), (64, 64))
    able = [i.name for i in registry.able("gated_delta", CPU, torch.float32, (64, 64))]
    assert able[-2:] == ["chunked", "reference"] and not {"cuda", "hopper", "emulated", "model"} & {*able}
    for every, expected in ((True, able[:-1]), (False, able[:1])):
        rows = list(selfcheck.compare(case, torch.float32, CPU, every))
        assert list(dict.fromkeys(row.implementation for row in rows)) == expected
        assert len(rows) == len(expected) * (len(inputs) + 2)
    with registry.force("gated_delta", "chunked"):
        assert {row.implementation for row in selfcheck.compare(case, torch.float32, CPU)} == {"chunked"}


def test_error_is_relative_and_infinite_for_nan() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert tolerance.error(expected * 1.5, expected) == pytest.approx(0.5)
    assert tolerance.error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    assert tolerance.error(torch.tensor([3.0, torch.nan]), expected) == float("inf")


def test_bench_gives_ratios_and_restores_the_threads() -> None:
    threads = torch.get_num_threads()
    rows = bench.run(rounds=1, tokens=128)
    assert torch.get_num_threads() == threads
    assert {row.op for row in rows} == set(registry.operators())
    assert all(row.note if row.ratio is None else row.ratio > 0 for row in rows)
    assert "torch" in bench.table(rows)


def test_bench_without_the_peer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_next.modeling_qwen3_next", None)
    (row, *_) = bench.run(rounds=1, tokens=64)
    assert row.ratio is None and "skipped" in row.note
