"""Prologue, epilogue and decode compiled for this processor, and their CUDA on an emulated thread block, against the
definitions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import native_rows, registry, toolchain
from kernels.decode import native as decode_native
from kernels.decode.op import decode
from kernels.epilogue.op import epilogue
from kernels.prologue.op import prologue
from kernels.samples import Decay, cu_seqlens_of, epilogue_inputs, gated_delta_inputs, prologue_inputs
from kernels.tolerance import bound, error
from kernels.toolchain import sources
from stoker.errors import Refusal

RAGGED = [130, 1, 2, 0, 3, 65]
TOKENWISE = ("q", "k", "v", "a", "b")
OUTPUTS = [f"output {i}" for i in range(5)]
DTYPES = {"compiled": torch.float32, "emulated": torch.bfloat16}
EACH = pytest.mark.parametrize("how", list(DTYPES))
EACH_DECAY = pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
EACH_ACTIVATION = pytest.mark.parametrize("activation", ["silu", "sigmoid"])

WithGradients = Callable[..., dict[str, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def libraries() -> None:
    if toolchain.host_library() is None:
        pytest.skip(toolchain.why_not())


@contextmanager
def forced(how: str) -> Iterator[None]:
    with registry.force("prologue", how), registry.force("epilogue", how), registry.force("decode", how):
        yield


def wide(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in x.items()}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Twice the bound, since cotangents are rounded to the dtype as well."""
    errors = {name: error(actual[name], value) for name, value in expected.items()}
    print(max(errors.values()), errors)
    assert {name: e for name, e in errors.items() if e > 2 * bound(dtype, name)} == {}


def with_seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_rows, "emulation_seed", seed)


def norm_gate(x: dict[str, Tensor], activation: str, with_gradients: WithGradients) -> dict[str, Tensor]:
    """Output and gradients of the epilogue; ``with_gradients`` asks for boundaries, which the epilogue has none of."""
    return with_gradients(lambda cu_seqlens, **y: epilogue(**y, eps=1e-6, activation=activation), x, None)


@EACH
@EACH_DECAY
@pytest.mark.parametrize(
    ("lengths", "heads", "dims", "width"),
    [
        (RAGGED, (1, 2), (64, 64), 4),
        (RAGGED, (2, 2), (128, 32), 3),
        ([1], (1, 1), (32, 64), 4),
        ([63, 64, 65], (1, 3), (32, 32), 2),
        ([0, 7, 0], (3, 3), (256, 64), 1),
        ([0], (1, 1), (64, 64), 4),
    ],
    ids=str,
)
def test_prologue_is_within_its_bound(
    how: str,
    per_channel: bool,
    lengths: Sequence[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    width: int,
    with_gradients: WithGradients,
    poisoned_memory: None,
) -> None:
    x = prologue_inputs(lengths, heads, dims, DTYPES[how], width, per_channel=per_channel)
    function = partial(prologue, num_qk_heads=heads[0])
    with forced(how):
        actual = with_gradients(function, x, cu_seqlens_of(lengths))
    with forced("reference"):
        check(actual, with_gradients(function, wide(x), cu_seqlens_of(lengths)), DTYPES[how])
    assert {name: actual[f"d{name}"].dtype for name in x} == {name: value.dtype for name, value in x.items()}


@EACH
@EACH_ACTIVATION
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(130, 3, 64), (1, 1, 32), (65, 2, 128), (17, 3, 256), (0, 2, 64)])
def test_epilogue_is_within_its_bound(
    how: str,
    activation: str,
    tokens: int,
    heads: int,
    dim: int,
    with_gradients: WithGradients,
    poisoned_memory: None,
) -> None:
    x = epilogue_inputs(tokens, heads, dim, DTYPES[how])
    with forced(how):
        actual = norm_gate(x, activation, with_gradients)
    with forced("reference"):
        check(actual, norm_gate(wide(x), activation, with_gradients), DTYPES[how])


def decode_sample(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    per_channel: bool,
    dtype: torch.dtype,
    decay: Decay = "trained",
) -> dict[str, Tensor]:
    x = gated_delta_inputs([tokens] * batch, heads, dims, dtype, decay, per_channel=per_channel)
    state = x.pop("initial_state")
    return {name: value.unflatten(0, (batch, tokens)) for name, value in x.items()} | {"state": state}


