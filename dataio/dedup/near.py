"""Near-duplicates: which documents say almost the same, whatever the number of files, workers or machines.

    sketch     of every document file: signatures, band keys, ids, times
    band       of one band and one range of its keys, over all files: pairs whose signatures agree, verified
    cluster    of all pairs: documents joined by them, and one of each to be kept
    decide     of one document file: the attributes beside it

Memory is bounded by a budget: the keys of a band are cut into ranges that fit, signatures are read in blocks. Only the
clusters are whole in memory, `BYTES_PER_MEMBER` for every document that has a pair. Compared are documents that are
`alive`, which no earlier stage dropped. A pair is believed only if 186 of the 256 bins of the signature agree, since
whoever joins candidates unseen chains unrelated texts through their boilerplate.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataio.dedup.arrays import key_range, origins, pieces, save
from dataio.dedup.sketch import EMPTY, NUM_BANDS, NUM_BINS, band_keys, signatures
from dataio.documents import ParquetFile, read_groups
from dataio.stages import Counts

#: Bins of 256 that must agree: J >= 0.727 as the signature estimates it, one standard deviation above 0.7. With 180 of
#: them precision was 0.97 to 0.98 where it is 0.99 now, at the same recall of J >= 0.8 (`stoker bench data`, 2026-11).
AGREEING_BINS = 186
#: Documents of one run of equal keys that later ones are compared with; the rest of a run that agrees with none of them
#: is found through other bands, if at all.
MAX_LEADERS = 16
#: Members of clusters whose signatures are compared with the kept ones at a time: 32 MB.
CLUSTERED_TOGETHER = 1 << 16
#: Bytes a task of a band needs for each document in its range: three quarters for key, number, id, origin, order and
#: their copies if it has a candidate, one for signatures, which are read in blocks.
BYTES_PER_DOCUMENT = 96
#: Bytes of a document of such a block: its signature, place, number and pair.
_BYTES_PER_SIGNATURE = 2 * NUM_BINS + 64
#: Bytes that clusters need for each document that has a pair, beside one file of pairs and `CLUSTERED_TOGETHER`.
BYTES_PER_MEMBER = 128

#: Beside the documents. `cluster`: id of its first document in the order of ids, null for a document alone.
ATTRIBUTES = pa.schema(
    [
        pa.field("near_cluster", pa.binary(16)),
        pa.field("near_size", pa.int32(), nullable=False),
        pa.field("near_keep", pa.bool_(), nullable=False),
    ]
)

FILES = SIGNATURES, KEYS, IDS, TIMES, ORIGINS = ("signatures.npy", "keys.npy", "ids.npy", "times.npy", "origins.npy")
#: What a document has in the files that are read row by row.
_ROWS: dict[str, tuple[type[np.integer[Any]], tuple[int, ...]]] = {
    SIGNATURES: (np.uint16, (NUM_BINS,)),
    IDS: (np.uint64, (2,)),
    TIMES: (np.int64, ()),
    ORIGINS: (np.uint64, ()),
}
_LAST = np.iinfo(np.int64).max


def sketch(documents: Path, folder: Path) -> Counts:
    """Write of a document file signatures (uint16 [n, 256], low halves), keys (uint64 [32, n]), ids (uint64 [n, 2]),
    times (int64 [n], microseconds since 1970, the largest number where there is none) and hashes of the origins (uint64
    [n])."""
    num = sum(group.num_rows for group in read_groups(documents, ["row"]))
    first = size = 0
    with ExitStack() as stack:
        files = {name: pieces(folder / name, kind, (num, *shape)) for name, (kind, shape) in _ROWS.items()}
        files[KEYS] = pieces(folder / KEYS, np.uint64, (NUM_BANDS, num))
        write = {name: stack.enter_context(file) for name, file in files.items()}
        for group in read_groups(documents, ["id", "text", "source", "path", "row", "timestamp"]):
            texts = [text.as_py().encode() for text in group["text"]]
            size += sum(map(len, texts))
            signed = signatures(texts)
            write[SIGNATURES](first * NUM_BINS, signed.astype(np.uint16))
            for number, keys in enumerate(band_keys(signed)):
                write[KEYS](number * num + first, keys)
            write[IDS](first * 2, np.frombuffer(b"".join(group["id"].to_pylist()), ">u8"))
            write[TIMES](first, group["timestamp"].cast(pa.int64()).fill_null(_LAST).to_numpy())
            write[ORIGINS](first, origins(group))
            first += group.num_rows
    return {"documents": num, "bytes_in": size}


def band(
    folders: Sequence[Path],
    alive: Sequence[Path],
    number: int,
    part: int,
    parts: int,
    out: Path,
    budget_bytes: int = 1 << 30,
) -> Counts:
    """Write the verified pairs (uint64 [m, 2], numbers of documents over all folders in their order) that share a key
    of the band `number`, of the keys in the range `part` of `parts`.

    `parts`: `arrays.parts_within(documents, BYTES_PER_DOCUMENT, budget_bytes)`. One key that more documents share than
    the budget is meant for takes three quarters of `BYTES_PER_DOCUMENT` for each of them: only signatures are bounded.
    """
    keys, numbers, bounds = _shared(folders, alive, number, *key_range(part, parts))
    # From here on only documents that share a key with another: they are read where they lie.
    ids, came_from = (_gather(folders, name, bounds, numbers) for name in (IDS, ORIGINS))
    order = np.lexsort((came_from, ids[:, 1], ids[:, 0], keys))
    del ids, came_from
    keys, numbers = keys[order], numbers[order]
    del order
    joined = _paired(folders, bounds, keys, numbers, max(1, budget_bytes // 4 // _BYTES_PER_SIGNATURE))
    save(out, joined.astype(np.uint64, copy=False))
    return {"candidates": len(keys), "pairs": len(joined)}


def _paired(
    folders: Sequence[Path],
    bounds: NDArray[np.int64],
    keys: NDArray[np.uint64],
    numbers: NDArray[np.int64],
    block: int,
) -> NDArray[np.int64]:
    """Pairs [m, 2] of documents, by number: see `_find_pairs`. Signatures of a block of them are read at a time."""
    leaders, leading = np.empty((MAX_LEADERS, NUM_BINS), np.uint16), np.empty(MAX_LEADERS, np.int64)
    found, num_leaders = [np.empty((0, 2), np.int64)], 0
    for first in range(0, len(keys), block):
        here = numbers[first : first + block]
        order = np.argsort(here)
        signed = _gather(folders, SIGNATURES, bounds, here[order])
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        pairs = np.empty((len(here), 2), np.int64)
        count, num_leaders = _find_pairs(keys, numbers, first, signed, place, leaders, leading, num_leaders, pairs)
        found.append(pairs[:count].copy())
    return np.concatenate(found)


def _shared(
    folders: Sequence[Path], alive: Sequence[Path], number: int, low: np.uint64, high: np.uint64
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Keys of the band from `low` to `high` that living documents share, and whose they are, in rising order; and where
    the numbers of each folder begin and the last one's end."""
    found, of, bounds = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], np.zeros(len(folders) + 1, np.int64)
    for place, (folder, living) in enumerate(zip(folders, alive)):
        held = np.load(folder / KEYS, mmap_mode="r")[number]
        inside = np.flatnonzero((held >= low) & (held <= high) & np.load(living))
        found.append(np.asarray(held[inside]))
        of.append(inside + bounds[place])
        bounds[place + 1] = bounds[place] + len(held)
    keys, numbers = np.concatenate(found), np.concatenate(of)
    del found, of
    order = np.argsort(keys)
    rising = keys[order]
    same = rising[1:] == rising[:-1]
    del rising
    order = order[np.append(same, False) | np.insert(same, 0, False)] if len(order) else order
    order.sort()
    return keys[order], numbers[order], bounds


