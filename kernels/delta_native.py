"""The delta rules compiled: on this machine's processor, on a GPU, and the GPU's code on an emulated thread block.

The C++ is one set of tile programs (``kernels/<operator>/native``); what differs here is who runs them. On a processor
heads are shared out over torch's threads. Nothing here reads a tensor's content, so a CUDA stream is never waited for.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from kernels import delta_op, toolchain
from kernels.chunk_size import CHUNK
from kernels.native_rows import in_threads, never
from kernels.precision import compute_dtype
from kernels.registry import Implementation, Supports
from kernels.segments import segment_bounds
from kernels.toolchain.library import NativeError

logger = logging.getLogger(__name__)

#: Head dims (K, V) that the libraries are built for.
HOST_DIMS = {(32, 32), (64, 64), (128, 128)}
MODEL_DIMS = (64, 64)
GPU_KEY_DIMS, GPU_VALUE_BLOCK = {64, 128}, 64

_POINTERS = (
    "q k v g beta cu_seqlens initial o final states errors solved d_o d_final dq dk dv dg dbeta dinitial workspace"
)
_SIZES = "num_tokens num_segments num_qk_heads num_v_heads key_dim value_dim save value_block"


class DeltaParams(ctypes.Structure):
    """``struct DeltaParams`` of native/delta_params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        ("workspace_bytes", ctypes.c_int64),
        *((f"{name}_stride", ctypes.c_int64) for name in ("q", "k", "v", "o", "d_o")),
        *((name, ctypes.c_int32) for name in _SIZES.split()),
        ("scale", ctypes.c_double),
    )


#: Runs the compiled forward (False) or backward (True) of an operator on the tensors that DeltaParams points at; the
#: tensor tells dtype and device.
Call = Callable[[str, DeltaParams, bool, Tensor], None]
#: The same of one operator.
Run = Callable[[DeltaParams, bool, Tensor], None]


def slot_shapes(
    matrices: int, num_tokens: int, num_segments: int, num_v_heads: int, key_dim: int, value_dim: int
) -> tuple[tuple[int, ...], ...]:
    """States that enter the chunks, errors, and T (and N_q where ``matrices`` is 2), by slot (native/delta_params.h);
    some slots stay unused."""
    slots = num_tokens // CHUNK + num_segments
    return (
        (slots, num_v_heads, key_dim, value_dim),
        (slots, num_v_heads, CHUNK, value_dim),
        (slots, num_v_heads, matrices, CHUNK, CHUNK),
    )


#: C x C matrices that an operator keeps of a chunk.
MATRICES = {"gated_delta": 1, "kda": 2}


def implementations(op: str) -> list[Implementation]:
    """Of an operator, in order of preference. "hopper" is the GPU's code with what only that architecture has: products
    of warpgroups and bulk copies; "wgmma" has the products alone.

    ``emulated`` and ``model`` run only where ``registry.force`` asks for them: the GPU's code on an emulated block, and
    the programs in double or with bfloat16 tiles on the host."""
    return [
        _cuda(op, "cuda"),
        _cuda(op, "hopper", "_hopper"),
        _cuda(op, "wgmma", "_wgmma"),
        _host(op, "compiled"),
        _emulated(op, "emulated"),
        _emulated(op, "emulated_hopper", "_hopper"),
        _emulated(op, "emulated_wgmma", "_wgmma"),
        _model(op, "model"),
    ]


