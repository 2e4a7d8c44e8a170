"""The compiled libraries of this process: found or built at first use, loaded once, or a reason why not."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from kernels.toolchain import build as builder
from kernels.toolchain.cache import Entry, find_built_elsewhere
from kernels.toolchain.library import Library
from kernels.toolchain.report import BuildReport
from kernels.toolchain.sources import HOME, HOST, SIMT, best_isa, host_target, known_isas
from kernels.toolchain.tools import ARCHITECTURES, Unavailable, cuda_toolkit, host_compiler
from stoker.errors import Refusal

logger = logging.getLogger(__name__)


def host_library(isa: str | None = None) -> Library | None:
    """The kernels compiled for the best instruction set of this machine's processor, or for `isa`; None if they cannot
    be had here, and `why_not` says why.

    Refusal if they should be there and are not right: a source that does not compile, a cache that cannot be written.
    """
    return _library(host_target(isa) if isa else HOST)


def cuda_library(arch: str | None = None) -> Library | None:
    """The kernels compiled for a GPU architecture, or for the devices of this machine; it loads without a driver too.

    None and Refusal as for `host_library`.
    """
    return _library(arch or "cuda")


def emulated_library() -> Library | None:
    """The CUDA sources compiled for this machine's processor, their thread blocks emulated: to check them, not to run.

    None and Refusal as for `host_library`.
    """
    return _library(SIMT)


def why_not(target: str = HOST) -> str:
    """The reason why there is no library; empty if there is one.

    `target`: "host", "host_avx2" and the like, "simt" (emulated), an architecture, or "cuda" (that of this machine's
    devices).
    """
    found = _attempt(target)
    return found if isinstance(found, str) else ""


def build_all(
    archs: Sequence[str] = tuple(ARCHITECTURES), isas: Sequence[str] | None = None, home: Path = HOME
) -> list[BuildReport]:
    """Find or build a library for each architecture and each instruction set, all of them by default. Refusal as
    above."""
    isas = known_isas() if isas is None else isas
    return [_report(target, home) for target in (*map(host_target, isas), *archs)]


def obtain(target: str, home: Path = HOME) -> Entry:
    """The library's file. Unavailable if it cannot be had here; where there is no compiler, one that another machine
    left in the cache from the same sources will do, and for "host" one for an older instruction set than the best."""
    sets = known_isas()
    hosts = [*map(host_target, sets)]
    if target not in (HOST, *hosts, SIMT, *ARCHITECTURES):
        known = ", ".join((*hosts, SIMT, *ARCHITECTURES))
        raise Refusal(f"kernels are not built for {target!r}: choose from {known}")
    best, *older = hosts[sets.index(best_isa()) :: -1] if target == HOST else [target]
    recipe = builder.recipe(best, home)
    try:
        tools = cuda_toolkit(target) if target in ARCHITECTURES else host_compiler()
    except Unavailable as missing:
        alike = (find_built_elsewhere(builder.recipe(name, home).contents) for name in (best, *older))
        entry = next(filter(None, alike), None)
        if entry is None:
            raise
        logger.info("%s kernels: %s; %s was built by %s", target, missing, entry.library, entry.record["tools"])
        return entry
    return builder.build(recipe, tools)


def _library(target: str) -> Library | None:
    found = _attempt(target)
    if isinstance(found, Library):
        return found
    _tell(target, found)
    return None


@cache
def _tell(target: str, reason: str) -> None:
    """Once: what runs instead is right, and slower."""
    logger.warning("no compiled kernels (%s): %s; the torch forms run instead", target, reason)


@cache
def _attempt(target: str) -> Library | str:
    if os.environ.get("STOKER_NATIVE") == "0":
        return "STOKER_NATIVE=0"
    try:
        entry = obtain(_device_architecture() if target == "cuda" else target)
    except Unavailable as missing:
        return str(missing)
    for warning in BuildReport.of(entry).warnings:
        logger.warning("%s kernels: %s", entry.record["target"], warning)
    return Library(entry.library, entry.record["target"])


def _report(target: str, home: Path) -> BuildReport:
    try:
        return BuildReport.of(obtain(target, home), look=True)
    except Unavailable as missing:
        return BuildReport(target, None, reason=str(missing))


def _device_architecture() -> str:
    """Of this machine's first device. NVML is asked: the CUDA runtime, once started, does not survive a fork."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise Unavailable("no NVIDIA driver") from None
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
        or nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    )
    if failed:
        raise Unavailable(f"no CUDA device (NVML error {failed})")
    capability = (major.value, minor.value)
    for arch, known in ARCHITECTURES.items():
        if capability in known.capabilities:
            return arch
    raise Unavailable(
        f"device of compute capability {capability[0]}.{capability[1]}: kernels are built for 9.0 and 10.x"
    )
