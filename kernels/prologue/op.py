"""The prologue of a mixer as models call it: :func:`prologue`, dispatched by ``kernels.registry``.

The blocked form is a registered torch operator (``stoker::prologue_chunked``) with a fake and an autograd rule, so
torch.compile sees one node; the reference is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import registry
from kernels.precision import compute_dtype
from kernels.prologue import chunked, native
from kernels.prologue.reference import prologue_reference
from stoker.errors import Refusal

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    num_qk_heads: int,
) -> Outputs:
    """From a mixer's projections to what its core reads; differentiable in everything but ``cu_seqlens``.

    q, k [N, Hk*K]; v [N, Hv*V]; a [N, Hv], or [N, Hv*K] for a decay per key channel; b [N, Hv]: projections, which may
    be columns of a wider one. q_conv, k_conv [Hk*K, W] and v_conv [Hv*V, W], last column on the current token; taps
    never cross a segment's first token. A_log [Hv]; dt_bias as a's columns. cu_seqlens int32 or int64 [S+1], 0 to N.
    Returns q, k [N, Hk, K] of unit length and v [N, Hv, V], convolved, activated by SiLU, in the dtypes they came in;
    g, the log decay <= 0, [N, Hv] or [N, Hv, K], and the write strength beta in [0, 1], [N, Hv], both in float32
    (float64 for float64 inputs). Refusal if shapes disagree or cu_seqlens does not rise from 0 to N.

    >>> q, k, v, g, beta = prologue(q, k, v, a, b, q_conv, k_conv, v_conv, A_log, dt_bias, cu_seqlens, num_qk_heads=4)
    """
    inputs = (q, k, v, a, b, q_conv, k_conv, v_conv, A_log, dt_bias)
    _check_shapes(*inputs, num_qk_heads)
    shape = (q.shape[1] // num_qk_heads, v.shape[1] // A_log.shape[0], q_conv.shape[1])
    outputs: Outputs = registry.choose("prologue", q.device, q.dtype, shape).run(*inputs, cu_seqlens, num_qk_heads)
    return outputs


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    num_qk_heads: int,
) -> None:
    if q.dim() != 2:
        raise Refusal(f"prologue: q has shape {tuple(q.shape)}, it must be packed: [tokens, heads * dim]")
    (N, qk_channels), v_channels, Hv, taps = q.shape, v.shape[-1], A_log.shape[0], q_conv.shape[-1]
    if qk_channels % num_qk_heads or v_channels % Hv:
        raise Refusal(
            f"prologue: q has {qk_channels} columns for {num_qk_heads} heads and v {v_channels} for the {Hv} of A_log: "
            "columns are a multiple of heads"
        )
    decays = a.shape[-1] if a.shape[-1] == Hv * (qk_channels // num_qk_heads) else Hv
    expected = {
        "k": (k, (N, qk_channels)),
        "v": (v, (N, v_channels)),
        "a": (a, (N, decays)),
        "b": (b, (N, Hv)),
        "q_conv": (q_conv, (qk_channels, taps)),
        "k_conv": (k_conv, (qk_channels, taps)),
        "v_conv": (v_conv, (v_channels, taps)),
        "dt_bias": (dt_bias, (decays,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise Refusal(f"prologue: {name} has shape {tuple(tensor.shape)}, q, v, A_log and q_conv ask for {shape}")


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

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        *tensors, _ = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return *operator_backward(*cotangents, *ctx.saved_tensors), None, None

    operator.register_fake(_fake)
    operator_backward.register_fake(_fake_backward)
    operator.register_autograd(gradients, setup_context=save_for_backward)
    return operator


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    num_qk_heads: int,
) -> Outputs:
    (N, qk_channels), Hv = q.shape, A_log.shape[0]
    per_head = a.shape[1] // Hv
    return (
        q.new_empty(N, num_qk_heads, qk_channels // num_qk_heads),
        k.new_empty(N, num_qk_heads, qk_channels // num_qk_heads),
        v.new_empty(N, Hv, v.shape[1] // Hv),
        a.new_empty((N, Hv, per_head) if per_head > 1 else (N, Hv), dtype=compute_dtype(a.dtype)),
        b.new_empty((N, Hv), dtype=compute_dtype(b.dtype)),
    )


def _fake_backward(dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dbeta: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    *inputs, _ = rest
    return tuple(x.new_empty(x.shape) for x in inputs)


prologue_chunked = torch_operator("prologue_chunked", chunked.forward, chunked.backward)

for _backend in native.backends():
    _operator = torch_operator(f"prologue_{_backend.name}", _backend.forward, _backend.backward)
    registry.register("prologue", registry.Implementation(_backend.name, _operator, _backend.supports))
registry.register(
    "prologue",
    registry.Implementation(
        "chunked",
        prologue_chunked,
        cost={"cuda": "blocks of torch calls: many small launches and a host read of cu_seqlens"},
    ),
)
registry.register("prologue", registry.Implementation("reference", prologue_reference))
