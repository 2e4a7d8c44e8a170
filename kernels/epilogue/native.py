"""The epilogue compiled: on this machine's processor, on a GPU, and the GPU's code on an emulated thread block.

Rows are read where they lie. Nothing is saved but the inputs, as in ``chunked``.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from kernels import native_rows, toolchain
from kernels.native_rows import Backend, Run
from stoker.errors import Refusal

#: Head dims that the libraries are built for (host/epilogue.cpp, cuda/epilogue.cu).
DIMS = {32, 64, 128, 256}

_POINTERS = "o z weight y dy d_o dz dweight workspace"


class EpilogueParams(ctypes.Structure):
    """``struct EpilogueParams`` of native/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in ("workspace_bytes", "o_stride", "z_stride", "dy_stride")),
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_heads", "dim", "silu", "wide_weight")),
        ("eps", ctypes.c_float),
    )
    held: tuple[Tensor, ...]  # the inputs that are pointed at, alive as long as the struct


def backends() -> list[Backend]:
    """In order of preference; ``emulated`` runs only where ``registry.force`` asks for it."""
    device = partial(native_rows.run_device, "epilogue"), torch.bfloat16
    host = partial(native_rows.run_host, "epilogue"), torch.float32
    return [
        Backend("cuda", partial(_forward, *device), partial(_backward, *device), _on_gpu),
        Backend("compiled", partial(_forward, *host), partial(_backward, *host), _on_host),
        Backend("emulated", partial(_forward, *device), partial(_backward, *device), native_rows.never),
    ]


def _on_gpu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    fits = dtype == torch.bfloat16 and shape[0] in DIMS
    return device == "cuda" and fits and toolchain.cuda_library() is not None


def _on_host(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    fits = dtype in (torch.float32, torch.bfloat16) and shape[0] in DIMS
    return device == "cpu" and fits and toolchain.host_library() is not None


def _forward(
    run: Run, element: torch.dtype, o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str
) -> Tensor:
    params, _ = _params(element, o, z, weight, eps, activation)
    y = o.new_empty(o.shape, dtype=element)
    params.y = y.data_ptr()
    run(params, False, o)
    return y.to(o.dtype)


def _backward(
    run: Run, element: torch.dtype, dy: Tensor, o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    params, weight_ = _params(element, o, z, weight, eps, activation)
    dy_ = native_rows.readable(dy, element)
    do, dz = (x.new_empty(x.shape, dtype=element) for x in (o, z))
    dweight = torch.empty_like(weight_)
    params.dy, params.dy_stride = dy_.data_ptr(), dy_.stride(0)
    params.d_o, params.dz, params.dweight = do.data_ptr(), dz.data_ptr(), dweight.data_ptr()
    run(params, True, o)
    return do.to(o.dtype), dz.to(z.dtype), dweight.to(weight.dtype)


def _params(
    element: torch.dtype, o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[EpilogueParams, Tensor]:
    """The struct, and the weight as it is handed over."""
    for name, x in (("o", o), ("z", z)):
        if torch.promote_types(x.dtype, element) != element:
            raise Refusal(f"epilogue: {name} is {x.dtype}, computed in {element}: give o and z one dtype")
    o, z = (native_rows.readable(x, element) for x in (o, z))
    weight = weight.to(weight.dtype if weight.dtype == element else torch.float32).contiguous()
    params = EpilogueParams(
        o=o.data_ptr(),
        z=z.data_ptr(),
        weight=weight.data_ptr(),
        o_stride=o.stride(0),
        z_stride=z.stride(0),
        num_tokens=len(o),
        num_heads=o.shape[1],
        dim=o.shape[2],
        silu=activation == "silu",
        wide_weight=weight.dtype == torch.float32,
        eps=eps,
    )
    params.held = (o, z, weight)
    return params, weight
