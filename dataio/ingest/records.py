"""What readers yield: a record, one that cannot be read, or one that is not wanted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

#: Bytes of a malformed record that are shown.
SAMPLE_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Record:
    """A text and what its source states about it. `row`: number of the record in its file, from 0."""

    row: int
    text: str
    path: str | None = None
    language: str | None = None
    licence: str | None = None
    repository: str | None = None
    revision: str | None = None
    timestamp: datetime | None = None
    metadata: str | None = None


@dataclass(frozen=True, slots=True)
class Malformed:
    """A record, or with `row` None the rest of a file, that does not hold what its format says. `why`: its kind."""

    row: int | None
    why: str
    sample: bytes = b""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that is well formed and no document. `why`: its kind."""

    why: str


Outcome = Record | Malformed | Skipped


def text_of(row: int, data: bytes) -> str | Malformed:
    """The text of a file's bytes: UTF-8 (or UTF-16 that says so), or why it is none."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in data:
        return Malformed(row, "binary", data[:SAMPLE_BYTES], "holds NUL bytes")
    else:
        encoding = "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        start = max(0, error.start - SAMPLE_BYTES // 2)
        return Malformed(row, "encoding", data[start : start + SAMPLE_BYTES], str(error)[:200])


def checked(record: Record, max_bytes: int) -> tuple[str, int] | Malformed | Skipped:
    """The text as it becomes a document, and its bytes in UTF-8: without byte order mark, line ends as ``\\n``."""
    text = record.text
    if text.startswith("\ufeff"):
        text = text[1:]
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        return Malformed(record.row, "surrogate", _shown(text, error.start), str(error)[:200])
    if b"\0" in data:
        return Malformed(record.row, "binary", _shown(text, text.index("\0")), "holds NUL characters")
    if len(data) > max_bytes:
        return Skipped("too_long")
    return (text, len(data)) if text and not text.isspace() else Skipped("empty")


def printable(path: str) -> str:
    """A path with escapes for bytes of a name that are not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _shown(text: str, at: int) -> bytes:
    return text[max(0, at - SAMPLE_BYTES // 8) : at + SAMPLE_BYTES // 8].encode("utf-8", "backslashreplace")
