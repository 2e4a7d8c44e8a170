"""Host kernels take subnormal numbers for zero, which makes them no worse, and leave the caller's mode as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import registry, selfcheck, toolchain
from kernels.cases import CASES, Case
from kernels.tolerance import bound
from tests.kernels.delta_rules import F32, RAGGED, RULES, Rule, errors_by_head

CPU = torch.device("cpu")
TINY = torch.finfo(F32).tiny


def first_cases() -> dict[str, Case]:
    """Of every operator that is compiled for the processor, one."""
    known = {op for op in registry.operators() if "compiled" in {i.name for i in registry.implementations(op)}}
    every = [case for cases in CASES for case in cases(F32, True) if case.op in known]
    return {case.op: case for case in reversed(every)}


@pytest.fixture(autouse=True)
def library() -> None:
    if toolchain.host_library() is None:
        pytest.skip(toolchain.why_not())


@pytest.fixture(params=[1, 2], ids=["in the caller's thread", "in two threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def flushes() -> bool:
    """Whether this thread does now, in torch's vectors and in Python's scalars."""
    vector = torch.full((64,), TINY) * 0.5
    scalar = 2.0**-1022 * 0.5
    assert bool((vector == 0).all()) == (scalar == 0.0)
    return scalar == 0.0


@pytest.mark.parametrize("decay", [-1.35, -3.0, -20.0])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.op)
def test_decays_that_make_subnormal_numbers_cost_no_accuracy(rule: Rule, decay: float) -> None:
    """e^(64 g) is one, or the entries of the chunk's decays below some diagonal are."""
    inputs = rule.inputs(RAGGED, (2, 4), (32, 32), F32)
    inputs["g"] = torch.full_like(inputs["g"], decay)
    found = errors_by_head(rule.run("compiled", inputs, RAGGED), rule.exact(inputs, RAGGED))
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert [name for name, value in found.items() if value > bound(F32, name)] == [], found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.op)
def test_what_decays_to_a_subnormal_number_is_zero(rule: Rule, num_threads: int) -> None:
    """In whatever thread: a state that nothing is written to, after decays from 1 to 1e-45."""
    inputs = rule.inputs([65], (2, 4), (32, 32), F32)
    inputs["beta"].zero_()
    inputs["g"] = torch.linspace(0, -104 / 65, 4).view(4, *[1] * (inputs["g"].dim() - 2)).expand_as(inputs["g"]).clone()
    results = rule.run("compiled", inputs, [65])
    exact = rule.exact(inputs, [65])["final_state"].abs()
    assert ((exact > 0) & (exact < TINY)).any()
    assert [name for name, x in results.items() if ((x != 0) & (x.abs() < TINY)).any()] == []


@pytest.mark.parametrize("op", first_cases())
def test_the_callers_mode_is_as_it_was(op: str) -> None:
    case = first_cases()[op]
    assert not flushes()
    with registry.force(op, "compiled"):
        assert all(row.passed for row in selfcheck.compare(case, F32, CPU))
        assert not flushes()
        if not torch.set_flush_denormal(True):
            pytest.skip("torch cannot set this processor's mode")
        try:
            assert flushes()
            selfcheck.outputs_and_gradients(case, case.inputs)
            assert flushes()
        finally:
            torch.set_flush_denormal(False)
