"""An S3 bucket, as obstore asks for it over HTTP: listed page by page, streamed, and read where a folder is."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from stoker.errors import Refusal
from tests.dataio.ingest.support import lay, read

pytest.importorskip("obstore", reason="obstore reads object stores; pip install 'stoker[objectstore]'")

CONTENTS = {
    "in/a.jsonl.gz": gzip.compress(b'{"text": "a", "url": "http://a"}\n' * 3 + b"bad\n"),
    "in/code/x.py": b"x = 1\n",
    "in/code/sub/y.py": b"y = 1\n",
    "in/code/package.json": b'{"license": "MIT"}',
    "in/z.tar": b"",
    "out/b.md": b"b\n",
}


class Bucket(BaseHTTPRequestHandler):
    """ListObjectsV2 in pages of two, HeadObject and GetObject (Amazon S3 API Reference) of `CONTENTS` in "bucket"."""

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).removeprefix("/bucket").lstrip("/")
        if not key:
            self.answer(200, self.listing(parse_qs(url.query)))
        elif key in CONTENTS:
            self.get(CONTENTS[key])
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def get(self, data: bytes) -> None:
        headers = {"ETag": f'"{md5(data).hexdigest()}"', "Last-Modified": formatdate(0, usegmt=True)}
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            return self.answer(200, data, headers)
        first, last = wanted.split("-")
        start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
        return self.answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        found: dict[str, str] = {}
        for key, data in sorted(CONTENTS.items()):
            rest = key.removeprefix(prefix)
            if key.startswith(prefix) and delimiter and delimiter in rest:
                folder = prefix + rest.split(delimiter)[0] + delimiter
                found[folder] = f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>"
            elif key.startswith(prefix):
                found[key] = (
                    f'<Contents><Key>{key}</Key><Size>{len(data)}</Size><ETag>"{md5(data).hexdigest()}"</ETag>'
                    "<LastModified>2024-01-02T03:04:05.000Z</LastModified></Contents>"
                )
        after = int(query.get("continuation-token", ["0"])[0])
        page = list(found.values())[after : after + 2]
        more = after + 2 < len(found)
        token = f"<NextContinuationToken>{after + 2}</NextContinuationToken>" if more else ""
        head = f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        return f"<ListBucketResult>{head}{''.join(page)}</ListBucketResult>".encode()

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "REGION": "none", "ALLOW_HTTP": "true"}
    for name, value in {**said, "ENDPOINT": f"http://127.0.0.1:{server.server_port}"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("bucket")
def test_a_bucket_is_read_as_a_folder_is(tmp_path: Path) -> None:
    local = read(lay(tmp_path / "disk", CONTENTS), "in", "out/*.md", repository="nearest")
    remote = read(tmp_path / "store", "s3://bucket/in", "s3://bucket/out/*.md", repository="nearest")
    assert remote.rows == local.rows and len(remote.rows) == 7
    assert remote.counts == local.counts and remote.faults() == {"malformed.json": 1, "malformed.truncated": 1}
    assert [unit.files[0].stamp for unit in remote.units] == [
        f'{len(CONTENTS["in/a.jsonl.gz"])}-"{md5(CONTENTS["in/a.jsonl.gz"]).hexdigest()}"'
    ]


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("url", ["s3://bucket/nowhere", "s3://bucket/no*/x.md"])
def test_what_a_bucket_does_not_hold_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(Refusal, match="there is no such file"):
        read(tmp_path, url)
