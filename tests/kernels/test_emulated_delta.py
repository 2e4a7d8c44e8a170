"""The delta rules as a GPU will run them, on emulated thread blocks: no worse than the model, no races, one result."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import delta_native, registry, toolchain
from kernels.samples import Decay, cu_seqlens_of
from kernels.segment_scan.split import split_delta
from kernels.tolerance import error
from kernels.toolchain.library import NativeError
from tests.kernels.delta_rules import (
    BF16,
    FEW,
    RAGGED,
    RULES,
    Rule,
    differing,
    errors_by_head,
    hard,
    hard_inputs,
    outputs_and_gradients,
    same_bits,
    sample,
    verify,
    without_subnormals,
)
from tests.kernels.test_model_delta import HARD_THRESHOLDS, THRESHOLDS, assert_within

pytestmark = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.op)
#: An error so far below bfloat16's rounding that "twice the model's" says nothing: float sums in another order.
NOTHING = 1e-5
SHORT = (65, 0, 3)


@pytest.fixture(autouse=True)
def library() -> None:
    if toolchain.emulated_library() is None:
        pytest.skip(toolchain.why_not("simt"))


def assert_as_good_as_the_model(rule: Rule, inputs: dict[str, Tensor], lengths: tuple[int, ...]) -> dict[str, float]:
    """No head of any output has twice the error of the bfloat16 model; the errors."""
    exact = without_subnormals(rule.exact(inputs, lengths))
    emulated, model = (
        errors_by_head(without_subnormals(rule.run(name, inputs, lengths)), exact) for name in ("emulated", "model")
    )
    assert_within(emulated, {name: 2 * value + NOTHING for name, value in model.items()})
    return emulated


@pytest.mark.parametrize(
    ("lengths", "heads", "seed"),
    [(FEW, (1, 2), 0), *(pytest.param(RAGGED, (2, 4), seed, marks=verify) for seed in range(5))],
)
@pytest.mark.parametrize("decay", ["trained", pytest.param("extreme", marks=verify)])
def test_no_head_has_twice_the_error_of_the_model(
    decay: Decay, lengths: tuple[int, ...], heads: tuple[int, int], seed: int, rule: Rule, poisoned_memory: None
) -> None:
    inputs, _ = sample(rule, lengths, heads, (64, 64), BF16, decay, seed)
    assert_within(assert_as_good_as_the_model(rule, inputs, lengths), THRESHOLDS)


@hard
def test_hard_inputs_are_no_harder_than_for_the_model(name: str, rule: Rule, poisoned_memory: None) -> None:
    inputs = hard_inputs(rule, name, (70, 30), (64, 64), BF16)
    assert_within(assert_as_good_as_the_model(rule, inputs, (70, 30)), HARD_THRESHOLDS)


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((1, 2), (64, 192)),
        pytest.param((1, 2), (128, 256), marks=verify),
        pytest.param((2, 2), (128, 192), marks=verify),
        *(pytest.param((1, 2), dims, marks=verify) for dims in [(64, 64), (64, 128), (128, 64), (128, 128)]),
        *(pytest.param(heads, (64, 64), marks=verify) for heads in [(2, 2), (1, 3)]),
    ],
)
def test_all_head_dims_are_within_the_thresholds(
    heads: tuple[int, int], dims: tuple[int, int], rule: Rule, poisoned_memory: None
) -> None:
    """192 columns are three blocks of 64, whose partial gradients are summed; 256 are two of 128."""
    inputs, exact = sample(rule, FEW, heads, dims, BF16)
    assert_within(errors_by_head(rule.run("emulated", inputs, FEW), exact), THRESHOLDS)


WIDE = [(128, 128), *(pytest.param(dims, marks=verify) for dims in [(64, 128), (128, 256)])]


@pytest.mark.parametrize("dims", WIDE, ids=str)
def test_blocks_of_128_columns_are_within_the_thresholds(
    dims: tuple[int, int], rule: Rule, poisoned_memory: None
) -> None:
    """67 segments of a head are enough blocks to fill a GPU with wide ones; all but two are empty here."""
    lengths = (0,) * 40 + (129,) + (0,) * 25 + (63,)
    inputs, exact = sample(rule, lengths, (1, 1), dims, BF16)
    actual = rule.run("emulated", inputs, lengths)
    assert_within(errors_by_head(actual, exact), THRESHOLDS)
    empty = [segment for segment, length in enumerate(lengths) if length == 0]
    assert same_bits(actual["final_state"][empty], inputs["initial_state"][empty])


@pytest.mark.parametrize("heads", [(2, 2), (1, 2)], ids=["direct", "summed"])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    heads: tuple[int, int], rule: Rule, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """A shared-memory race would be an error; blocks that met in global memory would differ."""
    inputs = rule.inputs(SHORT, heads, (64, 64), BF16)
    expected = rule.run("emulated", inputs, SHORT)
    for seed in (2, 1001):
        monkeypatch.setattr(delta_native, "emulation_seed", seed)
        assert differing(rule.run("emulated", inputs, SHORT), expected) == [], seed


@pytest.mark.parametrize(
    "dims",
    [(128, 128), *(pytest.param(dims, marks=verify) for dims in [(64, 64), (64, 128), (64, 192), (128, 256)])],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(130, 0, 64, 1), pytest.param((3, 65, 0, 127, 63), marks=verify)], ids=str)
def test_products_of_warpgroups_and_bulk_copies_give_the_same_bits(
    lengths: tuple[int, ...], dims: tuple[int, int], rule: Rule, poisoned_memory: None
) -> None:
    """Emulated, both kinds of product add 16 terms at a time in one order, so any operand in another place shows. A box
    that took the next sequence's tokens for zeros, or its own for another's, would too."""
    inputs = rule.inputs(lengths, (1, 2), dims, BF16)
    expected = rule.run("emulated", inputs, lengths)
    for name in ("emulated_wgmma", "emulated_hopper"):
        assert differing(rule.run(name, inputs, lengths), expected) == [], name


def test_threads_copy_where_no_map_of_a_tensor_can_be_made(
    rule: Rule, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; any other error is an error."""
    found, code = toolchain.emulated_library(), delta_native.NO_TENSOR_MAP
    assert found is not None
    library: toolchain.Library = found

    class Refusing:
        query = library.query

        def function(self, name: str, *types: type) -> Callable[..., None]:
            def refuse(*_: object) -> None:
                raise NativeError("the driver makes no map of these tensors", code)

            return refuse if name.endswith("_hopper") else library.function(name, *types)

    monkeypatch.setattr(toolchain, "emulated_library", Refusing)
    delta_native._tell.cache_clear()
    inputs = rule.inputs(SHORT, (1, 2), (64, 64), BF16)
    expected = rule.run("emulated_wgmma", inputs, SHORT)
    assert differing(rule.run("emulated_hopper", inputs, SHORT), expected) == []
    assert [record.message for record in caplog.records if "no map of these tensors" in record.message] == [
        f"kernel {rule.op}: the driver makes no map of these tensors; tiles are copied by threads instead"
    ]
    code = -1
    with pytest.raises(NativeError):
        rule.run("emulated_hopper", inputs, SHORT)


