"""The GPU's checks, as far as they can run without one: of the CUDA sources on an emulated thread block where that is
quick, of the compiled kernels on CPU where it is not."""

from __future__ import annotations

import pytest
import torch

from kernels import toolchain
from tests.kernels import device_checks as checks
from tests.kernels.delta_rules import RULES
from tests.kernels.device_checks import Runner

CPU = torch.device("cpu")
EMULATED = ("emulated", "emulated_hopper", "emulated_wgmma")


@pytest.fixture(params=RULES, ids=lambda rule: rule.op)
def compiled(request: pytest.FixtureRequest) -> Runner:
    if toolchain.host_library() is None:
        pytest.skip(f"no compiled kernels: {toolchain.why_not()}")
    return Runner(request.param, "compiled", CPU)


@pytest.fixture(params=[(rule, name) for rule in RULES for name in EMULATED], ids=lambda of: f"{of[0].op} {of[1]}")
def emulated(request: pytest.FixtureRequest) -> Runner:
    if toolchain.emulated_library() is None:
        pytest.skip(f"no emulated kernels: {toolchain.why_not('simt')}")
    return Runner(*request.param, CPU)


def test_emulated_kernels_are_accurate_for_every_head_and_chunk(emulated: Runner) -> None:
    checks.accurate(emulated, (65, 1), (1, 2), (64, 64))


def test_emulated_kernels_write_all_of_their_own_memory_and_no_other(emulated: Runner) -> None:
    checks.writes_all_of_its_own(emulated, (30, 0, 1))


def test_emulated_kernels_read_columns_of_a_wide_projection(emulated: Runner) -> None:
    checks.strided(emulated, (20,))


def test_compiled_kernels_are_accurate(compiled: Runner) -> None:
    checks.accurate(compiled, (130, 1, 0, 63), (1, 3), (64, 64))


@pytest.mark.parametrize("kind", checks.KEYS)
def test_keys_at_their_extremes(kind: str, compiled: Runner) -> None:
    checks.keys_at_extremes(compiled, kind, (66,))


@pytest.mark.parametrize("kind", checks.DECAYS)
def test_decay_at_its_extremes(kind: str, compiled: Runner) -> None:
    checks.decay_at_extremes(compiled, kind, (66,))


@pytest.mark.parametrize("name", checks.TOKENS)
def test_causality(name: str, compiled: Runner) -> None:
    checks.causal(compiled, name, 64, 66)


def test_the_rest_of_the_checks_pass_where_the_kernels_are_right(compiled: Runner) -> None:
    checks.isolated(compiled)
    checks.every_length(compiled, (1, 63, 64, 65))
    checks.chained(compiled)
    checks.repeatable(compiled, 3)
    checks.agrees_with_decode(compiled)
    checks.writes_all_of_its_own(compiled)


def test_a_small_hybrid_trains_in_bfloat16_as_in_float32() -> None:
    checks.trains_like_float32(CPU, 5)


@pytest.mark.parametrize("output", ["o", "dq", "dg"])
def test_an_error_in_one_chunk_of_one_head_is_found(output: str, compiled: Runner) -> None:
    """5 % on 64 of 640 rows of one of two heads: invisible in the whole, not in the part."""
    inputs = compiled.inputs((640,), (2, 2), (64, 64))
    exact = {name: x.double() for name, x in compiled(inputs, (640,)).items()}
    checks.judge(exact, exact)
    wrong = {name: x.clone() for name, x in exact.items()}
    wrong[output][64:128, 1] *= 1.05
    with pytest.raises(AssertionError, match=f"{output}, "):
        checks.judge(wrong, exact)


def test_a_write_beside_its_memory_is_found() -> None:
    with checks.banded_memory() as bands:
        x = torch.zeros(3).new_empty(2, 5)
    assert torch.isnan(x).all() and x.shape == (2, 5)
    assert all((band == checks.BAND).all() for pair in bands for band in pair)
    torch.as_strided(x, (11,), (1,), x.storage_offset()).fill_(0)
    assert not (bands[0][1] == checks.BAND).all()
