"""The prologue of a mixer: the definition against torch's, the blocked form against the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import blocks
from kernels.prologue.decode import prologue_step
from kernels.prologue.op import prologue, prologue_chunked
from kernels.prologue.reference import prologue_reference
from kernels.samples import cu_seqlens_of, prologue_inputs
from kernels.tolerance import bound, error
from stoker.errors import Refusal

WithGradients = Callable[..., dict[str, Tensor]]
F64 = torch.float64
RAGGED = [130, 1, 2, 0, 3, 65]
HEADS, DIMS = (2, 4), (8, 5)
TOKENWISE = ("q", "k", "v", "a", "b")

ours = partial(prologue, num_qk_heads=HEADS[0])
definition = partial(prologue_reference, num_qk_heads=HEADS[0])


def inputs(lengths: Sequence[int], dtype: torch.dtype = F64, **options: Any) -> dict[str, Tensor]:
    return prologue_inputs(lengths, HEADS, DIMS, dtype, **options)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_reference_is_torch_conv1d_silu_and_normalise_of_every_segment(width: int) -> None:
    x = inputs(RAGGED, width=width)
    q, k, v, _, beta = definition(**x, cu_seqlens=cu_seqlens_of(RAGGED))
    for name, actual in (("q", q), ("k", k), ("v", v)):
        weight = x[f"{name}_conv"]
        for rows, segment in zip(actual.split(RAGGED), x[name].split(RAGGED), strict=True):
            if len(segment):
                padded = torch.nn.functional.conv1d(
                    segment.T, weight.unsqueeze(1), padding=width - 1, groups=len(weight)
                )
                expected = torch.nn.functional.silu(padded[:, : len(segment)]).T.unflatten(-1, rows.shape[1:])
                if name != "v":
                    expected = expected / (expected.norm(dim=-1, keepdim=True).square() + 1e-6).sqrt()
                torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(beta, 1 / (1 + (-x["b"]).exp()))


@pytest.mark.parametrize("per_channel", [False, True])
def test_reference_gradients_pass_gradcheck(per_channel: bool) -> None:
    x = prologue_inputs([3, 2], (1, 2), (3, 2), F64, 3, per_channel=per_channel)
    leaves = [value.requires_grad_() for value in x.values()]
    assert torch.autograd.gradcheck(lambda *a: prologue_reference(*a, cu_seqlens_of([3, 2]), 1), leaves)


@pytest.mark.parametrize("lengths", [[1], [2], [63], [64], [65], [500], RAGGED, [0, 7, 0], [0]], ids=str)
@pytest.mark.parametrize("block", [1, 7 * 16, 1 << 16])
def test_blocked_form_equals_definition(
    lengths: Sequence[int],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    with_gradients: WithGradients,
    poisoned_memory: None,
) -> None:
    """float64, every output and gradient within 1e-12, also where blocks are shorter than the taps or hold segments."""
    monkeypatch.setattr(blocks, "ELEMENTS_CPU", block)
    x = inputs(lengths)
    actual = with_gradients(ours, x, cu_seqlens_of(lengths))
    for name, expected in with_gradients(definition, x, cu_seqlens_of(lengths)).items():
        assert error(actual[name], expected) <= 1e-12, name


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (1, 3)], ids=str)
def test_blocked_form_equals_definition_for_every_shape(
    heads: tuple[int, int], width: int, per_channel: bool, with_gradients: WithGradients
) -> None:
    x = prologue_inputs([9, 1, 70], heads, DIMS, F64, width, per_channel=per_channel)
    cu_seqlens = cu_seqlens_of([9, 1, 70])
    actual = with_gradients(partial(prologue, num_qk_heads=heads[0]), x, cu_seqlens)
    expected = with_gradients(partial(prologue_reference, num_qk_heads=heads[0]), x, cu_seqlens)
    assert actual["output 3"].shape == ((80, heads[1], DIMS[0]) if per_channel else (80, heads[1]))
    for name, value in expected.items():
        assert error(actual[name], value) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_stay_within_their_bound(dtype: torch.dtype, with_gradients: WithGradients) -> None:
    """q, k, v come back in their dtype, g and beta in float32."""
    x = inputs(RAGGED, dtype)
    actual = with_gradients(ours, x, cu_seqlens_of(RAGGED))
    exact = with_gradients(definition, {name: v.double() for name, v in x.items()}, cu_seqlens_of(RAGGED))
    assert [actual[f"output {i}"].dtype for i in range(5)] == [dtype] * 3 + [torch.float32] * 2
    assert all(actual[f"d{name}"].dtype == value.dtype for name, value in x.items())
    for name, value in exact.items():
        # Twice the bound: here the cotangents are rounded to the dtype as well.
        assert error(actual[name], value) <= 2 * bound(dtype, name), name


def test_gates_are_exact_from_far_below_zero_to_far_above() -> None:
    """softplus and its derivative to 1e-14 of themselves, against 80-bit numbers: at -700 they are e^-700, at 20.1
    torch's own default drops e^-20.1, at 1000 e^x is no number."""
    step = torch.tensor([-700.0, -40.0, -1.0, 0.0, 19.9, 20.1, 36.0, 41.0, 1000.0], dtype=F64)
    x = prologue_inputs([len(step)], (1, 1), DIMS, F64)
    x["a"], x["dt_bias"], x["A_log"] = (
        step.unsqueeze(-1).requires_grad_(),
        torch.zeros(1).double(),
        torch.ones(1).double(),
    )
    _, _, _, g, _ = prologue(**x, cu_seqlens=cu_seqlens_of([len(step)]), num_qk_heads=1)
    (da,) = torch.autograd.grad(g, x["a"], torch.ones_like(g))
    wide = step.numpy().astype(np.longdouble)
    softplus = np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))
    for actual, expected in ((g, softplus), (da, np.exp(wide - softplus))):
        np.testing.assert_allclose(actual.detach().squeeze(-1).numpy(), -np.e * expected.astype(float), rtol=1e-14)


