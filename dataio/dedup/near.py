"""Near-duplicates: which documents say almost the same, whatever the number of files, workers or machines.

    sketch     of every document file: signatures, band keys, ids, times
    band       of one band and one range of its keys, over all files: pairs whose signatures agree, verified
    cluster    of all pairs: documents joined by them, and one of each to be kept
    decide     of one document file: the attributes beside it

Memory is bounded by a budget: the keys of a band are cut into ranges that fit, signatures are read where they lie. Only
the clusters are whole in memory, `BYTES_PER_MEMBER` for every document that has a pair. Compared are documents that are
`alive`, which no earlier stage dropped. A pair is believed only if 0.7 of the whole signature agrees, since
whoever joins candidates unseen chains unrelated texts through their boilerplate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataio.dedup.arrays import key_range, save
from dataio.dedup.sketch import EMPTY, NUM_BANDS, NUM_BINS, band_keys, signatures
from dataio.documents import ParquetFile, read_groups
from dataio.stages import Counts

#: Bins of 256 that must agree: J >= 0.7 as the signature estimates it.
AGREEING_BINS = 180
#: Documents of one run of equal keys that later ones are compared with; the rest of a run that agrees with none of them
#: is found through other bands, if at all.
MAX_LEADERS = 16
#: Bytes a task of a band needs for each document in its range: key, number, id, order and their copies.
BYTES_PER_DOCUMENT = 64
#: Bytes that clusters need for each document that has a pair, beside one file of pairs.
BYTES_PER_MEMBER = 128

#: Beside the documents. `cluster`: id of its first document in the order of ids, null for a document alone.
ATTRIBUTES = pa.schema(
    [
        pa.field("near_cluster", pa.binary(16)),
        pa.field("near_size", pa.int32(), nullable=False),
        pa.field("near_keep", pa.bool_(), nullable=False),
    ]
)

FILES = SIGNATURES, KEYS, IDS, TIMES = ("signatures.npy", "keys.npy", "ids.npy", "times.npy")
_LAST = np.iinfo(np.int64).max


def sketch(documents: Path, folder: Path) -> Counts:
    """Write of a document file signatures (uint16 [n, 256], low halves), keys (uint64 [32, n]), ids (uint64 [n, 2]) and
    times (int64 [n], microseconds since 1970, the largest number where there is none)."""
    lows, keys, ids, times, size = [], [], [], [], 0
    for group in read_groups(documents, ["id", "text", "timestamp"]):
        texts = [text.as_py().encode() for text in group["text"]]
        size += sum(map(len, texts))
        signed = signatures(texts)
        lows.append(signed.astype(np.uint16))
        keys.append(band_keys(signed))
        ids.append(np.frombuffer(b"".join(group["id"].to_pylist()), ">u8").reshape(-1, 2).astype(np.uint64))
        times.append(group["timestamp"].cast(pa.int64()).fill_null(_LAST).to_numpy())
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / SIGNATURES, np.concatenate([np.empty((0, NUM_BINS), np.uint16), *lows]))
    save(folder / KEYS, np.concatenate([np.empty((NUM_BANDS, 0), np.uint64), *keys], axis=1))
    save(folder / IDS, np.concatenate([np.empty((0, 2), np.uint64), *ids]))
    save(folder / TIMES, np.concatenate([np.empty(0, np.int64), *times]))
    return {"documents": sum(map(len, ids)), "bytes_in": size}


def band(folders: Sequence[Path], alive: Sequence[Path], number: int, part: int, parts: int, out: Path) -> Counts:
    """Write the verified pairs (uint64 [m, 2], numbers of documents over all folders in their order) that share a key
    of the band `number`, of the keys in the range `part` of `parts`."""
    low, high = key_range(part, parts)
    found_keys, found_numbers, first = [], [], 0
    for folder, living in zip(folders, alive):
        keys = np.load(folder / KEYS, mmap_mode="r")[number]
        inside = np.flatnonzero((keys >= low) & (keys <= high) & np.load(living))
        found_keys.append(np.asarray(keys[inside]))
        found_numbers.append(inside + first)
        first += len(keys)
    keys = np.concatenate([np.empty(0, np.uint64), *found_keys])
    numbers = np.concatenate([np.empty(0, np.int64), *found_numbers])
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    shared = np.zeros(len(keys), np.bool_)
    same = keys[1:] == keys[:-1]
    shared[1:] |= same
    shared[:-1] |= same
    keys, numbers = keys[shared], numbers[shared]
    # From here on only documents that share a key with another: they are read where they lie.
    signed, ids = _gather(folders, numbers)
    order = np.lexsort((ids[:, 1], ids[:, 0], keys))
    pairs = _agreeing(keys[order], signed[order])
    save(out, numbers[order][pairs].astype(np.uint64).reshape(-1, 2))
    return {"candidates": len(keys), "pairs": len(pairs)}


def _gather(folders: Sequence[Path], numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """Signatures and ids of documents, by their numbers."""
    signed = np.empty((len(numbers), NUM_BINS), np.uint16)
    ids = np.empty((len(numbers), 2), np.uint64)
    first = 0
    for folder in folders:
        all_ids = np.load(folder / IDS, mmap_mode="r")
        here = np.flatnonzero((numbers >= first) & (numbers < first + len(all_ids)))
        if len(here):
            ids[here] = all_ids[numbers[here] - first]
            signed[here] = np.load(folder / SIGNATURES, mmap_mode="r")[numbers[here] - first]
        first += len(all_ids)
    return signed, ids


@numba.njit(nogil=True, cache=True)
def _agree(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> bool:
    agreeing = 0
    for place in range(NUM_BINS):
        agreeing += a[place] == b[place]
    return agreeing >= AGREEING_BINS


@numba.njit(nogil=True, cache=True)
def _find_pairs(keys: NDArray[np.uint64], signed: NDArray[np.uint16], pairs: NDArray[np.int64]) -> int:
    """In every run of equal keys a document is paired with the first leader that it agrees with, or becomes one."""
    leaders = np.empty(MAX_LEADERS, np.int64)
    count = num_leaders = 0
    for i in range(len(keys)):
        if i == 0 or keys[i] != keys[i - 1]:
            num_leaders = 0
        agrees = False
        for leader in leaders[:num_leaders]:
            if _agree(signed[leader], signed[i]):
                pairs[count, 0], pairs[count, 1] = leader, i
                count += 1
                agrees = True
                break
        if not agrees and num_leaders < MAX_LEADERS:
            leaders[num_leaders] = i
            num_leaders += 1
    return count


def _agreeing(keys: NDArray[np.uint64], signed: NDArray[np.uint16]) -> NDArray[np.int64]:
    wordless = (signed == np.uint16(EMPTY & 0xFFFF)).all(1)  # alike in nothing but that
    rows = np.flatnonzero(~wordless)
    pairs = np.empty((len(rows), 2), np.int64)
    count = _find_pairs(keys[rows], signed[rows], pairs)
    return rows[pairs[:count]]


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

    Of a cluster the earliest document is kept, by its timestamp, one without coming last, and of several the one with
    the smallest id: nothing that depends on files or their order. `folders` in the order that numbered the documents.
    """
    members = np.empty(0, np.int64)
    for path in edges:
        members = np.union1d(members, np.load(path).astype(np.int64))
    ids, times = _described(folders, members)
    by_id = np.lexsort((members, ids[:, 1], ids[:, 0]))
    rank = np.empty(len(members), np.int64)
    rank[by_id] = np.arange(len(members))
    parents = np.arange(len(members))
    for path in edges:
        _join(parents, rank[np.searchsorted(members, np.load(path).astype(np.int64))])
    root = parents[rank]  # of every member, as a rank: that of the smallest id
    sizes = np.bincount(root, minlength=len(members))
    kept = _keepers(root, rank, times)
    columns = (members, ids[by_id[root]], sizes[root], kept)
    save(out, np.column_stack([column.astype(np.uint64) for column in columns]))  # signed with unsigned gives floats
    return {"documents": len(members), "clusters": int((sizes > 0).sum()), "dropped": int((~kept).sum())}


def _described(folders: Sequence[Path], members: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Ids and times of the documents with these numbers, rising."""
    ids, times, first = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)], 0
    for folder in folders:
        all_ids = np.load(folder / IDS, mmap_mode="r")
        start, stop = np.searchsorted(members, [first, first + len(all_ids)])
        ids.append(all_ids[members[start:stop] - first])
        times.append(np.load(folder / TIMES, mmap_mode="r")[members[start:stop] - first])
        first += len(all_ids)
    return np.concatenate(ids), np.concatenate(times)


def _keepers(root: NDArray[np.int64], rank: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.bool_]:
    order = np.lexsort((rank, times, root))
    kept = np.zeros(len(root), np.bool_)
    leads = np.ones(len(order), np.bool_)
    leads[1:] = root[order][1:] != root[order][:-1]
    kept[order[leads]] = True
    return kept


def decide(documents: Path, first: int, clusters: Path, alive: Path, attributes: Path, alive_after: Path) -> Counts:
    """Write the attributes of a document file whose first document has the number `first`, and who is still alive."""
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
            living[count : count + group.num_rows] &= keep
            count += group.num_rows
    save(alive_after, living)
    return {"documents": count, "dropped": int(np.load(alive).sum() - living.sum())}