def test_a_slow_decay_is_as_slow_after_sixteen_thousand_tokens(rule: Rule) -> None:
    """Of keys that write nothing only the state's own decay is left: an error of one rounding a token would be 5e-4."""
    lengths, g = (1 << 14,), -3e-8
    inputs = rule.inputs(lengths, (1, 1), (64, 64), BF16)
    inputs["k"].zero_()
    inputs["g"].fill_(g)
    final = rule.run("emulated", inputs, lengths, ())["final_state"].double()
    assert error(final, inputs["initial_state"].double() * math.exp(g * lengths[0])) <= 5e-5


@pytest.mark.parametrize("decay", ["none", pytest.param("trained", marks=verify)])
def test_cutting_sequences_costs_no_accuracy(decay: Decay, rule: Rule) -> None:
    """The kernel makes the pairs of the pieces too, and they add nothing to what it costs a whole sequence, even where
    no state ever fades."""
    lengths = (200, 65)
    inputs, exact = sample(rule, lengths, (1, 2), (64, 64), BF16, decay)
    whole = rule.run("emulated", inputs, lengths)
    with registry.force(rule.op, "emulated"):
        cut = outputs_and_gradients(partial(split_delta, piece_tokens=64), inputs, lengths, BF16)
    for name, actual in cut.items():
        admitted = 1.25 * max(error(whole[name], exact[name]), 0.1 * THRESHOLDS[name])
        assert error(actual, exact[name]) <= admitted, name


