"""The epilogue of a mixer: the definition against transformers', the blocked form against the definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels import blocks
from kernels.epilogue.op import Activation, epilogue, epilogue_chunked
from kernels.epilogue.reference import epilogue_reference
from kernels.samples import epilogue_inputs
from kernels.tolerance import bound, error
from stoker.errors import Refusal

F64 = torch.float64
EPS = 1e-6
ACTIVATIONS = get_args(Activation)


def results(function: Callable[..., Tensor], x: dict[str, Tensor], activation: str) -> dict[str, Tensor]:
    """The output and every gradient by name, for a fixed cotangent."""
    leaves = {name: value.detach().requires_grad_() for name, value in x.items()}
    y = function(**leaves, eps=EPS, activation=activation)
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn(y.shape, generator=generator, dtype=F64).to(y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize(
    ("family", "norm", "activation"),
    [("qwen3_next", "Qwen3NextRMSNormGated", "silu"), ("kimi_linear", "KimiLinearRMSNormGated", "sigmoid")],
)
def test_reference_is_the_norm_of_transformers(family: str, norm: str, activation: str) -> None:
    """An independent implementation, float32 inside whatever it is given."""
    theirs = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    x = epilogue_inputs(65, 3, 24, torch.float32)
    module = getattr(theirs, norm)(24, eps=EPS)
    with torch.no_grad():
        module.weight.copy_(x["weight"])
    exact = epilogue_reference(**{name: value.double() for name, value in x.items()}, eps=EPS, activation=activation)
    assert error(module(x["o"], x["z"]), exact) <= bound(torch.float32, "y")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradients_pass_gradcheck(activation: str) -> None:
    leaves = [value.requires_grad_() for value in epilogue_inputs(4, 2, 3, F64).values()]
    assert torch.autograd.gradcheck(lambda *a: epilogue_reference(*a, EPS, activation), leaves)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", [1, 7 * 15, 1 << 16])
def test_blocked_form_equals_definition(
    tokens: int, activation: str, block: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """float64, output and every gradient within 1e-12."""
    monkeypatch.setattr(blocks, "ELEMENTS_CPU", block)
    x = epilogue_inputs(tokens, 3, 5, F64)
    actual = results(epilogue, x, activation)
    for name, expected in results(epilogue_reference, x, activation).items():
        assert error(actual[name], expected) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_narrow_dtypes_stay_within_their_bound(dtype: torch.dtype, activation: str) -> None:
    x = epilogue_inputs(200, 3, 24, dtype)
    actual = results(epilogue, x, activation)
    for name, expected in results(epilogue_reference, {k: v.double() for k, v in x.items()}, activation).items():
        assert actual[name].dtype == dtype
        # Twice the bound: here the cotangent is rounded to the dtype as well.
        assert error(actual[name], expected) <= 2 * bound(dtype, name), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_of_output_and_gate(activation: str) -> None:
    """Rows of zeros, of 1e-8 (where eps decides) and of 1e8; gates of -1000, of 0 and of 1000."""
    x = epilogue_inputs(9, 3, 5, F64)
    x["o"][:3] *= torch.tensor([0.0, 1e-8, 1e8]).double().view(3, 1, 1)
    x["z"][2:5] = torch.tensor([-1000.0, 0.0, 1000.0]).double().view(3, 1, 1)
    actual = results(epilogue, x, activation)
    for name, expected in results(epilogue_reference, x, activation).items():
        assert error(actual[name], expected) <= 1e-12, name


def test_every_head_of_every_token_is_normed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in one head of one token reaches no other bit of outputs or gradients of o and z; blocks change no bit."""
    x = epilogue_inputs(70, 3, 24, torch.float32)
    expected = results(epilogue, x, "silu")
    monkeypatch.setattr(blocks, "ELEMENTS_CPU", 7 * 3 * 24)
    x["o"][30, 1, 4] = torch.nan
    actual = results(epilogue, x, "silu")
    kept = torch.ones(70, 3, dtype=torch.bool)
    kept[30, 1] = False
    for name in ("y", "do", "dz"):
        assert torch.equal(actual[name][kept], expected[name][kept]), name


def test_gate_may_be_columns_of_a_wider_projection() -> None:
    x = epilogue_inputs(70, 3, 24, torch.float32)
    wide = torch.cat([torch.zeros(70, 5), x["z"].flatten(1)], dim=1)
    strided = results(partial_view, x | {"z": wide}, "silu")
    expected = results(epilogue, x, "silu")
    assert torch.equal(strided["y"], expected["y"]) and torch.equal(strided["do"], expected["do"])
    assert torch.equal(strided["dz"][:, 5:], expected["dz"].flatten(1))


def partial_view(z: Tensor, **x: Tensor) -> Tensor:
    return epilogue(z=z[:, 5:].unflatten(-1, (3, 24)), **x)


@pytest.mark.parametrize("name", ["o", "z", "weight"])
def test_any_one_gradient_alone_is_what_it_is_among_all(name: str) -> None:
    x = epilogue_inputs(70, 3, 5, F64)
    rest = {key: value for key, value in x.items() if key != name}
    alone = results(partial(epilogue, **rest), {name: x[name]}, "sigmoid")
    assert torch.equal(alone[f"d{name}"], results(epilogue, x, "sigmoid")[f"d{name}"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_passes_opcheck_and_compiles_whole(activation: Activation) -> None:
    leaves = [value.requires_grad_() for value in epilogue_inputs(20, 3, 5, F64).values()]
    torch.library.opcheck(epilogue_chunked, (*leaves, EPS, activation))
    compiled = torch.compile(epilogue, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves, EPS, activation), epilogue(*leaves, EPS, activation))


def test_shapes_that_disagree_and_unknown_activations_are_refused() -> None:
    x = epilogue_inputs(7, 3, 5, F64)
    for name in x:
        with pytest.raises(Refusal, match="twice and"):
            epilogue(**x | {name: x[name][:-1]}, eps=EPS, activation="silu")
    with pytest.raises(Refusal, match="'relu' is unknown: choose one of silu, sigmoid"):
        epilogue(**x, eps=EPS, activation="relu")  # type: ignore[arg-type]
