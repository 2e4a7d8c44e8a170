"""What a workspace of ``stoker data prepare`` knows of documents: the rows of its document and attribute files."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataio.selection import KEPT
from stoker.errors import Refusal

#: Stages in the order of a recipe; any others come after them by name.
STAGES = (
    *("licence", "code", "language", "prose", "redact", "filter"),
    *("exact", "near", "substring", "decontaminate", "select"),
)
#: Of a document that was not kept, the characters that are shown.
TEXT = 4000
#: Members of a cluster that are listed; its size says how many there are.
MEMBERS = 20

Pair = tuple[int, int]


@dataclass(frozen=True)
class Record:
    """A row of a document file and of the attribute files beside it. `facts`: columns of the document that say
    anything; `stages`: {stage: {column: value}}; `text` only where it was asked for."""

    source: str
    unit: str
    row: int  # of the document file
    facts: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    text: str | None = None

    @property
    def place(self) -> tuple[str, str, int]:
        return self.source, self.unit, self.row

    @property
    def reason(self) -> str | None:
        """Why it was dropped; None if it was kept, or if there is no decision yet."""
        reason: str | None = self.stages.get("select", {}).get("reason")
        return reason

    @property
    def cluster(self) -> bytes | None:
        """Its cluster of near-duplicates; None if it is alone."""
        cluster: bytes | None = self.stages.get("near", {}).get("near_cluster")
        return cluster


@dataclass(frozen=True)
class Member:
    """One of a cluster of near-duplicates."""

    source: str
    unit: str
    row: int
    id: str
    path: str
    kept: bool

    @property
    def place(self) -> tuple[str, str, int]:
        return self.source, self.unit, self.row


class Workspace:
    """A folder that ``stoker data prepare`` wrote. Refuses one without document files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = sorted(path.name for path in (folder / "documents").glob("*") if path.is_dir())
        if not self.sources:
            raise Refusal(f"{folder}: no prepared documents here; give the output folder of a recipe")
        found = {path.name for path in (folder / "attributes").glob("*") if path.is_dir()}
        self.stages = [*(stage for stage in STAGES if stage in found), *sorted(found - set(STAGES))]

    def at_rows(self, source: str, wanted: Iterable[Pair]) -> dict[Pair, Record]:
        """Documents by (input file, record in it)."""
        return self._matching(source, {*wanted}, ["file", "row"], _integers)

    def with_ids(self, source: str, wanted: Iterable[Pair]) -> dict[Pair, Record]:
        """Documents by the two words of their ids; the first of several."""
        return self._matching(source, {*wanted}, ["id"], _words)

    def members(self, records: Iterable[Record]) -> dict[bytes, list[Member]]:
        """{cluster: its first members} of the clusters that documents belong to, over all sources."""
        names = sorted({record.cluster for record in records if record.cluster is not None})
        found: dict[bytes, list[Member]] = defaultdict(list)
        if not names:
            return found
        values = pa.array(names, pa.binary(16))
        for source, unit in self._units():
            path = self._attributes("near", source, unit)
            if not path.is_file():
                continue
            first = 0
            for group, table in enumerate(_groups(path, ["near_cluster", "near_keep"])):
                rows = np.flatnonzero(pa.compute.is_in(table["near_cluster"], value_set=values).to_numpy())
                if len(rows):
                    here = _open(self._documents(source, unit)).read_row_group(group, ["id", "path"])
                    chosen, origin = table.take(rows).to_pylist(), here.take(rows).to_pylist()
                    for row, near, document in zip(rows.tolist(), chosen, origin):
                        members = found[near["near_cluster"]]
                        if len(members) < MEMBERS:
                            kept = near["near_keep"]
                            members.append(
                                Member(source, unit, first + row, document["id"].hex(), document["path"], kept)
                            )
                first += table.num_rows
        return found

    def dropped(self, source: str, of_each: int) -> list[Record]:
        """Documents that were not kept, with the beginning of their texts: `of_each` of every reason, those with the
        smallest ids, which is a random choice that does not change from run to run. The most frequent reason first."""
        least: dict[str, list[tuple[int, str, int, int]]] = defaultdict(list)
        counts = Counter[str]()
        for unit in self._units_of(source):
            path = self._attributes("select", source, unit)
            if not path.is_file():
                continue
            documents = _groups(self._documents(source, unit), ["id"])
            for group, (table, ids) in enumerate(zip(_groups(path, ["reason"]), documents)):
                for row, reason in enumerate(table["reason"].to_pylist()):
                    if reason is not None and reason != KEPT:
                        counts[reason] += 1
                        entry = (-int.from_bytes(ids["id"][row].as_py()), unit, group, row)
                        keep = heapq.heappush if len(least[reason]) < of_each else heapq.heappushpop
                        keep(least[reason], entry)
        places: dict[tuple[str, int], list[int]] = defaultdict(list)
        for reason in least:
            for _, unit, group, row in least[reason]:
                places[unit, group].append(row)
        records = [
            record
            for (unit, group), rows in sorted(places.items())
            for record in self._rows(source, unit, group, sorted(rows), with_text=True)
        ]
        return sorted(records, key=lambda record: (-counts[str(record.reason)], str(record.reason), record.facts["id"]))

    def _matching(self, source: str, wanted: set[Pair], columns: Sequence[str], pairs_of: Any) -> dict[Pair, Record]:
        found: dict[Pair, Record] = {}
        seconds = np.array([second for _, second in wanted])
        files = [first for first, _ in wanted]
        for unit in self._units_of(source):
            if len(found) == len(wanted):
                break
            file = _open(self._documents(source, unit))
            for group in range(file.num_row_groups):
                if columns[0] == "file" and not _may_hold(file, group, files):
                    continue
                pairs: NDArray[Any] = pairs_of(file.read_row_group(group, list(columns)))
                rows = np.flatnonzero(np.isin(pairs[:, 1], seconds))
                keys = {(int(pairs[row, 0]), int(pairs[row, 1])): int(row) for row in rows[::-1]}
                new = {key: row for key, row in keys.items() if key in wanted and key not in found}
                rows_of = sorted(new.values())
                records = dict(zip(rows_of, self._rows(source, unit, group, rows_of)))
                found |= {key: records[row] for key, row in new.items()}
        return found

    def _rows(
        self, source: str, unit: str, group: int, rows: Sequence[int], with_text: bool = False
    ) -> Iterator[Record]:
        """Records of some rows of a row group."""
        if not rows:
            return
        file = _open(self._documents(source, unit))
        first = sum(file.metadata.row_group(before).num_rows for before in range(group))
        columns = [name for name in file.schema_arrow.names if with_text or name != "text"]
        documents = file.read_row_group(group, columns).take(rows).to_pylist()
        decided: dict[str, list[dict[str, Any]]] = {}
        for stage in self.stages:
            path = self._attributes(stage, source, unit)
            if path.is_file():
                decided[stage] = _same_rows(_open(path), group, file, path).take(rows).to_pylist()
        for at, (row, document) in enumerate(zip(rows, documents)):
            text = document.pop("text", None)
            facts = {name: value for name, value in document.items() if value is not None}
            stages = {stage: values[at] for stage, values in decided.items()}
            yield Record(source, unit, first + row, facts, stages, None if text is None else text[:TEXT])

    def _units(self) -> Iterator[tuple[str, str]]:
        for source in self.sources:
            for unit in self._units_of(source):
                yield source, unit

    def _units_of(self, source: str) -> list[str]:
        return sorted(path.stem for path in (self.folder / "documents" / source).glob("[0-9]*.parquet"))

    def _documents(self, source: str, unit: str) -> Path:
        return self.folder / "documents" / source / f"{unit}.parquet"

    def _attributes(self, stage: str, source: str, unit: str) -> Path:
        return self.folder / "attributes" / stage / source / f"{unit}.parquet"


