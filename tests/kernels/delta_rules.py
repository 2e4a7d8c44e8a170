"""The delta rules that are compiled, and what the tests of their implementations share: one rule is one parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from kernels import registry
from kernels.gated_delta.op import gated_delta
from kernels.gated_delta.reference import gated_delta_reference
from kernels.kda.op import kda
from kernels.kda.reference import kda_reference
from kernels.precision import compute_dtype
from kernels.samples import Decay, cu_seqlens_of, gated_delta_inputs
from kernels.tolerance import error

verify = pytest.mark.verify
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
#: More than two chunks, one token, none, and a chunk of 64 less one, full, and one more.
RAGGED = (130, 1, 0, 63, 64, 65)
FEW = (130, 0, 63)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    op: str
    call: Callable[..., tuple[Tensor, Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    per_channel: bool

    def inputs(
        self,
        lengths: Sequence[int],
        heads: tuple[int, int],
        dims: tuple[int, int],
        dtype: torch.dtype,
        decay: Decay = "trained",
        seed: int = 0,
    ) -> Tensors:
        return gated_delta_inputs(lengths, heads, dims, dtype, decay, seed, self.per_channel)

    def run(self, name: str, inputs: Tensors, lengths: Sequence[int], wanted: Sequence[str] | None = None) -> Tensors:
        """Outputs, and gradients of the inputs ``wanted`` (all if None), by the implementation ``name``."""
        with registry.force(self.op, name):
            return outputs_and_gradients(self.call, inputs, lengths, inputs["q"].dtype, wanted)

    def exact(self, inputs: Tensors, lengths: Sequence[int]) -> Tensors:
        """The same by the reference in float64, on the same numbers and cotangents."""
        double = {name: x.double() for name, x in inputs.items()}
        return outputs_and_gradients(self.reference, double, lengths, inputs["q"].dtype)


_KNOWN = (
    Rule("gated_delta", gated_delta, gated_delta_reference, per_channel=False),
    Rule("kda", kda, kda_reference, per_channel=True),
)
RULES = [rule for rule in _KNOWN if "compiled" in {found.name for found in registry.implementations(rule.op)}]


@cache
def sample(
    rule: Rule,
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    decay: Decay = "trained",
    seed: int = 0,
) -> tuple[Tensors, Tensors]:
    """Inputs and their exact results: not to be written to."""
    inputs = rule.inputs(lengths, heads, dims, dtype, decay, seed)
    return inputs, rule.exact(inputs, lengths)


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Tensors,
    lengths: Sequence[int],
    dtype: torch.dtype,
    wanted: Sequence[str] | None = None,
) -> Tensors:
    """o, final_state and "d" + name for every input ``wanted``; the cotangents are numbers of ``dtype``."""
    leaves = {name: x.detach().requires_grad_(wanted is None or name in wanted) for name, x in inputs.items()}
    outputs = function(**leaves, cu_seqlens=cu_seqlens_of(lengths))
    generator = torch.Generator().manual_seed(7)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=F64).to(of).to(x.dtype)
        for x, of in zip(outputs, (dtype, compute_dtype(dtype)), strict=True)
    ]
    asked = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(asked.values()), cotangents) if asked else ()
    results = {name: x.detach() for name, x in zip(("o", "final_state"), outputs, strict=True)}
    return results | {f"d{name}": x for name, x in zip(asked, gradients, strict=True)}


def errors(actual: Tensors, exact: Tensors) -> dict[str, float]:
    """Of every output the relative L2 error."""
    return {name: error(actual[name], exact[name]) for name in exact}


def errors_by_head(actual: Tensors, exact: Tensors) -> dict[str, float]:
    """Of every output the largest relative L2 error of a head."""
    return {
        name: max(error(actual[name][:, head], exact[name][:, head]) for head in range(exact[name].shape[1]))
        for name in exact
    }


def differing(actual: Tensors, expected: Tensors) -> list[str]:
    """Names of what is not equal bit for bit."""
    assert actual.keys() == expected.keys()
    return [name for name in expected if not same_bits(actual[name], expected[name])]


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """NaN equals a NaN of the same bits, and 0 is not -0."""
    both = [x.contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in (actual, expected)]
    return actual.dtype == expected.dtype and actual.shape == expected.shape and both[0] == both[1]


def _turn(x: Tensor, period: int) -> Tensor:
    """0, 1, .. period - 1, 0, .. by token, in the shape of x."""
    return (torch.arange(len(x)) % period).view(-1, *[1] * (x.dim() - 1)).expand_as(x).to(x.dtype)


def _orthonormal(k: Tensor) -> Tensor:
    rows, _ = torch.linalg.qr(torch.randn(k.shape[2], k.shape[2], generator=torch.Generator().manual_seed(3)))
    return rows[torch.arange(len(k)) % k.shape[2], None].to(k.dtype).expand_as(k)


#: Inputs that are hard on the inverse of a chunk or on the decays: name -> what takes the place of a plain sample's.
HARD: dict[str, Callable[[Tensors], Tensors]] = {
    "identical keys, beta 1": lambda x: {"k": x["k"][:1].expand_as(x["k"]), "beta": torch.ones_like(x["beta"])},
    "k and -k in turn, beta 1": lambda x: {
        "k": x["k"][:1] * (1 - 2 * _turn(x["k"], 2)),
        "beta": torch.ones_like(x["beta"]),
    },
    "orthonormal keys": lambda x: {"k": _orthonormal(x["k"])},
    "every third row zero": lambda x: {name: x[name] * (_turn(x[name], 3) > 0) for name in "qkv"},
    "q and k of length 10": lambda x: {"q": x["q"] * 10, "k": x["k"] * 10, "beta": x["beta"] / 100},
    "beta 0": lambda x: {"beta": torch.zeros_like(x["beta"])},
    "beta 1": lambda x: {"beta": torch.ones_like(x["beta"])},
    "beta up to 2": lambda x: {"beta": 2 * x["beta"]},
    "decays of -1000 and 0 in turn": lambda x: {"g": -1000 * _turn(x["g"], 2)},
    **{f"decays of {g}": lambda x, g=g: {"g": torch.full_like(x["g"], g)} for g in (0.0, -1e-6, -20.0, -100.0)},  # type: ignore[misc]
}


_SOON = ("identical keys, beta 1", "beta up to 2", "decays of -1000 and 0 in turn", "decays of -100.0")
#: The parameter ``name`` of a test of hard inputs; most are for `make verify`.
hard = pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in _SOON else [verify]) for name in HARD])


def hard_inputs(rule: Rule, name: str, lengths: Sequence[int], dims: tuple[int, int], dtype: torch.dtype) -> Tensors:
    plain = rule.inputs(lengths, (1, 2), dims, dtype)
    return plain | {key: x.contiguous() for key, x in HARD[name](plain).items()}


def without_subnormals(results: Tensors) -> Tensors:
    """Numbers below float32's normal ones as 0: e^-100 is one that a kernel may hold as nothing."""
    return {name: torch.where(x.abs() < torch.finfo(F32).tiny, 0, x) for name, x in results.items()}
