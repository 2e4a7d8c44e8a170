"""What a reader is told, in words and in lines: whatever a text or a name holds, nothing acts on a terminal and nothing
is invisible."""

from __future__ import annotations

import json
import math
import unicodedata
from datetime import datetime
from typing import Any

from dataio.view.viewer import Dropped, Shown
from dataio.view.workspace import Record

#: Columns of a document file that a reader wants, in this order; the rest say where it lies.
DOCUMENT = ("path", "repository", "revision", "licence", "timestamp", "metadata")
#: Characters of a value in a table.
VALUE = 240
#: Unicode categories of what has no shape of its own or acts on its neighbours: controls, formats (directions, joiners,
#: tags), surrogates, private use, unassigned, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str) -> str:
    """The text with every character of that kind written out, line breaks and tabs excepted.

    >>> visible("a\\x1b[31m\\u202eb\\tc\\r\\n")
    'a⟨U+001B⟩[31m⟨U+202E⟩b\\tc⟨U+000D⟩\\n'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _UNSEEN:
        return character
    return f"⟨U+{ord(character):04X}⟩"


def said(value: Any) -> str:
    """A value of a column in a line: ids in hexadecimal, numbers with four digits, what is long cut off.

    >>> said(b"\\x01\\xff"), said(0.123456), said([{"start": 1, "stop": 4, "kind": "email"}] * 9)[:52], said(None)
    ('01ff', '0.1235', '9: {"start": 1, "stop": 4, "kind": "email"}, {"start', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bytes):
        text = value.hex()
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:.4g}" if math.isfinite(value) else str(value)
    elif isinstance(value, int):
        text = str(value)
    elif isinstance(value, datetime):
        text = value.isoformat(sep=" ")
    elif isinstance(value, list):
        head = ", ".join(json.dumps(entry, default=str, ensure_ascii=False) for entry in value[:8])
        text = f"{len(value)}: {head}" if value else "none"
    else:
        text = str(value)
    return one_line(text)


def one_line(text: str, length: int = VALUE) -> str:
    """At most `length` characters, in one line."""
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return visible(cut).replace("\n", "⏎").replace("\t", "⇥")


def origin(document: Shown | Dropped) -> str | None:
    """The input file and record that a document comes from, and its row in the workspace."""
    places = []
    if document.row is not None:
        places.append(f"{document.input_file or 'an input file without a name'}, record {document.row:,}")
    if document.record:
        source, unit, row = document.record.place
        places.append(f"documents/{source}/{unit}.parquet, row {row:,}")
    return "; ".join(places) or None


def why(record: Record) -> str:
    """Why a document was kept or dropped, in words."""
    if "select" not in record.stages:
        return "not decided yet"
    if record.reason is not None:
        return f"dropped: {record.reason}"
    passed = [stage for stage, values in decisions(record) if values and stage not in ("filter", "select")]
    return f"kept: {', '.join(passed) or 'no stage'} had nothing against it"


def decisions(record: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """(stage, [(column, value)]) of the values that a stage measured or decided."""
    return [
        (stage, [(name, said(value)) for name, value in values.items() if value is not None])
        for stage, values in record.stages.items()
    ]
