"""Local memory inside loops, found in machine code (SASS): what a spill costs depends on where it lies."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*?)\s*;", re.M)
_TARGET = re.compile(r"(.*,\s*)?(0x[0-9a-f]+)")

#: Address of an instruction -> addresses that may come next.
Flow = dict[int, set[int]]


def local_memory_in_loops(sass: str) -> dict[str, bool]:
    """Symbol of each function in the output of ``cuobjdump -sass`` -> does a loop of it read or write local memory.

    A loop is a cycle of the control flow, not a stretch that a backward branch spans: ptxas puts the waiting loops of
    barriers behind the end of a function, and their jump back spans nearly all of it. A subroutine called inside a loop
    is inside it. An indirect branch may go anywhere, so it errs towards yes.
    """
    parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.M)[1:]
    return {symbol: _local_in_loop(text) for symbol, text in zip(parts[::2], parts[1::2])}


def _local_in_loop(text: str) -> bool:
    code = [(int(m[1], 16), bool(m[2]), m[3].split(".")[0], m[4]) for m in _INSTRUCTION.finditer(text)]
    flow: Flow = {address: set() for address, _, _, _ in code}
    calls: dict[int, int] = {}
    for (address, conditional, operation, operands), after in zip(code, [*list(flow)[1:], -1]):
        target = _TARGET.fullmatch(operands)
        if operation == "CALL" and target:
            calls[address] = int(target[2], 16)
        elif operation in ("BRA", "JMP") and target:
            flow[address].add(int(target[2], 16))
            conditional = conditional or target[1] is not None
        elif operation in ("BRX", "JMX"):
            flow[address].update(flow)
        if conditional or operation not in ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET"):
            flow[address].add(after)
    into_calls = {address: following | {calls.get(address, -1)} for address, following in flow.items()}
    local = {address for address, _, operation, _ in code if operation in ("LDL", "STL")}
    return any(address in _reachable(flow, address) for address in local) or any(
        local & {called, *_reachable(into_calls, called)}
        for address, called in calls.items()
        if local and address in _reachable(flow, address)
    )


def _reachable(flow: Flow, start: int) -> set[int]:
    """Instructions that can run after the one at `start`; itself among them if it lies in a loop."""
    found: set[int] = set()
    work = list(flow.get(start, ()))
    while work:
        address = work.pop()
        if address in flow and address not in found:
            found.add(address)
            work.extend(flow[address])
    return found
