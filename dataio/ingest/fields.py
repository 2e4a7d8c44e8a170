"""Which keys of a JSON object, or columns of a Parquet file, say what about a document."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field

from dataio import languages, licences
from dataio.ingest.records import Record
from stoker.sections import Section

#: Characters of a path, language, licence or repository: more is not one.
_MAX_WORD = 8192
#: Characters of metadata that are kept with a document.
_MAX_METADATA = 65_536
#: A list in YAML, and hashable.
Strings = Annotated[tuple[str, ...], Field(strict=False)]
_ABSENT = object()
_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, default=str).encode
_NUMBER = re.compile(r"-?\d{1,19}(\.\d+)?")


class Bad(Exception):
    """A record that cannot become a document. `why`: its kind."""

    def __init__(self, why: str, detail: str) -> None:
        super().__init__(detail)
        self.why = why


class Fields(Section):
    """Names of the keys or columns; ``meta.url`` is the key "url" of the object "meta". One that a record has not, or
    with the value null, is unknown. What no field names is kept as the document's metadata."""

    text: str = Field(
        default="text", description="the text; a record without this key is malformed, one with null is empty"
    )
    path: str | None = Field(default="url", description="path or URL; a record without one has the path of its file")
    language: str | None = Field(default="language", description="programming or natural language, by any common name")
    licence: str | None = Field(
        default="license", description="SPDX expression or other wording; a list means all of them"
    )
    repository: str | None = Field(default="repository", description="what the file belongs to")
    revision: str | None = Field(default="revision", description="commit or version of the repository")
    timestamp: str | None = Field(
        default="timestamp", description="ISO 8601, or seconds (or milli-, microseconds) since 1970"
    )
    metadata: Literal["all"] | Strings = Field(default="all", description="top-level keys to keep as metadata")

    def names(self) -> frozenset[str]:
        """Top-level keys that are read apart from metadata."""
        return frozenset(name.split(".")[0] for name in self._used)

    def record(self, row: int, values: Mapping[str, Any]) -> Record:
        """The record of a JSON object or row; raises `Bad`."""
        text = _look_up(values, self.text)
        if text is _ABSENT:
            raise Bad("no_text", f'has no key "{self.text}": {", ".join(map(str, values))[:200]}')
        if isinstance(text, bytes):
            text = _utf8(text)
        if text is not None and not isinstance(text, str):
            raise Bad("text_type", f'"{self.text}" is {type(text).__name__}, not text')
        words = {name: _word(_look_up(values, key), name) for name, key in self._words.items()}
        language, licence = words.get("language"), words.get("licence")
        when = None if self.timestamp is None else moment(_look_up(values, self.timestamp))
        return Record(
            row,
            text or "",
            path=words.get("path"),
            language=languages.named(language) if language else None,
            licence=expression(licence) if licence else None,
            repository=words.get("repository"),
            revision=words.get("revision"),
            timestamp=when,
            metadata=self._metadata(values, timestamp_known=when is not None),
        )

    @cached_property
    def _words(self) -> dict[str, str]:
        """Keys of what is a short text."""
        names = ("path", "language", "licence", "repository", "revision")
        return {name: key for name in names if (key := getattr(self, name)) is not None}

    @cached_property
    def _used(self) -> frozenset[str]:
        return frozenset([self.text, *self._words.values(), *([self.timestamp] if self.timestamp else [])])

    def _metadata(self, values: Mapping[str, Any], timestamp_known: bool) -> str | None:
        used = self._used if timestamp_known or self.timestamp is None else self._used - {self.timestamp}
        rest = {
            key: value
            for key, value in values.items()
            if value is not None and key not in used and (self.metadata == "all" or key in self.metadata)
        }
        if not rest:
            return None
        try:
            written = _ENCODE(rest)
        except (ValueError, TypeError, RecursionError) as error:
            raise Bad("metadata", f"metadata cannot be written as JSON: {error}"[:200]) from None
        return written if len(written) <= _MAX_METADATA else f'{{"left_out_bytes":{len(written)}}}'


def _look_up(values: Mapping[str, Any], name: str) -> Any:
    """The value of a key, or of one in an object in it; `_ABSENT` if there is none."""
    found = values.get(name, _ABSENT)
    if found is _ABSENT and "." in name:
        first, rest = name.split(".", 1)
        inner = values.get(first)
        return _look_up(inner, rest) if isinstance(inner, Mapping) else _ABSENT
    return found


def _word(value: Any, name: str) -> str | None:
    """A short text of a record: numbers as they print, a list of licences as all of them."""
    if value is None or value is _ABSENT:
        return None
    if isinstance(value, bytes):
        value = _utf8(value)
    if isinstance(value, list) and name == "licence":
        value = " AND ".join(sorted({part for part in value if isinstance(part, str)}))
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not (value := value.strip()):
        return None
    if len(value) > _MAX_WORD:
        raise Bad("long_field", f"{name} has {len(value)} characters")
    if not value.isprintable():  # rare, so that the exact questions come second
        value = value.replace("\0", "")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise Bad("surrogate", f"{name} holds half of a surrogate pair")
    return value or None


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Bad("encoding", str(error)[:200]) from None


@lru_cache(4096)
def expression(licence: str) -> str:
    """A licence as SPDX expression where its wording is known, else as it is."""
    return licences.normalise(licence) or licence


def moment(value: Any) -> datetime | None:
    """The point in time that a value states, without an offset in UTC; None if it states none.

    >>> str(moment("2024-02-29T12:00:00+01:00")), str(moment(1709204400123))
    ('2024-02-29 11:00:00+00:00', '2024-02-29 11:00:00.123000+00:00')
    """
    try:
        if isinstance(value, str):
            number = _NUMBER.fullmatch(value.strip()) if len(value) > 8 else None
            value = float(value) if number else datetime.fromisoformat(value.strip())
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime):
            return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, int | float) and not isinstance(value, bool):
            # Seconds until the year 5138, then milliseconds, then microseconds.
            scale = 1 if abs(value) < 1e11 else 1e3 if abs(value) < 1e14 else 1e6
            return datetime.fromtimestamp(value / scale, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    return None