def _gather(folders: Sequence[Path], name: str, bounds: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[Any]:
    """Rows of the files `name`, by the numbers of their documents, which rise. Only files that have some are opened."""
    edges = np.searchsorted(numbers, bounds)
    kind, shape = _ROWS[name]
    rows = np.empty((len(numbers), *shape), kind)
    for place in np.flatnonzero(edges[1:] > edges[:-1]).tolist():
        path, here = folders[place] / name, slice(edges[place], edges[place + 1])
        num = int(bounds[place + 1] - bounds[place])
        before = (
            path.stat().st_size - num * rows[:1].nbytes
        )  # to read a header takes longer than the rows of many files
        held = np.memmap(path, kind, "r", before, (num, *shape))
        np.take(held, numbers[here] - bounds[place], axis=0, out=rows[here], mode="clip")  # "raise" makes a copy
    return rows


@numba.njit(nogil=True, cache=True)
def _agree(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> bool:
    agreeing = 0
    for place in range(NUM_BINS):
        agreeing += a[place] == b[place]
    return agreeing >= AGREEING_BINS


@numba.njit(nogil=True, cache=True)
def _find_pairs(
    keys: NDArray[np.uint64],
    numbers: NDArray[np.int64],
    first: int,
    signed: NDArray[np.uint16],
    place: NDArray[np.int64],
    leaders: NDArray[np.uint16],
    leading: NDArray[np.int64],
    num_leaders: int,
    pairs: NDArray[np.int64],
) -> tuple[int, int]:
    """In every run of equal keys a document is paired with the first leader that it agrees with, or becomes one.

    Of the documents from `first` on, whose signatures are `signed[place]`. `leaders`: signatures of those of the run
    that is not over, `leading` their numbers. Returns how many pairs and leaders there are.
    """
    wordless = np.uint16(EMPTY & 0xFFFF)
    count = 0
    for i in range(len(place)):
        row = first + i
        if row == 0 or keys[row] != keys[row - 1]:
            num_leaders = 0
        signature = signed[place[i]]
        if (signature == wordless).all():  # alike in nothing but that
            continue
        agrees = False
        for leader in range(num_leaders):
            if _agree(leaders[leader], signature):
                pairs[count, 0], pairs[count, 1] = leading[leader], numbers[row]
                count += 1
                agrees = True
                break
        if not agrees and num_leaders < MAX_LEADERS:
            leaders[num_leaders], leading[num_leaders] = signature, numbers[row]
            num_leaders += 1
    return count, num_leaders


@numba.njit(nogil=True, cache=True)
def _join(parents: NDArray[np.int64], pairs: NDArray[np.int64]) -> None:
    """Union by the smaller number; every entry ends as its cluster's smallest."""
    for k in range(len(pairs)):
        a, b = pairs[k, 0], pairs[k, 1]
        while parents[a] != a:
            parents[a] = parents[parents[a]]
            a = parents[a]
        while parents[b] != b:
            parents[b] = parents[parents[b]]
            b = parents[b]
        if a < b:
            parents[b] = a
        else:
            parents[a] = b
    for i in range(len(parents)):
        parents[i] = parents[parents[i]]


def cluster(edges: Sequence[Path], folders: Sequence[Path], out: Path) -> Counts:
    """Write uint64 [m, 5], in rising order of the documents' numbers: number, id of the cluster (two words), its size,
    1 if the document is kept.

    Of a cluster the earliest document is kept, by its timestamp, one without coming last, of several the one with the
    smallest id, and of one text the one whose origin has the smallest hash: nothing that depends on files or their
    order. A later one is dropped if it agrees with one that is kept; of those that were joined through others alone,
    the next is kept. `folders` in the order that numbered the documents.
    """
    members = np.empty(0, np.int64)
    for path in edges:
        members = np.union1d(members, np.load(path).astype(np.int64))
    bounds = np.cumsum([0, *(len(np.load(folder / TIMES, mmap_mode="r")) for folder in folders)])
    ids, times, came_from = (_gather(folders, name, bounds, members) for name in (IDS, TIMES, ORIGINS))
    by_id = np.lexsort((came_from, ids[:, 1], ids[:, 0]))
    del came_from
    rank = np.empty(len(members), np.int64)
    rank[by_id] = np.arange(len(members))
    parents = np.arange(len(members))
    for path in edges:
        _join(parents, rank[np.searchsorted(members, np.load(path).astype(np.int64))])
    root = parents[rank]  # of every member, as a rank: that of the smallest id
    sizes = np.bincount(root, minlength=len(members))
    order = np.lexsort((rank, times, root))
    del rank, parents, times
    dropped = _paired(folders, bounds, root[order].astype(np.uint64), members[order], CLUSTERED_TOGETHER)[:, 1]
    kept = np.ones(len(members), np.bool_)
    kept[np.searchsorted(members, dropped)] = False
    del order, dropped
    table = np.empty((len(members), 5), np.uint64)
    table[:, 0], table[:, 1:3], table[:, 3], table[:, 4] = members, ids[by_id[root]], sizes[root], kept
    save(out, table)
    return {"documents": len(members), "clusters": int((sizes > 0).sum()), "dropped": int((~kept).sum())}


def decide(
    documents: Path,
    first: int,
    clusters: Path,
    alive: Path,
    attributes: Path,
    alive_after: Path,
    drop: bool = True,
) -> Counts:
    """Write the attributes of a document file whose first document has the number `first`, and who is still alive:
    all that were, unless copies `drop`."""
    table = np.load(clusters, mmap_mode="r")
    living = np.load(alive)
    count = 0
    with ParquetFile(attributes, ATTRIBUTES) as file:
        for group in read_groups(documents, ["id"]):
            here = np.array([first + count, first + count + group.num_rows], np.uint64)
            begin, end = np.searchsorted(table[:, 0], here)
            rows = np.asarray(table[begin:end])
            at = rows[:, 0].astype(np.int64) - first - count
            size, keep = np.ones(group.num_rows, np.int32), np.ones(group.num_rows, np.bool_)
            size[at], keep[at] = rows[:, 3], rows[:, 4] == 1
            names: list[bytes | None] = [None] * group.num_rows
            for row, name in zip(at.tolist(), rows[:, 1:3].astype(">u8")):
                names[row] = name.tobytes()
            columns = [pa.array(names, pa.binary(16)), pa.array(size), pa.array(keep)]
            file.write(pa.table(columns, schema=ATTRIBUTES))
            if drop:
                living[count : count + group.num_rows] &= keep
            count += group.num_rows
    save(alive_after, living)
    return {"documents": count, "dropped": int(np.load(alive).sum() - living.sum())}
