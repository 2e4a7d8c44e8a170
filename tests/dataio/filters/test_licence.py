"""The licence policy: a header speaks for its file, code needs a licence, and the policy is a table of expressions."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from dataio.documents import Document, read_groups, write_documents
from dataio.filters import licence
from dataio.filters.licence import Options, final, judge


def table(rows: list[tuple[str | None, str | None, str | None]]) -> pa.Table:
    """Of header, licence and language."""
    names = ("licence_header", "licence", "language")
    return pa.table({name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(names)})


def test_headers_are_found_in_the_first_lines_only(tmp_path: Path) -> None:
    tag = "# SPDX-License-Identifier: "
    texts = ["", tag + "MIT\nx = 1\n", "é" * 63 + "\n" + tag + "GPL-2.0+\n", "x = 1\n" * 3000 + tag + "MIT\n", "x\n"]
    path, beside = tmp_path / "d.parquet", tmp_path / "a.parquet"
    write_documents(path, [Document(text, "s", f"p{i}", 0, i) for i, text in enumerate(texts * 100)])
    counts = licence.measure(path, beside, Options())
    assert counts == {"documents": 500, "stated": 200, "bytes_in": 100 * sum(len(text.encode()) for text in texts)}
    rows = [row for group in read_groups(path, ["id"], {beside: licence.SCHEMA.names}) for row in group.to_pylist()]
    assert [row["licence_header"] for row in rows] == [None, "MIT", "GPL-2.0-or-later", None, None] * 100
    before = beside.read_bytes()
    licence.measure(path, beside, Options())
    assert beside.read_bytes() == before


def test_a_header_decides_before_the_source() -> None:
    rows = [("GPL-3.0-only", "MIT", "python"), ("MIT", "GPL-3.0-only", "c"), (None, "GPL-3.0-only", "c")]
    assert judge(table(rows), Options()) == ["licence_not_allowed", None, "licence_not_allowed"]
    assert final("LicenseRef-BSD", "BSD-3-Clause") == "BSD-3-Clause"
    assert final("LicenseRef-BSD", "MIT") == "LicenseRef-BSD"


def test_code_needs_a_licence_and_prose_does_not() -> None:
    rows = [(None, None, language) for language in ("python", "json", "markdown", "en", None)]
    rows += [(None, "who knows", language) for language in ("python", "en")]
    none = "licence_unknown"
    assert judge(table(rows), Options()) == [none, none, None, None, None, none, None]
    assert judge(table(rows), Options(unknown_code="keep", unknown_prose="drop")) == [
        None,
        None,
        *[none] * 3,
        None,
        none,
    ]


def test_prose_under_a_licence_that_is_not_allowed_is_dropped() -> None:
    rows = [(None, "https://creativecommons.org/licenses/by-nc/4.0/", "en"), (None, "CC BY 4.0", "en")]
    assert judge(table(rows), Options()) == ["licence_not_allowed", None]


def test_the_policy_allows_and_denies_by_identifier() -> None:
    rows = [(None, name, "c") for name in ("MIT", "GPL-2.0-only", "MIT OR GPL-2.0-only", "Apache License 2.0")]
    bad = "licence_not_allowed"
    assert judge(table(rows), Options(allowed=("gpl-2.0",))) == [bad, None, None, bad]
    assert judge(table(rows), Options(denied=("MIT",))) == [bad, bad, bad, None]
    assert judge(table(rows).slice(0, 0), Options()) == []
    with pytest.raises(ValidationError, match=r"MTI: not one licence; give an SPDX identifier"):
        Options(denied=("MTI",))
    with pytest.raises(ValidationError, match=r"MIT OR ISC: not one licence"):
        Options(allowed=("MIT OR ISC",))


def test_the_policy_measures_nothing() -> None:
    assert frozenset() == licence.MEASURED
