"""Kimi Delta Attention: the definition against matrices, the closed form against the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import delta_chunks, registry
from kernels.gated_delta.op import gated_delta
from kernels.kda.op import kda, kda_chunked
from kernels.kda.reference import kda_reference
from kernels.samples import Decay, cu_seqlens_of, gated_delta_inputs
from kernels.tolerance import bound, error
from stoker.errors import Refusal

WithGradients = Callable[..., dict[str, Tensor]]
F64 = torch.float64
RAGGED = [130, 1, 63, 65, 64, 2]
inputs = partial(gated_delta_inputs, per_channel=True)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], admitted: float) -> None:
    errors = {name: error(actual[name], expected[name]) for name in expected}
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) <= admitted, errors


def test_reference_is_the_product_of_its_transition_matrices() -> None:
    """S_t = (I - beta k k^T) diag(e^g) S_{t-1} + beta k v^T, written out as matrices for every head and segment."""
    lengths = [3, 0, 5]
    x = inputs(lengths, (2, 4), (3, 5), F64)
    o, final = kda_reference(**x, cu_seqlens=cu_seqlens_of(lengths))
    for head in range(4):
        for segment, (start, stop) in enumerate([(0, 3), (3, 3), (3, 8)]):
            S = x["initial_state"][segment, head]
            for t in range(start, stop):
                k, beta = x["k"][t, head // 2], x["beta"][t, head]
                transition = (torch.eye(3, dtype=F64) - beta * torch.outer(k, k)) @ x["g"][t, head].exp().diag()
                S = transition @ S + beta * torch.outer(k, x["v"][t, head])
                torch.testing.assert_close(o[t, head], 3**-0.5 * S.T @ x["q"][t, head // 2])
            torch.testing.assert_close(final[segment, head], S)


def test_reference_gradients_pass_gradcheck() -> None:
    x = inputs([4, 2], (1, 2), (3, 3), F64)
    leaves = [value.requires_grad_() for value in x.values()]
    cu_seqlens = cu_seqlens_of([4, 2])
    assert torch.autograd.gradcheck(lambda *a: kda_reference(*a[:5], cu_seqlens, a[5]), leaves)


@pytest.mark.parametrize("lengths", [[1], [2], [63], [64], [65], [130], [500], RAGGED, [0, 7, 0, 64]], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 3)], ids=str)
def test_closed_form_equals_recurrence(
    lengths: Sequence[int], heads: tuple[int, int], with_gradients: WithGradients, poisoned_memory: None
) -> None:
    """float64: outputs, states and every gradient (g and the initial state too) within 1e-12, K != V."""
    x = inputs(lengths, heads, (8, 5), F64)
    cu_seqlens = cu_seqlens_of(lengths)
    expected = with_gradients(kda_reference, x, cu_seqlens)
    assert_close(with_gradients(kda, x, cu_seqlens), expected, 1e-12)


def test_channels_that_decay_alike_are_the_gated_delta_rule(with_gradients: WithGradients) -> None:
    x = gated_delta_inputs(RAGGED, (2, 4), (8, 5), F64)
    cu_seqlens = cu_seqlens_of(RAGGED)
    expected = with_gradients(gated_delta, x, cu_seqlens)
    alike = x | {"g": x["g"].unsqueeze(-1).expand(-1, -1, 8)}
    actual = with_gradients(kda, alike, cu_seqlens)
    actual["dg"] = actual["dg"].sum(-1)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("decay", ["none", "extreme"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_closed_form_stays_within_its_bound_at_decay_extremes(
    decay: Decay, dtype: torch.dtype, with_gradients: WithGradients
) -> None:
    x = inputs(RAGGED, (2, 4), (16, 16), dtype, decay)
    cu_seqlens = cu_seqlens_of(RAGGED)
    actual = with_gradients(kda, x, cu_seqlens)
    cast = {name: value.double() for name, value in x.items()}
    expected = with_gradients(kda_reference, cast, cu_seqlens)
    assert actual["output 0"].dtype == actual["dq"].dtype == dtype
    # Twice the bound: here the cotangents are rounded to the dtype as well.
    assert_close(actual, expected, 2 * bound(dtype, "*"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_channel_at_minus_1000_beside_channels_without_decay(
    dtype: torch.dtype, with_gradients: WithGradients
) -> None:
    x = inputs([130, 40], (1, 2), (8, 5), dtype, "none")
    x["g"][..., 3] = -1000.0
    cu_seqlens = cu_seqlens_of([130, 40])
    cast = {name: value.double() for name, value in x.items()}
    expected = with_gradients(kda_reference, cast, cu_seqlens)
    assert_close(with_gradients(kda, x, cu_seqlens), expected, 1e-12 if dtype is F64 else 2 * bound(dtype, "*"))


@pytest.mark.parametrize("g", [-1000.0, -100.0, -0.0])
def test_uniform_decay_of_any_size_is_exact_down_to_its_own_gradient(g: float, with_gradients: WithGradients) -> None:
    """At -100 the gradient of g is e^-100 of the others': a difference of large sums would be all noise."""
    x = inputs([130], (1, 1), (4, 4), F64)
    x["g"].fill_(g)
    cu_seqlens = cu_seqlens_of([130])
    expected = with_gradients(kda_reference, x, cu_seqlens)
    assert_close(with_gradients(kda, x, cu_seqlens), expected, 1e-12)


