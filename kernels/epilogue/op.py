"""The epilogue of a mixer as models call it: :func:`epilogue`, dispatched by ``kernels.registry``.

The blocked form is a registered torch operator (``stoker::epilogue_chunked``) with a fake and an autograd rule, so
torch.compile sees one node; the reference is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels import registry
from kernels.epilogue import chunked, native
from kernels.epilogue.reference import epilogue_reference
from stoker.errors import Refusal

Activation = Literal["silu", "sigmoid"]


def epilogue(o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: Activation) -> Tensor:
    """RMSNorm of every head of ``o``, times ``weight``, times the activated gate ``z``; differentiable in all three.

    o (the core's output) and z (the gate's projection, may be columns of a wider one) [N, Hv, V]; weight [V]; eps is
    added to the mean square. Returns [N, Hv, V] in o's dtype; statistics in float32 (float64 for float64 inputs).
    Refusal if shapes disagree or the activation is unknown.

    >>> y = epilogue(o, z, weight, 1e-6, "silu")
    """
    if o.dim() != 3 or z.shape != o.shape or weight.shape != o.shape[2:]:
        raise Refusal(
            f"epilogue: o, z and weight have shapes {tuple(o.shape)}, {tuple(z.shape)} and {tuple(weight.shape)}, "
            "they must be [tokens, heads, dim] twice and [dim]"
        )
    if activation not in get_args(Activation):
        raise Refusal(
            f"epilogue: activation {activation!r} is unknown: choose one of {', '.join(get_args(Activation))}"
        )
    chosen = registry.choose("epilogue", o.device, o.dtype, tuple(o.shape[2:]))
    y: Tensor = chosen.run(o, z, weight, eps, activation)
    return y


def torch_operator(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> torch.library.CustomOpDef:
    """Registers ``stoker::<name>`` and ``stoker::<name>_backward`` with their fakes and the autograd rule. ``forward``
    and ``backward`` take and return what those in ``chunked`` do."""
    schema, schema_backward = (
        torch.library.infer_schema(f, mutates_args=()) for f in (chunked.forward, chunked.backward)
    )
    operator = torch.library.custom_op(f"stoker::{name}", forward, mutates_args=(), schema=schema)
    operator_backward = torch.library.custom_op(
        f"stoker::{name}_backward", backward, mutates_args=(), schema=schema_backward
    )

    def fake(o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
        return o.new_empty(o.shape)

    def fake_backward(
        dy: Tensor, o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str
    ) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in (o, z, weight))

    def save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, str], output: Tensor) -> None:
        o, z, weight, ctx.eps, ctx.activation = inputs
        ctx.save_for_backward(o, z, weight)

    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *operator_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.activation), None, None

    operator.register_fake(fake)
    operator_backward.register_fake(fake_backward)
    operator.register_autograd(gradients, setup_context=save_for_backward)
    return operator


epilogue_chunked = torch_operator("epilogue_chunked", chunked.forward, chunked.backward)

for _backend in native.backends():
    _operator = torch_operator(f"epilogue_{_backend.name}", _backend.forward, _backend.backward)
    registry.register("epilogue", registry.Implementation(_backend.name, _operator, _backend.supports))
registry.register(
    "epilogue",
    registry.Implementation(
        "chunked",
        epilogue_chunked,
        cost={"cuda": "blocks of torch calls: many small launches"},
    ),
)
registry.register("epilogue", registry.Implementation("reference", epilogue_reference))
