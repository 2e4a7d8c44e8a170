"""What the stages hand to one another: array files, ranges of keys that fit in memory, hashes of origins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import DTypeLike, NDArray


def save(path: Path, array: NDArray[Any]) -> None:
    """An array file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def pieces(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Iterator[Callable[[int, NDArray[Any]], None]]:
    """Writes an array file of a known shape piece by piece: `write(at, values)` puts `values` where the element number
    `at` of the array lies, and all that follow it. Whole under its name, or not there; memory holds none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, kind = path.with_name(f".{path.name}.partial"), np.dtype(dtype)
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": kind.str, "fortran_order": False, "shape": shape})
            begin = file.tell()

            def write(at: int, values: NDArray[Any]) -> None:
                file.seek(begin + at * kind.itemsize)
                file.write(np.ascontiguousarray(values, kind).data)

            yield write
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def origins(group: pa.Table) -> NDArray[np.uint64]:
    """Hashes of where documents come from: what decides between copies of one time, whatever files they lie in now."""
    rows = zip(*(group[name].to_pylist() for name in ("source", "path", "row")))
    return np.array([xxhash.xxh3_64_intdigest(f"{s}\0{p}\0{r}".encode()) for s, p, r in rows], np.uint64)


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