def test_gradient_of_a_decay_is_exact_in_every_channel_however_small(with_gradients: WithGradients) -> None:
    """Channels that decay by 0, 3, 30 and 300 a token: each channel's own gradient within 1e-11 of its own size, the
    small ones beside gradients up to e^300 times as large."""
    x = inputs([130], (1, 2), (4, 4), F64)
    x["g"][:] = torch.tensor([0.0, -3.0, -30.0, -300.0])
    cu_seqlens = cu_seqlens_of([130])
    expected = with_gradients(kda_reference, x, cu_seqlens)["dg"]
    actual = with_gradients(kda, x, cu_seqlens)["dg"]
    for head in range(2):
        for channel in range(4):
            assert error(actual[:, head, channel], expected[:, head, channel]) <= 1e-11


def test_identical_keys_with_beta_one_is_the_worst_conditioned_system(with_gradients: WithGradients) -> None:
    x = inputs([130], (1, 2), (8, 8), F64, "none")
    x["k"][:] = x["k"][0]
    x["beta"].fill_(1 - 1e-9)
    cu_seqlens = cu_seqlens_of([130])
    expected = with_gradients(kda_reference, x, cu_seqlens)
    assert_close(with_gradients(kda, x, cu_seqlens), expected, 1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.9])
def test_write_strength_at_and_beyond_its_ends(beta: float, with_gradients: WithGradients) -> None:
    """beta = 0 has no inverse (its gradient needs none); beta in (1, 2) gives negative eigenvalues."""
    x = inputs([65, 10], (1, 2), (8, 4), F64)
    x["beta"].fill_(beta)
    cu_seqlens = cu_seqlens_of([65, 10])
    expected = with_gradients(kda_reference, x, cu_seqlens)
    assert_close(with_gradients(kda, x, cu_seqlens), expected, 1e-12)


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("group_elements", [1, 1 << 26])
def test_result_does_not_depend_on_chunk_or_group_size(
    size: int, group_elements: int, monkeypatch: pytest.MonkeyPatch, with_gradients: WithGradients
) -> None:
    lengths = [37, 5, 64]
    x = inputs(lengths, (1, 2), (8, 4), F64)
    cu_seqlens = cu_seqlens_of(lengths)
    expected = with_gradients(kda, x, cu_seqlens)
    monkeypatch.setattr(delta_chunks, "CHUNK", size)
    monkeypatch.setattr(delta_chunks, "GROUP_ELEMENTS_CPU", group_elements)
    assert_close(with_gradients(kda, x, cu_seqlens), expected, 1e-12)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("t", [17, 63, 64, 129])
def test_no_token_sees_a_later_one(name: str, t: int) -> None:
    """Outputs before ``t``, and gradients of a loss on them, keep every bit when an input at ``t`` moves (in the tail
    of a chunk too, flash-linear-attention issue 1240)."""

    def before(x: dict[str, Tensor]) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in x.values()]
        o, _ = kda(*leaves[:5], cu_seqlens_of([130]), leaves[5])
        gradients = torch.autograd.grad(o[:t].square().sum(), leaves)
        return [o[:t], *(grad[:t] for grad in gradients[:5]), gradients[5]]

    x = inputs([130], (1, 2), (8, 8), torch.float32)
    moved = {key: value.clone() for key, value in x.items()}
    moved[name][t] -= 0.7
    for kept, expected in zip(before(moved), before(x), strict=True):
        assert torch.equal(kept, expected)


