"""What the stages hand to one another: array files, and ranges of keys that fit in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def save(path: Path, array: NDArray[Any]) -> None:
    """An array file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def parts_within(num_documents: int, bytes_per_document: int, budget_bytes: int) -> int:
    """Ranges that 64-bit keys are cut into, so that the documents of one fit in the budget."""
    return max(1, -(-num_documents * bytes_per_document // budget_bytes))


def key_range(part: int, parts: int) -> tuple[np.uint64, np.uint64]:
    """First and last key of a range; the ranges hold every key once.

    >>> [tuple(map(int, key_range(part, 3)))[0] // 2**60 for part in range(3)]
    [0, 5, 10]
    """
    width = -(-(2**64) // parts)
    return np.uint64(part * width), np.uint64(min((part + 1) * width, 2**64) - 1)
