"""JSON lines: one object a line, plain or compressed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dataio.ingest.fields import Bad, Fields
from dataio.ingest.records import SAMPLE_BYTES, Malformed, Outcome
from dataio.ingest.streams import lines

#: A line may have this many times the bytes of the longest document: escapes (six bytes for one) and metadata.
_LINE_FACTOR = 4
#: And this many where one of its characters lies beyond U+FFFF, for which Python keeps four bytes for every other too.
_WIDE_LINE_FACTOR = 2
_WIDE = re.compile(rb"[\xf0-\xf4]|\\u[dD]8")
#: Strings, and what begins or parts values; a string that does not end reaches to the end of the line.
_TOKEN = re.compile(rb'[\[{,]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
#: A line may have a token for this many bytes of the longest document: an empty object takes 72 bytes of memory, one
#: with a key of its own 300. But always `_FREE_TOKENS`.
_BYTES_PER_TOKEN = 16
_FREE_TOKENS = 1 << 16


def read(stream: io.BufferedReader, fields: Fields, max_document_bytes: int) -> Iterator[Outcome]:
    """Rows are lines, blank ones counted. Memory is bounded by the longest line that is parsed and by how much it may
    hold: twelve times `max_document_bytes` for a text with an emoji, thirty for the worst line that was found."""
    decode = json.JSONDecoder(parse_constant=_not_json).decode
    limit = _LINE_FACTOR * max_document_bytes
    wide_limit = _WIDE_LINE_FACTOR * max_document_bytes
    tokens = max(_FREE_TOKENS, max_document_bytes // _BYTES_PER_TOKEN)
    for row, (line, size) in enumerate(lines(stream, limit)):
        if size > limit:
            yield Malformed(row, "long_line", line[:SAMPLE_BYTES], f"has {size} bytes, above {limit}")
            continue
        if size > wide_limit and _WIDE.search(line):
            detail = f"has {size} bytes, above {wide_limit} for a line with characters beyond U+FFFF"
            yield Malformed(row, "long_line", line[:SAMPLE_BYTES], detail)
            continue
        if not line or line.isspace():
            continue
        if size > tokens and next(islice(_TOKEN.finditer(line), tokens, None), None):
            yield Malformed(
                row, "structure", line[:SAMPLE_BYTES], f"has more than {tokens} strings, brackets and commas"
            )
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
