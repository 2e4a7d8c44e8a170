"""The prologue compiled: on this machine's processor, on a GPU, and the GPU's code on an emulated thread block.

Rows of the projections are read where they lie. Nothing is saved but the inputs, as in ``chunked``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kernels import native_rows, toolchain
from kernels.native_rows import Backend, Run
from kernels.segments import segment_bounds
from stoker.errors import Refusal

#: Head dims and most taps that the libraries are built for (host/prologue.cpp, cuda/prologue.cu).
HOST_DIMS, HOST_TAPS = {32, 64, 128, 256}, 8
GPU_KEY_DIMS, GPU_TAPS = {32, 64, 128, 256}, 4

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class ShortConv(ctypes.Structure):
    """``struct ShortConv`` of native/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "taps", "y", "dy", "dx", "dtaps")),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("channels", "dim", "unit", "wide_taps")),
    )


_POINTERS = "a b A_log dt_bias cu_seqlens g beta dg dbeta da db dA_log ddt_bias workspace"
_SIZES = "num_tokens num_segments num_v_heads decays width block_tokens gate_tokens"


class PrologueParams(ctypes.Structure):
    """``struct PrologueParams`` of native/params.h."""

    _fields_ = (
        ("convs", ShortConv * 3),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in ("workspace_bytes", "a_stride", "b_stride")),
        *((name, ctypes.c_int32) for name in _SIZES.split()),
    )
    taps: Sequence[Tensor]  # as the convs point at
    held: Sequence[Tensor]  # what else is pointed at, alive as long as the struct


def backends() -> list[Backend]:
    """In order of preference; ``emulated`` runs only where ``registry.force`` asks for it."""
    device = partial(native_rows.run_device, "prologue"), torch.bfloat16
    host = partial(native_rows.run_host, "prologue"), torch.float32
    return [
        Backend("cuda", partial(_forward, *device), partial(_backward, *device), _on_gpu),
        Backend("compiled", partial(_forward, *host), partial(_backward, *host), _on_host),
        Backend("emulated", partial(_forward, *device), partial(_backward, *device), native_rows.never),
    ]


def _on_gpu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    K, V, width = shape
    fits = dtype == torch.bfloat16 and K in GPU_KEY_DIMS and V % 8 == 0 and width <= GPU_TAPS
    return device == "cuda" and fits and toolchain.cuda_library() is not None


def _on_host(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    K, V, width = shape
    fits = dtype in (torch.float32, torch.bfloat16) and {K, V} <= HOST_DIMS and width <= HOST_TAPS
    return device == "cpu" and fits and toolchain.host_library() is not None


def _forward(
    run: Run,
    element: torch.dtype,
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
    N, Hv = len(q), len(A_log)
    heads, decays = (num_qk_heads, num_qk_heads, Hv), a.shape[1] // Hv
    ys = [x.new_empty((N, h, x.shape[1] // h), dtype=element) for x, h in zip((q, k, v), heads, strict=True)]
    g = a.new_empty((N, Hv, decays) if decays > 1 else (N, Hv), dtype=torch.float32)
    beta = b.new_empty((N, Hv), dtype=torch.float32)
    dims = [y.shape[2] for y in ys]
    params = _params(element, dims, (q, k, v), (q_conv, k_conv, v_conv), a, b, A_log, dt_bias, cu_seqlens)
    for conv, y in zip(params.convs, ys, strict=True):
        conv.y = y.data_ptr()
    params.g, params.beta = g.data_ptr(), beta.data_ptr()
    run(params, False, q)
    q_, k_, v_ = (y.to(x.dtype) for x, y in zip((q, k, v), ys, strict=True))
    return q_, k_, v_, g, beta


def _backward(
    run: Run,
    element: torch.dtype,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
    dbeta: Tensor,
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
) -> tuple[Tensor, ...]:
    inputs = (q, k, v, a, b, q_conv, k_conv, v_conv, A_log, dt_bias)
    dys = [_whole(dy, element) for dy in (dq, dk, dv)]
    dims = [dy.shape[2] for dy in dys]
    params = _params(element, dims, (q, k, v), (q_conv, k_conv, v_conv), a, b, A_log, dt_bias, cu_seqlens)
    dxs, dtaps = [x.new_empty(x.shape, dtype=element) for x in (q, k, v)], [torch.empty_like(w) for w in params.taps]
    for conv, dy, dx, dw in zip(params.convs, dys, dxs, dtaps, strict=True):
        conv.dy, conv.dx, conv.dtaps = dy.data_ptr(), dx.data_ptr(), dw.data_ptr()
    dg, dbeta = (_whole(x, torch.float32) for x in (dg, dbeta))
    da, db = (x.new_empty(x.shape, dtype=element) for x in (a, b))
    dA_log, ddt_bias = (x.new_empty(x.shape, dtype=torch.float32) for x in (A_log, dt_bias))
    params.dg, params.dbeta = dg.data_ptr(), dbeta.data_ptr()
    params.da, params.db = da.data_ptr(), db.data_ptr()
    params.dA_log, params.ddt_bias = dA_log.data_ptr(), ddt_bias.data_ptr()
    run(params, True, q)
    gradients = (*dxs, da, db, *dtaps, dA_log, ddt_bias)
    return tuple(gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


def _params(
    element: torch.dtype,
    dims: Sequence[int],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
) -> PrologueParams:
    for name, x in zip("qkvab", (*xs, a, b), strict=True):
        if torch.promote_types(x.dtype, element) != element:
            raise Refusal(f"prologue: {name} is {x.dtype} beside a q of {xs[0].dtype}: give all projections one dtype")
    if cu_seqlens.device.type == "cpu":
        segment_bounds(tuple(cu_seqlens.tolist()), len(a))
    cu = cu_seqlens.to(torch.int32).contiguous()
    xs = [native_rows.readable(x, element) for x in xs]
    a, b = (native_rows.readable(x, element, alignment=1) for x in (a, b))
    A_log, dt_bias = (_whole(x, torch.float32) for x in (A_log, dt_bias))
    taps = [_whole(w, w.dtype if w.dtype == element else torch.float32) for w in weights]
    params = PrologueParams(
        a=a.data_ptr(),
        b=b.data_ptr(),
        A_log=A_log.data_ptr(),
        dt_bias=dt_bias.data_ptr(),
        cu_seqlens=cu.data_ptr(),
        a_stride=a.stride(0),
        b_stride=b.stride(0),
        num_tokens=len(a),
        num_segments=len(cu) - 1,
        num_v_heads=len(A_log),
        decays=a.shape[1],
        width=taps[0].shape[1],
    )
    for conv, x, w, dim in zip(params.convs, xs, taps, dims, strict=True):
        conv.x, conv.x_stride, conv.channels = x.data_ptr(), x.stride(0), x.shape[1]
        conv.taps, conv.wide_taps, conv.dim = w.data_ptr(), w.dtype == torch.float32, dim
    params.convs[0].unit = params.convs[1].unit = True
    params.taps, params.held = taps, (*xs, a, b, A_log, dt_bias, cu)
    return params


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()
