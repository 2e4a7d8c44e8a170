"""What ptxas says about the kernels it assembles, and which of its versions are known to write wrong code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: Versions that turned correct PTX into wrong code for sm_90a (byte-identical PTX, clean with 13.1.80).
#: Source: flash-linear-attention pull request 1262, read 2026-11-22.
KNOWN_WRONG = {"sm_90a": {"12.8.93", "13.0.88"}}


@dataclass(frozen=True)
class Function:
    """A kernel, or a device function that was not inlined (its `registers` are None: they count in its callers).

    `shared_bytes` are the static ones; what a launch asks for on top is not known here.
    """

    symbol: str
    registers: int | None
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def version_warning(version: str, arch: str) -> str | None:
    if version in KNOWN_WRONG.get(arch, ()):
        return f"ptxas {version}: known wrong code on {arch}, 13.1 or newer advised (or STOKER_PTXAS)"
    return None


def functions(output: str) -> list[Function]:
    """Every function in what ``ptxas -v`` prints, in its order."""
    return list(_functions(output))


def _functions(output: str) -> Iterator[Function]:
    for block in re.split(
        r"(?=^ptxas info *: (?:Compiling entry function|Function properties for) )", output, flags=re.M
    ):
        named = re.match(r"ptxas info *: Function properties for (\S+)", block)
        if named is None:
            continue

        def count(pattern: str, block: str = block) -> int:
            return sum(map(int, re.findall(pattern, block)))

        yield Function(
            symbol=named[1],
            registers=count(r"Used (\d+) registers") or None,
            shared_bytes=count(r"(\d+) bytes smem"),
            stack_bytes=count(r"(\d+) bytes stack frame"),
            spill_bytes=count(r"(\d+) bytes spill (?:stores|loads)"),
        )