def test_segments_do_not_touch_each_other(with_gradients: WithGradients) -> None:
    """Whatever one segment holds, NaN included, every bit of the others' outputs and gradients stays."""
    cu_seqlens = cu_seqlens_of(RAGGED)
    x = inputs(RAGGED, (1, 2), (8, 8), torch.float32)
    expected = with_gradients(kda, x, cu_seqlens)
    for damaged in (0, 3):
        start, stop = cu_seqlens[damaged], cu_seqlens[damaged + 1]
        broken = {name: value.clone() for name, value in x.items()}
        for name in ("q", "k", "v", "g", "beta"):
            broken[name][start:stop] = float("nan")
        broken["initial_state"][damaged] = float("nan")
        actual = with_gradients(kda, broken, cu_seqlens)
        token = torch.ones(sum(RAGGED), dtype=torch.bool)
        token[start:stop] = False
        for key, value in actual.items():
            kept = token if len(value) == len(token) else torch.arange(len(RAGGED)) != damaged
            assert torch.equal(value[kept], expected[key][kept]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_packed_equals_separate(dtype: torch.dtype) -> None:
    """Bit for bit."""
    x = inputs(RAGGED, (1, 2), (8, 8), dtype)
    o, final = kda(**x, cu_seqlens=cu_seqlens_of(RAGGED))
    start = 0
    for segment, length in enumerate(RAGGED):
        alone = {name: value[start : start + length] for name, value in x.items() if name != "initial_state"}
        alone["initial_state"] = x["initial_state"][segment : segment + 1]
        o_alone, final_alone = kda(**alone, cu_seqlens=cu_seqlens_of([length]))
        assert torch.equal(o[start : start + length], o_alone)
        assert torch.equal(final[segment], final_alone[0])
        start += length


def test_two_calls_chained_by_the_state_equal_one() -> None:
    x = inputs([200], (1, 2), (8, 8), F64)
    o, final = kda(**x, cu_seqlens=cu_seqlens_of([200]))
    tokens = {name: value for name, value in x.items() if name != "initial_state"}
    first = {name: value[:77] for name, value in tokens.items()}
    rest = {name: value[77:] for name, value in tokens.items()}
    o_first, state = kda(**first, cu_seqlens=cu_seqlens_of([77]), initial_state=x["initial_state"])
    o_rest, state = kda(**rest, cu_seqlens=cu_seqlens_of([123]), initial_state=state)
    assert error(torch.cat((o_first, o_rest)), o) <= 1e-13
    assert error(state, final) <= 1e-13


def test_gradients_of_transformers_closed_form_agree(with_gradients: WithGradients) -> None:
    """An independent implementation (float32 inside, whatever it is given): T=130."""
    theirs = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    x = inputs([130], (2, 2), (16, 16), torch.float32)

    def other(cu_seqlens: Tensor, initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, ...]:
        query, key, value, g, beta = (tokens[name].unsqueeze(0) for name in ("q", "k", "v", "g", "beta"))
        o, state = theirs.chunk_kimi_delta_attention(
            query, key, value, g, beta, initial_state=initial_state, output_final_state=True
        )
        return o[0], state

    cu_seqlens = cu_seqlens_of([130])
    assert_close(with_gradients(kda, x, cu_seqlens), with_gradients(other, x, cu_seqlens), 1e-5)


def test_scale_multiplies_the_output() -> None:
    x = inputs([20], (1, 1), (4, 4), F64)
    default, _ = kda(**x, cu_seqlens=cu_seqlens_of([20]))
    doubled, _ = kda(**x, cu_seqlens=cu_seqlens_of([20]), scale=2 * 4**-0.5)
    torch.testing.assert_close(doubled, 2 * default)


@pytest.mark.parametrize("wanted", [["v"], ["g"], ["q", "beta"], ["initial_state"]], ids=str)
def test_gradients_of_some_inputs_are_those_of_all(wanted: list[str], with_gradients: WithGradients) -> None:
    x = inputs([70, 5], (1, 2), (8, 4), F64)
    cu_seqlens = cu_seqlens_of([70, 5])
    every = with_gradients(kda, x, cu_seqlens)
    fixed = {name: value for name, value in x.items() if name not in wanted}
    some = with_gradients(partial(kda, **fixed), {name: x[name] for name in wanted}, cu_seqlens)
    assert all(torch.equal(value, every[name]) for name, value in some.items())


def test_no_workspace_is_kept_when_no_gradient_is_asked_for() -> None:
    x = inputs([100], (1, 1), (4, 4), F64)
    arguments = (*list(x.values())[:5], cu_seqlens_of([100]), None, 0.5)
    saved = kda_chunked(*arguments, True)
    bare = kda_chunked(*arguments, False)
    assert torch.equal(saved[0], bare[0]) and torch.equal(saved[1], bare[1])
    assert all(len(buffer) for buffer in saved[2:]) and not any(len(buffer) for buffer in bare[2:])


def test_a_gradient_through_a_call_without_workspace_is_an_error() -> None:
    x = inputs([10], (1, 1), (4, 4), F64)
    leaves = [value.requires_grad_() for value in x.values()]
    with pytest.raises(RuntimeError, match="save=False"):
        kda_chunked(*leaves[:5], cu_seqlens_of([10]), leaves[5], 0.5, False)


def test_operator_passes_opcheck() -> None:
    x = inputs(RAGGED, (1, 2), (8, 4), F64)
    leaves = [value.requires_grad_() for value in x.values()]
    torch.library.opcheck(kda_chunked, (*leaves[:5], cu_seqlens_of(RAGGED), leaves[5], 0.3, True))


def test_no_initial_state_is_a_zero_state(with_gradients: WithGradients) -> None:
    x = inputs(RAGGED, (1, 2), (8, 4), F64)
    cu_seqlens = cu_seqlens_of(RAGGED)
    x["initial_state"].zero_()
    expected = with_gradients(kda, x, cu_seqlens)
    del x["initial_state"], expected["dinitial_state"]
    assert_close(with_gradients(kda, x, cu_seqlens), expected, 0.0)


def test_compiled_whole_equals_eager(with_gradients: WithGradients) -> None:
    x = inputs(RAGGED, (1, 2), (8, 4), torch.float32)
    cu_seqlens = cu_seqlens_of(RAGGED)
    compiled = torch.compile(kda, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, x, cu_seqlens)
    for name, expected in with_gradients(kda, x, cu_seqlens).items():
        assert torch.equal(actual[name], expected), name


def test_reference_can_be_forced() -> None:
    x = inputs([70], (1, 1), (4, 4), torch.float32)
    with registry.force("kda", "reference"):
        forced, _ = kda(**x, cu_seqlens=cu_seqlens_of([70]))
    assert torch.equal(forced, kda_reference(**x, cu_seqlens=cu_seqlens_of([70]))[0])


@pytest.mark.parametrize("bounds", [[0, 5], [1, 7], [0, 5, 3, 7], [7]], ids=str)
def test_boundaries_that_do_not_cover_the_tokens_are_refused(bounds: list[int]) -> None:
    x = inputs([7], (1, 1), (4, 4), F64)
    del x["initial_state"]
    with pytest.raises(Refusal, match="must rise from 0 to the number of packed tokens, 7"):
        kda(**x, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("name", ["q", "k", "g", "beta", "initial_state"])
def test_shapes_that_disagree_are_refused_by_name(name: str) -> None:
    x = inputs([7, 2], (2, 4), (4, 4), F64)
    x[name] = x[name][:-1]
    with pytest.raises(Refusal, match=f"{name} has shape"):
        kda(**x, cu_seqlens=cu_seqlens_of([7, 2]))


def test_one_decay_per_head_is_refused() -> None:
    x = inputs([7], (1, 2), (4, 4), F64)
    x["g"] = x["g"][..., 0]
    with pytest.raises(Refusal, match="g has shape"):
        kda(**x, cu_seqlens=cu_seqlens_of([7]))
