"""Reading the arrays of a store: ``HotArray`` maps shards, ``ColdArray`` decodes chunks, both check what they touch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import zstandard
from numpy.typing import NDArray

from dataio.checks import Checks
from dataio.shards import Grid, map_file, raw
from stoker.errors import Refusal
from stoker.hashing import crc32c

#: Shards mapped at a time; a map costs a file handle.
OPEN_SHARDS = 256
#: Decoded chunks of a cold array that are kept: 16 MiB of uint16, three times what the blocks of a group need.
DECODED_CHUNKS = 128

_REPAIR = "prepare this store again or restore the file"


class ArrayReader(ABC):
    """Rows of an array, which are sound or refused by name."""

    def __init__(self, folder: Path, grid: Grid, piece_rows: int, pieces: int) -> None:
        """A piece is what lies in memory back to back, `piece_rows` rows; `pieces` of them are kept."""
        self.folder, self.grid = folder, grid
        self.bytes_read = 0  # rows handed out, in bytes: what a rank has read, for tests and reports
        self.bytes_checked = 0  # bytes of files that were read to find them sound
        self._piece_rows = piece_rows
        self._piece = lru_cache(maxsize=pieces)(self._read_piece)

    @abstractmethod
    def _read_piece(self, number: int) -> NDArray[Any]: ...

    @abstractmethod
    def check(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Refuse damage in the rows [starts[j], ends[j])."""

    @abstractmethod
    def whole(self) -> NDArray[Any]:
        """All of an array in one file, sound to the last row."""

    @property
    def unchecked(self) -> NDArray[Any]:
        """As `whole`, where what has not been checked may be damaged."""
        return self.whole()

    @abstractmethod
    def damaged(self, shard: int) -> Iterator[str]:
        """A sentence for everything wrong in one shard file."""

    def rows(self, low: int, high: int) -> NDArray[Any]:
        """The rows [low, high), copied. IndexError outside the array."""
        if not 0 <= low <= high <= self.grid.shape[0]:
            raise IndexError(f"{self.folder}: rows [{low}, {high}) of {self.grid.shape[0]}")
        self.check(np.array([low]), np.array([high]))
        out = np.empty((high - low, *self.grid.shape[1:]), self.grid.dtype)
        for piece in range(low // self._piece_rows, -(-high // self._piece_rows)):
            first = piece * self._piece_rows
            inner = slice(max(low, first), min(high, first + self._piece_rows))
            out[inner.start - low : inner.stop - low] = self._piece(piece)[inner.start - first : inner.stop - first]
        self.bytes_read += out.nbytes
        return out

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """[n, width] int32: row j holds the `lengths[j]` <= width elements from `starts[j]` on, then zeros.

        IndexError outside the array; refuses damage, naming the file.
        """
        ends, size = starts + lengths, self.grid.shape[0]
        if len(starts) and (starts.min() < 0 or ends.max() > size or lengths.min() < 0 or lengths.max() > width):
            raise IndexError(f"{self.folder}: windows outside [0, {size}) or longer than {width}")
        self.check(starts, ends)
        out = np.zeros((len(starts), width), np.int32)
        for piece in _touched(starts, ends, self._piece_rows):
            _copy(self._piece(int(piece)), int(piece) * self._piece_rows, starts, ends, out)
        self.bytes_read += int(lengths.sum()) * self.grid.row_bytes
        return out

    def path(self, shard: int) -> Path:
        return self.folder / self.grid.key(shard)

    def _damage(self, low: int, high: int) -> Refusal:
        """Of the rows [low, high), which lie in one shard."""
        what = "tokens" if self.folder.name == "tokens" else "rows"
        path = self.path(low // self.grid.shard)
        return Refusal(f"{path}: {what} {low} to {min(high, self.grid.shape[0])} are damaged; {_REPAIR}")


class HotArray(ArrayReader):
    """An array in its hot form."""

    def __init__(self, folder: Path, grid: Grid, checks: Callable[[], Checks]) -> None:
        """`checks` is called when they are first needed."""
        super().__init__(folder, grid, piece_rows=grid.shard, pieces=OPEN_SHARDS)
        self._checks, self._all_sound = cache(checks), False

    def _read_piece(self, shard: int) -> NDArray[Any]:
        """The whole chunks of one shard file."""
        grid = self.grid
        data_bytes = grid.num_chunks(shard) * grid.chunk * grid.row_bytes
        data = map_file(self.path(shard), data_bytes + 16 * grid.shard_chunks + 4)
        return data[:data_bytes].view(grid.stored).reshape(-1, *grid.shape[1:])

    def check(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        for unit in self._checks().unverified(starts, ends, self.grid.unit):
            if not self._is_sound(int(unit)):
                raise self._damage(int(unit) * self.grid.unit, (int(unit) + 1) * self.grid.unit)

    def _is_sound(self, unit: int) -> bool:
        shard, start = divmod(unit * self.grid.unit, self.grid.shard)
        data = raw(self._piece(shard)[start : start + self.grid.unit])
        self.bytes_checked += len(data)
        if crc32c(data) != self._checks().expected(unit):
            return False
        self._checks().mark_sound(unit)
        return True

    def whole(self) -> NDArray[Any]:
        if not self._all_sound:
            self.check(np.array([0]), np.array([self.grid.num_units * self.grid.unit]))
            self._all_sound = True
        return self.unchecked

    @property
    def unchecked(self) -> NDArray[Any]:
        assert self.grid.num_shards == 1
        return self._piece(0)[: self.grid.shape[0]]

    def damaged(self, shard: int) -> Iterator[str]:
        self._piece.cache_clear()
        unit = self.grid.unit
        first = shard * (self.grid.shard // unit)
        last = min(first + -(-self.grid.num_chunks(shard) * self.grid.chunk // unit), self.grid.num_units)
        try:
            wrong = [number for number in range(first, last) if not self._is_sound(number)]
        except Refusal as refusal:
            yield str(refusal)
            return
        for low, high in _runs(wrong):
            yield str(self._damage(low * unit, high * unit))


class ColdArray(ArrayReader):
    """An array in its cold form: any rows, at the price of the chunks they lie in.

    One rank that reads all of a group decodes each chunk once. One of 256 decodes 17 bytes for each that it uses
    (measured 2026-11): many ranks train from a hot copy. Side arrays are decoded whole when first used.
    """

    def __init__(self, folder: Path, grid: Grid, checks: Callable[[], Checks]) -> None:
        super().__init__(folder, grid, piece_rows=grid.chunk, pieces=DECODED_CHUNKS)
        self._checks = cache(checks)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def _map(self, shard: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """The bytes of a shard, and its index [shard_chunks, 2]."""
        path, index_bytes = self.path(shard), 16 * self.grid.shard_chunks + 4
        data = map_file(path)
        index = data[-index_bytes:]
        if len(index) < index_bytes or crc32c(index[:-4]) != int.from_bytes(index[-4:].tobytes(), "little"):
            raise Refusal(f"{path}: damaged (its shard index is wrong); {_REPAIR}")
        return data, index[:-4].view("<u8").reshape(-1, 2)

    def _read_piece(self, chunk: int) -> NDArray[Any]:
        grid = self.grid
        shard, number = divmod(chunk, grid.shard_chunks)
        data, index = self._open(shard)
        offset, length = int(index[number, 0]), int(index[number, 1])
        frame = data[offset : offset + length]
        self.bytes_checked += len(frame)
        # The chunk's own checksum would do for damage, but not for a chunk in another's place.
        if len(frame) != length or length < 4 or crc32c(frame[:-4]) != self._checks().expected(chunk):
            raise self._damage(chunk * grid.chunk, (chunk + 1) * grid.chunk)
        plain = zstandard.ZstdDecompressor().decompress(frame[:-4].data, grid.chunk * grid.row_bytes)
        return np.frombuffer(plain, grid.stored).reshape(-1, *grid.shape[1:])

    def check(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Nothing is handed out here that was not checked when it was decoded."""

    @cached_property
    def _all(self) -> NDArray[Any]:
        return self.rows(0, self.grid.shape[0])

    def whole(self) -> NDArray[Any]:
        return self._all

    def damaged(self, shard: int) -> Iterator[str]:
        self._open.cache_clear()
        first = shard * self.grid.shard_chunks
        wrong = []
        for chunk in range(first, first + self.grid.num_chunks(shard)):
            try:
                self._read_piece(chunk)
            except Refusal:
                wrong.append(chunk)
        for low, high in _runs(wrong):
            yield str(self._damage(low * self.grid.chunk, high * self.grid.chunk))


class Loaded(ArrayReader):
    """An array that is in memory, or mapped, and known to be sound: defaults, and side arrays of older stores."""

    def __init__(self, folder: Path, values: NDArray[Any]) -> None:
        super().__init__(folder, Grid(values.dtype.name, values.shape, len(values), 1), len(values), 1)
        self._values = values

    def _read_piece(self, number: int) -> NDArray[Any]:
        return self._values

    def check(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """It was."""

    def whole(self) -> NDArray[Any]:
        return self._values

    def damaged(self, shard: int) -> Iterator[str]:
        return iter(())


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """[low, high) of every run of successive numbers."""
    breaks = np.flatnonzero(np.diff(np.array(numbers, np.int64)) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(np.array(numbers, np.int64), breaks) if len(run)]


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
