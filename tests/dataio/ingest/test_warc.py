"""WARC files: pages of crawls become their text, and what is damaged costs one record."""

from __future__ import annotations

import gzip
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dataio.ingest import html
from dataio.ingest.records import Malformed
from tests.dataio.ingest.support import lay, read

fastwarc = pytest.importorskip("fastwarc.warc", reason="fastwarc writes the WARC files that are read here")

PAGE = """<html><head><title>T</title><style>p {}</style><script>var hidden</script></head><body>
<nav><ul><li><a href="/">Home</a></li></ul></nav><article><h1>Über Öfen</h1>
<p>An oven is fed with <b>coal</b> by a person whose work is hard and hot, whatever the weather is.</p>
<pre>for x in y:
    feed(x)</pre></article></body></html>"""


def record(
    body: bytes, headers: str = "Content-Type: text/html; charset=utf-8", status: str = "200 OK", kind: str = "response"
) -> Any:
    made = fastwarc.WarcRecord()
    made.init_headers(record_type=getattr(fastwarc.WarcRecordType, kind))
    made.headers["WARC-Target-URI"] = "http://example.org/ü"
    made.headers["WARC-Date"] = "2024-02-29T12:00:00Z"
    if kind == "response":
        made.headers["Content-Type"] = "application/http; msgtype=response"
        body = f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body
    else:
        made.headers["Content-Type"] = headers.partition(": ")[2]
    made.set_bytes_content(body)
    return made


def written(*records: Any, members: bool = True) -> bytes:
    """WARC bytes; with `members` every record is a gzip member of its own, as crawlers write them."""
    parts = []
    for each in records:
        buffer = io.BytesIO()
        each.write(buffer)
        parts.append(gzip.compress(buffer.getvalue()) if members else buffer.getvalue())
    return b"".join(parts)


@pytest.mark.parametrize("members", [True, False])
def test_pages_become_their_text_with_address_and_date(tmp_path: Path, members: bool) -> None:
    records = [
        record(b"software: x\r\n", "Content-Type: application/warc-fields", kind="warcinfo"),
        record(PAGE.encode()),
        record(PAGE.encode("utf-16"), "Content-Type: text/html"),
        record(PAGE.encode("iso-8859-1"), "Content-Type: application/xhtml+xml; charset=ISO-8859-1"),
        record(b"plain text", "Content-Type: text/plain", kind="conversion"),
    ]
    lay(tmp_path / "in", {"a.warc.gz" if members else "a.warc": written(*records, members=members)})
    found = read(tmp_path / "in")
    assert [row["row"] for row in found.rows] == [1, 2, 3, 4]
    for row in found.rows[:3]:
        assert "Über Öfen" in row["text"] and "fed with coal by" in row["text"], row
        assert "for x in y:\n    feed(x)" in row["text"], "code keeps its lines"
        assert "hidden" not in row["text"] and "<" not in row["text"]
        assert (row["language"], row["path"]) == ("html", "http://example.org/ü")
        assert row["timestamp"] == datetime(2024, 2, 29, 12, tzinfo=UTC)
    assert (found.rows[3]["text"], found.rows[3]["language"]) == ("plain text", "text")
    assert not found.faults()


def test_what_is_no_page_is_skipped_by_reason(tmp_path: Path) -> None:
    records = [
        record(PAGE.encode(), status="404 Not Found"),
        record(b"\x89PNG", "Content-Type: image/png"),
        record(b" " * 3000 + PAGE.encode() * 400, "Content-Type: text/html"),
        record(b"<html><body></body></html>"),
    ]
    lay(tmp_path / "in", {"a.warc.gz": written(*records)})
    found = read(tmp_path / "in", max_document_bytes=50_000)
    reasons = ("http_status", "media_type", "too_long", "empty")
    assert found.faults() == {f"skipped.{why}": 1 for why in reasons} and not found.rows


