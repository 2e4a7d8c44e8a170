"""JSON lines: one object a line, plain or compressed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from dataio.ingest.fields import Bad, Fields
from dataio.ingest.records import SAMPLE_BYTES, Malformed, Outcome
from dataio.ingest.streams import lines

#: A line may have this many times the bytes of the longest document: escapes (six bytes for one) and metadata.
_LINE_FACTOR = 4


def read(stream: io.BufferedReader, fields: Fields, max_document_bytes: int) -> Iterator[Outcome]:
    """Rows are lines, blank ones counted. Memory is bounded by the longest line that is parsed."""
    decode = json.JSONDecoder(parse_constant=_not_json).decode
    limit = _LINE_FACTOR * max_document_bytes
    for row, (line, size) in enumerate(lines(stream, limit)):
        if size > limit:
            yield Malformed(row, "long_line", line[:SAMPLE_BYTES], f"has {size} bytes, above {limit}")
            continue
        if not line or line.isspace():
            continue
        try:
            text = line.decode("utf-8-sig" if row == 0 else "utf-8")
            values = decode(text)
            if not isinstance(values, dict):
                raise Bad("not_object", f"is {type(values).__name__}, not an object")
            yield fields.record(row, values)
        except Bad as bad:
            yield Malformed(row, bad.why, line[:SAMPLE_BYTES], str(bad))
        except UnicodeDecodeError as error:
            start = max(0, error.start - SAMPLE_BYTES // 2)
            yield Malformed(row, "encoding", line[start : start + SAMPLE_BYTES], str(error)[:200])
        except RecursionError:
            yield Malformed(row, "nested", line[:SAMPLE_BYTES], "objects or arrays are nested too deeply")
        except ValueError as error:
            why = "binary" if b"\0" in line else "json"
            yield Malformed(row, why, line[:SAMPLE_BYTES], str(error)[:200])


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
