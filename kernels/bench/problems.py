"""What is timed on a GPU: inputs of one shape, what ours makes of them, and what a peer has to make as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from kernels.bench import roofline
from kernels.bench.roofline import Work
from kernels.bench.shapes import Phase, Shape
from kernels.decode.op import decode
from kernels.epilogue.op import epilogue
from kernels.gated_delta.op import gated_delta
from kernels.kda.op import kda
from kernels.prologue.op import prologue

Outputs = Tensor | Sequence[Tensor]
DELTA_RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"gated_delta": gated_delta, "kda": kda}
#: Taps of the short convolution (Qwen3-Next, Kimi Linear), epsilon of the norm behind the core.
TAPS, EPS = 4, 1e-6


@dataclass(frozen=True)
class Problem:
    """``ours`` is called with nothing. ``inputs`` that need gradients ask for them; without any, only the forward is
    timed. ``dispatch``: what the operator hands to ``registry.choose``. ``layer``: prologue and epilogue as well."""

    op: str
    shape: Shape
    inputs: dict[str, Tensor]
    cu_seqlens: Tensor
    ours: Callable[[], Outputs]
    work: Callable[[Phase], Work]
    dispatch: tuple[int, ...]
    layer: bool = False
    leaves: Sequence[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", [x for x in self.inputs.values() if x.requires_grad])

    @property
    def case(self) -> str:
        return f"layer, {self.shape}" if self.layer else str(self.shape)

    def batched(self, name: str) -> Tensor:
        """An input as [sequences, tokens of each, ...], for peers that want it so; a view."""
        return self.inputs[name].unflatten(0, (self.shape.sequences, -1))


def delta_problem(op: str, shape: Shape, device: torch.device) -> Problem:
    N, (Hk, Hv), (K, V) = shape.tokens, shape.heads, shape.dims
    decays = (Hv, K) if op == "kda" else (Hv,)
    with torch.no_grad():
        rate = 1 + 15 * torch.rand(Hv, *[1] * (len(decays) - 1), device=device)
        inputs = {
            "q": normalize(_normal(device, N, Hk, K), dim=-1),
            "k": normalize(_normal(device, N, Hk, K), dim=-1),
            "v": _normal(device, N, Hv, V),
            "g": -rate * softplus(torch.randn(N, *decays, device=device) - 4),
            "beta": torch.randn(N, Hv, device=device).sigmoid(),
        }
    cu_seqlens = _leaves(inputs, shape, device)
    return Problem(
        op,
        shape,
        inputs,
        cu_seqlens,
        lambda: DELTA_RULES[op](*inputs.values(), cu_seqlens)[0],
        lambda phase: roofline.delta_work(op, shape, phase),
        (K, V),
    )


def prologue_problem(shape: Shape, device: torch.device, per_channel: bool = False) -> Problem:
    inputs = _prologue_inputs(shape, device, per_channel)
    cu_seqlens = _leaves(inputs, shape, device)
    return Problem(
        "prologue",
        shape,
        inputs,
        cu_seqlens,
        lambda: prologue(**inputs, cu_seqlens=cu_seqlens, num_qk_heads=shape.heads[0]),
        lambda phase: roofline.prologue_work(shape, phase, per_channel),
        (*shape.dims, TAPS),
    )


def epilogue_problem(shape: Shape, device: torch.device) -> Problem:
    inputs = _epilogue_inputs(shape, device) | {"o": _normal(device, shape.tokens, shape.heads[1], shape.dims[1])}
    return Problem(
        "epilogue",
        shape,
        inputs,
        _leaves(inputs, shape, device),
        lambda: epilogue(**inputs, eps=EPS, activation="silu"),
        lambda phase: roofline.epilogue_work(shape, phase),
        shape.dims[1:],
    )


def layer_problem(op: str, shape: Shape, device: torch.device) -> Problem:
    """Prologue, delta rule ``op`` and epilogue: all of a mixer but its projections."""
    before, after = _prologue_inputs(shape, device, op == "kda"), _epilogue_inputs(shape, device)
    cu_seqlens = _leaves(before, shape, device)
    _leaves(after, shape, device)

    def ours() -> Tensor:
        o, _ = DELTA_RULES[op](*prologue(**before, cu_seqlens=cu_seqlens, num_qk_heads=shape.heads[0]), cu_seqlens)
        return epilogue(o, **after, eps=EPS, activation="silu")

    return Problem(
        op,
        shape,
        before | after,
        cu_seqlens,
        ours,
        lambda phase: roofline.layer_work(op, shape, phase),
        shape.dims,
        layer=True,
    )


def decode_problem(shape: Shape, device: torch.device) -> Problem:
    """One token of each of ``shape.sequences``: the state is read and written, and little else."""
    B, (_, Hv), (K, V) = shape.sequences, shape.heads, shape.dims
    one = delta_problem("gated_delta", Shape(B, B, shape.heads, shape.dims), device).inputs
    inputs = {name: x.detach().unsqueeze(1) for name, x in one.items()}
    q, k, v, g, beta = inputs.values()
    state = torch.randn(B, Hv, K, V, device=device)
    return Problem(
        "decode",
        shape,
        inputs | {"state": state},
        torch.arange(B + 1, dtype=torch.int32, device=device),
        lambda: decode(q, k, v, g, beta, state),
        lambda phase: Work(2 * state.nbytes),
        (K, V),
    )


def _prologue_inputs(shape: Shape, device: torch.device, per_channel: bool) -> dict[str, Tensor]:
    """Projections as views of one wide one, as a fused projection leaves them."""
    N, (Hk, Hv), (K, V) = shape.tokens, shape.heads, shape.dims
    decays = Hv * K if per_channel else Hv
    widths = {"q": Hk * K, "k": Hk * K, "v": Hv * V, "a": decays, "b": Hv}
    wide = _normal(device, N, sum(widths.values()))
    convolutions = {f"{name}_conv": _normal(device, widths[name], TAPS) for name in "qkv"}
    gates = {
        "A_log": (1 + 15 * torch.rand(Hv, device=device)).log(),
        "dt_bias": torch.randn(decays, device=device) - 4,
    }
    return dict(zip(widths, wide.split(list(widths.values()), dim=1))) | convolutions | gates


def _epilogue_inputs(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    V = shape.dims[1]
    return {"z": _normal(device, shape.tokens, shape.heads[1], V), "weight": 1 + 0.3 * _normal(device, V)}


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _leaves(inputs: dict[str, Tensor], shape: Shape, device: torch.device) -> Tensor:
    """Has every input ask for its gradient; returns the boundaries of the sequences."""
    for x in inputs.values():
        x.requires_grad_()
    each = shape.tokens // shape.sequences
    return torch.arange(0, shape.tokens + 1, each, dtype=torch.int32, device=device)
