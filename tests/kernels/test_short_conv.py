"""The short convolution: the definition against torch's, the blocked form against the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels.samples import cu_seqlens_of, short_conv_inputs
from kernels.short_conv import chunked
from kernels.short_conv.decode import short_conv_step
from kernels.short_conv.op import short_conv, short_conv_chunked
from kernels.short_conv.reference import short_conv_reference
from kernels.tolerance import bound, error
from stoker.errors import Refusal

WithGradients = Callable[..., dict[str, Tensor]]
RAGGED = [130, 1, 2, 0, 3, 65]


@pytest.mark.parametrize("width", [1, 3, 4])
def test_reference_is_torch_conv1d_of_every_segment(width: int) -> None:
    x = short_conv_inputs(RAGGED, 5, width, torch.float64)
    y = short_conv_reference(**x, cu_seqlens=cu_seqlens_of(RAGGED))
    conv = torch.nn.Conv1d(5, 5, width, groups=5, padding=width - 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        conv.weight[:, 0] = x["weight"]
        for actual, segment in zip(y.split(RAGGED), x["x"].split(RAGGED), strict=True):
            if len(segment):
                expected = torch.nn.functional.silu(conv(segment.T.unsqueeze(0))[0, :, : len(segment)]).T
                torch.testing.assert_close(actual, expected)


def test_reference_gradients_pass_gradcheck() -> None:
    leaves = [value.requires_grad_() for value in short_conv_inputs([3, 2], 2, 3, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *a: short_conv_reference(*a, cu_seqlens_of([3, 2])), leaves)


@pytest.mark.parametrize("lengths", [[1], [2], [63], [64], [65], [500], RAGGED], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 7 * 5, 1 << 16])
def test_blocked_form_equals_definition(
    lengths: Sequence[int],
    width: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    with_gradients: WithGradients,
    poisoned_memory: None,
) -> None:
    """float64, outputs and both gradients within 1e-12, also where blocks are shorter than the taps."""
    monkeypatch.setattr(chunked, "BLOCK", block)
    x = short_conv_inputs(lengths, 5, width, torch.float64)
    actual = with_gradients(short_conv, x, cu_seqlens_of(lengths))
    for name, expected in with_gradients(short_conv_reference, x, cu_seqlens_of(lengths)).items():
        assert error(actual[name], expected) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_stay_within_their_bound(dtype: torch.dtype) -> None:
    x = short_conv_inputs(RAGGED, 40, 4, dtype)
    y = short_conv(**x, cu_seqlens=cu_seqlens_of(RAGGED))
    exact = short_conv_reference(**{name: v.double() for name, v in x.items()}, cu_seqlens=cu_seqlens_of(RAGGED))
    assert y.dtype == dtype
    assert error(y, exact) <= bound(dtype, "y")


def test_segments_do_not_touch_each_other_and_packing_is_exact(with_gradients: WithGradients) -> None:
    x = short_conv_inputs(RAGGED, 5, 4, torch.float32)
    cu_seqlens = cu_seqlens_of(RAGGED)
    y = short_conv(**x, cu_seqlens=cu_seqlens)
    for segment, alone in zip(y.split(RAGGED), x["x"].split(RAGGED), strict=True):
        assert torch.equal(segment, short_conv(alone, x["weight"], cu_seqlens_of([len(alone)])))
    broken = x["x"].clone()
    broken[:130] = torch.nan
    assert torch.equal(short_conv(broken, x["weight"], cu_seqlens)[130:], y[130:])


def test_input_may_be_a_slice_of_a_wider_projection(with_gradients: WithGradients) -> None:
    """Models pass columns of one packed projection, or its transpose: strides must not matter."""
    wide = short_conv_inputs([70], 12, 4, torch.float64)
    weight, cu_seqlens = wide["weight"][3:8], cu_seqlens_of([70])
    expected = short_conv(wide["x"][:, 3:8].contiguous(), weight, cu_seqlens)
    assert torch.equal(short_conv(wide["x"][:, 3:8], weight, cu_seqlens), expected)
    transposed = wide["x"].T.contiguous().T[:, 3:8]
    y = short_conv(transposed, weight, cu_seqlens)
    assert torch.equal(y, expected) and y.is_contiguous()


def test_decode_steps_equal_the_whole() -> None:
    x = short_conv_inputs([9, 9], 5, 4, torch.float64)
    y = short_conv(**x, cu_seqlens=cu_seqlens_of([9, 9])).unflatten(0, (2, 9))
    state = torch.zeros(2, 5, 3, dtype=torch.float64)
    tokens = x["x"].unflatten(0, (2, 9))
    for t in range(9):
        torch.testing.assert_close(short_conv_step(tokens[:, t], x["weight"], state), y[:, t])
    assert torch.equal(state, tokens[:, 6:].transpose(1, 2))


def test_operator_passes_opcheck_and_compiles_whole() -> None:
    leaves = [value.requires_grad_() for value in short_conv_inputs(RAGGED, 5, 4, torch.float64).values()]
    cu_seqlens = cu_seqlens_of(RAGGED)
    torch.library.opcheck(short_conv_chunked, (*leaves, cu_seqlens))
    compiled = torch.compile(short_conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves, cu_seqlens), short_conv(*leaves, cu_seqlens))


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(Refusal, match=r"\[channels, taps\]"):
        short_conv(torch.zeros(3, 5), torch.zeros(4, 4), torch.tensor([0, 3]))
    with pytest.raises(Refusal, match="must rise from 0"):
        short_conv(torch.zeros(3, 5), torch.zeros(5, 4), torch.tensor([0, 2]))
