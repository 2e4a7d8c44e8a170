"""Tar and zip archives: members are read where they are, in memory, and nothing is ever unpacked to a disk."""

from __future__ import annotations

import errno
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dataio.ingest import streams, tree
from dataio.ingest.records import Malformed, Outcome, Skipped
from dataio.ingest.repositories import MAX_TELLING_BYTES, Repositories, Rule
from dataio.ingest.streams import Damaged, Hashed, compression, expanded
from dataio.licences import is_licence_file, is_package_metadata

#: Bytes of a long name or of extended attributes in a tar file: Linux bounds names at 4 KiB.
_MAX_EXTENSION = 1 << 20
#: Bytes of licences, package metadata and lists of files that are held while an archive is read.
_MAX_TELLING = 64 << 20
_BLOCK = 512
#: First bytes of a zip file with members (APPNOTE.TXT, 4.3.7), and of one that was cut in parts (8.5.4).
_ZIP_HEADS = (b"PK\x03\x04", b"PK\x07\x08")
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # of a compression, or a version
    RuntimeError,  # of an encrypted member
    ValueError,
    struct.error,
    OverflowError,
    OSError,
)


class Unreadable(Exception):
    """A member that cannot be read, while others may be."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive. `read(most)`: its first bytes, before the next member is asked for."""

    row: int
    name: str
    size: int
    read: Callable[[int], bytes]
    is_link: bool = False


def read(
    path: Path, name: str, rule: Rule, wanted: Callable[[str], bool], extract_html: bool, max_bytes: int
) -> Iterator[Outcome]:
    """Rows are members in the archive's order; those not `wanted` are not counted. An archive is gone through twice
    where members belong to repositories, since a licence may lie behind what it holds for. Memory is bounded by one
    member, the list of names, and `_MAX_TELLING`."""
    repositories = _repositories(path, name, rule)
    with _members(path) as members:
        for member in members:
            if not wanted(member.name):
                continue
            if member.is_link:
                yield Skipped("link")
            elif problem := _unsafe(member.name):
                yield Malformed(member.row, "unsafe_path", _shown(member.name), problem)
            elif member.size > max_bytes:
                yield Skipped("too_long")
            else:
                yield _document(member, repositories, extract_html, max_bytes)


def _document(member: Member, repositories: Repositories | None, extract_html: bool, max_bytes: int) -> Outcome:
    try:
        data = member.read(max_bytes + 1)
    except Unreadable as error:
        return Malformed(member.row, "member", _shown(member.name), str(error)[:200])
    repository = repositories.of(member.name) if repositories else None
    return tree.document(member.row, data, member.name, repository, extract_html, max_bytes)


def _repositories(path: Path, name: str, rule: Rule) -> Repositories | None:
    if rule in ("none", "git"):
        return None
    names: list[str] = []
    telling: dict[str, bytes] = {}
    held = 0
    # What is damaged is met again, and counted, where documents are read.
    with suppress(Damaged), _members(path) as members:
        for member in members:
            if member.is_link or _unsafe(member.name):
                continue
            names.append(member.name)
            listing = rule == "distribution" and member.name.endswith(".dist-info/RECORD")
            if held < _MAX_TELLING and (listing or is_licence_file(member.name) or is_package_metadata(member.name)):
                with suppress(Unreadable):
                    telling[member.name] = member.read(_MAX_TELLING - held if listing else MAX_TELLING_BYTES)
                    held += len(telling[member.name])
    return Repositories(rule, name, names, lambda path, most: telling.get(path, b"")[:most])


def _unsafe(name: str) -> str | None:
    """Why a member's name would leave the folder that it is unpacked in."""
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return "is an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "leads out of the archive"
    return None


def _shown(name: str) -> bytes:
    return name.encode("utf-8", "backslashreplace")


@contextmanager
def _members(path: Path) -> Iterator[Iterator[Member]]:
    with open(path, "rb", buffering=0) as file:
        is_zip = _is_zip(file)
        file.seek(0)
        if is_zip:
            yield _of_zip(file, path.stat().st_size)
        else:
            yield _of_tar(expanded(Hashed(file, str(path))))


