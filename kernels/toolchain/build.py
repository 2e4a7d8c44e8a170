"""From sources to a library: what is compiled for a target, with which flags, and what is noted about the result."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kernels.toolchain import cache, ptxas, sources
from kernels.toolchain.sources import HOST, SIMT, Unit
from kernels.toolchain.tools import CudaToolkit, HostCompiler, Unavailable
from stoker import canonical
from stoker.errors import Refusal

#: Never -ffast-math: it would let the compiler reorder sums and drop NaN.
HOST_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
)
HOST_LINK = ("-shared", "-pthread", "-Wl,-z,defs")
#: The CUDA sources as C++, their thread blocks emulated (kernels/native/simt.h).
SIMT_FLAGS = (*HOST_FLAGS, "-Wno-unknown-pragmas", "-DSTOKER_SIMT", "-x", "c++")
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
CUDA_LINK = ("-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """All that decides a library's bytes but the tools: `target` is that of an instruction set ("host_avx2"), SIMT, or
    a GPU architecture ("sm_90a")."""

    target: str
    home: Path
    units: tuple[Unit, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    @cached_property
    def contents(self) -> str:
        """Hash of target, machine, sources, headers and flags."""
        units = [[unit.source, unit.isa] for unit in self.units]
        isas = {unit.isa: sources.ISA_FLAGS[unit.isa] for unit in self.units if unit.isa}
        files = sources.hashes(self.home, list(self.units))
        flags = [self.flags, self.link_flags, isas]
        return canonical.sha256([self.target, platform.machine(), units, flags, files])

    def key(self, versions: Mapping[str, str]) -> str:
        """Name of its entry in the cache."""
        return f"{self.target}-{canonical.sha256([cache.VERSION, self.contents, dict(versions)])[:32]}"


def recipe(target: str, home: Path) -> Recipe:
    """What there is to build for a target. Unavailable if the package has no source for it."""
    kind, _, which = target.partition("_")
    if kind == HOST:
        found = Recipe(target, home, tuple(sources.host_units(home, which)), HOST_FLAGS, HOST_LINK)
    elif kind == SIMT:
        found = Recipe(target, home, tuple(sources.cuda_units(home)), SIMT_FLAGS, HOST_LINK)
    else:
        flags = (*CUDA_FLAGS, f"-gencode=arch=compute_{which},code=sm_{which}")
        found = Recipe(target, home, tuple(sources.cuda_units(home, target)), flags, CUDA_LINK)
    if not found.units:
        raise Unavailable(f"no {'C++' if kind == HOST else 'CUDA'} sources under {home}")
    return found


def build(recipe: Recipe, tools: HostCompiler | CudaToolkit) -> cache.Entry:
    """The library of a recipe, from the cache or made now. Refusal if a source does not compile, with what the compiler
    says, or if the cache cannot be written."""
    return cache.obtain(recipe.key(tools.versions), recipe.target, lambda place: _make(recipe, tools, place))


def _make(recipe: Recipe, tools: HostCompiler | CudaToolkit, place: Path) -> dict[str, Any]:
    logger.info("building the %s kernels, once: %d objects", recipe.target, len(recipe.units))
    start = time.perf_counter()
    scratch = place / "scratch"
    scratch.mkdir()
    environment = tools.environment(scratch) | {"TMPDIR": str(scratch)}
    objects = [scratch / f"{index}.o" for index in range(len(recipe.units))]
    commands = [
        [*tools.command, *recipe.flags, *_isa(unit), f"-I{recipe.home}", "-c", str(recipe.home / unit.source)]
        for unit in recipe.units
    ]
    compiled = _parallel([[*command, "-o", str(o)] for command, o in zip(commands, objects)], environment)
    library = place / f"libstoker_{recipe.target}.so"
    link = [*tools.command, *recipe.link_flags, *map(str, objects), *tools.link_words, "-o", str(library)]
    (linked,) = _parallel([link], environment)
    said = "\n".join(step.output for step in [*compiled, linked])
    record = {
        "target": recipe.target,
        "contents": recipe.contents,
        "library": library.name,
        "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "tools": dict(tools.versions),
        "warnings": list(dict.fromkeys(re.findall(r"^.*(?:\bwarning\b|\(C75\d\d\)).*$", said, re.MULTILINE))),
        "objects": [[unit.source, unit.isa, step.seconds] for unit, step in zip(recipe.units, compiled)],
        "kernels": _kernels(recipe, compiled),
        "seconds": round(time.perf_counter() - start, 2),
    }
    shutil.rmtree(scratch)
    return record


def _isa(unit: Unit) -> list[str]:
    return [*sources.ISA_FLAGS[unit.isa], f"-DSTOKER_ISA={unit.isa}"] if unit.isa else []


@dataclass(frozen=True)
class _Step:
    output: str
    seconds: float


def _parallel(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list[_Step]:
    """Run commands side by side, one a core. The first that fails is refused, and those not yet begun are dropped."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        steps = [pool.submit(_run, command, environment) for command in commands]
        try:
            return [step.result() for step in steps]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(command: Sequence[str], environment: Mapping[str, str]) -> _Step:
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    output = done.stdout + done.stderr
    if done.returncode != 0:
        source = command[command.index("-c") + 1] if "-c" in command else "linking"
        excerpt = "\n".join(output.splitlines()[:20])
        raise Refusal(
            f"{source}: {command[0]} failed with code {done.returncode}; correct the source, choose another compiler "
            f"(CXX, CUDA_HOME), or set STOKER_NATIVE=0 to run without compiled kernels\n{excerpt}"
        )
    return _Step(output, round(time.perf_counter() - start, 2))


def _kernels(recipe: Recipe, compiled: Sequence[_Step]) -> list[dict[str, Any]]:
    """Every function that ptxas reported, with its source."""
    kernels = [
        {**dataclasses.asdict(function), "source": unit.source}
        for unit, step in zip(recipe.units, compiled)
        for function in ptxas.functions(step.output)
    ]
    names = _demangled([kernel["symbol"] for kernel in kernels])
    return [{**kernel, "name": name} for kernel, name in zip(kernels, names)]


def _demangled(symbols: Sequence[str]) -> list[str]:
    """Names as in the source, without return type and parameters; symbols as they are where there is no c++filt."""
    if not symbols or not (program := shutil.which("c++filt")):
        return list(symbols)
    done = subprocess.run([program, "-p", *symbols], capture_output=True, text=True, check=True)
    return [re.sub(r"^\w+ (?=[\w:]+<)", "", line) for line in done.stdout.splitlines()]
