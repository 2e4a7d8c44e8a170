"""Repeated passages: which bytes of a document say what another document, or the same one, has said before.

    anchors    of every document file: the texts that are compared, and places in them that their contents choose
    match      of one range of the anchors' hashes, over all files: where what surrounds them is repeated
    decide     of one document file: the spans to cut, as attributes beside it

What is found is exact: of N = `min_bytes`, a byte is cut if and only if it lies in a window of N bytes that also occurs
earlier without overlapping it. Earlier is the document with the earlier timestamp (one without coming last), of several
the one with the smaller id, and within a document what stands before. So every repeat of N bytes or more is found; what
is cut still stands somewhere, if not in one piece; and neither files nor workers nor their order decide.

It needs no suffix array. Every window has one anchor: a place in it that its contents choose (windows.py; winnowing:
Schleimer, Wilkerson, Aiken 2003), so windows are compared only with those that share their anchor: hashes bring them
together, bytes decide. On disk that takes the texts once, and 20 bytes for every anchor: one for about N / 4 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray
from pydantic import Field

from dataio.dedup import windows
from dataio.dedup.arrays import key_range, origins, save
from dataio.dedup.texts import alive_texts
from dataio.documents import ParquetFile, read_groups
from dataio.languages import is_code
from dataio.stages import Counts
from stoker.files import sync_directory
from stoker.sections import Section

VERSION = 1
#: Bytes that `match` needs for each anchor in its range, and as much again for what surrounds them, read in blocks.
BYTES_PER_ANCHOR = 320
#: Anchors that are sorted together; the files of `anchors` hold one such run after another.
RUN_ANCHORS = 1 << 22

_SPAN = pa.struct([pa.field("start", pa.int32(), nullable=False), pa.field("stop", pa.int32(), nullable=False)])
#: Beside the documents: the spans to cut, at boundaries of characters, and how many bytes they hold.
SCHEMA = pa.schema(
    [pa.field("substring", pa.list_(_SPAN), nullable=False), pa.field("substring_bytes", pa.int32(), nullable=False)]
)
COLUMNS = ("bytes",)


class Options(Section):
    """What counts as a repeated passage, and when so much is repeated that the document is dropped."""

    min_bytes: Annotated[int, Field(ge=32, le=4096)] = 200
    """Length of the shortest passage, in bytes. Lee et al. (2022) take 50 tokens: about 200 bytes."""
    keep_first: bool = True
    """Whether the earliest occurrence of a passage stays; false: it is cut as well."""
    max_share: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    """Share of a text's bytes that may be cut before the whole document is dropped; null: none is dropped."""
    code: bool = False
    """Whether passages of code are compared and cut as well: a cut leaves half a statement, and idioms repeat."""


MEASURED = frozenset({"min_bytes", "keep_first", "code"})


def judge(table: pa.Table, options: Options) -> list[str | None]:
    """`mostly_repeated`: more than `max_share` of the text is."""
    limit = 1.0 if options.max_share is None else options.max_share
    sizes = zip(table["substring_bytes"].to_pylist(), table["bytes"].to_pylist())
    return ["mostly_repeated" if cut > limit * size else None for cut, size in sizes]


# What `anchors` leaves in a folder: the texts that are alive, one after another; where each document's begins and the
# last one's ends (a dead one's is empty); what makes a document earlier: time, id, origin; of every anchor its hash
# (rising within a run), its position in the texts, and how far before it the first and the last window begin whose
# anchor it is; where runs begin; spans of windows that repeat others of their document.
TEXTS, BOUNDS, RANKS, HASHES = "texts.bin", "bounds.npy", "ranks.npy", "hashes.bin"
POSITIONS, REACHES, RUNS, SPANS = "positions.bin", "reaches.bin", "runs.npy", "spans.npy"
FILES = (TEXTS, BOUNDS, RANKS, HASHES, POSITIONS, REACHES, RUNS, SPANS)


