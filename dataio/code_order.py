"""The order of documents in a store: at random by a key, repositories together, their files after what they import.

    imports     of one document file: key, path and imports of the kept documents, by key
    arrange     of one range of keys, over all files: the documents in order, as (unit, row)
    join        the ranges, one after another

A repository's key is the hash of seed and name, that of a document without one the hash of seed and id. A range of keys
is a part of the order, so that memory is bounded by the documents of a range, or those of the largest repository.
"""

from __future__ import annotations

import os
import posixpath
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dataio.dedup.arrays import key_range, save
from dataio.documents import ParquetFile, read_groups
from dataio.imports import FAMILIES, dependencies
from dataio.stages import Counts

VERSION = 1
#: What `arrange` needs for a document of its range, with a dozen imports: its row and the graph of its repository.
BYTES_PER_DOCUMENT = 4000
#: Rows that `imports` writes, and `arrange` reads, at a time.
GROUP_ROWS = 4096
#: Parts of a path, from its end, that a name is looked up by.
DEEPEST = 16

_NAMES = pa.list_(pa.string())
_IMPORTS = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("repository", pa.string()),
        pa.field("path", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("imports", _NAMES),
    ]
)


def imports(documents: Path, select: Path, seed: int, out: Path) -> Counts:
    """Write of a document file what decides the order of its kept documents.

    Memory is a row group of texts and what is written here of the file's documents, uncompressed: 30 bytes for each,
    its names and those of what it imports.
    """
    found = [_IMPORTS.empty_table()]
    first = size = 0
    for table in read_groups(
        documents, ["id", "text", "bytes", "repository", "path"], {select: ("reason", "language")}
    ):
        size += int(table["bytes"].to_numpy().sum())
        kept = np.flatnonzero(table["reason"].is_null().to_numpy())
        chosen = table.take(kept)
        texts = chosen["text"]
        others = (chosen[name].to_pylist() for name in ("id", "repository", "path", "language"))
        keys, names = [], []
        for at, (name, repository, path, language) in enumerate(zip(*others)):
            key, of_row = xxhash.xxh3_64_intdigest(_named(seed, "document", name.hex())), list[str]()
            if repository is not None:
                key = xxhash.xxh3_64_intdigest(_named(seed, "repository", repository))
                of_row = dependencies(language, path, texts[at].as_py()) if language in FAMILIES else []
            keys.append(key)
            names.append(of_row)
        columns = {name: chosen[name] for name in ("repository", "path", "language")}
        columns |= {
            "key": pa.array(keys, pa.uint64()),
            "row": pa.array(first + kept),
            "imports": pa.array(names, _NAMES),
        }
        found.append(pa.table([columns[name] for name in _IMPORTS.names], schema=_IMPORTS))
        first += table.num_rows
    whole = pa.concat_tables(found)
    by_key = np.argsort(whole["key"].to_numpy(), kind="stable")
    with ParquetFile(out, _IMPORTS) as file:
        for start in range(0, len(by_key), GROUP_ROWS):
            file.write(whole.take(pa.array(by_key[start : start + GROUP_ROWS])))
    return {"documents": first, "bytes_in": size, "kept": len(whole)}


def _named(seed: int, kind: str, name: str) -> bytes:
    return f"{seed}\0{kind}\0{name}".encode()


def arrange(units: Sequence[Path], part: int, parts: int, out: Path) -> Counts:
    """Write int64 [m, 2]: (unit, row) of the documents whose keys are in the range `part` of `parts`, in order.

    `units`: files of `imports`; a unit's number is its place among them. Which document follows which does not depend
    on how documents are cut into units.
    """
    low, high = (int(bound) for bound in key_range(part, parts))
    found: list[tuple[Any, ...]] = []
    for unit, path in enumerate(units):
        rows_of = _between(path, low, high)
        found += ((key, repository or "", at, unit, *rest) for key, repository, at, *rest in rows_of)
    found.sort(key=lambda entry: entry[:5])
    rows: list[tuple[int, int]] = []
    for (_, repository), group in groupby(found, key=lambda entry: entry[:2]):
        _, _, paths, unit_of, row_of, languages, names = zip(*group)
        places = dependencies_first(paths, languages, names) if repository else range(len(paths))
        rows += ((unit_of[place], row_of[place]) for place in places)
    save(out, np.array(rows, np.int64).reshape(-1, 2))
    return {"documents": len(rows), "repositories": len({entry[1] for entry in found} - {""})}