@EACH
@EACH_DECAY
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", ["trained", "extreme"])
@pytest.mark.parametrize(
    ("tokens", "heads", "dims"),
    [
        (1, (1, 2), (64, 64)),
        (5, (2, 2), (128, 64)),
        (3, (1, 1), (256, 128)),
        (2, (1, 3), (32, 64)),
        (0, (1, 1), (64, 64)),
    ],
)
def test_decode_is_within_its_bound_and_leaves_other_states_alone(
    how: str,
    per_channel: bool,
    state_dtype: torch.dtype,
    decay: Decay,
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    poisoned_memory: None,
) -> None:
    x = decode_sample(2, tokens, heads, dims, per_channel, DTYPES[how], decay)
    states, slots = x["state"].to(state_dtype), torch.tensor([3, 0])
    pool = torch.full((5, *states.shape[1:]), torch.nan, dtype=state_dtype)
    pool[slots] = states
    exact, exact_pool = wide(x), pool.double()
    with forced(how):
        o = decode(**x | {"state": pool}, slots=slots)
    with forced("reference"):
        expected = decode(**exact | {"state": exact_pool}, slots=slots)
    assert error(o, expected) <= bound(DTYPES[how], "o")
    assert error(pool[slots], exact_pool[slots]) <= bound(state_dtype, "state")
    assert pool[[1, 2, 4]].isnan().all()


@pytest.mark.parametrize("isa", list(sources.ISA_FLAGS))
def test_every_instruction_set_is_within_the_bound(
    isa: str, monkeypatch: pytest.MonkeyPatch, with_gradients: WithGradients
) -> None:
    known = list(sources.ISA_FLAGS)
    if known.index(isa) > known.index(toolchain.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(toolchain, "host_library", partial(toolchain.host_library, isa))
    x = prologue_inputs(RAGGED, (1, 2), (64, 64), torch.float32)
    function = partial(prologue, num_qk_heads=1)
    y = epilogue_inputs(70, 3, 64, torch.float32)
    z = decode_sample(2, 3, (1, 2), (64, 64 + 16), True, torch.float32)
    exact = wide(z)
    with forced("compiled"):
        actual, actual_y = with_gradients(function, x, cu_seqlens_of(RAGGED)), norm_gate(y, "silu", with_gradients)
        o = decode(**z)
    with forced("reference"):
        check(actual, with_gradients(function, wide(x), cu_seqlens_of(RAGGED)), torch.float32)
        check(actual_y, norm_gate(wide(y), "silu", with_gradients), torch.float32)
        assert error(o, decode(**exact)) <= bound(torch.float32, "o")


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int, with_gradients: WithGradients) -> None:
    x = prologue_inputs([200, 130], (1, 2), (32, 32), torch.float32, per_channel=True)
    y = epilogue_inputs(330, 3, 32, torch.float32)
    before, found = torch.get_num_threads(), []
    with forced("compiled"):
        for count in (1, threads):
            torch.set_num_threads(count)
            z = decode_sample(3, 2, (1, 3), (32, 32), True, torch.float32)
            rows = with_gradients(partial(prologue, num_qk_heads=1), x, cu_seqlens_of([200, 130]))
            found.append([*rows.values(), *norm_gate(y, "silu", with_gradients).values(), decode(**z), z["state"]])
    torch.set_num_threads(before)
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


def test_the_order_of_blocks_and_threads_changes_no_bit_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, with_gradients: WithGradients, poisoned_memory: None
) -> None:
    """Three seeds; a race between threads of a block would be an error."""
    x = prologue_inputs([70, 1, 9], (1, 2), (64, 64), torch.bfloat16)
    y = epilogue_inputs(40, 3, 64, torch.bfloat16)
    found = []
    with forced("emulated"):
        for seed in (1, 2, 7):
            with_seed(seed, monkeypatch)
            z = decode_sample(2, 3, (1, 2), (64, 64), True, torch.bfloat16)
            rows = with_gradients(partial(prologue, num_qk_heads=1), x, cu_seqlens_of([70, 1, 9]))
            found.append([*rows.values(), *norm_gate(y, "silu", with_gradients).values(), decode(**z), z["state"]])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


@EACH
def test_packed_equals_separate_bit_for_bit(how: str) -> None:
    x = prologue_inputs(RAGGED, (1, 2), (32, 64), DTYPES[how], per_channel=True)
    with forced(how):
        packed = prologue(**x, cu_seqlens=cu_seqlens_of(RAGGED), num_qk_heads=1)
        bounds = cu_seqlens_of(RAGGED).tolist()
        for start, stop in pairwise(bounds):
            alone = x | {name: x[name][start:stop] for name in TOKENWISE}
            parts = prologue(**alone, cu_seqlens=cu_seqlens_of([stop - start]), num_qk_heads=1)
            for whole, part in zip(packed, parts, strict=True):
                assert torch.equal(whole[start:stop], part)


