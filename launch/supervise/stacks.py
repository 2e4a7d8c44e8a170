"""What ``faulthandler`` wrote of a rank that hangs: whether it waits for other ranks, and where it stands."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable
from pathlib import Path

_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)')
_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+.*:")
#: A frame in one of these files, or a line that calls one of these, waits for other ranks.
_COLLECTIVE_FILES = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication.py")
_COLLECTIVE_CALLS = re.compile(
    r"\b(all_reduce|all_gather\w*|all_to_all\w*|reduce_scatter\w*|broadcast\w*|barrier|(batch_)?i?send|i?recv"
    r"|gather|scatter|synchronize)\(|\.(wait|wait_all)\("
)
#: Frames from the innermost outward that are looked at.
_DEPTH = 4

Frame = tuple[str, int, str]


def frames(text: str) -> list[Frame]:
    """The main thread's frames of the last dump in ``text``, innermost first: (file, line, function)."""
    threads: list[list[Frame]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif (found := _FRAME.match(line)) and threads:
            threads[-1].append((found["file"], int(found["line"]), found["function"]))
    outermost = "<module>", "_run_module_as_main", "_run_code"
    main = [thread for thread in threads if thread and thread[-1][2] in outermost]
    return (main or threads or [[]])[-1]


def waiting(stack: Iterable[Frame]) -> bool:
    """The innermost frames are in a collective, or in a line that calls one."""
    return any(
        any(part in file for part in _COLLECTIVE_FILES) or _COLLECTIVE_CALLS.search(linecache.getline(file, line))
        for file, line, _ in list(stack)[:_DEPTH]
    )


def place(stack: Iterable[Frame]) -> str:
    """The innermost frame, as a person names it; empty where there is none."""
    home = str(Path(__file__).resolve().parents[2]) + "/"
    for file, line, function in stack:
        return f"{function} ({file.removeprefix(home)}:{line})"
    return ""


def read(path: Path) -> list[Frame]:
    """The frames that a rank's file holds; none where it could not write."""
    try:
        return frames(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []
