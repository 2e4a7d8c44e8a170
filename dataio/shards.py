"""One zarr v3 array whose shard files can be mapped into memory.

A shard is one file of `shard_chunks` inner chunks. Inner chunks are stored as plain little-endian bytes, so they lie
back to back and a shard *is* an array: a window is a memory copy, wherever it starts. zarr-python and tensorstore read
the same files (zarr v3 specification, ``sharding_indexed`` codec). What a checksum codec inside the chunk would have
protected is protected by CRC32Cs kept beside the array and checked when a chunk is first touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from stoker import canonical
from stoker.errors import Refusal
from stoker.hashing import crc32c

#: Shards mapped at a time; a map costs a file handle.
OPEN_SHARDS = 256
#: Offset and length that the sharding codec writes for a chunk that holds nothing.
ABSENT = 2**64 - 1

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


def _metadata(shape: tuple[int, ...], dtype: np.dtype[Any], chunk: tuple[int, ...], codecs: list[Any]) -> str:
    return canonical.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": False if dtype == np.bool_ else 0,
            "codecs": codecs,
            "attributes": {},
            "storage_transformers": [],
        }
    )


def _raw(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _write(path: Path, *parts: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def write_array(folder: Path, array: NDArray[Any]) -> None:
    """Write a side array (any shape, at least one element) as one chunk followed by its CRC32C."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    chunk = folder.joinpath("c", *["0"] * data.ndim)
    chunk.parent.mkdir(parents=True)
    _write(chunk, _raw(data), crc32c(_raw(data)).to_bytes(4, "little"))
    _write(folder / "zarr.json", _metadata(data.shape, data.dtype, data.shape, [_BYTES, _CRC]).encode())