def _is_zip(file: io.FileIO) -> bool:
    """By its first bytes, then by its last: a program may stand before a zip file, but one that ends a tar file is its
    last member."""
    head = file.read(_BLOCK)
    if head.startswith(_ZIP_HEADS):
        return True
    return head[257:262] != b"ustar" and compression(head) is None and zipfile.is_zipfile(file)


def _of_zip(file: io.FileIO, size: int) -> Iterator[Member]:
    if not zipfile.is_zipfile(file):
        raise Damaged("truncated", "zip: ends without its list of members")
    try:
        archive = zipfile.ZipFile(file)
    except _ZIP_ERRORS as error:
        raise Damaged("archive", _damage(error)) from None
    total = 0
    for row, info in enumerate(archive.infolist()):
        if info.filename.endswith("/"):  # not is_dir(), which fails where there is no name
            continue

        def first(most: int, info: zipfile.ZipInfo = info) -> bytes:
            nonlocal total
            try:
                with archive.open(info) as member:
                    data = member.read(most)
            except _ZIP_ERRORS as error:
                raise Unreadable(_damage(error)) from None
            total += len(data)
            if total > max(streams.FREE_BYTES, streams.MAX_RATIO * size):
                raise Damaged("bomb", f"zip: {size} bytes became more than {streams.MAX_RATIO} times as many")
            return data

        yield Member(row, info.filename, info.file_size, first, stat.S_ISLNK(info.external_attr >> 16))


def _damage(error: Exception) -> str:
    """What is wrong with a zip file; raises an error that is of the disk."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: of an offset that is none
        raise error
    return f"zip: {error}"


def _of_tar(stream: io.BufferedReader) -> Iterator[Member]:
    """Members as they come. Not by `tarfile.open`, which reads headers of any size into memory, keeps every member, and
    takes a damaged header for the end."""
    row = 0
    extended: dict[str, str] = {}
    while True:
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise Damaged("truncated", "tar: ends without its end mark")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # type: ignore[arg-type]
        except tarfile.HeaderError as error:
            if not block.strip(b"\0"):
                return
            raise Damaged("archive", f"tar: {error}") from None
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if info.size > _MAX_EXTENSION:
                raise Damaged("archive", f"tar: a header of {info.size} bytes")
            extended |= _extension(info.type, _Span(stream, info.size).rest())
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise Damaged("archive", "tar: sparse files are not read")
        span = _Span(stream, extended.get("size", info.size))
        name = extended.get("path", info.name)
        if (
            (info.isreg() and not name.endswith("/") and "GNU.sparse.major" not in extended)
            or info.islnk()
            or info.issym()
        ):
            yield Member(row, name.removeprefix("./"), span.size, span.first, info.islnk() or info.issym())
        span.skip()
        row, extended = row + 1, {}


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """What an extension says of the next member: its long name, or the records "<length> <key>=<value>" of pax."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    said: dict[str, str] = {}
    while kind == tarfile.XHDTYPE and data:
        length, space, _ = data.partition(b" ")
        if not (space and length.isdigit() and len(length) < int(length) <= len(data)):
            raise Damaged("archive", "tar: damaged attributes")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        said[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return said


class _Span:
    """The contents of a tar member in the stream, and what fills its last block."""

    def __init__(self, stream: io.BufferedReader, size: int | str) -> None:
        if not str(size).isdecimal():
            raise Damaged("archive", f"tar: a size of {size}")
        self._stream, self.size = stream, int(size)
        self._left = -(-self.size // _BLOCK) * _BLOCK

    def first(self, most: int) -> bytes:
        return self._take(min(most, self.size))

    def rest(self) -> bytes:
        data = self._take(self.size)
        self.skip()
        return data

    def skip(self) -> None:
        while self._left > 0:
            self._take(min(self._left, 1 << 20))

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= size
        if len(data) < size:
            raise Damaged("truncated", "tar: ends inside a member")
        return data
