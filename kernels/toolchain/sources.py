"""The C++ and CUDA sources of the package, the objects they become, and the hash of what goes into a library."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kernels.toolchain.tools import ARCHITECTURES
from stoker.errors import Refusal

#: Of this machine's processor: the kernels, and the CUDA sources with their thread blocks emulated.
HOST, SIMT = "host", "simt"
#: The folder that is searched, and the include path of every source.
HOME = Path(__file__).resolve().parent.parent
#: Instruction set -> flags of g++ and clang++, oldest first; processors other than x86-64 have their baseline only.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx2", "-mf16c"),
}
HEADERS = {".h", ".hpp", ".cuh"}
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Unit:
    """One object file: a source, named relative to the home, and the instruction set if it is compiled for several."""

    source: str
    isa: str | None = None


def known_isas(machine: str | None = None) -> list[str]:
    """The instruction sets that a kind of machine, by default this one, has libraries for, oldest first."""
    return list(ISA_FLAGS) if (machine or platform.machine()) in ("x86_64", "AMD64") else ["baseline"]


@cache
def best_isa() -> str:
    """The newest set of ISA_FLAGS whose instructions this machine's processor has all of; the baseline where no Linux
    says what it has."""
    try:
        said = CPUINFO.read_text()
    except FileNotFoundError:
        return "baseline"
    found = re.search(r"^flags\s*:(.*)$", said, re.MULTILINE)
    features = {f"-m{feature}" for feature in found[1].split()} if found else set()
    return next(isa for isa, flags in reversed(ISA_FLAGS.items()) if features.issuperset(flags))


def host_target(isa: str) -> str:
    """Every set has a library of its own, so a machine compiles what its processor runs best and nothing else."""
    return f"{HOST}_{isa}"


def all_targets() -> list[str]:
    """What libraries are built for, on this machine or another."""
    return [*map(host_target, ISA_FLAGS), SIMT, *ARCHITECTURES]


def host_units(home: Path, isa: str) -> list[Unit]:
    """Every ``host/*.cpp`` of the library for a set: those with a first line ``// isa: baseline avx2 avx512`` that has
    it among its words are compiled for it, those without such a line for any processor."""
    units = []
    for path in sorted(home.rglob("host/*.cpp")):
        isas = _first_line(path, "isa", "instruction set", ISA_FLAGS)
        if not isas or isa in isas:
            units.append(Unit(path.relative_to(home).as_posix(), isa if isas else None))
    return units


def cuda_units(home: Path, arch: str | None = None) -> list[Unit]:
    """Every ``cuda/*.cu`` that ``arch`` is compiled from, or all: a first line ``// arch: sm_90a`` says for which
    architectures alone a source is."""
    units = []
    for path in sorted(home.rglob("cuda/*.cu")):
        archs = _first_line(path, "arch", "architecture", ARCHITECTURES)
        if arch is None or not archs or arch in archs:
            units.append(Unit(path.relative_to(home).as_posix()))
    return units


def _first_line(path: Path, key: str, what: str, known: Collection[str]) -> list[str]:
    """The words behind ``// <key>:``, if a source begins so. Refusal, calling it a `what`, if one is not `known`."""
    with open(path, encoding="utf-8") as file:
        found = re.match(rf"//\s*{key}:(.*)", file.readline())
    words = found[1].split() if found else []
    for word in words:
        if word not in known:
            raise Refusal(f"{path}, line 1: {what} {word!r} is unknown: choose from {', '.join(known)}")
    return words


def hashes(home: Path, units: list[Unit]) -> dict[str, str]:
    """SHA-256 of every file that the objects may be made of: their sources, and all headers, by relative name."""
    headers = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.suffix in HEADERS]
    names = sorted({*headers, *(unit.source for unit in units)})
    return {name: hashlib.sha256((home / name).read_bytes()).hexdigest() for name in names}