def read_array(folder: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map what `write_array` wrote. Its checksum is verified here, once: 8 bytes per document at about 7 GB/s."""
    chunk = folder.joinpath("c", *["0"] * len(shape))
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        raw = np.memmap(chunk, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise Refusal(f"{chunk}: missing or empty ({error}); prepare this store again") from None
    if len(raw) != count + 4 or crc32c(_raw(raw[:count])) != int.from_bytes(raw[count:].tobytes(), "little"):
        raise Refusal(f"{chunk}: damaged (its checksum or size is wrong); prepare this store again")
    return np.asarray(raw)[:count].view(dtype).reshape(shape)


class ShardWriter:
    """Appends to a one-dimensional array and writes each shard when it is full, so memory is bounded by one shard."""

    def __init__(self, folder: Path, dtype: Any, chunk: int, shard_chunks: int) -> None:
        self.folder, self.dtype, self.chunk, self.shard_chunks = folder, np.dtype(dtype), chunk, shard_chunks
        self.size = 0
        self.checksums: list[int] = []  # CRC32C of every inner chunk
        self._shard = np.zeros(chunk * shard_chunks, self.dtype.newbyteorder("<"))
        self._filled = 0
        (folder / "c").mkdir(parents=True)

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
        number = (self.size - 1) // len(self._shard)
        num_chunks = -(-self._filled // self.chunk)
        self._shard[self._filled :] = 0
        chunks = self._shard.reshape(-1, self.chunk)[:num_chunks]
        self.checksums += [crc32c(_raw(chunk)) for chunk in chunks]
        index = np.full((self.shard_chunks, 2), ABSENT, "<u8")
        index[:num_chunks, 0] = np.arange(num_chunks) * chunks.itemsize * self.chunk
        index[:num_chunks, 1] = chunks.itemsize * self.chunk
        _write(
            self.folder / "c" / str(number),
            _raw(chunks),
            _raw(index),
            crc32c(_raw(index)).to_bytes(4, "little"),
        )
        self._filled = 0

    def close(self) -> None:
        if self._filled:
            self._flush()
        sharding = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [self.chunk],
                "codecs": [_BYTES],
                "index_codecs": [_BYTES, _CRC],
                "index_location": "end",
            },
        }
        metadata = _metadata((self.size,), self.dtype, (self.chunk * self.shard_chunks,), [sharding])
        _write(self.folder / "zarr.json", metadata.encode())


class ShardReader:
    """Random access to an array written by `ShardWriter`; `checksums` are its chunks' CRC32Cs."""

    def __init__(
        self, folder: Path, dtype: Any, size: int, chunk: int, shard_chunks: int, checksums: NDArray[np.uint32]
    ) -> None:
        self.folder, self.dtype, self.size = folder, np.dtype(dtype), size
        self.chunk, self.shard_chunks, self.shard = chunk, shard_chunks, chunk * shard_chunks
        self.bytes_read = 0  # by `gather`: what a rank has read, for tests and reports
        self._checksums = checksums
        self._verified = np.zeros(len(checksums), np.bool_)
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """Rows of `width`: row j holds the `lengths[j]` <= width elements from `starts[j]` on, then zeros.

        IndexError outside the array; refuses a damaged chunk, naming it.
        """
        ends = starts + lengths
        if len(starts) and (starts.min() < 0 or ends.max() > self.size or lengths.min() < 0 or lengths.max() > width):
            raise IndexError(f"{self.folder}: windows outside [0, {self.size}) or longer than {width}")
        out = np.zeros((len(starts), width), np.int32)
        chunks = _touched(starts, ends, self.chunk)
        for chunk in chunks[~self._verified[chunks]]:
            self._verify(int(chunk))
        for shard in _touched(starts, ends, self.shard):
            _copy(self._map(int(shard)), int(shard) * self.shard, starts, ends, out)
        self.bytes_read += int(lengths.sum()) * self.dtype.itemsize
        return out

    def damaged(self, shard: int) -> Iterator[str]:
        """A sentence for everything wrong in one shard."""
        try:
            self._map.cache_clear()
            self._map(shard)
        except Refusal as refusal:
            yield str(refusal)
            return
        for chunk in range(shard * self.shard_chunks, min((shard + 1) * self.shard_chunks, len(self._checksums))):
            try:
                self._verify(chunk)
            except Refusal as refusal:
                yield str(refusal)

    def _verify(self, chunk: int) -> None:
        shard, start = divmod(chunk * self.chunk, self.shard)
        values = self._map(shard)[start : start + self.chunk]
        if crc32c(_raw(values)) != self._checksums[chunk]:
            first = chunk * self.chunk
            raise Refusal(
                f"{self._path(shard)}: chunk {chunk % self.shard_chunks} (tokens {first} to "
                f"{min(first + self.chunk, self.size)}) is damaged; prepare this store again or restore the file"
            )
        self._verified[chunk] = True

    def _path(self, shard: int) -> Path:
        return self.folder / "c" / str(shard)

    def _open(self, shard: int) -> NDArray[Any]:
        """The whole chunks of one shard file, after its index has been checked."""
        path = self._path(shard)
        tokens = min(self.shard, self.size - shard * self.shard)
        num_chunks = -(-tokens // self.chunk)
        chunk_bytes, index_bytes = self.chunk * self.dtype.itemsize, 16 * self.shard_chunks + 4
        try:
            raw = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise Refusal(f"{path}: missing or empty ({error}); prepare this store again") from None
        tail = raw[-index_bytes:].tobytes()
        index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)
        if (
            len(raw) != num_chunks * chunk_bytes + index_bytes
            or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little")
            or not np.array_equal(index[:num_chunks, 0], np.arange(num_chunks) * chunk_bytes)
            or not (index[:num_chunks, 1] == chunk_bytes).all()
        ):
            raise Refusal(f"{path}: damaged (its shard index or size is wrong); prepare this store again")
        # A plain array over the map: numba dispatches on np.memmap, a subclass, some ten microseconds slower.
        return np.asarray(raw)[: num_chunks * chunk_bytes].view(self.dtype.newbyteorder("<"))


@numba.njit(nogil=True, cache=True)
def _touched(starts, ends, unit):  # type: ignore[no-untyped-def]
    """Numbers of the blocks of `unit` elements that the non-empty windows lie in, ascending, each once."""
    numbers = [0 for _ in range(0)]  # typed and empty
    for row in range(len(starts)):
        if ends[row] > starts[row]:
            numbers.extend(range(starts[row] // unit, (ends[row] - 1) // unit + 1))
    return np.unique(np.array(numbers, np.int64))


@numba.njit(nogil=True, cache=True)
def _copy(shard, base, starts, ends, out):  # type: ignore[no-untyped-def]
    """out[j, i] = element starts[j] + i, for every element that lies in `shard`, whose first is element `base`."""
    for row in range(len(starts)):
        low = max(starts[row], base)
        high = min(ends[row], base + len(shard))
        if low < high:
            # Views first: element by element from `shard` into `out`, the compiler does not vectorise (6x slower).
            source, target = shard[low - base : high - base], out[row, low - starts[row] : high - starts[row]]
            for element in range(len(source)):
                target[element] = source[element]
