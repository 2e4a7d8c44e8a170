"""Decoding compiled: on this machine's processor, on a GPU, and the GPU's code on an emulated thread block.

States of float32 and bfloat16 are updated where they lie; others, and such as are not contiguous, through a copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels import native_rows, toolchain
from kernels.decode.chunked import decode_chunked
from kernels.registry import Supports

#: Head dims that the libraries are built for (host/decode.cpp, cuda/decode.cu).
HOST_MOST_DIM, HOST_VALUES = 256, 16
GPU_KEY_DIMS, GPU_VALUES = {32, 64, 128, 256}, 64

_SIZES = "batch num_tokens num_qk_heads num_v_heads key_dim value_dim num_states per_channel narrow_state"


class DecodeParams(ctypes.Structure):
    """``struct DecodeParams`` of native/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "g", "beta", "slots", "state", "o")),
        *((name, ctypes.c_int32) for name in _SIZES.split()),
        ("scale", ctypes.c_float),
    )


def backends() -> list[tuple[str, Callable[..., Tensor], Supports]]:
    """(name, function with the signature of ``decode_chunked``, where it can run), in order of preference;
    ``emulated`` runs only where ``registry.force`` asks for it."""
    return [
        ("cuda", partial(_decode, _run_device, torch.bfloat16), _on_gpu),
        ("compiled", partial(_decode, _run_host, torch.float32), _on_host),
        ("emulated", partial(_decode, _run_device, torch.bfloat16), native_rows.never),
    ]


def _on_gpu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    K, V = shape
    fits = dtype == torch.bfloat16 and K in GPU_KEY_DIMS and V % GPU_VALUES == 0
    return device == "cuda" and fits and toolchain.cuda_library() is not None


def _on_host(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    fits = dtype in (torch.float32, torch.bfloat16) and max(shape) <= HOST_MOST_DIM and shape[1] % HOST_VALUES == 0
    return device == "cpu" and fits and toolchain.host_library() is not None


def _decode(
    run: Callable[[DecodeParams, Tensor], None],
    element: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    if state.dtype == torch.float64:  # and so all is computed in float64
        return decode_chunked(q, k, v, g, beta, state, slots, scale)
    B, T, Hv, V = v.shape
    q_, k_, v_ = (x.to(element).contiguous() for x in (q, k, v))
    g_, beta_ = (x.to(torch.float32).contiguous() for x in (g, beta))
    slots_ = None if slots is None else slots.to(torch.int64).contiguous()
    narrow = state.dtype == torch.bfloat16
    state_ = state.to(torch.bfloat16 if narrow else torch.float32).contiguous()
    if state_.data_ptr() % 16:
        state_ = state_.clone()
    o = torch.empty((B, T, Hv, V), dtype=element, device=v.device)
    tensors = {"q": q_, "k": k_, "v": v_, "g": g_, "beta": beta_, "slots": slots_, "state": state_, "o": o}
    params = DecodeParams(
        **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
        batch=B,
        num_tokens=T,
        num_qk_heads=k.shape[2],
        num_v_heads=Hv,
        key_dim=k.shape[3],
        value_dim=V,
        num_states=len(state),
        per_channel=g.dim() == 4,
        narrow_state=narrow,
        scale=scale,
    )
    run(params, q_)
    if state_ is not state:
        state.copy_(state_)
    return o.to(v.dtype)


def _run_host(params: DecodeParams, like: Tensor) -> None:
    library = toolchain.host_library()
    assert library is not None
    call = native_rows.function(library, "stoker_decode", (DecodeParams, ctypes.c_int, ctypes.c_int))
    native_rows.in_threads(params.batch * params.num_v_heads, lambda begin, end: call(params, begin, end))


def _run_device(params: DecodeParams, like: Tensor) -> None:
    native_rows.run_device("decode", params, False, like)
