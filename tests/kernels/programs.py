"""Small C++ programs on the headers of kernels/native, compiled as the toolchain compiles the kernels."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.toolchain.build import HOST_LINK, SIMT_FLAGS
from kernels.toolchain.sources import HOME, ISA_FLAGS
from kernels.toolchain.tools import Unavailable, host_compiler

SOURCES = Path(__file__).parent / "native_programs"


def executable(source: str, place: Path) -> Path:
    """``source`` of native_programs as a program in the folder ``place``; the test is skipped without a compiler."""
    return _compile(source, place / Path(source).stem, [])


def library(source: str, place: Path, isa: str = "baseline", *defined: str) -> ctypes.CDLL:
    """``source`` as a library for an instruction set, with names ``defined`` for the preprocessor."""
    flags = [*ISA_FLAGS[isa], f"-DSTOKER_ISA={isa}", *(f"-D{name}" for name in defined), *HOST_LINK]
    return ctypes.CDLL(str(_compile(source, place / f"{Path(source).stem}_{isa}.so", flags)))


def _compile(source: str, to: Path, flags: list[str]) -> Path:
    try:
        compiler = host_compiler()
    except Unavailable as missing:
        pytest.skip(str(missing))
    command = [*compiler.command, *SIMT_FLAGS, f"-I{HOME}", str(SOURCES / source), *flags, "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """Of an array whose rows are contiguous."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of numbers that bfloat16 holds exactly."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)
