"""The C++ and CUDA sources of the package, the objects they become, and the hash of what goes into a library."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import Refusal

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


def host_units(home: Path, machine: str | None = None) -> list[Unit]:
    """Every ``host/*.cpp``, once, or once for each instruction set of a first line ``// isa: baseline avx2 avx512``.

    In the order in which they are linked, the oldest instruction set first: of an inline function that several objects
    carry the linker keeps the first, and that one must run on every machine.
    """
    x86 = (machine or platform.machine()) in ("x86_64", "AMD64")
    units = []
    for path in sorted(home.rglob("host/*.cpp")):
        source = path.relative_to(home).as_posix()
        isas: list[str | None] = [*_instruction_sets(path)] or [None]
        for isa in isas:
            if isa not in (None, *ISA_FLAGS):
                raise Refusal(f"{path}, line 1: instruction set {isa!r} is unknown: choose from {', '.join(ISA_FLAGS)}")
            if x86 or isa in (None, "baseline"):
                units.append(Unit(source, isa))
    order = list(ISA_FLAGS)
    return sorted(units, key=lambda unit: order.index(unit.isa or "baseline"))


def best_isa() -> str:
    """The newest set of ISA_FLAGS whose instructions this machine's processor has all of."""
    found = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    features = {f"-m{feature}" for feature in found[1].split()} if found else set()
    return next(isa for isa, flags in reversed(ISA_FLAGS.items()) if features.issuperset(flags))


def _instruction_sets(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        found = re.match(r"//\s*isa:(.*)", file.readline())
    return found[1].split() if found else []


def cuda_units(home: Path) -> list[Unit]:
    """Every ``cuda/*.cu``."""
    return [Unit(path.relative_to(home).as_posix()) for path in sorted(home.rglob("cuda/*.cu"))]


def hashes(home: Path, units: list[Unit]) -> dict[str, str]:
    """SHA-256 of every file that the objects may be made of: their sources, and all headers, by relative name."""
    headers = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.suffix in HEADERS]
    names = sorted({*headers, *(unit.source for unit in units)})
    return {name: hashlib.sha256((home / name).read_bytes()).hexdigest() for name in names}
