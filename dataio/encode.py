"""Documents to tokens: what was kept, as it was kept, in the rows of its document file.

    sample     of one document file: the texts that a tokenizer is trained on
    train      a tokenizer on the samples
    encode     of one document file: out/tokens.npy, lengths.npy, bytes.npy

A text is read as it will be trained on: repeated passages cut out, secrets replaced, a header before code. Memory is
bounded by one row group of the document file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dataio import backends, edits
from dataio import tokenizer as bpe
from dataio.dedup.arrays import save
from dataio.documents import ParquetFile, read_groups
from dataio.filters.redact import replacement
from dataio.header import FIELDS, check_header
from dataio.selection import FLAGS
from dataio.stages import Counts
from stoker.errors import Refusal

VERSION = 1
#: What `encode` writes into its folder.
FILES = ("tokens.npy", "lengths.npy", "bytes.npy")

_SAMPLE = pa.schema([pa.field("text", pa.string(), nullable=False)])


@dataclass(frozen=True)
class Texts:
    """The kept texts of one document file, as they are trained on. Paths of the file and of attributes beside it.

    `header`: what stands before code, such as ``"# {repository}/{path}\\n"``; what a document lacks is left empty.
    """

    documents: Path
    select: Path
    redact: Path | None = None
    substring: Path | None = None
    header: str | None = None

    def __post_init__(self) -> None:
        if self.header is not None:
            check_header(self.header)

    def groups(self) -> Iterator[Group]:
        """The row groups of the file, one after the other."""
        beside: dict[Any, Sequence[str]] = {self.select: ("reason", "language", "flags")}
        if self.redact is not None:
            beside[self.redact] = ("redactions",)
        if self.substring is not None:
            beside[self.substring] = ("substring",)
        first = 0
        for table in read_groups(self.documents, ["id", "text", "bytes", "path", "repository"], beside):
            kept = np.flatnonzero(table["reason"].is_null().to_numpy())
            rest = table.drop_columns(["text"]).take(kept)
            found = Group(
                table.num_rows, int(table["bytes"].to_numpy().sum()), kept, rest, _bytes_of(table["text"], kept)
            )
            try:
                self._rewrite(found)
            except ValueError as error:
                raise Refusal(
                    f"{self.documents}: rows from {first}: {error}; the stages substring and redact were of other texts"
                ) from None
            self._put_headers(found)
            first += table.num_rows
            yield found

    def _rewrite(self, group: Group) -> None:
        texts, all_cuts, all_secrets = group.texts, _spans(group.table, "substring"), _spans(group.table, "redactions")
        for row in sorted({*all_cuts, *all_secrets}):
            secrets = all_secrets.get(row, ())
            pieces = [(span["start"], span["stop"]) for span in all_cuts.get(row, ())]
            instead = [(s["start"], s["stop"], replacement(s["kind"]).encode()) for s in secrets]
            before, texts[row] = len(texts[row]), edits.apply(texts[row], pieces, instead)
            group.counts.update(rewritten=1, redacted=len(secrets), cut_bytes=sum(b - a for a, b in pieces))
            group.counts["emptied"] += 1 if before and not texts[row] else 0

    def _put_headers(self, group: Group) -> None:
        texts, table = group.texts, group.table
        if self.header is not None:
            is_code = table["flags"].to_numpy() & FLAGS["code"] > 0
            columns = [table[name].to_pylist() for name in FIELDS]
            for row in np.flatnonzero(is_code).tolist():
                if texts[row]:
                    values = {name: _line(column[row]) for name, column in zip(FIELDS, columns)}
                    texts[row] = self.header.format(**values).encode() + texts[row]


@dataclass
class Group:
    """A row group: how many rows it has, bytes of their texts, and which of them were kept."""

    rows: int
    bytes_in: int
    kept: NDArray[np.int64]
    table: pa.Table  # of the kept rows, without their texts
    texts: list[bytes]  # of the kept rows, as they are trained on
    counts: Counter[str] = field(default_factory=Counter)


def encode(texts: Texts, tokenizer: Path, out: Path) -> Counts:
    """Write into the folder `out`, for a document file of n rows:

        tokens.npy     uint16 if the vocabulary fits, or uint32: the kept documents in a row, each ended by end-of-text
        lengths.npy    int64 [n] tokens of each row, end-of-text included; 0 where it was dropped
        bytes.npy      int64 [n] bytes in UTF-8 of the text as encoded

    A text of which nothing was left is end-of-text alone. Counts tell tokens and bytes by language, too.
    """
    encoder = backends.encoder(tokenizer)
    identity = encoder.tokenizer.id
    dtype = np.dtype(bpe.token_dtype(identity))
    lengths, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    counts: Counter[str] = Counter(documents=0, bytes_in=0, kept=0, tokens=0, bytes=0)
    out.mkdir(parents=True, exist_ok=True)
    with _array_file(out / "tokens.npy", dtype) as write:
        for group in texts.groups():
            if counts["kept"] == 0:
                encoder.check(group.texts)
            ids, found = encoder.encode(group.texts)
            tokens = np.empty(len(ids) + len(found), dtype)
            _end_each(ids, found, identity.eos_id, tokens)
            write(tokens)
            length, size = np.zeros(group.rows, np.int64), np.zeros(group.rows, np.int64)
            length[group.kept], size[group.kept] = found + 1, [len(text) for text in group.texts]
            lengths.append(length)
            sizes.append(size)
            counts.update(group.counts)
            counts.update(documents=group.rows, bytes_in=group.bytes_in, kept=len(found))
            counts.update(tokens=int(length.sum()), bytes=int(size.sum()))
            for language, rows in _by_language(group.table):
                counts[f"tokens/{language}"] += int(length[group.kept[rows]].sum())
                counts[f"bytes/{language}"] += int(size[group.kept[rows]].sum())
    save(out / "lengths.npy", np.concatenate(lengths))
    save(out / "bytes.npy", np.concatenate(sizes))
    return dict(counts)


def sample(texts: Texts, share: float, out: Path) -> Counts:
    """Write to a file those of the kept texts whose id, as a number, is in the lowest `share` of all."""
    counts: Counter[str] = Counter(documents=0, bytes_in=0, kept=0, bytes=0)
    with ParquetFile(out, _SAMPLE) as file:
        for group in texts.groups():
            ids = np.frombuffer(b"".join(group.table["id"].to_pylist()), ">u8")[::2]
            chosen = [group.texts[row] for row in np.flatnonzero(ids < share * 2.0**64)]
            file.write(pa.table([pa.array(chosen, pa.binary()).cast(pa.string())], schema=_SAMPLE))
            counts.update(documents=group.rows, bytes_in=group.bytes_in, kept=len(chosen))
            counts["bytes"] += sum(len(text) for text in chosen)
    return dict(counts)


def train(samples: Sequence[Path], vocab_size: int, out: Path) -> Counts:
    """Train a tokenizer on what `sample` wrote and write it to `out`. Refuses texts too few for `vocab_size`."""
    counts: Counter[str] = Counter(documents=0, bytes_in=0)

    def texts() -> Iterator[str]:
        for path in samples:
            for table in read_groups(path):
                counts.update(documents=table.num_rows, bytes_in=table.nbytes)
                yield from table["text"].to_pylist()

    bpe.train(texts(), vocab_size, out)
    return dict(counts)


def _bytes_of(texts: pa.ChunkedArray, rows: NDArray[np.int64]) -> list[bytes]:
    """Of some rows in UTF-8, copied once."""
    whole = texts.chunk(0) if texts.num_chunks == 1 else texts.combine_chunks()  # which copies even one
    _, offsets, data = whole.buffers()
    bounds = np.frombuffer(offsets, np.int32, len(whole) + 1, 4 * whole.offset)
    view = memoryview(data or b"")
    return [view[start:stop].tobytes() for start, stop in zip(bounds[rows].tolist(), bounds[rows + 1].tolist())]


def _spans(table: pa.Table, column: str) -> dict[int, Sequence[Mapping[str, Any]]]:
    """Of the rows that have any; of none where the column is missing."""
    if column not in table.column_names:
        return {}
    rows = np.flatnonzero(pc.list_value_length(table[column]).fill_null(0).to_numpy())
    return dict(zip(rows.tolist(), table[column].take(pa.array(rows)).to_pylist()))


def _line(value: str | None) -> str:
    """A name as it may stand in a line."""
    return (value or "").translate({ord(sign): " " for sign in "\n\r\x85\u2028\u2029"})


def _by_language(table: pa.Table) -> Iterator[tuple[str, NDArray[np.intp]]]:
    found = table["language"].combine_chunks().dictionary_encode()
    for number, language in enumerate(found.dictionary.to_pylist()):
        yield language, np.flatnonzero(found.indices.to_numpy() == number)


@contextmanager
def _array_file(path: Path, dtype: np.dtype[Any]) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Writes an array file of rows that come piece by piece: whole under its name, or not there."""
    partial, count = path.with_name(f".{path.name}.partial"), 0

    def write(rows: NDArray[Any]) -> None:
        nonlocal count
        file.write(np.ascontiguousarray(rows, dtype).data)
        count += len(rows)

    def write_header() -> None:
        file.seek(0)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)

    try:
        with open(partial, "wb") as file:
            # numpy leaves room in it for the length to grow.
            write_header()
            begin = file.tell()
            yield write
            write_header()
            assert file.tell() == begin
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@numba.njit(nogil=True, cache=True)
def _end_each(ids: NDArray[np.uint32], lengths: NDArray[np.int64], end: int, out: NDArray[Any]) -> None:
    """Copy the ids of texts in a row, with `end` after each text."""
    start = 0
    for text in range(len(lengths)):
        stop = start + lengths[text]
        source, target = ids[start:stop], out[start + text : stop + text]
        for at in range(len(source)):  # of slices, that the compiler sees neither end: it is four times faster
            target[at] = source[at]
        out[stop + text] = end
        start = stop