@EACH
def test_segments_do_not_touch_each_other(how: str, with_gradients: WithGradients) -> None:
    """Whatever one segment holds, NaN included, every bit of the others' outputs and gradients stays."""
    x = prologue_inputs(RAGGED, (1, 1), (32, 32), DTYPES[how])
    cu_seqlens, function = cu_seqlens_of(RAGGED), partial(prologue, num_qk_heads=1)
    with forced(how):
        expected = with_gradients(function, x, cu_seqlens)
        for damaged in (0, 2, 4) if how == "compiled" else (4,):
            kept = torch.ones(sum(RAGGED), dtype=torch.bool)
            kept[cu_seqlens[damaged] : cu_seqlens[damaged + 1]] = False
            broken = {name: value.clone() for name, value in x.items()}
            for name in TOKENWISE:
                broken[name][~kept] = torch.nan
            actual = with_gradients(function, broken, cu_seqlens)
            for name in (*OUTPUTS, *(f"d{name}" for name in TOKENWISE)):
                assert torch.equal(actual[name][kept], expected[name][kept]), name


@EACH
@pytest.mark.parametrize("t", [3, 64])
def test_no_token_sees_a_later_one(how: str, t: int) -> None:
    """Outputs before ``t``, and gradients of a loss on them, keep every bit when inputs at ``t`` move."""

    def before(x: dict[str, Tensor]) -> list[Tensor]:
        leaves = {key: value.detach().requires_grad_() for key, value in x.items()}
        outputs = [y[:t] for y in prologue(**leaves, cu_seqlens=cu_seqlens_of([67]), num_qk_heads=1)]
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), list(leaves.values()))
        return [*outputs, *(dx[:t] for dx in gradients[:5]), *gradients[5:]]

    x = prologue_inputs([67], (1, 1), (32, 32), DTYPES[how])
    moved = {key: value.clone() for key, value in x.items()}
    for name in TOKENWISE:
        moved[name][t] -= 0.7
    with forced(how):
        for kept, expected in zip(before(moved), before(x), strict=True):
            assert torch.equal(kept, expected)


@EACH
@pytest.mark.parametrize("offset", [3, 8])
def test_inputs_may_be_columns_of_one_wide_projection(how: str, offset: int, with_gradients: WithGradients) -> None:
    """Every bit as from copies, whether or not the columns are aligned to 16 bytes."""
    x = prologue_inputs(RAGGED, (1, 2), (32, 32), DTYPES[how])
    y = epilogue_inputs(70, 2, 32, DTYPES[how])
    columns = torch.cat([torch.zeros(201, offset, dtype=DTYPES[how]), *(x[name] for name in TOKENWISE)], dim=1)
    parts = columns[:, offset:].split([x[name].shape[1] for name in TOKENWISE], dim=1)
    gate = torch.cat([torch.zeros(70, offset, dtype=DTYPES[how]), y["z"].flatten(1)], dim=1)[:, offset:]
    with forced(how):
        whole = prologue(**x, cu_seqlens=cu_seqlens_of(RAGGED), num_qk_heads=1)
        strided = prologue(
            **x | dict(zip(TOKENWISE, parts, strict=True)), cu_seqlens=cu_seqlens_of(RAGGED), num_qk_heads=1
        )
        for left, right in zip(whole, strided, strict=True):
            assert torch.equal(left, right)
        gated = epilogue(y["o"], gate.unflatten(-1, (2, 32)), y["weight"], 1e-6, "silu")
        assert torch.equal(gated, epilogue(**y, eps=1e-6, activation="silu"))


def test_narrow_inputs_are_computed_in_float32_on_cpu(with_gradients: WithGradients) -> None:
    x, y = prologue_inputs(RAGGED, (1, 2), (32, 32), torch.bfloat16), epilogue_inputs(70, 3, 64, torch.bfloat16)
    function = partial(prologue, num_qk_heads=1)
    with forced("compiled"):
        actual, actual_y = with_gradients(function, x, cu_seqlens_of(RAGGED)), norm_gate(y, "silu", with_gradients)
    with forced("reference"):
        check(actual, with_gradients(function, wide(x), cu_seqlens_of(RAGGED)), torch.bfloat16)
        check(actual_y, norm_gate(wide(y), "silu", with_gradients), torch.bfloat16)


