"""Document files: the same bytes for the same documents, whole or not there, attributes row for row beside them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio import documents
from dataio.documents import SCHEMA, Document, ParquetFile, read_groups, write_documents
from stoker.errors import Refusal

WORDS = st.none() | st.text(max_size=5)


def some(count: int, words: int = 20) -> list[Document]:
    return [Document(f"text {i} " * (i % words), "web", f"p/{i}", file=i // 100, row=i % 100) for i in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(min_size=1), WORDS, WORDS), max_size=20))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str | None, str | None]]
) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    wanted = [
        Document(text, "s", path, 0, i, repository=repository, licence=licence, timestamp=when if i % 2 else None)
        for i, (text, path, repository, licence) in enumerate(rows)
    ]
    path = tmp_path_factory.mktemp("documents") / "0.parquet"
    assert write_documents(path, wanted) == len(wanted)
    read = [row for group in read_groups(path) for row in group.to_pylist()]
    assert [Document(**{k: v for k, v in row.items() if k not in ("id", "bytes")}) for row in read] == wanted
    assert [row["bytes"] for row in read] == [len(d.text.encode()) for d in wanted]
    assert [row["id"] for row in read] == [xxhash.xxh3_128(d.text.encode()).digest() for d in wanted]


def test_row_groups_are_bounded_and_the_same_documents_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "GROUP_BYTES", 10_000)
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 70)
    wanted = some(500, words=300)
    write_documents(tmp_path / "a.parquet", wanted)
    write_documents(tmp_path / "b.parquet", iter(wanted))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    groups = list(read_groups(tmp_path / "a.parquet", ["text"]))
    sizes = [sum(len(text) for text in group["text"].to_pylist()) for group in groups]
    assert max(group.num_rows for group in groups) <= 70
    assert all(size <= 10_000 for size, group in zip(sizes, groups) if group.num_rows > 1)
    assert [text for group in groups for text in group["text"].to_pylist()] == [d.text for d in wanted]


def test_any_parquet_reader_reads_them(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.parquet", some(10))
    assert pq.read_table(tmp_path / "a.parquet").schema.equals(SCHEMA)


def test_attributes_are_read_beside_their_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 30)
    write_documents(tmp_path / "a.parquet", some(100))
    schema = pa.schema([pa.field("length", pa.int64()), pa.field("unread", pa.int64())])
    with ParquetFile(tmp_path / "length.parquet", schema) as file:
        for group in read_groups(tmp_path / "a.parquet", ["text"]):
            lengths = [len(text) for text in group["text"].to_pylist()]
            file.write(pa.table({"length": lengths, "unread": lengths}, schema=schema))
    rows = [
        row
        for group in read_groups(tmp_path / "a.parquet", ["text"], {tmp_path / "length.parquet": ["length"]})
        for row in group.to_pylist()
    ]
    assert len(rows) == 100 and all(row == {"text": row["text"], "length": len(row["text"])} for row in rows)


def test_a_file_whose_writer_failed_is_not_there(tmp_path: Path) -> None:
    def failing() -> list[Document]:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_documents(tmp_path / "a.parquet", (d for part in (some(5), None) for d in part or failing()))
    assert list(tmp_path.iterdir()) == []


def test_damaged_missing_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"a\.parquet"):
        list(read_groups(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(Refusal, match=r"b\.parquet"):
        list(read_groups(tmp_path / "b.parquet"))
    write_documents(tmp_path / "c.parquet", some(10))
    write_documents(tmp_path / "d.parquet", some(11))
    with pytest.raises(Refusal, match=r"d\.parquet: its rows are not those of .*c\.parquet"):
        list(read_groups(tmp_path / "c.parquet", ["text"], {tmp_path / "d.parquet": ["id"]}))
    content = bytearray((tmp_path / "c.parquet").read_bytes())
    content[40:60] = bytes(20)
    (tmp_path / "c.parquet").write_bytes(content)
    with pytest.raises(Refusal, match=r"c\.parquet"):
        list(read_groups(tmp_path / "c.parquet"))