def test_a_row_of_zeros_has_no_direction_and_no_gradient_that_is_not_finite(with_gradients: WithGradients) -> None:
    x = inputs([9])
    for name in TOKENWISE:
        x[name].zero_()
    actual = with_gradients(ours, x, cu_seqlens_of([9]))
    assert not actual["output 0"].any() and not actual["output 1"].any()
    for name, expected in with_gradients(definition, x, cu_seqlens_of([9])).items():
        assert error(actual[name], expected) <= 1e-12, name


def test_sums_over_many_tokens_keep_their_digits() -> None:
    """40,000 tokens in float32: the gradients of taps, A_log and dt_bias within the bound of 400."""
    x = prologue_inputs([40_000], (1, 1), (4, 4), torch.float32)
    gradients = []
    for dtype in (torch.float32, F64):
        leaves = {name: value.to(dtype).requires_grad_() for name, value in x.items()}
        outputs = prologue(**leaves, cu_seqlens=cu_seqlens_of([40_000]), num_qk_heads=1)
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(y.shape, generator=generator).to(dtype) + 0.5 for y in outputs]
        gradients.append(torch.autograd.grad(outputs, list(leaves.values())[5:], cotangents))
    for actual, expected in zip(*gradients, strict=True):
        assert error(actual, expected) <= bound(torch.float32, "*")


