"""How an implementation of a delta rule becomes a torch operator, and what the delta rules refuse.

Gated delta and KDA have one signature and one life cycle: a forward that leaves a workspace, a backward that reads it.
:func:`torch_operator` registers such a pair with its fakes and its autograd rule, so torch.compile sees one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.precision import compute_dtype
from stoker.errors import Refusal

#: Of a forward: o, final state, three workspaces (empty unless ``save``).
SCHEMA = """(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens, Tensor? initial_state, float scale,
    bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""
#: Of a backward, given the three workspaces: gradients of q, k, v, g, beta, initial state.
BACKWARD_SCHEMA = """(Tensor do, Tensor dfinal, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens,
    Tensor first, Tensor second, Tensor third, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""
Forward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
#: number of tokens, of segments, Hv, K, V -> shapes of the three workspaces
WorkspaceShapes = Callable[[int, int, int, int, int], tuple[tuple[int, ...], ...]]


def torch_operator(
    name: str,
    forward: Forward,
    backward: Backward,
    workspace_shapes: WorkspaceShapes,
    workspace_dtype: Callable[[torch.dtype], torch.dtype] = compute_dtype,
) -> torch.library.CustomOpDef:
    """Registers ``forward`` as ``stoker::<name>``, of SCHEMA, and ``backward`` as ``stoker::<name>_backward``, of
    BACKWARD_SCHEMA. ``workspace_dtype``: by the dtype of q.

    >>> operator = torch_operator("kda_chunked", chunked.forward, chunked.backward, delta_chunks.workspace_shapes)
    >>> registry.register("kda", registry.Implementation("chunked", partial(run, operator)))
    """

    operator = torch.library.custom_op(f"stoker::{name}", forward, mutates_args=(), schema=SCHEMA)
    operator_backward = torch.library.custom_op(
        f"stoker::{name}_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA
    )

    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        _, _, cu_seqlens, _, _, save = rest
        (N, Hv, V), K, S = v.shape, k.shape[2], cu_seqlens.shape[0] - 1
        dtype = compute_dtype(q.dtype)
        shapes = workspace_shapes(N, S, Hv, K, V) if save else ((0,),) * 3
        first, second, third = (q.new_empty(shape, dtype=workspace_dtype(q.dtype)) for shape in shapes)
        return v.new_empty(N, Hv, V), q.new_empty((S, Hv, K, V), dtype=dtype), first, second, third

    def fake_backward(do: Tensor, dfinal: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dinitial = dfinal.new_empty(dfinal.shape, dtype=compute_dtype(rest[0].dtype))
        return *(x.new_empty(x.shape) for x in rest[:5]), dinitial

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, initial_state, scale, save = inputs
        if not save:
            raise RuntimeError(f"{name}: save=False, yet a gradient is asked for; call kernels.delta_op.run")
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.set_materialize_grads(False)  # or every backward would fill cotangents of the workspaces with zeros
        ctx.scale = scale
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype

    def gradients(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # to be asked for once: activation checkpointing recomputes it then
        q, _, v, _, _, cu_seqlens, *_ = saved
        do = torch.zeros_like(v) if do is None else do
        if dfinal is None:
            shape = (cu_seqlens.shape[0] - 1, v.shape[1], q.shape[2], v.shape[2])
            dfinal = q.new_zeros(shape, dtype=compute_dtype(q.dtype))
        *grads, dinitial = operator_backward(do, dfinal, *saved, ctx.scale)
        return *grads, None, None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype), None, None

    operator.register_fake(fake)
    operator_backward.register_fake(fake_backward)
    operator.register_autograd(gradients, setup_context=save_for_backward)
    return operator


def run(
    operator: torch.library.CustomOpDef,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o and the final state; the workspace is kept only if a gradient is asked for."""
    inputs = (q, k, v, g, beta) if initial_state is None else (q, k, v, g, beta, initial_state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    o, final, *_ = operator(q, k, v, g, beta, cu_seqlens, initial_state, scale, save)
    return o, final


def check_shapes(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    *,
    per_channel: bool,
) -> None:
    """Refusal unless the shapes are those of :func:`kernels.gated_delta.op.gated_delta`; ``per_channel``: g has a decay
    for every key channel."""
    N, Hv, V = v.shape
    Hk, K = k.shape[1:]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "q": (q, (N, Hk, K)),
        "k": (k, (N, Hk, K)),
        "g": (g, (N, Hv, K) if per_channel else (N, Hv)),
        "beta": (beta, (N, Hv)),
        "initial_state": (initial_state, (cu_seqlens.shape[0] - 1, Hv, K, V)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise Refusal(f"{op}: {name} has shape {tuple(tensor.shape)}, v and k ask for {shape}")
    tensors = {"v": v, "cu_seqlens": cu_seqlens} | {name: tensor for name, (tensor, _) in expected.items()}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != q.device:
            raise Refusal(f"{op}: {name} is on {tensor.device} and q on {q.device}; move it there")
    if Hk == 0 or Hv % Hk:
        raise Refusal(f"{op}: {Hv} value heads are not a multiple of {Hk} query-key heads")
    if cu_seqlens.shape[0] < 2:
        raise Refusal(
            f"{op}: cu_seqlens has {cu_seqlens.shape[0]} entries; it must rise from 0 to the number of packed tokens, "
            f"{N}: pass the start of every segment and the end of the last"
        )
