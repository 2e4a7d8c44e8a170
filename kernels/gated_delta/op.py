"""The gated delta rule as models call it: :func:`gated_delta`, dispatched by ``kernels.registry``.

The closed form is a registered torch operator (``stoker::gated_delta_chunked``) with a fake and an autograd rule, so
torch.compile sees one node; the reference is plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import registry
from kernels.gated_delta import chunked
from kernels.gated_delta.chunks import max_chunks
from kernels.gated_delta.reference import gated_delta_reference
from kernels.precision import compute_dtype
from stoker.errors import Refusal


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule over packed segments; differentiable in everything but ``cu_seqlens``.

    q, k [N, Hk, K]; v [N, Hv, V]; g (log decay, <= 0) and beta [N, Hv]; value head h reads query-key head
    h // (Hv / Hk). cu_seqlens int32 or int64 [S+1], from 0 to N; the state never crosses a boundary, an empty segment
    hands its state on. initial_state [S, Hv, K, V] (zeros if None). scale multiplies q (K^-0.5 if None).
    Returns o [N, Hv, V] in v's dtype and the final state [S, Hv, K, V] in float32 (float64 for float64 inputs).
    Refusal if shapes disagree or cu_seqlens does not rise from 0 to N.

    >>> o, state = gated_delta(q, k, v, g, beta, torch.tensor([0, 700, 2048]))
    """
    _check_shapes(q, k, v, g, beta, cu_seqlens, initial_state)
    chosen = registry.choose("gated_delta", q.device, q.dtype, (q.shape[2], v.shape[2]))
    o, state = chosen.run(q, k, v, g, beta, cu_seqlens, initial_state, q.shape[2] ** -0.5 if scale is None else scale)
    return o, state


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None
) -> None:
    N, Hv, V = v.shape
    Hk, K = k.shape[1:]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "q": (q, (N, Hk, K)),
        "k": (k, (N, Hk, K)),
        "g": (g, (N, Hv)),
        "beta": (beta, (N, Hv)),
        "initial_state": (initial_state, (cu_seqlens.shape[0] - 1, Hv, K, V)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise Refusal(f"gated_delta: {name} has shape {tuple(tensor.shape)}, v and k ask for {shape}")
    if Hv % Hk:
        raise Refusal(f"gated_delta: {Hv} value heads are not a multiple of {Hk} query-key heads")


@torch.library.custom_op("stoker::gated_delta_chunked", mutates_args=())
def gated_delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``chunked.forward``: o, final state and the workspace for the backward (empty unless ``save``)."""
    return chunked.forward(q, k, v, g, beta, cu_seqlens, initial_state, scale, save)


@gated_delta_chunked.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, Hv, V), K, S = v.shape, k.shape[2], cu_seqlens.shape[0] - 1
    dtype = compute_dtype(q.dtype)
    num_chunks = max_chunks(N, S, chunked.CHUNK)
    shapes = chunked.workspace_shapes(num_chunks, Hv, K, V) if save else ((0,),) * 3
    states, e, T = (q.new_empty(shape, dtype=dtype) for shape in shapes)
    return v.new_empty(N, Hv, V), q.new_empty((S, Hv, K, V), dtype=dtype), states, e, T


@torch.library.custom_op("stoker::gated_delta_chunked_backward", mutates_args=())
def gated_delta_chunked_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    states: Tensor,
    e: Tensor,
    T: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``chunked.backward``."""
    return chunked.backward(do, dfinal, q, k, v, g, beta, cu_seqlens, states, e, T, scale)


@gated_delta_chunked_backward.register_fake
def _(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    states: Tensor,
    e: Tensor,
    T: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
    return dq, dk, dv, dg, dbeta, dfinal.new_empty(dfinal.shape, dtype=compute_dtype(q.dtype))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, cu_seqlens, initial_state, scale, save = inputs
    if not save:
        raise RuntimeError("gated_delta_chunked: save=False, yet a gradient is asked for; call gated_delta")
    states, e, T = output[2:]
    ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, states, e, T)
    ctx.scale = scale
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx: Any, do: Tensor, dfinal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *grads, dinitial = gated_delta_chunked_backward(do, dfinal, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype), None, None


gated_delta_chunked.register_autograd(_backward, setup_context=_save_for_backward)


def _run_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, g, beta) if initial_state is None else (q, k, v, g, beta, initial_state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return gated_delta_chunked(q, k, v, g, beta, cu_seqlens, initial_state, scale, save)[:2]


registry.register(
    "gated_delta",
    registry.Implementation(
        "chunked",
        _run_chunked,
        cost={"cuda": "closed form in torch, no CUDA kernel yet: many small launches and a host read of cu_seqlens"},
    ),
)
registry.register("gated_delta", registry.Implementation("reference", gated_delta_reference))
