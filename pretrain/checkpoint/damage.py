"""Damage: what is wrong with a checkpoint, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Damage:
    """One finding: the ``file`` of the step's folder, and, where they are known, the global name of the tensor and the
    number of its chunk (row-major in the tensor's grid)."""

    file: str
    tensor: str | None
    chunk: int | None
    what: str

    def __str__(self) -> str:
        where = f"{self.file}, tensor {self.tensor}, chunk {self.chunk}" if self.tensor is not None else self.file
        return f"{where}: {self.what}"


class Damaged(Exception):
    """A checkpoint is not what was saved. ``found`` is never empty."""

    def __init__(self, found: Iterable[Damage]) -> None:
        self.found = list(found)
        more = f" (and {len(self.found) - 8} more)" if len(self.found) > 8 else ""
        super().__init__("; ".join(map(str, self.found[:8])) + more)
