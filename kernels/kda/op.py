"""Kimi Delta Attention as models call it: :func:`kda`, dispatched by ``kernels.registry``."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kernels import delta_chunks, delta_native, delta_op, registry
from kernels.kda import chunked
from kernels.kda.reference import kda_reference


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Delta rule with a decay per key channel over packed segments; differentiable in everything but ``cu_seqlens``.

    q, k [N, Hk, K]; v [N, Hv, V]; g (log decay, <= 0) [N, Hv, K]; beta [N, Hv]; value head h reads query-key head
    h // (Hv / Hk). cu_seqlens int32 or int64 [S+1], from 0 to N; the state never crosses a boundary, an empty segment
    hands its state on. initial_state [S, Hv, K, V] (zeros if None). scale multiplies q (K^-0.5 if None).
    Returns o [N, Hv, V] in v's dtype and the final state [S, Hv, K, V] in float32 (float64 for float64 inputs).
    Refusal if shapes disagree or, on CPU, cu_seqlens does not rise from 0 to N (a GPU is not waited for to look).
    Compiled for K = V in {32, 64, 128} on CPU in float32 and bfloat16, for K in {64, 128} and V a multiple of 64 on a
    GPU in bfloat16; anything else runs in torch.

    >>> o, state = kda(q, k, v, g, beta, torch.tensor([0, 700, 2048]))
    """
    delta_op.check_shapes("kda", q, k, v, g, beta, cu_seqlens, initial_state, per_channel=True)
    chosen = registry.choose("kda", q.device, q.dtype, (q.shape[2], v.shape[2]))
    o, state = chosen.run(q, k, v, g, beta, cu_seqlens, initial_state, q.shape[2] ** -0.5 if scale is None else scale)
    return o, state


kda_chunked = delta_op.torch_operator("kda_chunked", chunked.forward, chunked.backward, delta_chunks.workspace_shapes)

for _implementation in delta_native.implementations("kda"):
    registry.register("kda", _implementation)
registry.register(
    "kda",
    registry.Implementation(
        "chunked",
        partial(delta_op.run, kda_chunked),
        cost={"cuda": "closed form in torch: many small launches and a host read of cu_seqlens"},
    ),
)
registry.register("kda", registry.Implementation("reference", kda_reference))
