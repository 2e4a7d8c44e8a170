"""Arrays of a store on disk: zarr v3, cut into shard files of many chunks (``sharding_indexed`` codec).

    hot     chunks are plain little-endian bytes and lie back to back, so a shard *is* an array: it is mapped, and a
            window is a copy wherever it starts. What a checksum in the chunk would protect, ``Checks`` beside it do.
    cold    chunks are zstd and a CRC32C: 2.4 times smaller, for object stores and keeping; read chunk by chunk.

zarr-python and tensorstore read both. Each shard ends with an index of its chunks (zarr v3 specification); readers of
hot arrays here know where a chunk lies and do not read it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from dataio.checks import UNIT_BYTES, Leaves, unit_checksums
from stoker import canonical
from stoker.errors import Refusal
from stoker.hashing import crc32c

Profile = Literal["hot", "cold"]

#: Offset and length that the sharding codec writes for a chunk that holds nothing.
ABSENT = 2**64 - 1
#: Level 1 to 9 of tokens: 2.3 to 2.6 times smaller; 3 decompresses at 1.1 GB/s (measured 2026-11).
ZSTD_LEVEL = 3
#: Rows of a chunk of a side array: others can read a part of it.
SIDE_CHUNK = 65_536

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}
_ZSTD = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}


@dataclass(frozen=True)
class Grid:
    """An array and how it is cut: `chunk` rows, `shard_chunks` of them in a file. A row is a scalar or `shape[1:]`.

    `unit_rows`: rows of a unit of ``Checks``; None: of `UNIT_BYTES`, or a chunk where that is smaller, or cold.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk: int
    shard_chunks: int
    profile: Profile = "hot"
    unit_rows: int | None = None

    @classmethod
    def side(cls, dtype: str, shape: tuple[int, ...], profile: Profile = "hot") -> Grid:
        """Of an array in one file."""
        chunk = min(SIDE_CHUNK, shape[0])
        return cls(dtype, shape, chunk, -(-shape[0] // chunk), profile)

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        return self.stored.itemsize * int(np.prod(self.shape[1:]))

    @property
    def shard(self) -> int:
        """Rows of a whole shard."""
        return self.chunk * self.shard_chunks

    @property
    def num_shards(self) -> int:
        return -(-self.shape[0] // self.shard)

    @property
    def unit(self) -> int:
        """Rows of a unit of ``Checks``: it divides a chunk, or there is but one chunk."""
        if self.unit_rows is not None:
            return self.unit_rows
        return self.chunk if self.profile == "cold" else min(self.chunk, UNIT_BYTES // self.row_bytes)

    @property
    def num_units(self) -> int:
        stored = (self.num_shards - 1) * self.shard + self.num_chunks(self.num_shards - 1) * self.chunk
        return -(-stored // self.unit)

    def rows(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the one after its last."""
        return shard * self.shard, min((shard + 1) * self.shard, self.shape[0])

    def num_chunks(self, shard: int) -> int:
        low, high = self.rows(shard)
        return -(-(high - low) // self.chunk)

    def key(self, shard: int) -> str:
        """Path of a shard file in the array's folder."""
        return "/".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])

    def metadata(self) -> str:
        """The array's zarr.json."""
        sharding = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [self.chunk, *self.shape[1:]],
                "codecs": [_BYTES] if self.profile == "hot" else [_BYTES, _ZSTD, _CRC],
                "index_codecs": [_BYTES, _CRC],
                "index_location": "end",
            },
        }
        return _metadata(self.shape, self.stored, (self.shard, *self.shape[1:]), [sharding])


def _metadata(shape: tuple[int, ...], dtype: np.dtype[Any], chunk: tuple[int, ...], codecs: list[Any]) -> str:
    return canonical.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": {"b": False, "f": 0.0}.get(dtype.kind, 0),
            "codecs": codecs,
            "attributes": {},
            "storage_transformers": [],
        }
    )


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    size: int
    sha256: str


class _File:
    """A file that is whole under its name, or not there; hashed as it is written."""

    def __init__(self, path: Path, durable: bool) -> None:
        self.path, self.size, self._durable, self._hasher = path, 0, durable, hashlib.sha256()
        self._partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> _File:
        self._file = open(self._partial, "wb")
        return self

    def write(self, part: bytes | memoryview) -> None:
        self._file.write(part)
        self._hasher.update(part)
        self.size += len(part)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None and self._durable:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if kind is not None:
                self._partial.unlink(missing_ok=True)
        if kind is None:
            os.replace(self._partial, self.path)

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.size, self._hasher.hexdigest())


def write_file(path: Path, *parts: bytes | memoryview) -> FileEntry:
    """Write a file. A power loss can take it until it has been synced."""
    with _File(path, durable=False) as file:
        for part in parts:
            file.write(part)
    return file.entry


