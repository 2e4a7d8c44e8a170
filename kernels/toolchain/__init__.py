"""Compiled libraries of the C++ and CUDA sources in this package: built once for each content, loaded by ctypes.
Not here: torch, tensors, or which implementation of an operator runs; a library is functions on structs of pointers.
Start with ``libraries.py``, then ``build.py``; ``python -m kernels.toolchain`` shows how a build came out."""

from kernels.toolchain.libraries import build_all, cuda_library, emulated_library, host_library, why_not
from kernels.toolchain.library import Library
from kernels.toolchain.report import BuildReport
from kernels.toolchain.sources import best_isa

__all__ = [
    "BuildReport",
    "Library",
    "best_isa",
    "build_all",
    "cuda_library",
    "emulated_library",
    "host_library",
    "why_not",
]