def _between(path: Path, low: int, high: int) -> Iterator[tuple[Any, ...]]:
    """Rows of a file of `imports` whose keys are in a range. They lie by key: groups outside it are not read."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            keys = file.metadata.row_group(group).column(0).statistics
            if low <= keys.max and keys.min <= high:
                columns = (column.to_pylist() for column in file.read_row_group(group, use_threads=False).columns)
                yield from (row for row in zip(*columns) if low <= row[0] <= high)


def join(parts: Sequence[Path], out: Path) -> Counts:
    """Write the orders of all ranges in one file, int64 [kept, 2] = (unit, row); memory does not grow with it."""
    arrays = [np.load(path, mmap_mode="r") for path in parts]
    shape = (sum(len(array) for array in arrays), 2)
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        for array in arrays:
            array.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, out)
    return {"documents": shape[0]}


def dependencies_first(
    paths: Sequence[str], languages: Sequence[str | None], names: Sequence[Sequence[str]]
) -> list[int]:
    """Indices of the files of one repository, whose imports have these `names`: every file comes after those that it
    depends on, if possible right after, and files go by path otherwise. Files in a cycle stand together, by path."""
    by_path = sorted(range(len(paths)), key=lambda i: (paths[i], i))
    families = [FAMILIES.get(languages[i] or "") for i in by_path]
    indices = {family: _Index(family) for family in {*families} if family is not None}
    packages = {posixpath.dirname(path) for path in paths if posixpath.basename(path) == "__init__.py"}
    for node, (i, family) in enumerate(zip(by_path, families)):
        if family is not None:
            indices[family].add(node, paths[i], packages)
    edges: list[Sequence[int]] = [[] for _ in by_path]
    # A package of Go is all the files of a folder. It is a node of its own, or edges would be files times files.
    nodes: dict[str, int] = {}
    for node, (i, family) in enumerate(zip(by_path, families)):
        if family is None:
            continue
        to: set[int] = set()
        for name in names[i]:
            if family != "go":
                to.update(indices[family].files(name, paths[i]))
            elif (folder := indices[family].folder(name)) is not None:
                if folder not in nodes:
                    nodes[folder] = len(edges)
                    edges.append(indices[family].inside[folder])
                to.add(nodes[folder])
        edges[node] = sorted(to)
    return [by_path[node] for group in _components(edges) for node in sorted(group) if node < len(by_path)]


class _Index:
    """Which files of a repository answer to a name, in languages that can import one another."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.exact: dict[str, list[int]] = defaultdict(list)
        self.ending: dict[str, list[tuple[str, int]]] = defaultdict(list)  # (path, node), by path
        self.inside: dict[str, list[int]] = defaultdict(list)
        self.folders: dict[str, list[str]] = defaultdict(list)

    def add(self, node: int, path: str, packages: set[str]) -> None:
        """Files come by path. `packages`: folders that Python takes for one."""
        folder, name = posixpath.split(path)
        if self.family == "go":
            # Tests may import what imports the package that they test.
            if not name.endswith("_test.go"):
                if folder not in self.inside:
                    for ending, _ in _endings(folder):
                        self.folders[ending].append(folder)
                self.inside[folder].append(node)
            return
        for form in _forms(self.family, folder, name):
            self.exact[form].append(node)
            for ending, above in _endings(form):
                # What lies in a package of Python is imported by a name that begins with the outermost one.
                if self.family != "python" or above not in packages:
                    self.ending[ending].append((path, node))

    def files(self, name: str, importer: str) -> list[int]:
        """Those that a name means; one from anywhere means the file nearest to the importer."""
        for form in _meant(self.family, name):
            if form.startswith("/"):
                if found := self.exact.get(form[1:]):
                    return found
            elif form in self.ending:
                return [_nearest(self.ending[form], importer)]
        return []

    def folder(self, name: str) -> str | None:
        """That of a package of Go: the module's own path is a beginning of the name, of unknown length; the standard
        library's names have no dot in their first part, and are files of a repository only in Go's own."""
        parts = name.split("/")
        endings = (parts[i:] for i in range(1, len(parts))) if "." in parts[0] else [["src", *parts]]
        found = (self.folders.get("/".join(ending)) for ending in endings)
        return next((min(some, key=lambda folder: (len(folder), folder)) for some in found if some), None)


