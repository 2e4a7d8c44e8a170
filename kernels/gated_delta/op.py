"""The gated delta rule as models call it: :func:`gated_delta`, dispatched by ``kernels.registry``."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kernels import delta_chunks, delta_native, delta_op, registry
from kernels.gated_delta import chunked
from kernels.gated_delta.reference import gated_delta_reference


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
    Refusal if shapes disagree or, on CPU, cu_seqlens does not rise from 0 to N (a GPU is not waited for to look).
    Compiled for K = V in {32, 64, 128} on CPU in float32 and bfloat16, for K in {64, 128} and V a multiple of 64 on a
    GPU in bfloat16; anything else runs in torch.

    >>> o, state = gated_delta(q, k, v, g, beta, torch.tensor([0, 700, 2048]))
    """
    delta_op.check_shapes("gated_delta", q, k, v, g, beta, cu_seqlens, initial_state, per_channel=False)
    chosen = registry.choose("gated_delta", q.device, q.dtype, (q.shape[2], v.shape[2]))
    o, state = chosen.run(q, k, v, g, beta, cu_seqlens, initial_state, q.shape[2] ** -0.5 if scale is None else scale)
    return o, state


gated_delta_chunked = delta_op.torch_operator(
    "gated_delta_chunked", chunked.forward, chunked.backward, delta_chunks.workspace_shapes
)

for _implementation in delta_native.implementations("gated_delta"):
    registry.register("gated_delta", _implementation)
registry.register(
    "gated_delta",
    registry.Implementation(
        "chunked",
        partial(delta_op.run, gated_delta_chunked),
        cost={"cuda": "closed form in torch: many small launches and a host read of cu_seqlens"},
    ),
)
registry.register("gated_delta", registry.Implementation("reference", gated_delta_reference))
