"""Exact copies: documents that differ in nothing but letter case and white space, over all files at once.

    digest     of every document file: hashes of the texts as they are compared, and what decides between copies
    gather     of one range of hashes, over all files: who has copies, how many, and which is kept
    decide     of one document file: the attributes beside it

Hashes are cut into ranges that fit a memory budget. Compared are documents that are `alive`, which no earlier stage
dropped. The kept copy is the earliest, one without a timestamp last, and of several the one whose source, path and row
have the smallest hash, so neither files nor their order decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from dataio.dedup.arrays import key_range, origins, save
from dataio.documents import ParquetFile, read_groups
from dataio.stages import Counts

#: Beside the documents. `exact_copies`: how many there are of the text, this one included.
ATTRIBUTES = pa.schema(
    [pa.field("exact_copies", pa.int32(), nullable=False), pa.field("exact_keep", pa.bool_(), nullable=False)]
)
#: Bytes a task needs for each document in its range: hashes, time, number, order and their copies.
BYTES_PER_DOCUMENT = 160
_LAST = np.iinfo(np.int64).max


def normalised(text: str) -> str:
    """A text as it is compared: case folded, every run of white space one space, none at the ends.

    >>> normalised("  Straße\\n\\tB ") == normalised("STRASSE b")
    True
    """
    return " ".join(text.casefold().split())


def digest(documents: Path, out: Path) -> Counts:
    """Write of a document file uint64 [n, 4]: hash of the normalised text (two words), time, and hash of the origin."""
    rows, size = [np.empty((0, 4), np.uint64)], 0
    for group in read_groups(documents, ["text", "source", "path", "row", "timestamp"]):
        texts = group["text"].to_pylist()
        size += sum(len(text) for text in texts)
        digests = b"".join(xxhash.xxh3_128_digest(normalised(text).encode()) for text in texts)
        columns = np.empty((len(texts), 4), np.uint64)
        columns[:, :2] = np.frombuffer(digests, ">u8").reshape(-1, 2)
        columns[:, 2] = group["timestamp"].cast(pa.int64()).fill_null(_LAST).to_numpy().astype(np.uint64)
        columns[:, 3] = origins(group)
        rows.append(columns)
    found = np.concatenate(rows)
    save(out, found)
    return {"documents": len(found), "characters_in": size}


def gather(digests: Sequence[Path], alive: Sequence[Path], part: int, parts: int, out: Path) -> Counts:
    """Write int64 [m, 3], in rising order of the documents' numbers over all files: number, copies, 1 if it is kept, of
    documents with copies whose hash is in the range `part` of `parts`."""
    low, high = key_range(part, parts)
    found, numbers, first = [np.empty((0, 4), np.uint64)], [np.empty(0, np.int64)], 0
    for path, living in zip(digests, alive):
        rows = np.load(path, mmap_mode="r")
        inside = np.flatnonzero((rows[:, 0] >= low) & (rows[:, 0] <= high) & np.load(living))
        found.append(np.asarray(rows[inside]))
        numbers.append(inside + first)
        first += len(rows)
    table, number = np.concatenate(found), np.concatenate(numbers)
    # Times before 1970 are negative: as signed numbers they come first.
    order = np.lexsort((table[:, 3], table[:, 2].astype(np.int64), table[:, 1], table[:, 0]))
    table, number = table[order], number[order]
    starts = np.ones(len(table), np.bool_)
    starts[1:] = (table[1:, :2] != table[:-1, :2]).any(1)
    group = np.cumsum(starts) - 1
    copies = np.bincount(group, minlength=1)[group] if len(group) else np.empty(0, np.int64)
    several = copies > 1
    result = np.stack([number[several], copies[several], starts[several].astype(np.int64)], axis=1)
    save(out, result[np.argsort(result[:, 0])])
    return {"documents": len(table), "dropped": int((several & ~starts).sum())}


def decide(
    documents: Path, first: int, gathered: Sequence[Path], alive: Path, attributes: Path, alive_after: Path
) -> Counts:
    """Write the attributes of a document file whose first document has the number `first`, and who is still alive."""
    tables = [np.load(path, mmap_mode="r") for path in gathered]
    living = np.load(alive)
    count = 0
    with ParquetFile(attributes, ATTRIBUTES) as file:
        for group in read_groups(documents, ["id"]):
            copies, keep = np.ones(group.num_rows, np.int32), np.ones(group.num_rows, np.bool_)
            for table in tables:
                rows = _between(table, first + count, first + count + group.num_rows)
                at = rows[:, 0] - first - count
                copies[at], keep[at] = rows[:, 1], rows[:, 2] == 1
            file.write(pa.table([pa.array(copies), pa.array(keep)], schema=ATTRIBUTES))
            living[count : count + group.num_rows] &= keep
            count += group.num_rows
    save(alive_after, living)
    return {"documents": count, "dropped": int(np.load(alive).sum() - living.sum())}


def _between(table: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    begin, end = np.searchsorted(table[:, 0], [start, stop])
    return np.asarray(table[begin:end])