@pytest.mark.parametrize("name", TOKENWISE)
@pytest.mark.parametrize("t", [3, 64, 129])
def test_no_token_sees_a_later_one(name: str, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs before ``t``, and gradients of a loss on them, keep every bit when an input at ``t`` moves."""
    monkeypatch.setattr(blocks, "ELEMENTS_CPU", 16 * 16)

    def before(x: dict[str, Tensor]) -> list[Tensor]:
        leaves = {key: value.detach().requires_grad_() for key, value in x.items()}
        outputs = [y[:t] for y in ours(**leaves, cu_seqlens=cu_seqlens_of([130]))]
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), list(leaves.values()))
        return [*outputs, *(dx[:t] for dx in gradients[:5]), *gradients[5:]]

    x = inputs([130], torch.float32)
    moved = {key: value.clone() for key, value in x.items()}
    moved[name][t] -= 0.7
    for kept, expected in zip(before(moved), before(x), strict=True):
        assert torch.equal(kept, expected)


def test_segments_do_not_touch_each_other(with_gradients: WithGradients) -> None:
    """Whatever one segment holds, NaN included, every bit of the others' outputs and gradients stays."""
    x = inputs(RAGGED, torch.float32)
    cu_seqlens = cu_seqlens_of(RAGGED)
    expected = with_gradients(ours, x, cu_seqlens)
    for damaged in (0, 2, 4):
        kept = torch.ones(sum(RAGGED), dtype=torch.bool)
        kept[cu_seqlens[damaged] : cu_seqlens[damaged + 1]] = False
        broken = {name: value.clone() for name, value in x.items()}
        for name in TOKENWISE:
            broken[name][~kept] = torch.nan
        actual = with_gradients(ours, broken, cu_seqlens)
        for name in ("output 0", "output 1", "output 2", "output 3", "output 4", *(f"d{name}" for name in TOKENWISE)):
            assert torch.equal(actual[name][kept], expected[name][kept]), name


@pytest.mark.parametrize("block", [1, 7 * 16, 1 << 16])
def test_block_size_changes_no_bit_of_a_token(
    block: int, monkeypatch: pytest.MonkeyPatch, with_gradients: WithGradients
) -> None:
    """Outputs and the gradients of the projections; those of weights are sums over blocks."""
    x = inputs(RAGGED, torch.float32, per_channel=True)
    monkeypatch.setattr(blocks, "ELEMENTS_CPU", 31 * 16)
    expected = with_gradients(ours, x, cu_seqlens_of(RAGGED))
    monkeypatch.setattr(blocks, "ELEMENTS_CPU", block)
    actual = with_gradients(ours, x, cu_seqlens_of(RAGGED))
    for name in (*(f"output {i}" for i in range(5)), *(f"d{name}" for name in TOKENWISE)):
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_separate_bit_for_bit(dtype: torch.dtype) -> None:
    x = inputs(RAGGED, dtype, per_channel=True)
    packed = ours(**x, cu_seqlens=cu_seqlens_of(RAGGED))
    bounds = cu_seqlens_of(RAGGED).tolist()
    for start, stop in pairwise(bounds):
        alone = x | {name: x[name][start:stop] for name in TOKENWISE}
        for whole, part in zip(packed, ours(**alone, cu_seqlens=cu_seqlens_of([stop - start])), strict=True):
            assert torch.equal(whole[start:stop], part)


def test_inputs_may_be_columns_of_one_wide_projection(with_gradients: WithGradients) -> None:
    """Row stride is the projection's, the first column any: every bit as from copies, and outputs are contiguous."""
    x = inputs(RAGGED, torch.float32)
    cu_seqlens = cu_seqlens_of(RAGGED)
    wide = torch.cat([torch.zeros(len(x["q"]), 3), *(x[name] for name in TOKENWISE)], dim=1)
    columns = dict(zip(TOKENWISE, wide[:, 3:].split([x[name].shape[1] for name in TOKENWISE], dim=1), strict=True))
    assert not columns["q"].is_contiguous()
    packed = [value.requires_grad_() for value in x.values()]
    strided = [columns.get(name, value).detach().requires_grad_() for name, value in x.items()]
    expected = prologue(*packed, cu_seqlens, HEADS[0])
    actual = prologue(*strided, cu_seqlens, HEADS[0])
    assert all(y.is_contiguous() for y in actual)
    cotangents = [torch.randn_like(y) for y in expected]
    gradients = [torch.autograd.grad(y, x, cotangents) for y, x in ((actual, strided), (expected, packed))]
    for left, right in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert torch.equal(left, right)


def test_any_one_gradient_alone_is_what_it_is_among_all(with_gradients: WithGradients) -> None:
    x = inputs(RAGGED)
    cu_seqlens = cu_seqlens_of(RAGGED)
    every = with_gradients(ours, x, cu_seqlens)
    for name in x:
        rest = {key: value for key, value in x.items() if key != name}
        alone = with_gradients(partial(ours, **rest), {name: x[name]}, cu_seqlens)
        assert torch.equal(alone[f"d{name}"], every[f"d{name}"]), name


def test_cotangents_may_have_any_stride() -> None:
    """Autograd hands on expanded and transposed ones."""
    x = [value.requires_grad_() for value in inputs([9, 1], per_channel=True).values()]
    outputs = prologue(*x, cu_seqlens_of([9, 1]), HEADS[0])
    for make in (lambda y: torch.ones(()).double().expand_as(y), lambda y: torch.randn_like(y.mT.contiguous()).mT):
        cotangents = [make(y) for y in outputs]
        copies = [y.contiguous() for y in cotangents]
        for actual, expected in zip(
            torch.autograd.grad(outputs, x, cotangents, retain_graph=True),
            torch.autograd.grad(outputs, x, copies, retain_graph=True),
            strict=True,
        ):
            assert torch.equal(actual, expected)


def test_the_backward_keeps_the_inputs_and_nothing_else() -> None:
    x = [value.requires_grad_() for value in inputs(RAGGED).values()]
    cu_seqlens = cu_seqlens_of(RAGGED)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prologue(*x, cu_seqlens, HEADS[0])
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in (*x, cu_seqlens))