def test_packed_equals_separate_and_no_token_sees_a_later_one(rule: Rule) -> None:
    inputs = rule.inputs((65, 70), (1, 2), (64, 64), BF16)
    inputs["initial_state"].zero_()
    o = rule.run("emulated", inputs, (65, 70), ())["o"]
    alone = {name: x[65:] if len(x) == 135 else x[1:] for name, x in inputs.items()}
    assert same_bits(o[65:], rule.run("emulated", alone, (70,), ())["o"])
    for name in ("q", "k", "v", "g", "beta"):
        moved = inputs | {name: inputs[name].clone()}
        moved[name][65 + 66] -= 0.7
        kept = rule.run("emulated", moved, (65, 70), ())["o"]
        assert same_bits(kept[: 65 + 66], o[: 65 + 66]), name
        assert not same_bits(kept, o), name


def test_a_nan_stays_in_its_head_and_segment(rule: Rule) -> None:
    inputs = rule.inputs((65, 70), (1, 2), (64, 64), BF16)
    expected = rule.run("emulated", inputs, (65, 70))
    for name in ("v", "g"):
        broken = inputs | {name: inputs[name].clone()}
        broken[name][65 + 3, 0, ...] = torch.nan
        actual = rule.run("emulated", broken, (65, 70))
        assert torch.isnan(actual["o"][65 + 3 :, 0]).all(), name
        for output in ("o", "final_state", "dv", "dg", "dbeta", "dinitial_state"):
            assert same_bits(actual[output][:, 1], expected[output][:, 1]), (name, output)
        for output in ("o", "dq", "dk", "dv", "dg", "dbeta"):
            assert same_bits(actual[output][:65], expected[output][:65]), (name, output)


Allocate = Callable[..., Tensor]


@pytest.mark.parametrize("name", ["compiled", "emulated"])
def test_nothing_is_written_outside_an_output_or_a_workspace(
    name: str, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that the library may write to lies between two bands, which keep every byte."""
    band, taken = 4096, []
    allocate: Allocate = torch.Tensor.new_empty

    def guarded(self: Tensor, *shape: int | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        wanted = allocate(self, *shape, dtype=dtype or self.dtype)
        memory = torch.full((2 * band + wanted.nbytes,), 0xA5, dtype=torch.uint8)
        taken.append(memory)
        return memory[band : band + wanted.nbytes].view(wanted.dtype).view(wanted.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    inputs = rule.inputs(SHORT, (1, 2), (64, 64), BF16)
    rule.run(name, inputs, SHORT)
    assert len(taken) >= 10
    for memory in taken:
        assert (memory[:band] == 0xA5).all() and (memory[-band:] == 0xA5).all()


def test_unused_slots_are_never_written(rule: Rule, poisoned_memory: None) -> None:
    lengths = (3, 0, 130, 0, 64)
    inputs = rule.inputs(lengths, (1, 2), (64, 64), BF16)
    operator = getattr(torch.ops.stoker, f"{rule.op}_emulated")
    arguments = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    kept = operator(*arguments, cu_seqlens_of(lengths), inputs["initial_state"], 0.125, True)
    start, used = 0, set()
    for segment, length in enumerate(lengths):
        first = start // 64 + segment
        used |= set(range(first, first + -(-length // 64)))
        start += length
    for workspace in kept[2:]:
        assert {slot for slot in range(len(workspace)) if not torch.isnan(workspace[slot]).all()} == used