def chunked(body: bytes, size: int = 100) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "encode"),
    [
        ("Transfer-Encoding: chunked", chunked),
        ("Content-Encoding: gzip", gzip.compress),
        ("Transfer-Encoding: chunked\r\nContent-Encoding: gzip", lambda body: chunked(gzip.compress(body))),
        ("Transfer-Encoding: chunked\r\nContent-Encoding: gzip", lambda body: body),
    ],
)
def test_transfer_and_content_encodings_are_undone_where_they_are_there(
    tmp_path: Path, headers: str, encode: Any
) -> None:
    response = record(encode(PAGE.encode()), f"Content-Type: text/html\r\n{headers}")
    lay(tmp_path / "in", {"a.warc.gz": written(response)})
    (row,) = read(tmp_path / "in").rows
    assert "Über Öfen" in row["text"]


@pytest.mark.parametrize(
    ("body", "headers", "why"),
    [
        (gzip.compress(PAGE.encode())[:-20], "Content-Encoding: gzip", "http"),
        (gzip.compress(b"a" * 10_000_000), "Content-Encoding: gzip", "http"),
        (b"<p>" + bytes(3000), "", "binary"),
        (b"<p>" + b"\xff\xfe\xfd" * 1000, "Content-Type: text/html; charset=utf-8", "encoding"),
        (b"<div>" * 100_000 + b"deep", "", "nested"),
    ],
)
def test_a_malformed_page_is_one_malformed_record(tmp_path: Path, body: bytes, headers: str, why: str) -> None:
    headers = headers if "Content-Type" in headers else f"Content-Type: text/html\r\n{headers}".strip()
    lay(tmp_path / "in", {"a.warc.gz": written(record(body, headers), record(PAGE.encode()))})
    found = read(tmp_path / "in")
    assert found.faults() == {f"malformed.{why}": 1} and [row["row"] for row in found.rows] == [1]


@pytest.mark.parametrize("junk", [b"junk\r\n" * 100, b"WARC/1.1\r\nWARC-Type: response\r\n\r\n", b"\0" * 5000 + b"\n"])
def test_reading_goes_on_at_the_next_record(tmp_path: Path, junk: bytes) -> None:
    good = written(record(PAGE.encode()), members=False)
    lay(tmp_path / "in", {"a.warc": good + junk + good})
    found = read(tmp_path / "in")
    assert len(found.rows) == 2 and found.faults() == {"malformed.warc": 1}


@pytest.mark.parametrize("members", [True, False])
@pytest.mark.parametrize("cut", [1, 50, 400])
def test_a_cut_file_keeps_the_records_before_the_cut(tmp_path: Path, members: bool, cut: int) -> None:
    data = written(*(record(PAGE.encode()) for _ in range(100)), members=members)
    lay(tmp_path / "in", {"a.warc.gz": data[:-cut]})
    found = read(tmp_path / "in")
    if members:  # the last block that was decompressed is lost
        assert 100 - 16_384 / len(PAGE) < len(found.rows) <= 100 and found.faults() == {"malformed.truncated": 1}
    elif cut == 1:  # an empty line behind the last record
        assert len(found.rows) == 100 and not found.faults()
    else:
        assert len(found.rows) == 99 and found.faults() == {"malformed.truncated": 1}


def test_without_resiliparse_pages_are_still_read_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> str:
        raise html.metadata.PackageNotFoundError(name)

    html.extractor.cache_clear()
    monkeypatch.setattr(html.metadata, "version", missing)
    text = html.text_of(0, PAGE.encode())
    html.extractor.cache_clear()
    assert isinstance(text, str)
    assert text.startswith("Über Öfen") and "for x in y:\n    feed(x)" in text and "hidden" not in text
    assert "fed with coal by" in text and "stoker[html]" in caplog.text


@pytest.mark.parametrize("size", [0, 1, 512, 513])
def test_depth_is_counted_where_elements_end(size: int) -> None:
    page = "<br><p>" * 2000 + "<div>" * size + "text" + "</div>" * size
    found = html.text_of(0, page.encode())
    assert isinstance(found, Malformed) == (size > html.MAX_DEPTH)