@EACH
def test_gates_keep_their_digits_from_far_below_zero_to_far_above(how: str) -> None:
    """Each g and da to 2e-6 of itself (4e-3 where rounded to bfloat16), against float64."""
    step = torch.tensor([-80.0, -40.0, -9.0, -1.0, 0.0, 0.5, 3.0, 20.0, 88.0, 1000.0])
    exact = prologue_inputs([len(step)], (1, 1), (32, 32), torch.float64)
    exact |= {"a": step.double().unsqueeze(1), "dt_bias": torch.zeros(1).double(), "A_log": torch.ones(1).double()}
    found = []
    for name, x in (("reference", exact), (how, {key: value.to(DTYPES[how]) for key, value in exact.items()})):
        a = x["a"].requires_grad_()
        with forced(name):
            g = prologue(**x, cu_seqlens=cu_seqlens_of([len(step)]), num_qk_heads=1)[3]
        found.append((g.detach(), *torch.autograd.grad(g, a, torch.ones_like(g))))
    for (expected, actual), tolerance in zip(zip(*found, strict=True), (2e-6, bound(DTYPES[how], "a")), strict=True):
        assert ((actual.double() - expected) / expected).abs().max() <= tolerance


@EACH
@EACH_ACTIVATION
def test_extremes_of_output_and_gate(how: str, activation: str, with_gradients: WithGradients) -> None:
    """Rows of zeros, of 1e-4 (where eps decides) and of 1e8; gates of -1000, of 0 and of 1000."""
    x = epilogue_inputs(9, 3, 32, DTYPES[how])
    x["o"][:3] *= torch.tensor([0.0, 1e-4, 1e8]).view(3, 1, 1).to(DTYPES[how])
    x["z"][2:5] = torch.tensor([-1000.0, 0.0, 1000.0]).view(3, 1, 1).to(DTYPES[how])
    with forced(how):
        actual = norm_gate(x, activation, with_gradients)
    with forced("reference"):
        check(actual, norm_gate(wide(x), activation, with_gradients), DTYPES[how])


@EACH
def test_a_row_of_zeros_has_no_direction(how: str, with_gradients: WithGradients) -> None:
    x = prologue_inputs([9], (1, 1), (32, 32), DTYPES[how])
    for name in TOKENWISE:
        x[name].zero_()
    with forced(how):
        actual = with_gradients(partial(prologue, num_qk_heads=1), x, cu_seqlens_of([9]))
    assert not actual["output 0"].any() and not actual["output 1"].any()
    assert all(value.isfinite().all() for value in actual.values())


def test_sums_over_many_tokens_keep_their_digits() -> None:
    """20,000 tokens in float32: gradients of taps, A_log, dt_bias and the norm's weight within the bound of 400."""
    x, y = prologue_inputs([20_000], (1, 1), (32, 32), torch.float32), epilogue_inputs(20_000, 1, 32, torch.float32)
    found = []
    for dtype, how in ((torch.float32, "compiled"), (torch.float64, "chunked")):
        leaves = {name: value.to(dtype).requires_grad_() for name, value in x.items()}
        weights = {name: value.to(dtype).requires_grad_() for name, value in y.items()}
        with forced(how):
            outputs = prologue(**leaves, cu_seqlens=cu_seqlens_of([20_000]), num_qk_heads=1)
            gated = epilogue(**weights, eps=1e-6, activation="silu")
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(o.shape, generator=generator).to(dtype) + 0.5 for o in (*outputs, gated)]
        found.append(
            [
                *torch.autograd.grad(outputs, list(leaves.values())[5:], cotangents[:-1]),
                *torch.autograd.grad(gated, weights["weight"], cotangents[-1]),
            ]
        )
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) <= bound(torch.float32, "*")