def _host(op: str, name: str) -> Implementation:
    def takes(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        return device == "cpu" and dtype in (torch.float32, torch.bfloat16) and shape in HOST_DIMS

    def supports(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        return takes(device, dtype, shape) and toolchain.host_library() is not None

    return Implementation(name, _operator(op, name, _run_host, compute_dtype), supports, takes=takes)


def _model(op: str, name: str) -> Implementation:
    def takes(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        return device == "cpu" and dtype in (torch.float64, torch.bfloat16) and shape == MODEL_DIMS

    return Implementation(name, _operator(op, name, _run_model), never, takes=takes)


def _device_takes(where: str) -> Supports:
    def takes(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        fits = shape[0] in GPU_KEY_DIMS and shape[1] % GPU_VALUE_BLOCK == 0
        return device == where and dtype == torch.bfloat16 and fits

    return takes


def _cuda(op: str, name: str, suffix: str = "") -> Implementation:
    """``suffix``: behind the names of its entry points, which not every architecture's library has."""
    takes = _device_takes("cuda")

    def supports(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        library = toolchain.cuda_library() if takes(device, dtype, shape) else None
        return library is not None and library.has(f"stoker_{op}_forward{suffix}")

    return Implementation(name, _operator(op, name, partial(_run_cuda, suffix)), supports, takes=takes)


def _emulated(op: str, name: str, suffix: str = "") -> Implementation:
    operator = _operator(op, name, partial(_run_emulated, suffix))
    return Implementation(name, operator, never, takes=_device_takes("cpu"))


def _unchanged(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _operator(
    op: str, name: str, call: Call, element_of: Callable[[torch.dtype], torch.dtype] = _unchanged
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The torch operator over ``call``. ``element_of``: dtype of q -> that of q, k, v and workspaces in the C++."""
    run, shapes = partial(call, op), partial(slot_shapes, MATRICES[op])
    forward, backward = partial(_forward, run, shapes, element_of), partial(_backward, run, element_of)
    return partial(delta_op.run, delta_op.torch_operator(f"{op}_{name}", forward, backward, shapes, element_of))


def _forward(
    run: Run,
    workspace_shapes: delta_op.WorkspaceShapes,
    element_of: Callable[[torch.dtype], torch.dtype],
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
    real, element = compute_dtype(q.dtype), element_of(q.dtype)
    q_, k_, v_ = (_rows(x.to(element)) for x in (q, k, v))
    g_, beta_ = (_aligned(x.to(real)) for x in (g, beta))
    cu = cu_seqlens.to(torch.int32).contiguous()
    initial = None if initial_state is None else initial_state.to(real).contiguous()
    o, final = v_.new_empty(N, Hv, V), v.new_empty((S, Hv, K, V), dtype=real)
    shapes = workspace_shapes(N, S, Hv, K, V)
    states, errors = (q.new_empty(shape if save else 0, dtype=element) for shape in shapes[:2])
    solved = q.new_empty(shapes[2], dtype=element)  # some programs hand it from one kernel to the next
    tensors = {"g": g_, "beta": beta_, "initial": initial, "o": o, "final": final}
    params = _params(q_, k_, v_, cu, scale, states=states, errors=errors, solved=solved, **tensors)
    params.save = save
    run(params, False, q_)
    return o.to(v.dtype), final, states, errors, solved if save else solved.new_empty(0)


def _backward(
    run: Run,
    element_of: Callable[[torch.dtype], torch.dtype],
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    states: Tensor,
    errors: Tensor,
    solved: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    real, element = compute_dtype(q.dtype), element_of(q.dtype)
    q_, k_, v_, do_ = (_rows(x.to(element)) for x in (q, k, v, do))
    g_, beta_, dfinal_ = (_aligned(x.to(real)) for x in (g, beta, dfinal))
    cu = cu_seqlens.to(torch.int32).contiguous()
    dq, dk, dv = (x.new_empty(x.shape, dtype=element) for x in (q, k, v))
    dg, dbeta, dinitial = (x.new_empty(x.shape, dtype=real) for x in (g, beta, dfinal))
    gradients = {"dq": dq, "dk": dk, "dv": dv, "dg": dg, "dbeta": dbeta, "dinitial": dinitial}
    saved = {"states": states, "errors": errors, "solved": solved}
    params = _params(q_, k_, v_, cu, scale, g=g_, beta=beta_, d_o=do_, d_final=dfinal_, **saved, **gradients)
    params.d_o_stride = do_.stride(0)
    run(params, True, q_)
    grads = zip((dq, dk, dv, dg, dbeta), (q, k, v, g, beta), strict=True)
    dq, dk, dv, dg, dbeta = (grad.to(x.dtype) for grad, x in grads)
    return dq, dk, dv, dg, dbeta, dinitial


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _rows(x: Tensor) -> Tensor:
    """x [N, heads, dim] with tokens any distance apart but heads and dims side by side, 16-byte aligned."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if x.stride()[1:] == (x.shape[2], 1) and aligned else x.clone(memory_format=torch.contiguous_format)


def _params(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, **tensors: Tensor | None) -> DeltaParams:
    N, Hv, V = v.shape
    tensors |= {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}
    return DeltaParams(
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        o_stride=Hv * V,
        num_tokens=N,
        num_segments=len(cu_seqlens) - 1,
        num_qk_heads=k.shape[1],
        num_v_heads=Hv,
        key_dim=k.shape[2],
        value_dim=V,
        scale=scale,
    )


def _run_host(op: str, params: DeltaParams, back: bool, q: Tensor) -> None:
    library = toolchain.host_library()
    assert library is not None
    _run_heads(library, op, params, back)


def _run_model(op: str, params: DeltaParams, back: bool, q: Tensor) -> None:
    library = toolchain.host_library("baseline")
    if library is None:
        raise RuntimeError(f"no model of the kernels: {toolchain.why_not('host_baseline')}")
    _run_heads(library, f"{op}_{'double' if q.dtype == torch.float64 else 'bf16'}", params, back)


def _run_heads(library: toolchain.Library, name: str, params: DeltaParams, back: bool) -> None:
    bounds = (ctypes.c_int32 * (params.num_segments + 1)).from_address(params.cu_seqlens)
    segment_bounds(tuple(bounds), params.num_tokens)
    run = library.function(f"stoker_{name}_{library.isa}", DeltaParams, *[ctypes.c_int] * 3)
    heads = params.num_qk_heads if back else params.num_v_heads
    in_threads(heads, lambda begin, end: run(params, back, begin, end))


def _run_cuda(suffix: str, op: str, params: DeltaParams, back: bool, q: Tensor) -> None:
    library = toolchain.cuda_library()
    assert library is not None
    with torch.cuda.device(q.device):
        _run_device(library, suffix, op, params, back, q, torch.cuda.current_stream(q.device).cuda_stream)


#: Of native/abi.h: the driver makes no map of the tensors, which bulk copies need; what runs in its place.
NO_TENSOR_MAP, WITHOUT_MAPS = -1000002, "_wgmma"


def _run_emulated(suffix: str, op: str, params: DeltaParams, back: bool, q: Tensor) -> None:
    library = toolchain.emulated_library()
    if library is None:
        raise RuntimeError(f"no emulated kernels: {toolchain.why_not('simt')}")
    _run_device(library, suffix, op, params, back, q, emulation_seed)


#: In which order the emulated library runs blocks and threads.
emulation_seed = 1


def _run_device(
    library: toolchain.Library, suffix: str, op: str, params: DeltaParams, back: bool, q: Tensor, stream: int
) -> None:
    try:
        _call_device(library, suffix, op, params, back, q, stream)
    except NativeError as error:
        if error.code != NO_TENSOR_MAP or suffix == WITHOUT_MAPS:
            raise
        _tell(op, str(error))
        _call_device(library, WITHOUT_MAPS, op, params, back, q, stream)


@cache
def _tell(op: str, reason: str) -> None:
    """Once: what runs instead is right, and somewhat slower."""
    logger.warning("kernel %s: %s; tiles are copied by threads instead", op, reason)


def _call_device(
    library: toolchain.Library, suffix: str, op: str, params: DeltaParams, back: bool, q: Tensor, stream: int
) -> None:
    if back:
        size = library.query(f"stoker_{op}_workspace{suffix}", DeltaParams)(params)
        workspace = q.new_empty((size,), dtype=torch.uint8)
        params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    name = f"stoker_{op}_{'backward' if back else 'forward'}{suffix}"
    library.function(name, DeltaParams, ctypes.c_void_p)(params, stream)
