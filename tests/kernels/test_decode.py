"""Decoding: the definition against the operators that train, the closed form against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import registry
from kernels.decode.op import decode
from kernels.gated_delta.op import gated_delta
from kernels.kda.op import kda
from kernels.samples import Decay, cu_seqlens_of, gated_delta_inputs
from kernels.tolerance import bound, error
from stoker.errors import Refusal

F64 = torch.float64
EACH_DECAY = pytest.mark.parametrize("per_channel", [False, True], ids=["gated_delta", "kda"])


def sample(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    per_channel: bool,
    dtype: torch.dtype = F64,
    decay: Decay = "trained",
    dims: tuple[int, int] = (8, 5),
) -> dict[str, Tensor]:
    """q, k, v, g, beta [B, T, ...] and a state for each of the sequences."""
    x = gated_delta_inputs([tokens] * batch, heads, dims, dtype, decay, per_channel=per_channel)
    state = x.pop("initial_state")
    return {name: value.unflatten(0, (batch, tokens)) for name, value in x.items()} | {"state": state}


def both(x: dict[str, Tensor], slots: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """o and the state after it: of the closed form, and of the definition on the same numbers in float64."""
    mine, exact = ({name: value.clone() for name, value in x.items()} for _ in range(2))
    exact = {name: value.double() for name, value in exact.items()}
    o = decode(**mine, slots=slots)
    with registry.force("decode", "reference"):
        expected = decode(**exact, slots=slots)
    return (o, mine["state"]), (expected, exact["state"])


@EACH_DECAY
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("heads", [(2, 2), (2, 6)], ids=str)
def test_prefill_then_decode_equals_the_whole(heads: tuple[int, int], implementation: str, per_channel: bool) -> None:
    """70 tokens at once, then 1, 1, 3 and 5 more for two sequences, state in place."""
    x = gated_delta_inputs([80, 80], heads, (8, 5), F64, per_channel=per_channel)
    operator = kda if per_channel else gated_delta
    o, final = operator(**x, cu_seqlens=cu_seqlens_of([80, 80]))
    by_sequence = {name: value.unflatten(0, (2, 80)) for name, value in x.items() if name != "initial_state"}
    prefill = {name: value[:, :70].flatten(0, 1) for name, value in by_sequence.items()}
    _, state = operator(**prefill, cu_seqlens=cu_seqlens_of([70, 70]), initial_state=x["initial_state"])
    start = 70
    for count in (1, 1, 3, 5):
        stop = start + count
        with registry.force("decode", implementation):
            step = decode(**{name: value[:, start:stop] for name, value in by_sequence.items()}, state=state)
        assert error(step, o.unflatten(0, (2, 80))[:, start:stop]) <= 1e-13
        start = stop
    assert error(state, final) <= 1e-13


@EACH_DECAY
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 20])
@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (2, 4)], ids=str)
def test_closed_form_equals_recurrence(
    heads: tuple[int, int], tokens: int, per_channel: bool, poisoned_memory: None
) -> None:
    (o, state), (expected, expected_state) = both(sample(3, tokens, heads, per_channel))
    assert error(o, expected) <= 1e-13
    assert error(state, expected_state) <= 1e-13


@EACH_DECAY
@pytest.mark.parametrize("decay", ["none", "extreme"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_stays_within_its_bound_at_decay_extremes(decay: Decay, dtype: torch.dtype, per_channel: bool) -> None:
    (o, state), (expected, expected_state) = both(sample(2, 11, (2, 4), per_channel, dtype, decay, (16, 16)))
    assert o.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
    assert error(o, expected) <= bound(dtype, "o")
    assert error(state, expected_state) <= bound(dtype, "*")


@EACH_DECAY
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_slots_choose_states_of_a_pool_and_leave_the_others_alone(index_dtype: torch.dtype, per_channel: bool) -> None:
    x = sample(3, 2, (1, 2), per_channel)
    slots = torch.tensor([4, 0, 2], dtype=index_dtype)
    pool = torch.full((6, 2, 8, 5), float("nan"), dtype=F64)
    pool[slots.long()] = x["state"]
    o = decode(**x | {"state": pool}, slots=slots)
    expected = decode(**x)
    assert torch.equal(o, expected) and torch.equal(pool[slots.long()], x["state"])
    assert pool[[1, 3, 5]].isnan().all()


@EACH_DECAY
def test_a_narrow_state_is_rounded_once_after_the_last_token(per_channel: bool) -> None:
    """bfloat16 states, float32 inputs: what is stored is the nearest bfloat16 of the exact state, in place."""
    x = sample(2, 6, (2, 2), per_channel, torch.float32)
    x["state"] = x["state"].bfloat16()
    (o, state), (expected, expected_state) = both(x)
    assert error(o, expected) <= bound(torch.float32, "o")
    assert state.dtype == torch.bfloat16
    assert error(state, expected_state) <= 2**-8


def test_a_state_that_is_a_strided_view_is_updated_where_it_lies() -> None:
    x = sample(2, 3, (1, 2), True)
    wide = torch.zeros(2, 2, 5, 8, dtype=F64)
    wide.copy_(x["state"].mT)
    o = decode(**x | {"state": wide.mT})
    assert error(o, decode(**x)) <= 1e-14 and error(wide.mT, x["state"]) <= 1e-14


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_no_token_sees_a_later_one(name: str) -> None:
    """Outputs before the last of 8 tokens keep every bit when an input there moves."""
    x = sample(2, 8, (1, 2), True, torch.float32)
    moved = {key: value.clone() for key, value in x.items()}
    moved[name][:, 7] -= 0.7
    assert torch.equal(decode(**moved)[:, :7], decode(**x)[:, :7])


def test_scale_multiplies_the_output() -> None:
    x = sample(2, 3, (1, 1), True)
    default = decode(**x | {"state": x["state"].clone()})
    torch.testing.assert_close(decode(**x, scale=2 * 8**-0.5), 2 * default)


@EACH_DECAY
def test_operator_passes_opcheck(per_channel: bool) -> None:
    x = sample(3, 4, (1, 2), per_channel)
    slots = torch.tensor([2, 0, 1])
    torch.library.opcheck(torch.ops.stoker.decode_chunked.default, (*x.values(), slots, 0.3))


def test_compiled_whole_equals_eager() -> None:
    x = sample(3, 4, (1, 2), True, torch.float32)
    state = x["state"].clone()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x | {"state": state}), decode(**x))
    assert torch.equal(state, x["state"])


@pytest.mark.parametrize("slots", [[0, 0], [0, 3], [-1, 0]], ids=str)
def test_slots_that_repeat_or_are_not_in_the_pool_are_refused(slots: list[int]) -> None:
    with pytest.raises(Refusal, match="must be different places of a pool of 2 states"):
        decode(**sample(2, 1, (1, 1), False), slots=torch.tensor(slots))


@pytest.mark.parametrize("name", ["q", "k", "g", "beta", "state"])
def test_shapes_that_disagree_are_refused_by_name(name: str) -> None:
    x = sample(3, 2, (2, 4), True)
    x[name] = x[name][:-1]
    with pytest.raises(Refusal, match=f"{name} has shape"):
        decode(**x)


def test_value_heads_that_no_query_head_divides_are_refused() -> None:
    with pytest.raises(Refusal, match="3 value heads are not a multiple of 2"):
        decode(**sample(1, 1, (2, 3), False))
