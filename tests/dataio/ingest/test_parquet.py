"""Parquet: rows become documents whatever the text's type; a file of another shape is one malformed record."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataio.ingest.support import lay, read


def write(path: Path, **columns: pa.Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=64)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_rows_of_all_groups_are_documents_in_order(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {i} é" if i % 7 else None for i in range(500)]
    when = datetime(2024, 1, 2, tzinfo=UTC)
    meta = pa.array([{"url": f"http://{i}", "stars": i} for i in range(500)])
    stamps = pa.array([when] * 500, pa.timestamp("ms", tz="UTC"))
    content = pa.array(texts, pa.string()).cast(kind) if kind != pa.string_view() else pa.array(texts, kind)
    write(tmp_path / "in/a.parquet", content=content, meta=meta, timestamp=stamps, blob=pa.array([b"x"] * 500))
    found = read(tmp_path / "in", fields={"text": "content", "path": "meta.url", "metadata": ["meta"]})
    wanted = [i for i in range(500) if i % 7]
    assert [(row["text"], row["path"], row["row"]) for row in found.rows] == [
        (texts[i], f"http://{i}", i) for i in wanted
    ]
    assert {row["timestamp"] for row in found.rows} == {when}
    assert json.loads(found.rows[0]["metadata"]) == {"meta": {"stars": 1, "url": "http://1"}}
    assert found.faults() == {"skipped.empty": 72}


def test_other_columns_are_metadata(tmp_path: Path) -> None:
    columns = {"n": [1], "when": [datetime(2024, 1, 2)], "list": [[1, None]], "none": [None]}
    write(tmp_path / "in/a.parquet", text=pa.array(["a"]), **{name: pa.array(value) for name, value in columns.items()})
    (row,) = read(tmp_path / "in").rows
    assert json.loads(row["metadata"]) == {"n": 1, "when": "2024-01-02 00:00:00", "list": [1, None]}


@pytest.mark.parametrize("columns", [{"txt": pa.array(["a"])}, {"text": pa.array([1])}, {"text": pa.array([["a"]])}])
def test_a_wrong_schema_makes_the_file_one_malformed_record(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    write(tmp_path / "in/a.parquet", **columns)
    write(tmp_path / "in/b.parquet", text=pa.array(["next file"]))
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == ["next file"]
    assert found.faults() == {"malformed.schema": 1}
    assert found.quarantined[0]["row"] is None and "text" in found.quarantined[0]["detail"]


def test_strings_that_are_not_utf8_are_malformed_one_by_one(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"\xff\xfe", b"also good"]).view(pa.string())
    write(tmp_path / "in/a.parquet", text=bad)
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == ["good", "also good"]
    assert found.faults() == {"malformed.encoding": 1} and found.quarantined[0]["row"] == 1


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, -10])
def test_a_cut_or_damaged_file_is_one_malformed_record(tmp_path: Path, keep: float) -> None:
    texts = pa.array([np.random.default_rng(i).bytes(100).hex() for i in range(500)])
    write(tmp_path / "in/a.parquet", text=texts)
    data = (tmp_path / "in/a.parquet").read_bytes()
    lay(tmp_path / "in", {"a.parquet": data[: int(len(data) * keep) if isinstance(keep, float) else keep]})
    found = read(tmp_path / "in")
    assert not found.rows and found.faults() == {"malformed.parquet": 1}


def test_damage_within_a_file_loses_what_follows_and_is_said(tmp_path: Path) -> None:
    texts = pa.array([np.random.default_rng(i).bytes(1000).hex() for i in range(500)])
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in/a.parquet", row_group_size=64, compression="zstd")
    data = bytearray((tmp_path / "in/a.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    lay(tmp_path / "in", {"a.parquet": bytes(data)})
    found = read(tmp_path / "in")
    assert 64 <= len(found.rows) < 500 and found.faults() == {"malformed.parquet": 1}
    assert [row["text"] for row in found.rows] == texts.to_pylist()[: len(found.rows)]
