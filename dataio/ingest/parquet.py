"""Parquet files: one record a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataio.ingest.fields import Bad, Fields
from dataio.ingest.records import SAMPLE_BYTES, Malformed, Outcome
from dataio.ingest.streams import Damaged

#: Bytes of the columns that are decoded at a time, as far as the file's own figures tell.
_BATCH_BYTES = 8 << 20
_MAX_ROWS = 4096


def read(path: Path, fields: Fields) -> Iterator[Outcome]:
    """Rows are numbered over all row groups; raises `Damaged` for a file without a column of text, and where it cannot
    be read further. Memory is bounded by `_BATCH_BYTES` and the largest page, which writers keep near 1 MiB."""
    row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            _require_text(file.schema_arrow, fields.text)
            columns = _columns(file.schema_arrow.names, fields)
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                rows = max(1, min(_MAX_ROWS, meta.num_rows * _BATCH_BYTES // max(1, meta.total_byte_size)))
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    for values in _rows(batch):
                        yield _outcome(row, values, fields)
                        row += 1
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Damaged("parquet", str(error)[:200]) from None


def _require_text(schema: pa.Schema, name: str) -> None:
    column = name.split(".")[0]
    if column not in schema.names:
        raise Damaged("schema", f'has no column "{column}": {", ".join(schema.names)}'[:500])
    kind = schema.field(column).type
    while isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    if kind not in texts and "." not in name:
        raise Damaged("schema", f'column "{column}" is {kind}, not text')


def _columns(names: list[str], fields: Fields) -> list[str] | None:
    """Columns to read; None is all of them."""
    if fields.metadata == "all":
        return None
    wanted = fields.names() | set(fields.metadata)
    return [name for name in names if name in wanted]


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch; Parquet does not check that strings are UTF-8, so one that is not comes as its error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _outcome(row: int, values: dict[str, Any] | UnicodeDecodeError, fields: Fields) -> Outcome:
    if isinstance(values, UnicodeDecodeError):
        return Malformed(row, "encoding", values.object[:SAMPLE_BYTES], str(values)[:200])
    try:
        return fields.record(row, values)
    except Bad as bad:
        return Malformed(row, bad.why, str(values)[:SAMPLE_BYTES].encode("utf-8", "backslashreplace"), str(bad))
