"""How compiled row operators (prologue, epilogue, decode) are run: by this machine's processor, by a GPU, and, to check
the GPU's code, on an emulated thread block.

Their C++ is row programs (``kernels/<operator>/native``), shared by the host's and the GPU's library. Nothing here
reads a tensor's content, so a CUDA stream is never waited for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import toolchain
from kernels.registry import Supports

#: What a host entry point is asked for (``Stage`` of the C++).
FORWARD, BACKWARD, SUMS = range(3)
#: In which order the emulated library runs blocks and threads.
emulation_seed = 1

#: Tokens of a block on the host (``kBlockTokens`` of the C++).
HOST_BLOCK = 64

#: Runs the compiled forward (False) or backward (True) on the tensors of a parameter struct; any tensor of the device.
Run = Callable[[ctypes.Structure, bool, Tensor], None]


@dataclass(frozen=True)
class Backend:
    """One way to run an operator: ``forward`` and ``backward`` take and return what those of ``chunked`` do."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Supports


def never(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Runs only where ``registry.force`` asks for it."""
    return False


@cache
def function(library: toolchain.Library, name: str, types: tuple[Any, ...]) -> Callable[..., None]:
    """``library.function``, looked up once: for a single token that costs more than the kernel."""
    return library.function(_entry(library, name), *types)


@cache
def _entry(library: toolchain.Library, name: str) -> str:
    """As the library calls it: a host's says its instruction set."""
    return f"{name}_{library.isa}" if library.isa else name


def run_host(op: str, params: Any, back: bool, like: Tensor) -> None:
    """Blocks of tokens shared out over torch's threads; sums over blocks do not depend on their number."""
    library = toolchain.host_library()
    assert library is not None
    call = function(library, f"stoker_{op}", (type(params), *[ctypes.c_int] * 3))
    blocks = -(-params.num_tokens // HOST_BLOCK)
    if not back:
        in_threads(blocks, lambda begin, end: call(params, FORWARD, begin, end))
        return
    _workspace = _hang_workspace(library, op, params, like)
    in_threads(blocks, lambda begin, end: call(params, BACKWARD, begin, end))
    call(params, SUMS, 0, blocks)


def run_device(op: str, params: Any, back: bool, like: Tensor) -> None:
    """On the current stream of the GPU where ``like`` lies; on an emulated one if it lies on CPU."""
    if like.device.type == "cpu":
        emulated = toolchain.emulated_library()
        if emulated is None:
            raise RuntimeError(f"no emulated kernels: {toolchain.why_not('simt')}")
        _launch(emulated, op, params, back, like, emulation_seed)
        return
    library = toolchain.cuda_library()
    assert library is not None
    with torch.cuda.device(like.device):
        _launch(library, op, params, back, like, torch.cuda.current_stream(like.device).cuda_stream)


def _launch(library: toolchain.Library, op: str, params: Any, back: bool, like: Tensor, stream: int) -> None:
    _workspace = _hang_workspace(library, op, params, like) if back else None
    name = f"stoker_{op}_{'backward' if back else 'forward'}"
    function(library, name, (type(params), ctypes.c_void_p))(params, stream)


def _hang_workspace(library: toolchain.Library, op: str, params: Any, like: Tensor) -> Tensor:
    """Memory for the backward, which the caller holds until the last call is made."""
    size = library.query(_entry(library, f"stoker_{op}_workspace"), type(params))(params)
    workspace = like.new_empty((size,), dtype=torch.uint8)
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    return workspace


def in_threads(count: int, work: Callable[[int, int], None]) -> None:
    """``work(begin, end)`` over equal parts of ``count``, one for each of torch's threads."""
    parts = min(torch.get_num_threads(), count)
    ranges = [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
    if parts == 1:
        work(*ranges[0])
    elif parts:
        list(_pool(os.getpid(), parts).map(lambda part: work(*part), ranges))


def readable(x: Tensor, dtype: torch.dtype, alignment: int = 16) -> Tensor:
    """x [N, ...] as kernels read it: rows any distance apart, each aligned to so many bytes, the rest contiguous."""
    x = x.to(dtype)
    aligned = x.data_ptr() % alignment == 0 and x.stride(0) * x.element_size() % alignment == 0
    inner = x[:1].is_contiguous()
    return x if inner and aligned else x.clone(memory_format=torch.contiguous_format)


@cache
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, "stoker-kernels")
