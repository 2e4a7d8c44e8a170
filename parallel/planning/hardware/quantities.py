"""Files of numbers that carry a unit and a source: ``{value: 900 GB/s, source: datasheet, note: ...}``. No torch.

A schema says what a file holds: dotted field -> base unit of ``SCALES``, or "count", "counts", "word", "flag".
Words and flags stand bare; a number without a source is refused; a number that nobody knows is ``{value: null}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import yaml

from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.formats import require, stamp
from stoker.nearest import nearest

#: How far a number can be trusted: read in a primary source, read in a secondary one, the vendor's figure from general
#: knowledge, measured on the machine, or taken over from elsewhere because none is published (the text says whence).
Tag = Literal["verified", "secondary", "known", "measured", "assumed"]

#: What a file may write, by the base unit that it becomes.
SCALES: Mapping[str, Mapping[str, float]] = {
    "FLOP/s": {"FLOP/s": 1, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15},
    "bytes": {"bytes": 1, "GB": 1e9, "MiB": 2**20, "GiB": 2**30},
    "bytes/s": {"bytes/s": 1, "GB/s": 1e9, "TB/s": 1e12, "Gb/s": 1e9 / 8},
    "s": {"s": 1, "us": 1e-6},
    "W": {"W": 1},
}
BARE = {"word": str, "flag": bool}


@dataclass(frozen=True)
class Source:
    """Where a number comes from; ``date`` as the source gives it, or when it was read."""

    text: str
    tag: Tag
    url: str | None = None
    date: str | None = None


Values = dict[str, Any]
Sources = dict[str, Source]


def read_quantities(
    path: Path, name: str, version: int, schema: Mapping[str, str], optional: str
) -> tuple[Values, Sources]:
    """Values in base units and their sources, both by dotted field, of the file at `path` with the stamp `name`.

    Fields under the prefix `optional` may be missing, all others of `schema` must be there and nothing else may.
    Raises Refusal that names the file and the field.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not readable as YAML ({error})") from None
    require(content, name, version, str(path))
    return _Reader(path, content, schema).read(optional)


def write_quantities(
    path: str | Path, name: str, version: int, schema: Mapping[str, str], values: Values, sources: Sources
) -> None:
    """Write what ``read_quantities`` reads back equal."""
    named = {source: f"s{index}" for index, source in enumerate(dict.fromkeys(sources.values()))}
    content: dict[str, Any] = {
        "format": stamp(name, version),
        "sources": {
            key: {part: text for part, text in asdict(source).items() if text is not None}
            for source, key in named.items()
        },
    }
    for field, value in values.items():
        *parents, last = field.split(".")
        table = content
        for parent in parents:
            table = table.setdefault(parent, {})
        unit = schema[field]
        if unit in SCALES and value is not None:
            value = f"{value!r} {unit}"
        elif unit == "counts":
            value = list(value)
        source = {"source": named[sources[field]]} if field in sources else {}
        table[last] = value if unit in BARE else {"value": value, **source}
    write_atomic(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


class _Reader:
    """One file, its fields checked one by one."""

    def __init__(self, path: Path, content: dict[str, Any], schema: Mapping[str, str]) -> None:
        self.path, self.schema = path, schema
        self.entries = dict(self._leaves({key: content[key] for key in content if key not in ("format", "sources")}))
        self.named = {key: self._source(key, entry) for key, entry in self._table(content, "sources").items()}

    def read(self, optional: str) -> tuple[Values, Sources]:
        for field in self.schema:
            if field not in self.entries and not field.startswith(optional):
                self._refuse(field, "is missing (an unknown number is written {value: null})")
        values: Values = {}
        sources: Sources = {}
        for field in (field for field in self.schema if field in self.entries):
            entry = self.entries[field]
            if self.schema[field] in BARE:
                values[field] = self._bare(field, entry)
                continue
            if not isinstance(entry, dict) or not {"value"} <= set(entry) <= {"value", "source", "note"}:
                self._refuse(field, "wants {value: ..., source: ...} and, if need be, a note")
            values[field] = self._number(field, entry["value"])
            if "source" in entry or entry["value"] is not None:
                sources[field] = self._named(field, entry)
        return values, sources

    def _leaves(self, table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Fields of the schema that the file has; refuses what the schema does not know."""
        for key, entry in table.items():
            field = f"{prefix}{key}"
            if field in self.schema:
                yield field, entry
            elif any(known.startswith(f"{field}.") for known in self.schema):
                yield from self._leaves(self._table(table, key), f"{field}.")
            else:
                guess = nearest(field, self.schema)
                self._refuse(field, "is not known" + (f": did you mean {guess}?" if guess else ""))

    def _number(self, field: str, value: Any) -> Any:
        unit = self.schema[field]
        if value is None:
            return None
        if unit == "count":
            return self._count(field, value)
        if unit == "counts":
            if not isinstance(value, list):
                self._refuse(field, f"{value!r} must be a list of whole numbers")
            return tuple(self._count(field, one) for one in value)
        found = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?) (\S+)", str(value))
        scales = SCALES[unit]
        if found is None or found[2] not in scales:
            self._refuse(field, f"{value!r} must be a number, a space and one of {', '.join(scales)}")
        amount = float(found[1]) * scales[found[2]]
        if not 0 < amount < math.inf:
            self._refuse(field, f"{value!r} must be above zero")
        return amount

    def _count(self, field: str, value: Any) -> int:
        if type(value) is not int or value < 0:
            self._refuse(field, f"{value!r} must be a whole number")
        return value

    def _bare(self, field: str, entry: Any) -> Any:
        wanted = BARE[self.schema[field]]
        if type(entry) is not wanted:
            self._refuse(field, f"{entry!r} must be {'a word' if wanted is str else 'true or false'}")
        return entry

    def _named(self, field: str, entry: dict[str, Any]) -> Source:
        key = entry.get("source")
        if key not in self.named:
            self._refuse(field, f"names its source, one of {', '.join(self.named)}; found {key!r}")
        source = self.named[key]
        return replace(source, text=f"{source.text}; {entry['note']}") if "note" in entry else source

    def _source(self, key: str, entry: Any) -> Source:
        if (
            not isinstance(entry, dict)
            or not {"text", "tag"} <= set(entry) <= {"text", "tag", "url", "date"}
            or entry["tag"] not in get_args(Tag)
        ):
            self._refuse(f"sources.{key}", f"wants text and a tag ({', '.join(get_args(Tag))}), and may have url, date")
        words = {part: str(entry[part]) for part in ("url", "date") if part in entry}
        return Source(str(entry["text"]), entry["tag"], **words)

    def _table(self, table: dict[str, Any], key: str) -> dict[str, Any]:
        entry = table.get(key)
        if not isinstance(entry, dict):
            self._refuse(key, "must be a table of keys and values")
        return entry

    def _refuse(self, field: str, reason: str) -> NoReturn:
        raise Refusal(f"{self.path}, {field}: {reason}")
