"""How a build came out: kernels, registers, spills, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels.toolchain import ptxas, sass
from kernels.toolchain.cache import Entry
from kernels.toolchain.tools import cuobjdump

#: Shared memory, stack and spills in bytes.
ROW = "  {:60} {:>9} {:>7} {:>6} {:>6}  {}"


@dataclass(frozen=True)
class Kernel:
    """One row of the table; `local_in_loop` is None if nobody could look."""

    symbol: str
    name: str
    source: str
    registers: int | None
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    local_in_loop: bool | None = None

    @property
    def failure(self) -> str | None:
        """Spilled bytes are a failure unless the machine code shows that no loop touches local memory."""
        if self.local_in_loop:
            return f"{self.name}: reads or writes local memory inside a loop"
        if self.spill_bytes and self.local_in_loop is None:
            return (
                f"{self.name}: spills {self.spill_bytes} bytes, and without cuobjdump and nvdisasm nobody knows where"
            )
        return None


@dataclass(frozen=True)
class BuildReport:
    """One target: a library, or the reason why there is none. `made` by this call, or found in the cache.

    `objects`: source, instruction set if it is compiled for several, and seconds of each.
    """

    target: str
    library: Path | None
    reason: str = ""
    made: bool = False
    seconds: float = 0.0
    tools: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    objects: tuple[tuple[str, str | None, float], ...] = ()
    kernels: tuple[Kernel, ...] = ()

    @classmethod
    def of(cls, entry: Entry, look: bool = False) -> BuildReport:
        """What was noted when it was built; with `look`, the machine code is looked at too, if it can be."""
        record: dict[str, Any] = entry.record
        tools = record["tools"]
        known = ptxas.version_warning(tools["ptxas"], record["target"]) if "ptxas" in tools else None
        code = cuobjdump("-sass", str(entry.library)) if look and record["kernels"] else None
        in_loop = sass.local_memory_in_loops(code or "")
        unseen = None if code is None else False  # a function that is not inlined is judged where it is called
        return cls(
            target=record["target"],
            library=entry.library,
            made=entry.made,
            seconds=record["seconds"],
            tools=tools,
            warnings=(*([known] if known else []), *record["warnings"]),
            objects=tuple(tuple(row) for row in record["objects"]),
            kernels=tuple(Kernel(**row, local_in_loop=in_loop.get(row["symbol"], unseen)) for row in record["kernels"]),
        )

    @property
    def failures(self) -> list[str]:
        """What makes the build unfit for release: local memory in loops, and lost performance that ptxas tells of."""
        lost = [warning for warning in self.warnings if "Performance Loss" in warning]
        return [*lost, *(kernel.failure for kernel in self.kernels if kernel.failure)]


def table(reports: Iterable[BuildReport]) -> str:
    """Every target with its tools and warnings, and a row for each of its kernels."""
    return "\n\n".join("\n".join(_lines(report)) for report in reports)


def _lines(report: BuildReport) -> Iterable[str]:
    if report.library is None:
        yield f"{report.target}: not built: {report.reason}"
        return
    tools = ", ".join(f"{name} {version}" for name, version in report.tools.items())
    yield f"{report.target}: {'built' if report.made else 'in the cache, built'} in {report.seconds:.1f} s with {tools}"
    yield f"  {report.library}"
    yield from (f"  warning: {warning}" for warning in report.warnings)
    yield from (f"  FAILED: {failure}" for failure in report.failures)
    yield from (f"  {' '.join(filter(None, (source, isa)))}: {seconds} s" for source, isa, seconds in report.objects)
    if report.kernels:
        yield ROW.format("kernel", "registers", "shared", "stack", "spills", "local in loop")
    for row in report.kernels:
        registers = "-" if row.registers is None else row.registers
        in_loop = {True: "yes", False: "no", None: "not looked at"}[row.local_in_loop]
        memory = (row.shared_bytes, row.stack_bytes, row.spill_bytes)
        yield ROW.format(row.name, registers, *memory, in_loop)