def _forms(family: str, folder: str, name: str) -> list[str]:
    """What a file is imported as, from the root."""
    if family == "c":
        return [posixpath.join(folder, name)]
    stem, _ = posixpath.splitext(name)
    forms = [posixpath.join(folder, stem)]
    if family == "python":
        return [folder] if stem == "__init__" else forms
    forms += [posixpath.join(folder, name)]
    if stem.endswith(".d"):
        forms += [posixpath.join(folder, stem[:-2])]
    return [*forms, folder] if stem == "index" else forms


def _endings(path: str) -> list[tuple[str, str]]:
    """The last parts of a path, more and more of them, with what is before: ("b", "a"), ("a/b", "")."""
    parts = path.split("/")
    return [("/".join(parts[i:]), "/".join(parts[:i])) for i in range(len(parts) - 1, -1, -1)][:DEEPEST]


def _meant(family: str, name: str) -> list[str]:
    if family == "python":  # a module, or something in one
        return [name, name.rpartition("/")[0]]
    if family == "javascript" and name.endswith((".js", ".jsx", ".mjs", ".cjs")):  # of TypeScript, as it will be
        return [name, posixpath.splitext(name)[0]]
    return [name]


def _nearest(candidates: Sequence[tuple[str, int]], importer: str) -> int:
    """Of files by path the one with which `importer` has most folders in common: its neighbours by path have."""
    at = bisect_left(candidates, (importer, -1))
    some = candidates[max(0, at - 1) : at + 1]

    def distance(candidate: tuple[str, int]) -> tuple[int, int, str]:
        common = posixpath.commonpath(["/" + importer, "/" + candidate[0]])
        return -common.count("/") - (common != "/"), candidate[0].count("/"), candidate[0]

    return min(some, key=distance)[1]


def _components(edges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Strongly connected components of a graph, each after those that its edges lead to (Tarjan: Depth-First Search
    and Linear Graph Algorithms, 1972), from node 0 on; without recursion."""
    found: list[list[int]] = []
    number = [0] * len(edges)  # from 1, in the order of visits
    lowest = [0] * len(edges)  # number of the first node that is reached from here and not in a component yet
    done = len(edges) + 1  # what `lowest` is of a node in a component
    open_nodes: list[int] = []
    visits = 0
    for root in range(len(edges)):
        path: list[tuple[int, Iterator[int]]] = []
        enter: int | None = None if number[root] else root
        while enter is not None or path:
            if enter is not None:
                visits += 1
                number[enter] = lowest[enter] = visits
                open_nodes.append(enter)
                path.append((enter, iter(edges[enter])))
            node, rest = path[-1]
            enter = None
            for to in rest:
                if not number[to]:
                    enter = to
                    break
                lowest[node] = min(lowest[node], lowest[to])
            if enter is not None:
                continue
            path.pop()
            if path:
                above = path[-1][0]
                lowest[above] = min(lowest[above], lowest[node])
            if lowest[node] == number[node]:
                component: list[int] = []
                while not component or component[-1] != node:
                    component.append(open_nodes.pop())
                    lowest[component[-1]] = done
                found.append(component)
    return found
