"""Bytes of input files: opened wherever they lie, hashed as they pass, decompressed with a bound on what comes out."""

from __future__ import annotations

import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from stoker.errors import Refusal

#: A stream that grows beyond this many times what went in is no text: English and code shrink 3 to 10 times, deflate
#: reaches at most 1032 (zlib's technical notes), zstd tens of thousands.
MAX_RATIO = 250
#: Below this size a stream may have any ratio.
FREE_BYTES = 64 << 20
#: Decompressed at a time. Of a damaged stream the last one is lost, so it is not larger.
_BLOCK = 16 << 10
#: First bytes of a compressed file (RFC 1952, RFC 8878, bzip2, xz). pzstd begins with a skippable frame.
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"} | {
    bytes([first]) + b"\x2a\x4d\x18": "zstd" for first in range(0x50, 0x60)
}
#: Memory of an xz decompressor: its largest preset, -9, needs 65 MiB (xz(1)).
_XZ_MEMORY = 128 << 20
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https")


class Damaged(Exception):
    """What a file holds from here on cannot be read. `why`: its kind."""

    def __init__(self, why: str, detail: str) -> None:
        super().__init__(detail)
        self.why = why


def is_remote(url: str) -> bool:
    return "://" in url


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Object stores are read through obstore where it is there."""
    import fsspec

    scheme = url.split("://")[0]
    try:
        if scheme in _OBJECT_STORES:
            try:
                from obstore.fsspec import register
            except ImportError:
                pass
            else:
                register(scheme)
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise Refusal(f"{url}: {error}; run: pip install 'stoker[objectstore]'") from None
    except ValueError as error:
        raise Refusal(f"{url}: {error}; write a local path, or a URL that fsspec or obstore knows") from None


class Hashed(io.RawIOBase):
    """A file whose bytes are counted and hashed (xxh3-128) as they are read in order."""

    def __init__(self, file: BinaryIO | io.RawIOBase, url: str) -> None:
        self._file, self._url = file, url
        self._hash, self.size, self._ahead = xxhash.xxh3_128(), 0, b""

    def readable(self) -> bool:
        return True

    def peek(self, size: int) -> bytes:
        """The first bytes of what will be read next, at least `size` of them where there are as many."""
        self._ahead += self._take(size - len(self._ahead))
        return self._ahead

    def read(self, size: int = -1) -> bytes:
        if not self._ahead:
            return self._take(size)
        data, self._ahead = self._ahead, b""
        assert not 0 <= size < len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def finish(self) -> tuple[int, str]:
        """(bytes, hash) of the whole file: what no reader wanted is read now."""
        while self.read(1 << 20):
            pass
        return self.size, self._hash.hexdigest()

    def _take(self, size: int) -> bytes:
        try:
            data = self._file.read(size) or b""
        except Exception as error:  # of a disk or a network: never to be taken for damage to what is stored
            raise Refusal(f"{self._url}: cannot be read further ({error}); run the same command again") from error
        self._hash.update(data)
        self.size += len(data)
        return data


@contextmanager
def opened(url: str) -> Iterator[Hashed]:
    """A file of an input. Refuses one that cannot be opened; reading refuses what cannot be read."""
    try:
        if is_remote(url):
            system, path = filesystem(url)
            file = system.open(path, "rb")
        else:
            file = io.FileIO(url)
    except Refusal:
        raise
    except Exception as error:  # the clients of stores raise what they like
        raise Refusal(f"{url}: cannot be read ({error}); make it readable, or leave it out with exclude") from error
    with file:
        yield Hashed(file, url)


@contextmanager
def local(url: str, folder: Path) -> Iterator[Path]:
    """A file that can be read in any order: itself where it is local, else a copy in `folder` until the end."""
    with opened(url) as file:
        if not is_remote(url):
            yield Path(url)
            return
        folder.mkdir(parents=True, exist_ok=True)
        # A name of what killed writers leave, which the next run removes.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fetched.", suffix=".partial") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            yield Path(copy.name)


class _Inflate:
    """`zlib.decompressobj` as `lzma.LZMADecompressor` is asked."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, size: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail or data, size)


class _Members:
    """Reads a file of one compressed member after another, each perhaps with zeros behind it, as xz pads files and
    gzip(1) accepts them. For xz with a bound on its dictionary, which `lzma.LZMAFile` has not."""

    def __init__(self, raw: Hashed, start: Callable[[], Any]) -> None:
        self._raw, self._start, self._decompressor = raw, start, start()

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._decompressor.eof:
                if not (data := self._next_member()):
                    return b""
                self._decompressor = self._start()
            elif self._decompressor.needs_input and not (data := self._raw.read(_BLOCK)):
                raise EOFError("truncated")
            if found := self._decompressor.decompress(data, size):
                return found

    def _next_member(self) -> bytes:
        """The first bytes of it; none at the end of the file."""
        data = self._decompressor.unused_data or self._raw.read(_BLOCK)
        while data and not data.strip(b"\0"):
            data = self._raw.read(_BLOCK)
        return data.lstrip(b"\0")


class _Expanded(io.RawIOBase):
    """A decompressed stream that ends with `Damaged` where the compressed one is damaged, cut off or a bomb."""

    def __init__(self, raw: Hashed, inner: Any, name: str) -> None:
        self._raw, self._inner, self._name, self._size = raw, inner, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(min(len(buffer), _BLOCK))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            why = "truncated" if "runcated" in str(error) else "compression"
            raise Damaged(why, f"{self._name}: {error}") from None
        self._size += len(data)
        if self._size > max(FREE_BYTES, MAX_RATIO * self._raw.size):
            raise Damaged("bomb", f"{self._name}: {self._raw.size} bytes became more than {MAX_RATIO} times as many")
        buffer[: len(data)] = data
        return len(data)


def compression(head: bytes) -> str | None:
    """What a file of these first bytes is compressed with."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def expanded(raw: Hashed) -> io.BufferedReader:
    """The contents of a file, decompressed if its first bytes say that it is compressed, whatever its name."""
    name = compression(raw.peek(6))
    if name is None:
        return io.BufferedReader(raw, 1 << 20)
    inner: Any
    if name == "gzip":
        inner = _Members(raw, _Inflate)
    elif name == "xz":
        inner = _Members(raw, partial(lzma.LZMADecompressor, memlimit=_XZ_MEMORY))
    else:
        inner = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), name)
    return io.BufferedReader(_Expanded(raw, inner, name), 1 << 20)


def lines(stream: io.BufferedReader, limit: int) -> Iterator[tuple[bytes, int]]:
    """(line without its end, its bytes) of a stream. Of a line longer than `limit` only the beginning is kept: memory
    does not depend on what the file holds."""
    while line := stream.readline(limit + 1):
        size = len(line)
        if size > limit and not line.endswith(b"\n"):
            while rest := stream.readline(1 << 20):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
        yield line.rstrip(b"\r\n"), size
