"""Archives: members are documents; what would do harm when unpacked is counted, and nothing is unpacked."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from dataio.ingest import streams
from tests.dataio.ingest.support import lay, read

PACK = {
    "tar": lambda data: data,
    "tar.gz": gzip.compress,
    "tar.zst": zstandard.ZstdCompressor().compress,
    "tar.xz": lzma.compress,
    "tar.bz2": bz2.compress,
}


def tar(*members: tuple[str, bytes | str], style: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file; str contents are targets of links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def metadata(licence: str) -> bytes:
    return f"Metadata-Version: 2.4\nName: pkg\nLicense-Expression: {licence}\n".encode()


LONG = "/".join(["folder"] * 40) + "/x.py"
MEMBERS = [
    ("pkg-1.0/src/a.py", b"print(1)\r\n"),
    (f"pkg-1.0/{LONG}", b"long = 1\n"),
    ("pkg-1.0/data.bin", b"\0" * 5000),
    ("pkg-1.0/README.md", "Ünicode\n".encode()),
    ("pkg-1.0/PKG-INFO", metadata("MIT")),
]


@pytest.mark.parametrize("ending", [*PACK, "zip"])
@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_documents_of_the_archive_s_repository(tmp_path: Path, ending: str, style: int) -> None:
    data = zipped(*MEMBERS) if ending == "zip" else PACK[ending](tar(*MEMBERS, style=style))
    lay(tmp_path / "in", {f"pkg-1.0.{ending}": data})
    found = read(tmp_path / "in")
    assert found.texts == {"src/a.py": "print(1)\n", LONG: "long = 1\n", "README.md": "Ünicode\n"}
    assert [row["row"] for row in found.rows] == [0, 1, 3]
    assert {(row["repository"], row["licence"]) for row in found.rows} == {("pkg-1.0", "MIT")}
    assert [row["language"] for row in found.rows] == ["python", "python", "markdown"]
    assert not found.faults()
    assert read(tmp_path / "in", format="archive", include=["*.md"], exclude=["src/"]).texts == {
        "README.md": "Ünicode\n"
    }


def test_the_licence_of_the_nearest_package_holds(tmp_path: Path) -> None:
    members = [
        ("a/x.py", b"x\n"),
        ("a/b/y.py", b"y\n"),
        ("a/b/PKG-INFO", metadata("ISC")),
        ("PKG-INFO", metadata("MIT")),
    ]
    lay(tmp_path / "in", {"p.tar": tar(*members)})
    found = read(tmp_path / "in", repository="nearest")
    assert {(row["path"], row["repository"], row["licence"]) for row in found.rows} == {
        ("a/x.py", "p", "MIT"),
        ("y.py", "a/b", "ISC"),
    }


UNSAFE = ["../../etc/evil.py", "/etc/evil.py", "a/../../evil.py", "C:\\evil.py", "..\\evil.py"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("pack", [tar, zipped])
def test_names_that_lead_out_of_an_archive_are_malformed(tmp_path: Path, name: str, pack: Callable[..., bytes]) -> None:
    lay(tmp_path / "in", {"x.archive": pack((name, b"evil\n"), ("good.py", b"good\n"))})
    before = sorted(path for path in tmp_path.rglob("*"))
    found = read(tmp_path / "in", format="archive", out=tmp_path / "out")
    assert [row["text"] for row in found.rows] == ["good\n"]
    assert found.faults() == {"malformed.unsafe_path": 1}
    assert "evil" in found.quarantined[0]["sample"]
    outside = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in [path, *path.parents]}
    assert outside == set(before), "nothing was unpacked"


def test_links_are_skipped(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"x.tar": tar(("passwd.py", "/etc/passwd"), ("good.py", b"good\n"))})
    found = read(tmp_path / "in")
    assert found.faults() == {"skipped.link": 1} and len(found.rows) == 1


@pytest.mark.parametrize("pack", [lambda *m: gzip.compress(tar(*m)), lambda *m: PACK["tar.zst"](tar(*m)), zipped])
def test_bombs_are_stopped_by_what_they_grow_to(
    tmp_path: Path, pack: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", 1 << 20)
    members = [("first.py", b"first\n"), *((f"{i}.py", b"a" * (1 << 20)) for i in range(30))]
    lay(tmp_path / "in", {"x.archive": pack(*members)})
    found = read(tmp_path / "in", format="archive", repository="none")
    assert found.texts["first.py"] == "first\n" and len(found.rows) < 20
    assert found.faults() == {"malformed.bomb": 1}


@pytest.mark.parametrize("ending", [*PACK, "zip"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_archive_keeps_what_came_before_the_cut(tmp_path: Path, ending: str, share: float) -> None:
    members = [(f"{i}.py", os.urandom(500).hex().encode()) for i in range(100)]
    data = zipped(*members) if ending == "zip" else PACK[ending](tar(*members))
    lay(tmp_path / "in", {"x.archive": data[: int(share * len(data))]})
    found = read(tmp_path / "in", format="archive")
    assert len(found.rows) < 100 and sum(found.faults().values()) == 1
    if ending in ("tar", "tar.gz"):
        assert len(found.rows) > 100 * share - 40
    assert all(dict(members)[row["path"]].decode() == row["text"] for row in found.rows)


def test_a_tar_without_its_end_mark_is_called_truncated(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"x.tar": tar(("a.py", b"a\n"))[:1024]})
    found = read(tmp_path / "in")
    assert len(found.rows) == 1 and found.faults() == {"malformed.truncated": 1}


def test_a_cut_zip_is_called_truncated_and_not_taken_for_a_tar(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"x.zip": zipped(*MEMBERS)[:-30], "y.archive": zipped(*MEMBERS)[:-30]})
    found = read(tmp_path / "in", format="archive")
    assert found.faults() == {"malformed.truncated": 2} and not found.rows
    assert {shown["detail"] for shown in found.quarantined} == {"zip: ends without its list of members"}


def test_an_archive_whose_last_member_is_an_archive_is_read_as_what_it_is(tmp_path: Path) -> None:
    inner = zipped(("inner.py", b"inner\n"), method=zipfile.ZIP_STORED)
    outer = tar(("outer.py", b"outer\n"), ("last.whl", inner))
    lay(tmp_path / "in", {"x.tar": outer, "y.tar.gz": gzip.compress(outer, 0), "z.pyz.zip": b"#!/bin/sh\n" + inner})
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == ["outer\n", "outer\n", "inner\n"] and not found.faults()


def header(name: str, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        header("x", 1 << 40, tarfile.GNUTYPE_LONGNAME),
        header("x", 1 << 40, tarfile.XHDTYPE),
        header("x", 512, tarfile.XHDTYPE) + b"999 path=x\n".ljust(512, b"\0"),
        header("x", 512, tarfile.XHDTYPE) + b"0 a=b\n".ljust(512, b"\0"),
        header("x", 14, tarfile.XHDTYPE) + b"14 size=1x000\n".ljust(512, b"\0") + header("x.py", 1, tarfile.REGTYPE),
        header("x", 12, tarfile.XHDTYPE) + b"12 size=-10\n".ljust(512, b"\0") + header("x.py", 1, tarfile.REGTYPE),
        header("x", 1 << 40, tarfile.REGTYPE),
        b"junk" * 128,
        os.urandom(2048),
        b"",
        b"\x1f\x8b\x08",
    ],
)
def test_hostile_headers_end_an_archive_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    lay(tmp_path / "in", {"a.tar": tar(("good.py", b"good\n"))[:1024] + data, "b.tar": tar(("next.py", b"next\n"))})
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == ["good\n", "next\n"]
    assert sum(found.faults().values()) == 1


def test_members_of_a_zip_that_cannot_be_read_are_malformed_one_by_one(tmp_path: Path) -> None:
    members = [("nameless", b"x"), ("a.py", b"aaaa\n"), ("b.py", b"bbbb\n"), ("c.py", b"cccc\n")]
    data = bytearray(zipped(*members, method=zipfile.ZIP_STORED))
    data[data.index(b"bbbb")] ^= 1  # its checksum no longer holds
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    data[entry + 8] |= 1  # a.py is said to be encrypted
    data = data.replace(b"nameless", bytes(8))
    lay(tmp_path / "in", {"x.zip": bytes(data)})
    found = read(tmp_path / "in")
    assert [row["text"] for row in found.rows] == ["cccc\n"] and found.faults() == {"malformed.member": 2}


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_an_empty_or_foreign_file_is_malformed(tmp_path: Path, name: str) -> None:
    lay(tmp_path / "in", {name: b"", f"other.{name}": b"not an archive\n" * 100})
    assert sum(read(tmp_path / "in").faults().values()) == 2