def raw(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def write_array(folder: Path, array: NDArray[Any]) -> dict[str, FileEntry]:
    """Write a small array (at least one element) as one chunk followed by its CRC32C; its files by path in `folder`."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    key = "/".join(["c", *["0"] * data.ndim])
    metadata = _metadata(data.shape, data.dtype, data.shape, [_BYTES, _CRC])
    return {
        key: write_file(folder / key, raw(data), crc32c(raw(data)).to_bytes(4, "little")),
        "zarr.json": write_file(folder / "zarr.json", metadata.encode()),
    }


def read_array(folder: Path, dtype: Any, shape: tuple[int, ...], verify: bool = True) -> NDArray[Any]:
    """Map what `write_array` wrote; `verify`: compare its checksum, which reads it all."""
    chunk = folder.joinpath("c", *["0"] * len(shape))
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = map_file(chunk, count + 4)
    if verify and crc32c(data[:count]) != int.from_bytes(data[count:].tobytes(), "little"):
        raise Refusal(f"{chunk}: damaged (its checksum is wrong); prepare this store again or restore the file")
    return data[:count].view(dtype).reshape(shape)


def map_file(path: Path, size: int | None = None) -> NDArray[np.uint8]:
    """The bytes of a file, mapped. Refuses one that is missing, or is not of `size`."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: missing or empty ({error}); prepare this store again or restore the file") from None
    if size is not None and len(data) != size:
        raise Refusal(
            f"{path}: damaged ({len(data)} bytes where {size} were written); prepare this store again or restore it"
        )
    # A plain array over the map: numba dispatches on np.memmap, a subclass, some ten microseconds slower.
    return np.asarray(data)


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was written; `units`: CRC32C of each of its units, as they are stored."""

    file: FileEntry
    units: NDArray[np.uint32]


def write_shard(path: Path, grid: Grid, chunks: Iterable[NDArray[Any]], durable: bool = False) -> ShardEntry:
    """Write one shard file of an array, from its chunks: `grid.chunk` rows each, of the last one those there are.

    `durable`: it is on the disk on return, its name once the folder is synced.
    """
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    index = np.full((grid.shard_chunks, 2), ABSENT, "<u8")
    units: list[NDArray[np.uint32]] = []
    with _File(path, durable) as file:
        for number, rows in enumerate(chunks):
            chunk = np.ascontiguousarray(rows, grid.stored)
            if len(chunk) < grid.chunk:
                chunk = np.concatenate((chunk, np.zeros((grid.chunk - len(chunk), *grid.shape[1:]), grid.stored)))
            data = raw(chunk)
            if grid.profile == "cold":
                frame = compressor.compress(data)
                units.append(np.array([crc32c(frame)], np.uint32))
                data = memoryview(frame + crc32c(frame).to_bytes(4, "little"))
            else:
                units.append(unit_checksums(chunk.reshape(-1).view(np.uint8), grid.unit * grid.row_bytes))
            index[number] = file.size, len(data)
            file.write(data)
        file.write(raw(index))
        file.write(crc32c(raw(index)).to_bytes(4, "little"))
    return ShardEntry(file.entry, np.concatenate(units))


def cut(values: NDArray[Any], rows: int) -> Iterator[NDArray[Any]]:
    """Pieces of so many rows; the last may be shorter."""
    for low in range(0, len(values), rows):
        yield values[low : low + rows]


@dataclass(frozen=True)
class Written:
    """An array on disk: its files by path in its folder, CRC32Cs of its units, SHA-256s of its leaves."""

    grid: Grid
    files: dict[str, FileEntry]
    units: NDArray[np.uint32]
    leaves: bytes


class ShardWriter:
    """Writes an array whose length is not known yet: `append` rows, `close`. Memory is bounded by one shard."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        """`grid`: as it will be, of any length."""
        self.folder, self._grid, self.size = folder, grid, 0
        self._shard = np.zeros((grid.shard, *grid.shape[1:]), grid.stored)
        self._filled = 0
        self._files: dict[str, FileEntry] = {}
        self._units: list[NDArray[np.uint32]] = []
        self._leaves = Leaves()

    def append(self, values: NDArray[Any]) -> None:
        while len(values):
            room = values[: len(self._shard) - self._filled]
            self._shard[self._filled : self._filled + len(room)] = room
            self._filled += len(room)
            self.size += len(room)
            values = values[len(room) :]
            if self._filled == len(self._shard):
                self._flush()

    def _flush(self) -> None:
        grid, rows = self._sized(), self._shard[: self._filled]
        number = grid.num_shards - 1
        self._leaves.update(rows)
        entry = write_shard(self.folder / grid.key(number), grid, cut(rows, grid.chunk))
        self._files[grid.key(number)] = entry.file
        self._units.append(entry.units)
        self._filled = 0

    def _sized(self) -> Grid:
        grid = self._grid
        return replace(grid, shape=(self.size, *grid.shape[1:]))

    def close(self) -> Written:
        """Write what is left and the metadata. There must be a row."""
        if self._filled:
            self._flush()
        self._leaves.close()
        return finish_array(self.folder, self._sized(), self._files, self._units, bytes(self._leaves.digests))


def finish_array(
    folder: Path, grid: Grid, files: dict[str, FileEntry], units: list[NDArray[np.uint32]], leaves: bytes
) -> Written:
    """Write the metadata of an array whose shards are there."""
    files = files | {"zarr.json": write_file(folder / "zarr.json", grid.metadata().encode())}
    return Written(grid, files, np.concatenate(units), leaves)


def write_side(folder: Path, grid: Grid, rows: Callable[[int, int], NDArray[Any]]) -> Written:
    """Write an array in one file, chunk by chunk; `rows(low, high)` gives them, each once and in order."""
    leaves = Leaves()

    def chunks() -> Iterator[NDArray[Any]]:
        for low in range(0, grid.shape[0], grid.chunk):
            chunk = np.ascontiguousarray(rows(low, min(low + grid.chunk, grid.shape[0])), grid.stored)
            leaves.update(chunk)
            yield chunk

    entry = write_shard(folder / grid.key(0), grid, chunks())
    leaves.close()
    return finish_array(folder, grid, {grid.key(0): entry.file}, [entry.units], bytes(leaves.digests))