def test_operators_pass_opcheck_and_compile_whole() -> None:
    torch._dynamo.reset()  # else sizes that differ from another test's become symbols
    x = {
        name: value.requires_grad_() for name, value in prologue_inputs([9, 3], (1, 2), (32, 32), torch.float32).items()
    }
    y = {name: value.requires_grad_() for name, value in epilogue_inputs(7, 2, 32, torch.float32).items()}
    z = decode_sample(2, 3, (1, 2), (32, 32), True, torch.float32)
    cu_seqlens, slots = cu_seqlens_of([9, 3]), torch.tensor([1, 0])
    operators: Any = torch.ops.stoker
    torch.library.opcheck(operators.prologue_compiled.default, (*x.values(), cu_seqlens, 1))
    torch.library.opcheck(operators.epilogue_compiled.default, (*y.values(), 1e-6, "silu"))
    torch.library.opcheck(operators.decode_compiled.default, (*z.values(), slots, 0.3))
    whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    with forced("compiled"):
        gates = partial(prologue, num_qk_heads=1)
        for left, right in zip(
            whole(gates)(**x, cu_seqlens=cu_seqlens), gates(**x, cu_seqlens=cu_seqlens), strict=True
        ):
            assert torch.equal(left, right)
        norm = partial(epilogue, eps=1e-6, activation="silu")
        assert torch.equal(whole(norm)(**y), norm(**y))
        state = z["state"].clone()
        assert torch.equal(whole(decode)(**z | {"state": state}), decode(**z)) and torch.equal(state, z["state"])
    torch._dynamo.reset()


@EACH
def test_a_state_that_is_a_strided_view_is_updated_where_it_lies(how: str) -> None:
    x = decode_sample(2, 3, (1, 2), (64, 64), True, DTYPES[how])
    turned = x["state"].mT.contiguous()
    with forced(how):
        assert torch.equal(decode(**x | {"state": turned.mT}), decode(**x))
    assert torch.equal(turned.mT, x["state"])


def test_on_a_gpu_a_slot_outside_the_pool_gives_nan_and_touches_nothing() -> None:
    """There slots are not read before the launch, so the operator cannot refuse."""
    x = decode_sample(3, 2, (1, 2), (64, 64), False, torch.bfloat16)
    emulated = next(run for name, run, _ in decode_native.backends() if name == "emulated")
    before = x["state"].clone()
    o = emulated(*x.values(), torch.tensor([-1, 1, 3]), 0.125)
    assert o[[0, 2]].isnan().all() and o[1].isfinite().all()
    assert torch.equal(x["state"][[0, 2]], before[[0, 2]]) and not torch.equal(x["state"][1], before[1])


def test_projections_of_different_dtypes_are_refused_by_name() -> None:
    x = prologue_inputs([9], (1, 1), (32, 32), torch.bfloat16)
    x["b"] = x["b"].float()
    with forced("emulated"), pytest.raises(Refusal, match=r"b is torch.float32 beside a q of torch.bfloat16"):
        prologue(**x, cu_seqlens=cu_seqlens_of([9]), num_qk_heads=1)


def test_boundaries_that_do_not_cover_the_tokens_are_refused() -> None:
    with forced("compiled"), pytest.raises(Refusal, match="must rise from 0 to the number of packed tokens, 9"):
        prologue(**prologue_inputs([9], (1, 1), (32, 32), torch.float32), cu_seqlens=cu_seqlens_of([5]), num_qk_heads=1)


def test_a_workspace_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch, with_gradients: WithGradients) -> None:
    monkeypatch.setattr(toolchain.Library, "query", lambda *_: lambda params: 16)
    x = prologue_inputs([9], (1, 1), (32, 32), torch.float32)
    y = epilogue_inputs(300, 1, 32, torch.float32)
    with forced("compiled"):
        with pytest.raises(toolchain.library.NativeError, match="workspace too small"):
            with_gradients(partial(prologue, num_qk_heads=1), x, cu_seqlens_of([9]))
        with pytest.raises(toolchain.library.NativeError, match="workspace too small"):
            norm_gate(y, "silu", with_gradients)


def test_other_shapes_and_dtypes_fall_back_to_torch() -> None:
    cpu = torch.device("cpu")
    for dtype, shape, expected in (
        (torch.float32, (64, 64, 4), "compiled"),
        (torch.bfloat16, (128, 256, 8), "compiled"),
        (torch.float64, (64, 64, 4), "chunked"),
        (torch.float32, (48, 64, 4), "chunked"),
        (torch.float32, (64, 64, 9), "chunked"),
    ):
        assert registry.choose("prologue", cpu, dtype, shape).name == expected
    assert registry.choose("epilogue", cpu, torch.float32, (64,)).name == "compiled"
    assert registry.choose("epilogue", cpu, torch.float32, (24,)).name == "chunked"
    assert registry.choose("decode", cpu, torch.float32, (100, 48)).name == "compiled"
    assert registry.choose("decode", cpu, torch.float32, (64, 24)).name == "chunked"
