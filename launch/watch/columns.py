"""Lines of ``metrics.jsonl`` as columns of numbers: what ``json`` reads of each line, at a fraction of its time.

A large block of lines as they are written goes to Arrow's reader. One that holds anything else (a damaged line, a loss
that is not finite, a key of an unexpected type) is read line by line, so the columns are the same either way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launch.watch.tail import objects
from pretrain.events import SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa

Array = NDArray[Any]
Columns = dict[str, Array]

#: Columns of every step, with their types; further ones are ``draws.<source>`` and ``aux.<name>``.
COUNTS, REALS, CLOCK = (
    ("step", "attempt", "tokens"),
    ("loss", "grad_norm", "lr"),
    ("step_time_s", "tokens_per_s", "mfu"),
)
DRAWS, AUX = "draws.", "aux."
#: Bytes from which on it pays to import Arrow.
LARGE = 1 << 20
#: A source that is null, which is damage, and not one that is absent, which was not drawn.
_NULL_DRAWN = re.compile(rb'"draws":\{[^}]*:null')


def read(block: bytes) -> tuple[Columns, int]:
    """The steps in whole lines, and how many lines are none."""
    if len(block) >= LARGE and (found := read_regular(block)) is not None:
        return found, 0
    rows, damaged = objects(block)
    try:
        return of_rows(rows), damaged
    except _WRONG:
        good = [row for row in rows if _readable(row)]
        return of_rows(good), damaged + len(rows) - len(good)


def of_rows(rows: Sequence[dict[str, Any]]) -> Columns:
    """Lines as columns; one of ``_WRONG`` if any of them is not a step of this schema."""
    if any(row["schema"] != SCHEMA for row in rows):
        raise ValueError("another schema")
    clocks = [row["timing"] for row in rows]
    draws, aux = [row["draws"] for row in rows], [row["aux"] for row in rows]
    return {
        **{name: _array([row[name] for row in rows], np.int64) for name in COUNTS},
        **{name: _array([row[name] for row in rows], np.float64) for name in REALS},
        **{name: _array([clock.get(name) for clock in clocks], np.float64) for name in CLOCK},
        "applied": _array([row["applied"] for row in rows], bool),
        "verdict": np.array([str(row["verdict"]) for row in rows], object),
        **{DRAWS + name: _array([d.get(name, 0) for d in draws], np.int64) for name in _union(draws)},
        **{AUX + name: _array([a.get(name, np.nan) for a in aux], np.float64) for name in _union(aux)},
    }


def read_regular(block: bytes) -> Columns | None:
    """The columns of a block whose every line is a step as ``StepEvent.to_line`` writes it with finite numbers; None
    where Arrow cannot say, or could read it in another way than ``json`` does."""
    # Arrow takes objects wherever they begin, lists of any depth, bytes that are no text, and the word Inf.
    lines = _lines(block)
    if lines is None or not block.isascii() or b"[" in block or (b"I" in block and b"Inf" in block):
        return None
    import pyarrow as pa
    from pyarrow import json

    known = [
        *((name, pa.int64()) for name in ("schema", *COUNTS)),
        *((name, pa.float64()) for name in REALS),
        ("timing", pa.struct([(name, pa.float64()) for name in CLOCK])),
        ("applied", pa.bool_()),
        ("verdict", pa.string()),
    ]
    try:
        table = json.read_json(
            pa.BufferReader(block),
            json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            json.ParseOptions(explicit_schema=pa.schema(known), unexpected_field_behavior="infer"),
        )
        if table.num_rows != lines:
            return None
        top = {name: table[name].combine_chunks() for name in (*dict(known), "draws", "aux")}
        if any(column.null_count for column in top.values()) or (top["schema"].to_numpy() != SCHEMA).any():
            return None
        draws, aux = _fields(top["draws"]), _fields(top["aux"])
    except (pa.ArrowException, KeyError, TypeError):
        return None
    if any(found.null_count for found in draws.values()) and _NULL_DRAWN.search(block):
        return None
    if any(found.type != pa.int64() for found in draws.values()):
        return None
    if not all(found.type in (pa.int64(), pa.float64(), pa.null()) for found in aux.values()):
        return None
    clock = _fields(top["timing"])
    return {
        **{name: top[name].to_numpy() for name in (*COUNTS, *REALS)},
        **{name: _reals(clock[name]) for name in CLOCK},
        "applied": top["applied"].to_numpy(zero_copy_only=False),
        "verdict": top["verdict"].to_numpy(zero_copy_only=False),
        **{DRAWS + name: found.fill_null(0).to_numpy() for name, found in draws.items()},
        **{AUX + name: _reals(found) for name, found in aux.items()},
    }


#: What a line that is JSON and no step's makes go wrong.
_WRONG = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


def _lines(block: bytes) -> int | None:
    """How many, if each begins and ends with a brace: with as many objects as lines, each is one. None if not."""
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    begins = np.concatenate([[0], ends[:-1] + 1])
    braces = (characters[begins] == ord("{")).all() and (characters[ends - 1] == ord("}")).all()
    return len(ends) if braces else None


def _fields(column: pa.Array) -> dict[str, pa.Array]:
    """Of a column of objects; TypeError where it is none."""
    if not str(column.type).startswith("struct"):
        raise TypeError(f"{column.type} is no object")
    return {column.type.field(index).name: column.field(index) for index in range(column.type.num_fields)}


def _reals(column: pa.Array) -> Array:
    """Null is NaN."""
    if column.null_count == len(column):
        return np.full(len(column), np.nan)
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def _array(values: list[Any], dtype: Any) -> Array:
    """NumPy reads the texts "nan", "inf" and "-inf", and None as NaN."""
    array = np.array(values, dtype)
    if array.ndim != 1:
        raise ValueError("nested")
    return array


def _union(maps: Iterable[dict[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(name for each in maps for name in each)


def _readable(row: dict[str, Any]) -> bool:
    try:
        of_rows([row])
    except _WRONG:
        return False
    return True
