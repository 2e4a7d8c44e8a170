"""Code order: what a file imports comes before it, repositories stay together, and no cut of the files decides."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio import code_order, documents
from dataio.code_order import dependencies_first
from dataio.documents import Document, ParquetFile, write_documents
from dataio.imports import MOST_NAMES, dependencies
from dataio.languages import of_path
from dataio.selection import SELECTED


@pytest.mark.parametrize(
    ("language", "path", "text", "expected"),
    [
        ("python", "a.py", "import b, c.d as e  # f\nimport os; x = 1", ["b", "c/d", "os"]),
        ("python", "p/q/a.py", "from . import b\nfrom ..c import (d as x,\n  e,  # why\n)",
         ["/p/q/b", "/p/c/d", "/p/c/e"]),
        ("python", "p/a.py", "from .b import *\nfrom b.c \\\n  import d", ["/p/b/*"]),
        ("python", "p/a.py", "from b.c import d, \\\n    e", ["b/c/d", "b/c/e"]),
        ("python", "p/a.py", "from ...b import c\ndef f():\n    import g\nfrom.h import i", []),
        ("python", "a.py", "from . import b\r\nimport c\r\n", ["/b", "c"]),
        ("javascript", "s/a.js", "import x, {y} from './b'\nexport * from \"../c/d.js\"", ["/s/b", "/c/d.js"]),
        ("typescript", "s/a.ts", "import '@/u/v'; const z = require( './w' ); await import('./l?raw')",
         ["u/v", "/s/w", "/s/l"]),
        ("javascript", "a.js", "import React from 'react'\nimport f from 'lodash/fp'", ["lodash/fp"]),
        ("go", "a.go", 'package a\nimport (\n\t"fmt"\n\tx "github.com/u/r/p" // (y)\n)\nimport . "m.io/q"',
         ["fmt", "github.com/u/r/p", "m.io/q"]),
        ("c", "s/a.c", '#include "b.h"\n # include <sys/c.h>\n#include <stdio.h>\n#include "../d.h"',
         ["b.h", "sys/c.h", "include/stdio.h", "/d.h"]),
        ("markdown", "a.md", "import b", []),
        (None, "a", "import b", []),
    ],
)  # fmt: skip
def test_names_are_those_that_the_language_means(language: str, path: str, text: str, expected: list[str]) -> None:
    assert dependencies(language, path, text) == expected


def order(files: Sequence[tuple[str, str]]) -> list[int]:
    """Indices of the files (path, text) of one repository."""
    paths, languages = [path for path, _ in files], [of_path(path) for path, _ in files]
    names = [dependencies(language, path, text) for language, (path, text) in zip(languages, files)]
    return dependencies_first(paths, languages, names)


def ordered(files: dict[str, str]) -> list[str]:
    """Paths in order; the same whatever order they come in."""
    paths = list(files)
    found = [paths[i] for i in order([*files.items()])]
    for seed in range(3):
        random.Random(seed).shuffle(paths)
        assert [paths[i] for i in order([(path, files[path]) for path in paths])] == found
    return found


def test_python_files_come_after_what_they_import() -> None:
    files = {
        "README.md": "import z",
        "pkg/__init__.py": "from .core import run",
        "pkg/core.py": "import json\nfrom pkg.util import helper\nfrom . import zeta",
        "pkg/json.py": "import pkg.core",  # not the json that core imports
        "pkg/util.py": "",
        "pkg/zeta.py": "",
        "tests/test_core.py": "from pkg import core",
    }
    found = ordered(files)
    expected = ["pkg/util.py", "pkg/zeta.py", "pkg/core.py", "pkg/__init__.py", "pkg/json.py", "tests/test_core.py"]
    assert found == ["README.md", *expected]


def test_an_index_a_folder_and_an_ending_that_is_left_out_are_found_in_typescript() -> None:
    files = {
        "app/a.ts": "import {b} from './lib'\nimport c from '@/shared/c'",
        "app/lib/index.ts": "export * from './x.js'",
        "app/lib/x.ts": "import type {T} from './types'",
        "app/lib/types.d.ts": "",
        "src/shared/c.tsx": "",
    }
    assert ordered(files) == ["app/lib/types.d.ts", "app/lib/x.ts", "app/lib/index.ts", "src/shared/c.tsx", "app/a.ts"]


def test_a_package_of_go_is_all_its_files_but_tests() -> None:
    files = {
        "a/main.go": 'import (\n"fmt"\n"github.com/u/r/z/deep"\n)',
        "z/deep/one.go": 'import "github.com/u/r/z"',
        "z/deep/one_test.go": 'import "github.com/u/r/a"',
        "z/deep/two.go": "",
        "z/z.go": "",
        "fmt/fmt.go": 'import "github.com/u/r/a"',
    }
    found = ordered(files)
    expected = ["z/z.go", "z/deep/one.go", "z/deep/two.go", "a/main.go", "fmt/fmt.go", "z/deep/one_test.go"]
    assert found == expected
    assert ordered({"src/os/a.go": 'import "fmt"', "src/fmt/z.go": ""}) == ["src/fmt/z.go", "src/os/a.go"]


def test_the_nearest_header_of_a_name_is_meant() -> None:
    files = {
        "a/config.h": "",
        "a/main.c": '#include "config.h"\n#include <string.h>',
        "b/config.h": '#include "lib/deep.h"',
        "b/lib/deep.h": "",
        "b/src/main.cpp": '#include "config.h"',
        "string.h": '#include "a/main.c"',
    }
    expected = ["a/config.h", "a/main.c", "b/lib/deep.h", "b/config.h", "b/src/main.cpp", "string.h"]
    assert ordered(files) == expected
    index = code_order._Index("c")
    for node, path in enumerate(sorted(["x/y/z/c.h", "x/y/c.h", "c.h", "w/c.h", "x-y/c.h"])):
        index.add(node, path, set())
    nearest = {"x/y/z/a.c": "x/y/z/c.h", "x/y/a.c": "x/y/c.h", "w/deep/a.c": "w/c.h", "x-y/a.c": "x-y/c.h"}
    for importer, path in nearest.items():
        assert index.files("c.h", importer) == [sorted(["x/y/z/c.h", "x/y/c.h", "c.h", "w/c.h", "x-y/c.h"]).index(path)]


graphs = st.integers(1, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=20))
)


@given(graphs)
def test_dependencies_come_first_and_cycles_stand_together(graph: tuple[int, set[tuple[int, int]]]) -> None:
    count, edges = graph
    paths = [f"m{i}.py" for i in range(count)]
    names = [[f"/m{to}" for at, to in sorted(edges) if at == i] for i in range(count)]
    found = dependencies_first(paths, ["python"] * count, names)
    assert sorted(found) == list(range(count))
    reach = np.eye(count, dtype=bool)
    for at, to in edges:
        reach[at, to] = True
    for _ in range(count):
        reach |= (reach.astype(int) @ reach.astype(int)) > 0
    place = {node: i for i, node in enumerate(found)}
    for a, b in itertools.permutations(range(count), 2):
        if reach[a, b] and not reach[b, a]:
            assert place[b] < place[a]
    cycles = [{b for b in range(count) if reach[a, b] and reach[b, a]} for a in found]
    assert len(list(itertools.groupby(cycles))) == len({frozenset(cycle) for cycle in cycles})
    for cycle in cycles:
        assert sorted(cycle) == [node for node in found if node in cycle]


def test_a_chain_of_any_length_is_followed_and_a_hub_costs_no_square() -> None:
    chain = [(f"m{i:05d}.py", f"import m{i + 1:05d}") for i in range(5000)]
    assert order(chain) == list(range(4999, -1, -1))
    package = [(f"p/{i}.go", "") for i in range(2000)]
    users = [(f"a/u{i}.go", 'import "x.io/r/p"') for i in range(2000)]
    assert order(users + package)[-1] == sorted(range(2000), key=lambda i: f"a/u{i}.go")[-1]
    headers = [(f"d{i}/config.h", "") for i in range(2000)] + [
        (f"d{i}/x.c", '#include "config.h"') for i in range(2000)
    ]
    assert len(order(headers)) == 4000


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "from a import (b\n" * 100_000),
        ("python", "from " + " " * 1_000_000),
        ("javascript", "import " * 200_000),
        ("javascript", "from" + " " * 1_000_000),
        ("go", '\nimport ("a' * 100_000),
        ("c", "#include <" * 100_000),
    ],
)
def test_hostile_text_takes_linear_time(language: str, text: str) -> None:
    assert len(dependencies(language, "a", text)) <= 1


def test_no_file_has_more_names_or_longer_ones_than_a_person_writes() -> None:
    text = "".join(f"import m{i}\n" for i in range(MOST_NAMES + 5)) + "import " + "x" * 1000
    assert len(dependencies("python", "a.py", text)) == MOST_NAMES
    assert len(order([("/".join(["d"] * 3000) + "/a.py", "import a")])) == 1


def corpus() -> list[tuple[Document, str | None]]:
    draw = random.Random(3)
    found: list[tuple[Document, str | None]] = []
    for i in range(120):
        repository = draw.choice([None, "r/one", "r/two", "r/three"])
        text = f"import m{draw.randrange(120)}\n# {i}" if repository else f"text {i % 50}"
        document = Document(text, "s", f"m{i}.py", 0, i, repository=repository)
        found.append((document, "near.copy" if draw.random() < 0.2 else None))
    return found


def arranged(
    folder: Path, held: Sequence[Sequence[tuple[Document, str | None]]], parts: int = 1, seed: int = 0
) -> list[Document]:
    files = []
    for i, unit in enumerate(held):
        path, select = folder / f"{i}.parquet", folder / f"{i}.select.parquet"
        write_documents(path, [document for document, _ in unit])
        with ParquetFile(select, SELECTED) as file:
            for at in range(0, len(unit), 13):
                reasons = [reason for _, reason in unit[at : at + 13]]
                n = len(reasons)
                columns = [pa.array(reasons, pa.string()), [1.0] * n, ["python"] * n, [0] * n]
                file.write(pa.table(columns, schema=SELECTED))
        files.append(folder / f"{i}.imports.parquet")
        counts = code_order.imports(path, select, seed, files[-1])
        assert (counts["documents"], counts["kept"]) == (len(unit), sum(reason is None for _, reason in unit))
    ranges = [folder / f"range{part}.npy" for part in range(parts)]
    for part, to in enumerate(ranges):
        code_order.arrange(files, part, parts, to)
    counts = code_order.join(ranges, folder / "order.npy")
    rows = np.load(folder / "order.npy")
    assert rows.dtype == np.int64 and rows.shape == (counts["documents"], 2)
    return [held[unit][row][0] for unit, row in rows]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 13)
    monkeypatch.setattr(code_order, "GROUP_ROWS", 5)


def test_every_kept_document_once_repositories_together_and_in_their_order(tmp_path: Path) -> None:
    held = corpus()
    found = arranged(tmp_path, [held])
    assert sorted(d.row for d in found) == [d.row for d, reason in held if reason is None]
    runs = [key for key, _ in itertools.groupby(d.repository or f"#{d.row}" for d in found)]
    assert len(set(runs)) == len(runs)
    for name in ("r/one", "r/two", "r/three"):
        files = [(d.path, d.text) for d, reason in held if d.repository == name and reason is None]
        assert [(d.path, d.text) for d in found if d.repository == name] == [files[i] for i in order(files)]


@pytest.mark.parametrize(("cuts", "parts"), [((0,), 3), ((0, 40, 41, 90), 1), ((0, 0, 60), 7)])
def test_neither_units_nor_ranges_change_which_document_follows_which(
    cuts: tuple[int, ...], parts: int, tmp_path: Path
) -> None:
    held = corpus()
    units = [held[a:b] for a, b in itertools.pairwise((*cuts, len(held)))]
    (tmp_path / "cut").mkdir()
    assert arranged(tmp_path / "cut", units, parts) == arranged(tmp_path, [held])


def test_another_seed_is_another_order_and_documents_do_not_stay_with_their_neighbours(tmp_path: Path) -> None:
    held = [(Document(f"text {i}", "s", f"{i}", 0, i), None) for i in range(200)]
    rows = [d.row for d in arranged(tmp_path, [held])]
    again = [d.row for d in arranged(tmp_path, [held], seed=1)]
    for found in (rows, again):
        assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(found)) < 12
    assert rows != again and sorted(rows) == sorted(again)


def test_a_source_of_which_nothing_is_left_has_an_order_of_none(tmp_path: Path) -> None:
    assert arranged(tmp_path, [[], [(Document("a", "s", "a", 0, 0), "exact.copy")]], 2) == []


def test_memory_holds_no_objects_of_the_documents_that_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python holds at most is that of a row group, of however many documents."""
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 250)
    monkeypatch.setattr(code_order, "GROUP_ROWS", 250)
    peaks = []
    for count in (500, 4000):
        path, select = tmp_path / f"{count}.parquet", tmp_path / f"{count}.select.parquet"
        text = "".join(f"import module{at}\n" for at in range(12))
        write_documents(path, [Document(text, "s", f"m{i}.py", 0, i, repository="r") for i in range(count)])
        with ParquetFile(select, SELECTED) as file:
            for _ in range(0, count, 250):
                columns = [pa.nulls(250, pa.string()), [1.0] * 250, ["python"] * 250, [0] * 250]
                file.write(pa.table(columns, schema=SELECTED))
        tracemalloc.start()
        code_order.imports(path, select, 0, tmp_path / "imports.parquet")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
