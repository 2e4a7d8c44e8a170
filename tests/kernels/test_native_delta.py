"""The delta rules compiled for this machine's processor, in float32: exact to rounding, the same bits every time."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import registry, toolchain
from kernels.samples import Decay, cu_seqlens_of
from kernels.tolerance import bound
from kernels.toolchain.sources import ISA_FLAGS
from tests.kernels.delta_rules import (
    BF16,
    F32,
    RAGGED,
    RULES,
    Rule,
    differing,
    errors,
    errors_by_head,
    same_bits,
    sample,
)

pytestmark = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.op)
DIMS = [(32, 32), (64, 64), (128, 128)]
DECAYS: tuple[Decay, ...] = ("trained", "none", "extreme")
LENGTHS = [(1,), (63,), (64,), (65,), (130,), (0, 7, 0, 0, 64, 0), pytest.param((500,), marks=pytest.mark.verify)]
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")
#: What mallopt(3) calls M_PERTURB: fresh memory is filled with a byte's complement, freed memory with the byte.
M_PERTURB = -6


@pytest.fixture(autouse=True)
def library() -> None:
    if toolchain.host_library() is None:
        pytest.skip(toolchain.why_not())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def force_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where this processor has no such instructions."""
    order = list(ISA_FLAGS)
    if order.index(isa) > order.index(toolchain.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(toolchain, "host_library", partial(toolchain.host_library, isa))


def assert_within_bounds(errors: dict[str, float], dtype: torch.dtype) -> None:
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert [name for name, value in errors.items() if value > bound(dtype, name)] == [], errors


@pytest.mark.parametrize(
    ("dims", "decay"),
    [
        pytest.param(dims, decay, marks=[pytest.mark.verify] if decay != "trained" and dims != (32, 32) else [])
        for dims in DIMS
        for decay in DECAYS
    ],
    ids=str,
)
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_every_instruction_set_is_within_its_bound_for_every_head(
    isa: str, dims: tuple[int, int], decay: Decay, rule: Rule, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    force_isa(isa, monkeypatch)
    inputs, exact = sample(rule, RAGGED, (2, 4), dims, F32, decay)
    assert_within_bounds(errors_by_head(rule.run("compiled", inputs, RAGGED), exact), F32)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (3, 3)], ids=str)
def test_lengths_and_head_groups_are_within_the_bound(
    lengths: tuple[int, ...], heads: tuple[int, int], rule: Rule, poisoned_memory: None
) -> None:
    inputs, exact = sample(rule, lengths, heads, (32, 32), F32)
    assert_within_bounds(errors(rule.run("compiled", inputs, lengths), exact), F32)


def test_bfloat16_inputs_cost_only_the_rounding_of_what_comes_out(rule: Rule) -> None:
    inputs, exact = sample(rule, RAGGED, (2, 4), (64, 64), BF16)
    actual = rule.run("compiled", inputs, RAGGED)
    assert {name for name, x in actual.items() if x.dtype == BF16} == {"o", "dq", "dk", "dv"}
    assert_within_bounds(errors_by_head(actual, exact), BF16)


def test_no_token_at_all_leaves_the_initial_state(rule: Rule) -> None:
    inputs = rule.inputs([0, 0], (2, 4), (32, 32), F32)
    results = rule.run("compiled", inputs, [0, 0])
    assert results["o"].shape == (0, 4, 32)
    assert same_bits(results["final_state"], inputs["initial_state"])


def test_no_initial_state_is_a_zero_state(rule: Rule) -> None:
    inputs = rule.inputs(RAGGED, (2, 4), (32, 32), F32)
    inputs["initial_state"].zero_()
    expected = rule.run("compiled", inputs, RAGGED)
    del inputs["initial_state"], expected["dinitial_state"]
    assert differing(rule.run("compiled", inputs, RAGGED), expected) == []


