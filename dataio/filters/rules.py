"""Measuring and judging, as every filter of thresholds does it.

A column of values and the option that bounds it share a name: ``max_hash_share`` drops what has more than it says in
the column ``hash_share``, ``min_words`` what has fewer ``words``, ``drop_vendored`` what is marked in ``vendored``. A
value on the bound stays, None or False switches a rule off, and a value that is null, because there was nothing to
measure, drops nothing. The reason is the option's name; rules are asked in the order of the options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel

from dataio.documents import ParquetFile, read_groups
from dataio.languages import is_code
from dataio.stages import Counts

#: Values of some documents, in their order: {column: array}. NaN becomes null.
Values = Mapping[str, NDArray[Any] | pa.Array]


def write_attributes(
    documents: Path,
    attributes: Path,
    schema: pa.Schema,
    columns: Sequence[str],
    *,
    code: bool,
    values: Callable[[pa.Table], Values],
) -> Counts:
    """Write beside a document file what `values` finds in its code, or in its prose; null for the others. `values` is
    given `columns` (the text among them) of the documents of one row group that are meant."""
    count = measured = size = 0
    with ParquetFile(attributes, schema) as file:
        for group in read_groups(documents, [*columns, *({"language"} - set(columns))]):
            group = group.combine_chunks()
            meant = np.array([is_code(language) == code for language in group["language"].to_pylist()], np.bool_)
            found = values(group.filter(pa.array(meant))) if meant.any() else {}
            places = pa.array(np.cumsum(meant) - 1, mask=~meant)
            file.write(pa.table([_column(found.get(field.name), field, places) for field in schema], schema=schema))
            count += group.num_rows
            measured += int(meant.sum())
            size += int(utf8(group["text"])[1][-1])
    return {"documents": count, "measured": measured, "bytes_in": size}


def _column(values: NDArray[Any] | pa.Array | None, field: pa.Field, places: pa.Array) -> pa.Array:
    if values is None:
        return pa.nulls(len(places), field.type)
    return pa.array(values, from_pandas=True).cast(field.type).take(places)


def utf8(texts: pa.ChunkedArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of texts, one after another, and where each begins; the last offset is where the last one ends."""
    array = pa.concat_arrays(texts.chunks) if texts.num_chunks != 1 else texts.chunk(0)
    _, offsets, data = array.buffers()
    starts = np.zeros(1, np.int64)
    if len(array):
        starts = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    content = np.frombuffer(data or b"", np.uint8)[starts[0] : starts[-1]]
    content.flags.writeable = False  # one type for what is compiled, whoever allocated it
    return content, starts - starts[0]


def judge_bounds(
    table: pa.Table, options: BaseModel, exempt: Mapping[str, NDArray[np.bool_]] | None = None
) -> list[str | None]:
    """Of every row the first option that drops it, or None. `exempt`: by an option's name, rows that it is not asked
    about."""
    reasons = np.full(table.num_rows, None, object)
    for name in type(options).model_fields:
        side, _, column = name.partition("_")
        bound = getattr(options, name)
        if side not in ("min", "max", "drop") or bound is None or bound is False:
            continue
        if side == "drop":
            beyond = np.array([bool(mark) for mark in table[column].to_pylist()], np.bool_)
        else:
            found = table[column].to_numpy()  # of float32 mostly, and so is the bound then: what is on it is on it
            beyond = found < bound if side == "min" else found > bound
        if exempt is not None and name in exempt:
            beyond &= ~exempt[name]
        reasons[beyond & (reasons == None)] = name  # noqa: E711 (elementwise)
    return reasons.tolist()