def anchors(documents: Path, alive: Path, folder: Path, options: Options) -> Counts:
    """Write the `FILES` of a document file, of its documents that are alive and, unless `options.code`, no code.

    Memory: a row group, a run of anchors, and 40 bytes for every document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    living = np.load(alive)
    bounds, ranks, spans = [np.zeros(1, np.int64)], [np.empty((0, 3), np.uint64)], [np.empty((0, 2), np.int64)]
    runs, pending = [0], list[tuple[NDArray[Any], ...]]()
    row = size = 0
    with ExitStack() as stack:
        texts, *files = (stack.enter_context(_whole(folder / name)) for name in (TEXTS, HASHES, POSITIONS, REACHES))
        for group in read_groups(documents, ["id", "text", "source", "path", "row", "timestamp", "language"]):
            here = living[row : row + group.num_rows]
            if not options.code:
                here &= [not is_code(language) for language in group["language"].to_pylist()]
            text, edges = alive_texts(group["text"], here)
            texts.write(text.data)
            bounds.append(edges[1:] + size)
            ranks.append(_ranks(group))
            hashes, positions, reaches, repeated = windows.anchors_of(
                text, edges, options.min_bytes, options.keep_first
            )
            pending.append((hashes, positions + size, reaches))
            spans.append(repeated + size)
            row, size = row + group.num_rows, size + len(text)
            if sum(len(columns[0]) for columns in pending) >= RUN_ANCHORS:
                runs.append(runs[-1] + _write_run(files, pending))
                pending = []
        if pending:
            runs.append(runs[-1] + _write_run(files, pending))
    for name, parts in ((BOUNDS, bounds), (RANKS, ranks), (SPANS, spans)):
        save(folder / name, np.concatenate(parts))
    save(folder / RUNS, np.array(runs, np.int64))
    return {"documents": int(living.sum()), "bytes_in": size, "anchors": runs[-1]}


def _ranks(group: pa.Table) -> NDArray[np.uint64]:
    """[n, 3]: time (none: last), first half of the id, hash of the origin. The smaller is earlier, word by word."""
    ranks = np.empty((group.num_rows, 3), np.uint64)
    times = group["timestamp"].cast(pa.int64()).fill_null(np.iinfo(np.int64).max).to_numpy()
    ranks[:, 0] = times.astype(np.uint64) ^ np.uint64(1 << 63)  # before 1970 is negative
    ranks[:, 1] = np.frombuffer(b"".join(group["id"].to_pylist()), ">u8")[::2]
    ranks[:, 2] = origins(group)
    return ranks


def _write_run(files: Sequence[BinaryIO], pending: Sequence[tuple[NDArray[Any], ...]]) -> int:
    columns = [np.concatenate(parts) for parts in zip(*pending)]
    order = np.argsort(columns[0], kind="stable")
    for file, column in zip(files, columns):
        file.write(column[order].data)
    return len(order)


def match(folders: Sequence[Path], part: int, parts: int, out: Path, options: Options, budget_bytes: int) -> Counts:
    """Write spans to cut, int64 [m, 2] in rising order, positions in the texts of all `folders` one after another: of
    windows whose anchor's hash is in the range `part` of `parts`.

    `parts`: `arrays.parts_within(anchors, BYTES_PER_ANCHOR, budget_bytes)`. Where an anchor stands in so many different
    surroundings that these do not fit the budget, later ones are compared with the earliest that do; the count
    "forgotten" says how many did not, 0 if everything was found.
    """
    starts = np.cumsum([0, *((folder / TEXTS).stat().st_size for folder in folders)])
    num_anchors, rows = _repeated(folders, starts, *key_range(part, parts))
    width = options.min_bytes + windows.num_grams(options.min_bytes) - 1
    # As many rows again are carried over; a row has its surroundings, what is known of its windows, and its slots.
    block = max(1, budget_bytes // 2 // (2 * (2 * width + 128)))
    spans, carried, forgotten = [np.empty((0, 2), np.int64)], rows[:0], 0
    for first in range(0, len(rows), block):
        here = np.concatenate([carried, rows[first : first + block]])
        around = np.empty((len(here), width), np.uint8)
        for file in np.unique(here["file"]).tolist():
            text, inside = _mapped(folders[file] / TEXTS, np.uint8), np.flatnonzero(here["file"] == file)
            windows.copy_around(text, starts[file], here, inside, options.min_bytes, around)
        repeated, leads = windows.repeats(around, here, options.min_bytes, options.keep_first)
        spans.append(repeated)
        # What the other occurrences of the last anchor, in the next block, are to be compared with.
        following = rows[first + block : first + block + 1]["hash"]
        carried = here[leads & (here["hash"] == following)] if len(following) else rows[:0]
        forgotten += max(0, len(carried) - block)
        carried = carried[:block]
    save(out, windows.union(np.concatenate(spans)))
    return {"anchors": num_anchors, "repeated": len(rows), "forgotten": forgotten}


def _repeated(
    folders: Sequence[Path], starts: NDArray[np.int64], low: np.uint64, high: np.uint64
) -> tuple[int, NDArray[Any]]:
    """How many anchors have a hash in the range, and those that share it with another: by hash, and of one hash the
    earlier first."""
    hashes, numbers, bounds = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [0]
    for folder in folders:
        held, runs = _mapped(folder / HASHES, np.uint64), np.load(folder / RUNS)
        for begin, end in pairwise(runs):
            run = held[begin:end]
            inside = slice(np.searchsorted(run, low), np.searchsorted(run, high, side="right"))
            hashes.append(np.array(run[inside]))
            numbers.append(np.arange(inside.start, inside.stop) + begin + bounds[-1])
        bounds.append(bounds[-1] + len(held))
    of, number = np.concatenate(hashes), np.concatenate(numbers)
    order = np.argsort(of, kind="stable")
    same = of[order[1:]] == of[order[:-1]]
    order = order[np.append(same, False) | np.insert(same, 0, False)] if len(order) else order
    # In the order of the files, which are read one by one.
    shared = order[np.argsort(number[order])]
    of, number = of[shared], number[shared]

    rows, ranks, num_documents = np.empty(len(of), windows.ROW), np.empty((len(of), 3), np.uint64), 0
    rows["hash"] = of
    for file, folder in enumerate(folders):
        here = slice(*np.searchsorted(number, bounds[file : file + 2]))
        texts, rank = np.load(folder / BOUNDS), np.load(folder / RANKS, mmap_mode="r")
        if here.start < here.stop:
            at = number[here] - bounds[file]
            position, reach = _mapped(folder / POSITIONS, np.int64)[at], _mapped(folder / REACHES, np.uint16, 2)[at]
            document = np.searchsorted(texts, position, side="right") - 1
            ranks[here] = rank[document]
            held = rows[here]
            held["file"], held["document"], held["position"] = file, document + num_documents, position + starts[file]
            held["far"], held["near"] = reach.T
        num_documents += len(texts) - 1
    order = np.lexsort((rows["position"], rows["document"], ranks[:, 2], ranks[:, 1], ranks[:, 0], rows["hash"]))
    return sum(map(len, hashes)), rows[order]


def decide(documents: Path, folder: Path, first: int, matched: Sequence[Path], attributes: Path) -> Counts:
    """Write the attributes of a document file; `first`: bytes of the texts of all folders before its `folder`."""
    text, bounds = _mapped(folder / TEXTS, np.uint8), np.load(folder / BOUNDS)
    spans = [np.load(folder / SPANS)]
    for path in matched:
        table = np.load(path, mmap_mode="r")
        spans.append(table[slice(*np.searchsorted(table[:, 0], [first, first + len(text)]))] - first)
    cuts, counts = windows.cuts_of(text, bounds, windows.union(np.concatenate(spans)))
    edges = np.cumsum(np.insert(counts, 0, 0))
    sums = np.add.reduceat(np.append(cuts[:, 1] - cuts[:, 0], 0), edges[:-1]) * (counts > 0)
    row = 0
    with ParquetFile(attributes, SCHEMA) as file:
        for group in read_groups(documents, ["bytes"]):
            here = edges[row : row + group.num_rows + 1]
            columns = [pa.array(cuts[here[0] : here[-1], side], pa.int32()) for side in (0, 1)]
            structs = pa.StructArray.from_arrays(columns, fields=list(_SPAN))
            lists = pa.ListArray.from_arrays(pa.array(here - here[0], pa.int32()), structs, type=SCHEMA.field(0).type)
            sizes = pa.array(sums[row : row + group.num_rows], pa.int32())
            file.write(pa.table([lists, sizes], schema=SCHEMA))
            row += group.num_rows
    return {"documents": row, "bytes_in": len(text), "cut": int((counts > 0).sum()), "bytes_cut": int(sums.sum())}


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is whole under its name, or not there."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def _mapped(path: Path, dtype: DTypeLike, columns: int = 0) -> NDArray[Any]:
    """A file of numbers where it lies; of none, an empty array, since nothing cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty((0, columns) if columns else 0, dtype)
    held = np.memmap(path, dtype, "r")
    return held.reshape(-1, columns) if columns else held