def test_avx2_and_avx512_give_the_same_bits(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum has one order and every step is fused alike, whatever the vector's width; the baseline, which has no
    fused multiply-add, rounds differently."""
    for dims in DIMS:
        inputs = rule.inputs(RAGGED, (2, 4), dims, F32)
        results = []
        for isa in ("avx2", "avx512"):
            force_isa(isa, monkeypatch)
            results.append(rule.run("compiled", inputs, RAGGED))
            monkeypatch.undo()
        assert differing(*results) == [], dims


@pytest.mark.parametrize("heads", [(2, 6), (3, 3)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(heads: tuple[int, int], rule: Rule) -> None:
    inputs = rule.inputs(RAGGED, heads, (64, 64), F32)
    with threads(1):
        expected = rule.run("compiled", inputs, RAGGED)
    for count in (2, 5):
        with threads(count):
            assert differing(rule.run("compiled", inputs, RAGGED), expected) == [], count


def test_thirty_runs_in_threads_give_the_same_bits(rule: Rule) -> None:
    inputs = rule.inputs([130, 65], (2, 4), (32, 32), F32)
    expected = rule.run("compiled", inputs, [130, 65])
    with threads(2):
        for _ in range(30):
            assert differing(rule.run("compiled", inputs, [130, 65]), expected) == []


def test_what_memory_held_before_is_never_read(rule: Rule) -> None:
    """The tiles of the C++, which torch does not poison, start as whatever byte the allocator is told to leave."""
    inputs = rule.inputs(RAGGED, (2, 4), (64, 64), F32)
    expected = rule.run("compiled", inputs, RAGGED)
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not libc.mallopt(M_PERTURB, 1):
        pytest.skip("the allocator cannot fill fresh memory")
    try:
        for byte in (0x01, 0x80):  # floats of -1.7e38 and of 3.4e38
            libc.mallopt(M_PERTURB, byte)
            assert differing(rule.run("compiled", inputs, RAGGED), expected) == []
    finally:
        libc.mallopt(M_PERTURB, 0)


def test_a_forked_process_has_threads_of_its_own(rule: Rule) -> None:
    """The kernels alone run in the child: torch's own threads do not survive a fork."""
    inputs = rule.inputs(RAGGED, (2, 4), (32, 32), F32)
    operator = getattr(torch.ops.stoker, f"{rule.op}_compiled")
    arguments = (*[inputs[name] for name in INPUTS[:5]], cu_seqlens_of(RAGGED), inputs["initial_state"], 0.2, True)

    def child() -> None:
        o, final, *_ = operator(*arguments)
        raise SystemExit(0 if same_bits(o, expected[0]) and same_bits(final, expected[1]) else 1)

    with threads(2):
        expected = operator(*arguments)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(30)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("wanted", [*[(name,) for name in INPUTS], ("q", "beta"), ()], ids=str)
def test_each_gradient_is_the_same_whichever_others_are_asked_for(wanted: tuple[str, ...], rule: Rule) -> None:
    inputs = rule.inputs([65, 3], (1, 2), (32, 32), F32)
    everything = rule.run("compiled", inputs, [65, 3])
    actual = rule.run("compiled", inputs, [65, 3], wanted)
    expected = {name: everything[name] for name in ("o", "final_state", *(f"d{x}" for x in wanted))}
    assert differing(actual, expected) == []


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_keeping_a_workspace_changes_no_bit_of_the_outputs(dtype: torch.dtype, rule: Rule) -> None:
    inputs = rule.inputs(RAGGED, (2, 4), (32, 32), dtype)
    operator = getattr(torch.ops.stoker, f"{rule.op}_compiled")
    arguments = (*[inputs[name] for name in INPUTS[:5]], cu_seqlens_of(RAGGED), inputs["initial_state"], 0.2)
    kept, bare = operator(*arguments, True), operator(*arguments, False)
    assert same_bits(kept[0], bare[0]) and same_bits(kept[1], bare[1])
    assert all(len(buffer) for buffer in kept[2:]) and not any(len(buffer) for buffer in bare[2:])


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_views_of_one_wide_projection_equal_packed_inputs(dtype: torch.dtype, offset: int, rule: Rule) -> None:
    """q, k and v side by side in rows that hold NaN before and behind them; a cotangent with strides of its own."""
    inputs = rule.inputs(RAGGED, (2, 4), (32, 32), dtype)
    widths = [inputs[name][0].numel() for name in ("q", "k", "v")]
    wide = torch.full((sum(RAGGED), offset + sum(widths) + 8), torch.nan, dtype=dtype)
    views = dict(inputs)
    for name, part in zip(("q", "k", "v"), wide[:, offset:-8].split(widths, dim=1), strict=True):
        views[name] = part.view_as(inputs[name]).copy_(inputs[name])
    assert not views["q"].is_contiguous()
    assert differing(rule.run("compiled", views, RAGGED), rule.run("compiled", inputs, RAGGED)) == []


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_a_nan_reaches_its_own_head_and_nothing_else(name: str, rule: Rule) -> None:
    """In every output from its token on; other heads and other segments keep every bit, gradients too."""
    lengths, token = [70, 130], 70 + 64
    inputs = rule.inputs(lengths, (2, 4), (32, 32), F32)
    expected = rule.run("compiled", inputs, lengths)
    broken = inputs | {name: inputs[name].clone()}
    broken[name][token, 0, ...] = torch.nan
    actual = rule.run("compiled", broken, lengths)
    heads = (0, 1) if name in ("q", "k") else (0,)  # two value heads read the first query-key head
    assert torch.isnan(actual["o"][token:, heads] if name != "q" else actual["o"][token, heads]).all()
    for output, value in actual.items():
        group = 2 if value.shape[1] == 4 else 1
        per_token = len(value) == sum(lengths)
        assert same_bits(value[:, group:], expected[output][:, group:]), output
        first = slice(0, 70) if per_token else slice(0, 1)
        assert same_bits(value[first], expected[output][first]), output


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("t", [63, 64, 129])
def test_no_token_sees_a_later_one(name: str, t: int, rule: Rule) -> None:
    """Outputs before ``t``, and gradients of a loss on them, keep every bit when an input at ``t`` moves."""

    def before(inputs: dict[str, Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        with registry.force(rule.op, "compiled"):
            o, _ = rule.call(*leaves[:5], cu_seqlens_of([130]), leaves[5])
        gradients = torch.autograd.grad(o[:t].square().sum(), leaves)
        return [o[:t], *(gradient[:t] for gradient in gradients[:5]), gradients[5]]

    inputs = rule.inputs([130], (1, 2), (32, 32), F32)
    moved = {key: x.clone() for key, x in inputs.items()}
    moved[name][t] -= 0.7
    for kept, expected in zip(before(moved), before(inputs), strict=True):
        assert same_bits(kept.detach(), expected.detach())


def test_packed_equals_separate_bit_for_bit(rule: Rule) -> None:
    inputs = rule.inputs(RAGGED, (2, 4), (32, 32), F32)
    with registry.force(rule.op, "compiled"):
        o, final = rule.call(**inputs, cu_seqlens=cu_seqlens_of(RAGGED))
        start = 0
        for segment, length in enumerate(RAGGED):
            alone = {name: x[start : start + length] for name, x in inputs.items()}
            alone["initial_state"] = inputs["initial_state"][segment : segment + 1]
            o_alone, final_alone = rule.call(**alone, cu_seqlens=cu_seqlens_of([length]))
            assert same_bits(o[start : start + length], o_alone)
            assert same_bits(final[segment : segment + 1], final_alone)
            start += length


def test_two_calls_chained_at_a_chunk_equal_one_bit_for_bit(rule: Rule) -> None:
    inputs = rule.inputs([200], (1, 2), (64, 64), F32)
    tokens = {name: x for name, x in inputs.items() if name != "initial_state"}
    with registry.force(rule.op, "compiled"):
        o, final = rule.call(**inputs, cu_seqlens=cu_seqlens_of([200]))
        state, parts = inputs["initial_state"], []
        for part in (slice(0, 128), slice(128, 200)):
            piece = {name: x[part] for name, x in tokens.items()}
            out, state = rule.call(**piece, cu_seqlens=cu_seqlens_of([part.stop - part.start]), initial_state=state)
            parts.append(out)
    assert same_bits(torch.cat(parts), o) and same_bits(state, final)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_operator_passes_opcheck(dtype: torch.dtype, rule: Rule) -> None:
    """Of these lengths every chunk slot is in use: an unused one keeps whatever memory held, which opcheck compares."""
    leaves = [x.requires_grad_() for x in rule.inputs([65, 3], (1, 2), (32, 32), dtype).values()]
    operator = getattr(torch.ops.stoker, f"{rule.op}_compiled")
    torch.library.opcheck(operator, (*leaves[:5], cu_seqlens_of([65, 3]), leaves[5], 0.3, True))


def test_compiled_whole_equals_eager(rule: Rule, with_gradients: Callable[..., dict[str, Tensor]]) -> None:
    """Chosen by the registry, as a model calls it, and for other head dims once torch.compile has seen the first."""
    compiled = torch.compile(rule.call, fullgraph=True, backend="aot_eager")
    for dims, name in (((8, 8), "chunked"), ((32, 32), "compiled"), ((64, 64), "compiled")):
        assert registry.choose(rule.op, torch.device("cpu"), F32, dims).name == name
        inputs = rule.inputs(RAGGED, (2, 4), dims, F32)
        expected = with_gradients(rule.call, inputs, cu_seqlens_of(RAGGED))
        assert differing(with_gradients(compiled, inputs, cu_seqlens_of(RAGGED)), expected) == [], dims
