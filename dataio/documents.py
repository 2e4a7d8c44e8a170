"""The one type that every corpus becomes: documents, in Parquet files, and attributes beside them, row for row.

A document file is written once and never changed; what a stage finds out about its documents goes into a file of its
own with the same row groups, so that a threshold can move without reading a text again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from stoker.errors import Refusal
from stoker.files import sync_directory

#: Text of one row group: what a stage holds in memory at a time, and small beside what a Python process needs anyway.
GROUP_BYTES = 8 << 20
#: Documents of a row group, where they are short.
GROUP_DOCUMENTS = 8192

#: As in a document file, in this order.
SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(16), nullable=False),  # xxh3-128 of the text in UTF-8, big-endian
        pa.field("text", pa.string(), nullable=False),
        pa.field("bytes", pa.int32(), nullable=False),  # of the text in UTF-8
        pa.field("source", pa.string(), nullable=False),  # name in the recipe
        pa.field("path", pa.string(), nullable=False),  # path within the source, or URL
        pa.field("repository", pa.string()),
        pa.field("revision", pa.string()),
        pa.field("language", pa.string()),  # as the source states or a file's name tells; prose is identified later
        pa.field("licence", pa.string()),  # SPDX expression, as stated
        pa.field("timestamp", pa.timestamp("us", tz="UTC")),
        pa.field("file", pa.int32(), nullable=False),  # which input file of the source
        pa.field("row", pa.int64(), nullable=False),  # which record of it, from 0
        pa.field("metadata", pa.string()),  # JSON object of whatever else a record had
    ]
)
_PARQUET = {"compression": "zstd", "compression_level": 1, "version": "2.6", "store_schema": False}


@dataclass(frozen=True)
class Document:
    """One text and where it comes from. `row`: record of the input file number `file` of its source.

    >>> Document("print(1)\\n", "code", "a.py", file=0, row=0).id.hex()
    '514cc96ed76438b83da3af4e8dbadf1a'
    """

    text: str
    source: str
    path: str
    file: int
    row: int
    repository: str | None = None
    revision: str | None = None
    language: str | None = None
    licence: str | None = None
    timestamp: Any = None  # datetime with a time zone
    metadata: str | None = None
    id: bytes = field(init=False)
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        raw = self.text.encode()
        object.__setattr__(self, "id", document_id(raw))
        object.__setattr__(self, "bytes", len(raw))


def document_id(text: bytes) -> bytes:
    """What a text is known by for ever, whatever file it came in: xxh3-128 of its UTF-8 bytes."""
    return xxhash.xxh3_128_digest(text)


class ParquetFile:
    """A Parquet file being written: whole under its name, or not there. A context manager.

    Memory is bounded by one row group; on leaving without an error the file is complete and durable.
    """

    def __init__(self, path: str | os.PathLike[str], schema: pa.Schema) -> None:
        self.path, self.schema = Path(path), schema
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        # Dictionaries only where values repeat: of ids and texts they would be copies.
        words = [name for name in schema.names if name in ("source", "repository", "revision", "language", "licence")]
        words += [name for name in schema.names if name.startswith("reason")]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._partial, schema, use_dictionary=words, **_PARQUET)

    def write(self, group: pa.RecordBatch | pa.Table) -> None:
        """One row group."""
        table = pa.Table.from_batches([group]) if isinstance(group, pa.RecordBatch) else group
        self._writer.write_table(table.cast(self.schema), row_group_size=max(1, table.num_rows))

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._writer.close()
            if kind is None:
                with open(self._partial, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(self._partial, self.path)
                sync_directory(self.path.parent)
        finally:
            self._partial.unlink(missing_ok=True)


def write_documents(path: str | os.PathLike[str], documents: Iterable[Document]) -> int:
    """Write a document file of row groups of at most `GROUP_DOCUMENTS` documents and about `GROUP_BYTES` of text;
    returns how many there were. The same documents give the same bytes."""
    count = 0
    with ParquetFile(path, SCHEMA) as file:
        group: list[Document] = []
        size = 0
        for document in documents:
            if group and (size + len(document.text) > GROUP_BYTES or len(group) == GROUP_DOCUMENTS):
                file.write(_batch(group))
                group, size = [], 0
            group.append(document)
            size += len(document.text)
            count += 1
        if group:
            file.write(_batch(group))
    return count


def _batch(documents: Sequence[Document]) -> pa.RecordBatch:
    names = {entry.name for entry in fields(Document)}
    assert names == set(SCHEMA.names)
    columns = [pa.array([getattr(d, entry.name) for d in documents], entry.type) for entry in SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def read_groups(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    beside: Mapping[str | os.PathLike[str], Sequence[str]] | None = None,
) -> Iterator[pa.Table]:
    """The row groups of a document file, with `columns` of it and of the attribute files `beside` it.

    Refuses a file that is missing or damaged, and one beside it whose row groups are others.
    """
    wanted = {path: columns, **(beside or {})}
    with ExitStack() as stack:
        opened = [(name, stack.enter_context(_open(name)), of) for name, of in wanted.items()]
        shapes = {name: _group_rows(file) for name, file, _ in opened}
        if any(shape != shapes[path] for shape in shapes.values()):
            wrong = next(name for name, shape in shapes.items() if shape != shapes[path])
            raise Refusal(f"{wrong}: its rows are not those of {path}; remove it and run its stage again")
        for group in range(len(shapes[path])):
            tables = [_read(name, file, group, of) for name, file, of in opened]
            table = tables[0]
            for other in tables[1:]:
                for name in other.column_names:
                    table = table.append_column(other.schema.field(name), other.column(name))
            yield table


def _open(path: str | os.PathLike[str]) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise Refusal(
            f"{path}: not a document or attribute file that can be read ({error}); prepare it again"
        ) from None


def _group_rows(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _read(path: Any, file: pq.ParquetFile, group: int, columns: Sequence[str] | None) -> pa.Table:
    try:
        return file.read_row_group(group, columns=None if columns is None else list(columns), use_threads=False)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise Refusal(f"{path}: row group {group} cannot be read ({error}); prepare it again") from None