@pytest.mark.parametrize("per_channel", [False, True])
def test_decode_steps_equal_the_whole_bit_for_bit(per_channel: bool) -> None:
    x = inputs([9, 9], torch.float32, per_channel=per_channel)
    whole = [y.unflatten(0, (2, 9)) for y in ours(**x, cu_seqlens=cu_seqlens_of([9, 9]))]
    tokens = {name: x[name].unflatten(0, (2, 9)) for name in TOKENWISE}
    windows = tuple(torch.zeros(2, x[name].shape[1], 3) for name in ("q", "k", "v"))
    for t in range(9):
        row = x | {name: tokens[name][:, t] for name in TOKENWISE}
        for actual, expected in zip(prologue_step(**row, windows=windows, num_qk_heads=2), whole, strict=True):
            assert torch.equal(actual, expected[:, t])
    for window, name in zip(windows, ("q", "k", "v"), strict=True):
        assert torch.equal(window, tokens[name][:, 6:].transpose(1, 2))


@pytest.mark.parametrize("per_channel", [False, True])
def test_operator_passes_opcheck(per_channel: bool) -> None:
    leaves = [value.requires_grad_() for value in inputs([9, 0, 3], per_channel=per_channel).values()]
    torch.library.opcheck(prologue_chunked, (*leaves, cu_seqlens_of([9, 0, 3]), HEADS[0]))


def test_compiled_whole_equals_eager(with_gradients: WithGradients) -> None:
    x = inputs(RAGGED, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, x, cu_seqlens_of(RAGGED))
    for name, expected in with_gradients(ours, x, cu_seqlens_of(RAGGED)).items():
        assert torch.equal(actual[name], expected), name


@pytest.mark.parametrize("name", ["k", "v", "a", "b", "q_conv", "k_conv", "v_conv", "dt_bias"])
def test_shapes_that_disagree_are_refused_by_name(name: str) -> None:
    x = inputs([7, 2])
    x[name] = x[name][:-1]
    with pytest.raises(Refusal, match=f"prologue: {name} has shape"):
        ours(**x, cu_seqlens=cu_seqlens_of([7, 2]))


def test_a_batch_that_is_not_packed_is_refused() -> None:
    x = inputs([7])
    with pytest.raises(Refusal, match=r"q has shape \(1, 7, 16\), it must be packed"):
        ours(**x | {"q": x["q"].unsqueeze(0)}, cu_seqlens=cu_seqlens_of([7]))


def test_columns_that_are_no_multiple_of_heads_are_refused() -> None:
    with pytest.raises(Refusal, match="q has 16 columns for 3 heads and v 20 for the 4 of A_log"):
        prologue(**inputs([7]), cu_seqlens=cu_seqlens_of([7]), num_qk_heads=3)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 7], [0, 5, 3, 7], [7]], ids=str)
def test_boundaries_that_do_not_cover_the_tokens_are_refused(bounds: list[int]) -> None:
    with pytest.raises(Refusal, match="must rise from 0 to the number of packed tokens, 7"):
        ours(**inputs([7]), cu_seqlens=torch.tensor(bounds))