def with_copies(workspace: Workspace, records: Sequence[Record]) -> list[tuple[Record, list[Member]]]:
    """Records, each with the other members of its cluster. Reads a column of all attribute files once."""
    members = workspace.members(records)
    return [
        (record, [other for other in members.get(record.cluster or b"", []) if other.place != record.place])
        for record in records
    ]


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise Refusal(f"{path}: cannot be read ({error}); prepare it again") from None


def _same_rows(file: pq.ParquetFile, group: int, documents: pq.ParquetFile, path: Path) -> pa.Table:
    """A row group of an attribute file, which has the rows of its document file or is refused."""
    shapes = [[of.metadata.row_group(at).num_rows for at in range(of.num_row_groups)] for of in (file, documents)]
    if shapes[0] != shapes[1]:
        raise Refusal(f"{path}: its rows are not those of its documents; remove it and run its stage again")
    return file.read_row_group(group)


def _groups(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    file = _open(path)
    for group in range(file.num_row_groups):
        yield file.read_row_group(group, list(columns))


def _may_hold(file: pq.ParquetFile, group: int, files: Sequence[int]) -> bool:
    """Whether a row group has records of any of these input files, by what its statistics say."""
    column = file.metadata.row_group(group).column(file.schema_arrow.get_field_index("file"))
    known = column.statistics
    return known is None or not known.has_min_max or any(known.min <= number <= known.max for number in files)


def _integers(table: pa.Table) -> NDArray[Any]:
    return np.stack([table[name].to_numpy().astype(np.int64) for name in ("file", "row")], axis=1)


def _words(table: pa.Table) -> NDArray[Any]:
    return np.frombuffer(b"".join(table["id"].to_pylist()), ">u8").reshape(-1, 2).astype(np.uint64)
