"""JSON lines: every line is a document, a malformed record of a named kind, or empty; none ends the job."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dataio.ingest.fields import Fields
from dataio.ingest.jsonl import _TOKEN
from dataio.ingest.jsonl import read as read_lines
from dataio.ingest.records import Malformed, Record
from tests.dataio.ingest.support import lay, read

COMPRESSED = {
    "plain": lambda data: data,
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "xz": partial(lzma.compress, preset=0),
    "bz2": bz2.compress,
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


@pytest.mark.parametrize("compression", COMPRESSED)
def test_files_are_read_by_what_they_hold_not_by_their_name(tmp_path: Path, compression: str) -> None:
    data = lines(*({"text": f"text {i} é\n" * i} for i in range(500)))
    half = len(data) // 2
    several = COMPRESSED[compression](data[:half]) + COMPRESSED[compression](data[half:])  # members of one file
    lay(tmp_path / "in", {"a.jsonl": COMPRESSED[compression](data), "b.jsonl.gz": several})
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == [f"text {i} é\n" * i for i in range(1, 500)] * 2
    assert [(row["file"], row["row"]) for row in found.rows] == [(f, i) for f in (0, 1) for i in range(1, 500)]
    assert found.faults() == {"skipped.empty": 2}


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.text(min_size=1))
def test_what_no_field_names_becomes_metadata(extra: dict[str, Any], text: str) -> None:
    known = {"text", "url", "language", "license", "repository", "revision", "timestamp"}
    extra = {key: value for key, value in extra.items() if key not in known and value is not None}
    (record,) = list(read_lines(io.BufferedReader(io.BytesIO(lines({"text": text, **extra}))), Fields(), 1 << 20))  # type: ignore[arg-type]
    assert isinstance(record, Record) and record.text == text
    assert json.loads(record.metadata or "{}") == extra


def test_fields_are_found_by_name_and_within_objects(tmp_path: Path) -> None:
    first = {"content": "a", "meta": {"url": "http://a", "lang": "en-US"}, "licenses": ["MIT", "Apache-2.0"], "n": 1}
    second = {"content": "b", "meta": 3, "licenses": "GPLv3+", "created": "2024-02-29T12:00:00+01:00", "meta.url": "x"}
    third = {"content": "c", "created": "yesterday", "licenses": None}
    lay(tmp_path / "in", {"a.jsonl": lines(first, second, third)})
    fields = {"text": "content", "path": "meta.url", "language": "meta.lang", "licence": "licenses"}
    a, b, c = read(tmp_path / "in", fields=fields | {"timestamp": "created"}, language="de", licence="CC0-1.0").rows
    assert [row["path"] for row in (a, b, c)] == ["http://a", "x", "a.jsonl"]
    assert [row["language"] for row in (a, b, c)] == ["en", "de", "de"]
    assert [row["licence"] for row in (a, b, c)] == ["Apache-2.0 AND MIT", "GPL-3.0-or-later", "CC0-1.0"]
    assert [row["timestamp"] for row in (a, b, c)] == [None, datetime(2024, 2, 29, 11, tzinfo=UTC), None]
    assert json.loads(a["metadata"]) == {"meta": first["meta"], "n": 1}
    assert json.loads(c["metadata"]) == {"created": "yesterday"}, "what could not be understood is kept"


def test_texts_lose_byte_order_marks_and_carriage_returns_and_nothing_else(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"a.jsonl": b"\xef\xbb\xbf" + lines({"text": "\ufeffa\r\nb\rc\n\n \t"}) + b"\r\n"})
    assert [row["text"] for row in read(tmp_path / "in").rows] == ["a\nb\nc\n\n \t"]


HOSTILE = {
    "json": b'{"text": "a"',
    "not_object": b'["text"]',
    "no_text": b'{"txt": "a"}',
    "text_type": b'{"text": ["a"]}',
    "encoding": b'{"text": "\xff\xfe"}',
    "surrogate": b'{"text": "half \\ud83d"}',
    "binary": b'{"text": "nul \\u0000"}',
    "nested": b'{"text": "a", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "structure": b'{"text": "a", "x": [' + b"{}," * 50_000 + b"{}]}",
    "long_line": b'{"text": "' + b"a" * 5000 + b'"}',
    "long_field": b'{"text": "a", "url": "' + b"a" * 3000 + b'", "language": "' + b"x" * 8500 + b'"}',
    "metadata": b'{"text": "a", "x": 1e999}',
}


@pytest.mark.parametrize("why", HOSTILE)
def test_a_malformed_line_is_counted_and_shown_and_the_next_one_read(tmp_path: Path, why: str) -> None:
    lay(tmp_path / "in", {"a.jsonl": lines({"text": "before"}) + HOSTILE[why] + b"\n" + lines({"text": "after"})})
    found = read(tmp_path / "in", max_document_bytes=1000 if why == "long_line" else 1 << 20)
    assert [row["text"] for row in found.rows] == ["before", "after"]
    assert [row["row"] for row in found.rows] == [0, 2]
    assert found.faults() == {f"malformed.{why}": 1}
    (shown,) = found.quarantined
    assert (shown["file"], shown["row"], shown["why"]) == (str(tmp_path / "in/a.jsonl"), 1, why)
    assert 0 < len(shown["sample"]) <= 4 * 2048 and shown["detail"]


@pytest.mark.parametrize("text", [",[{" * 300_000, '",\\"{' * 100_000, "\\" * 400_001, '"' * 400_000])
def test_what_looks_like_structure_in_a_text_is_text(tmp_path: Path, text: str) -> None:
    lay(tmp_path / "in", {"a.jsonl": lines({"text": text})})
    (row,) = read(tmp_path / "in", max_document_bytes=1 << 20).rows
    assert row["text"] == text


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_structure_is_counted_as_a_parser_meets_it(values: dict[str, Any]) -> None:
    def tokens(value: Any) -> int:
        """Brackets that open, commas and strings."""
        if isinstance(value, str):
            return 1
        if isinstance(value, dict):
            return 1 + max(0, len(value) - 1) + sum(1 + tokens(inner) for inner in value.values())
        return 1 + max(0, len(value) - 1) + sum(map(tokens, value)) if isinstance(value, list) else 0

    (line,) = lines(values).splitlines()
    assert len(_TOKEN.findall(line)) == tokens(values)


@pytest.mark.parametrize("line", [b'"' + b'\\"' * 500_000, b'"\\' * 500_000, b'{"text": "' + b"\\" * 1_000_001])
def test_a_string_without_an_end_is_gone_through_once(line: bytes) -> None:
    start = time.perf_counter()
    assert len(_TOKEN.findall(line)) <= 500_000
    assert time.perf_counter() - start < 5


def test_a_long_line_of_wide_characters_is_refused_before_it_takes_four_bytes_for_each(tmp_path: Path) -> None:
    text = "a" * 1500
    wide = [
        b'{"text": "%s%s"}' % (text.encode(), end) for end in ("\U0001f600".encode(), b"\\ud83d\\ude00", b"\xc3\xa9")
    ]
    lay(tmp_path / "in", {"a.jsonl": b"\n".join(wide)})
    found = read(tmp_path / "in", max_document_bytes=700)
    assert found.faults() == {"malformed.long_line": 2, "skipped.too_long": 1}


@pytest.mark.parametrize("compression", ["gz", "xz"])
@pytest.mark.parametrize("zeros", [1, 512, 40_000])
def test_zeros_behind_a_member_are_no_damage(tmp_path: Path, compression: str, zeros: int) -> None:
    pack = COMPRESSED[compression]
    one, two = (lines(*({"text": f"{name} {i}"} for i in range(5000))) for name in "ab")
    padded = pack(one) + bytes(zeros) + pack(two) + bytes(zeros)
    lay(tmp_path / "in", {f"a.jsonl.{compression}": padded, "b.jsonl": padded + b"junk"})
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == [json.loads(line)["text"] for line in (one + two).splitlines()] * 2
    assert sum(found.faults().values()) == 1, "but anything else is"


@pytest.mark.parametrize("nibble", [0, 13, 15])
def test_zstd_may_begin_with_a_skippable_frame(tmp_path: Path, nibble: int) -> None:
    skipped = bytes([0x50 + nibble]) + b"\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"  # RFC 8878, 3.1.2
    pack = COMPRESSED["zst"]
    lay(tmp_path / "in", {"a.jsonl": skipped + pack(lines({"text": "a"})) + skipped + pack(lines({"text": "b"}))})
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == ["a", "b"] and not found.faults()


@pytest.mark.parametrize("bad", [b"\0" * 3000, b"NaN", b'{"text": NaN}', b"9" * 5000, b'{"text": "a"} {"text": "b"}'])
def test_what_python_reads_and_json_is_not_is_malformed(tmp_path: Path, bad: bytes) -> None:
    lay(tmp_path / "in", {"a.jsonl": bad + b"\n" + lines({"text": "after"})})
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == ["after"] and sum(found.faults().values()) == 1


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_no_bytes_are_beyond_reading(content: list[bytes]) -> None:
    stream = io.BufferedReader(io.BytesIO(b"\n".join(content)))  # type: ignore[arg-type]
    for outcome in read_lines(stream, Fields(), 20):
        assert isinstance(outcome, Record | Malformed)


@pytest.mark.parametrize("compression", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_to_a_compressed_file_ends_it_and_not_the_unit(tmp_path: Path, compression: str, damage: str) -> None:
    data = lines(*({"text": random.Random(i).randbytes(100).hex()} for i in range(10_000)))
    packed = bytearray(COMPRESSED[compression](data))
    if damage == "truncated":
        del packed[-len(packed) // 3 :]
    else:
        packed[len(packed) * 2 // 3] ^= 0x55
    lay(tmp_path / "in", {"a.jsonl": bytes(packed), "b.jsonl": lines({"text": "next file"})})
    found = read(tmp_path / "in")
    faults = {why for why in found.faults() if why not in ("malformed.json", "malformed.encoding")}
    assert faults & {"malformed.truncated", "malformed.compression"}
    assert found.rows[-1]["text"] == "next file"
    whole = [json.loads(line)["text"] for line in data.splitlines()]
    before = [row["text"] for row in found.rows[:-1]]
    if damage == "truncated" and compression != "bz2":
        assert len(before) > 5000 and before == whole[: len(before)]


def test_a_quarantine_keeps_the_first_hundred(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"a.jsonl": b"\x1b[31m\xff\n" * 500})
    found = read(tmp_path / "in")
    assert found.counts["malformed.encoding"] == 500 and len(found.quarantined) == 100
    assert found.quarantined[-1]["row"] == 99
    assert found.quarantined[0]["sample"] == "\x1b[31m\\xff", "escaped in the file, which is ASCII"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("2024-01-02", datetime(2024, 1, 2, tzinfo=UTC)),
        ("2024-01-02T03:04:05Z", datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (1704164645, datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (1704164645000, datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("1704164645", datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (1704164645.5, datetime(2024, 1, 2, 3, 4, 5, 500_000, tzinfo=UTC)),
        ("0001-01-01T00:00:00+23:00", None),
        (10**40, None),
        (True, None),
        ({}, None),
    ],
)
def test_a_timestamp_is_understood_or_unknown(tmp_path: Path, said: Any, meant: datetime | None) -> None:
    lay(tmp_path / "in", {"a.jsonl": lines({"text": "a", "timestamp": said})})
    assert read(tmp_path / "in").rows[0]["timestamp"] == meant
