"""Data files: chunks appended by their one writer, each followed by its CRC32C; and read back, each checked."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np

from pretrain.checkpoint.damage import Damage, Damaged
from pretrain.checkpoint.manifest import CRC_BYTES, Address, Extent, Manifest
from stoker.hashing import crc32c

#: Chunks of at least PACKED_BYTES start on a page, so that they can be written and read without the page cache
#: (O_DIRECT); smaller ones are packed, aligned for any element and for a cache line.
PAGE_BYTES, PACKED_BYTES, PACKED_ALIGN = 4096, 64 * 2**10, 64
_GAP_READ_BYTES = 2**20


class DataWriter:
    """Appends chunks to a file of its own, made by the first of them; nothing is durable before ``close``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self.bytes = 0

    def append(self, chunk: np.ndarray) -> Address:
        """Write a contiguous chunk and its CRC; returns where it lies."""
        if self._file is None:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            self._file = FileIO(descriptor, "wb")
        align = PAGE_BYTES if chunk.nbytes >= PACKED_BYTES else PACKED_ALIGN
        offset = -(-self.bytes // align) * align
        data = chunk.reshape(-1).view(np.uint8).data
        crc = crc32c(data)
        for part in (bytes(offset - self.bytes), data, crc.to_bytes(CRC_BYTES, "little")):
            view = memoryview(part)
            while view:
                view = view[self._file.write(view) :]
        self.bytes = offset + data.nbytes + CRC_BYTES
        return Address(self._path.name, offset, crc)

    def close(self) -> None:
        """Make the bytes durable. An error here means that they are not, and that no retry can make them."""
        if self._file is not None:
            with self._file:
                os.fsync(self._file.fileno())


def open_regular(folder: Path, name: str) -> FileIO:
    """Open a file of a checkpoint for reading. Raises Damaged where it is missing, a link or not a plain file."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        raise Damaged([Damage(name, None, None, "missing" if error.errno == errno.ENOENT else "a link")]) from error
    try:
        return FileIO(descriptor, "rb")
    except IsADirectoryError as error:
        os.close(descriptor)
        raise Damaged([Damage(name, None, None, "a folder")]) from error


class DataReader:
    """Reads and checks chunks of a checkpoint's data files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._files: dict[str, FileIO] = {}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def chunk(self, tensor: str, number: int) -> np.ndarray:
        """The bytes of a chunk (uint8). Raises Damaged naming file, tensor and chunk."""
        stored = self._manifest.tensors[tensor]
        at = stored.chunks[number]
        raw = self._read(at.file, at.offset, stored.chunk_bytes + CRC_BYTES, tensor, number)
        data, trailer = raw[:-CRC_BYTES], int.from_bytes(raw[-CRC_BYTES:].tobytes(), "little")
        crc = crc32c(data.data)
        if crc != at.crc:
            what = "holds another chunk, or one of another step" if trailer == crc else "its bytes changed"
            raise Damaged([Damage(at.file, tensor, number, f"CRC32C {crc:08x} is not {at.crc:08x}: {what}")])
        if trailer != crc:
            raise Damaged([Damage(at.file, tensor, number, f"the CRC32C behind it reads {trailer:08x}, not {crc:08x}")])
        return data

    def damage(self, name: str, extents: list[Extent]) -> Iterator[Damage]:
        """Everything wrong with one data file: its chunks, in order, and the zeros between them."""
        position = 0
        for extent in extents:
            try:
                self._refuse_gap(name, position, extent.start)
                self.chunk(extent.tensor, extent.chunk)
            except Damaged as found:
                yield from found.found
            position = extent.stop

    def _refuse_gap(self, name: str, start: int, stop: int) -> None:
        for offset in range(start, stop, _GAP_READ_BYTES):
            gap = self._read(name, offset, min(_GAP_READ_BYTES, stop - offset), None, None)
            if gap.any():
                at = offset + int(np.flatnonzero(gap)[0])
                raise Damaged([Damage(name, None, None, f"byte {at}, between chunks, is not zero")])

    def _read(self, name: str, offset: int, length: int, tensor: str | None, chunk: int | None) -> np.ndarray:
        if name not in self._files:
            self._files[name] = open_regular(self._folder, name)
        buffer = np.empty(length, np.uint8)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._files[name].fileno(), [buffer.data[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise Damaged([Damage(name, tensor, chunk, f"the disk cannot read it: {error}")]) from error
            if count == 0:
                raise Damaged([Damage(name, tensor, chunk, f"the file ends at byte {offset + done}")])
            done += count
        return buffer


@contextmanager
def reading(folder: Path, manifest: Manifest) -> Iterator[DataReader]:
    reader = DataReader(folder, manifest)
    try:
        yield reader
    finally:
        reader.close()
