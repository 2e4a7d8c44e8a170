"""Files that grow while they are read: at each look the whole lines that came since the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Bytes that are read at once.
BLOCK = 4 << 20


class Tail:
    """A log of lines, read from where the last look stopped. A last line without its newline is being written, or torn:
    it is left for the next look."""

    def __init__(self, path: Path, block: int = BLOCK) -> None:
        self.path = path
        self.offset = 0
        self._block = block
        self._identity: tuple[int, int] | None = None

    def begins_anew(self) -> bool:
        """Whether what was read before is void, since the file is gone, replaced or cut. To be asked before
        ``blocks``, which then begins at the start."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            identity, size = None, 0
        else:
            identity, size = (found.st_dev, found.st_ino), found.st_size
        before, self._identity = self._identity, identity
        if before is None or (identity == before and size >= self.offset):
            return False
        self.offset = 0
        return True

    def blocks(self) -> Iterator[bytes]:
        """New lines, many at once, each with its newline. Nothing if there is no file; OSError if it cannot be read."""
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return
        with file:
            file.seek(self.offset)
            held = b""
            while block := file.read(self._block):
                held += block
                end = held.rfind(b"\n") + 1
                if end:
                    self.offset += end
                    yield held[:end]
                    held = held[end:]


class Journal:
    """A file of JSON objects, a line each, all of them kept: for logs of events, which are few."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self.entries: list[dict[str, Any]] = []
        self.damaged = 0

    def refresh(self) -> None:
        if self._tail.begins_anew():
            self.entries, self.damaged = [], 0
        for block in self._tail.blocks():
            found, damaged = objects(block)
            self.entries += found
            self.damaged += damaged


def objects(block: bytes) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of whole lines, and how many lines are none."""
    try:
        rows = json.loads(b"[" + block[:-1].replace(b"\n", b",") + b"]")
        if len(rows) == block.count(b"\n") and all(type(row) is dict for row in rows):
            return rows, 0
    except (ValueError, RecursionError):
        pass
    found: list[dict[str, Any]] = []
    lines = block[:-1].split(b"\n")
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found, len(lines) - len(found)
