"""The chunk grid of a tensor, and which part of a chunk lies where on a rank. No torch.

A chunk is a run of whole rows, so it is contiguous in the row-major order of its tensor. The grid depends on the
tensor's shape and item size only: whatever layout wrote a checkpoint, its chunks hold the same bytes.
Chunks at the end of a dim are filled up with zeros to the full chunk shape, as zarr's regular grid wants it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from parallel.planning.layout import Coords, Layout, Shape, Slice

#: No chunk is larger, bytes. Small enough that a boundary chunk is cheap to assemble and to read for a few rows of it,
#: large enough that the seek of a disk (about 5 ms at 200 MB/s: 1 MB) and a line of the manifest do not count.
TARGET_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Grid:
    """A regular grid of chunks of shape ``chunk`` over a tensor of ``shape``; chunks are numbered row-major."""

    shape: Shape
    chunk: Shape

    @classmethod
    def of(cls, shape: Shape, itemsize: int) -> Grid:
        """The grid that a tensor is saved with: the first dim whose rows fit ``TARGET_BYTES`` is cut into equal runs
        of rows, dims before it row by row, dims after it not at all. So the experts of ``[E, F, D]`` are kept whole,
        several to a chunk, or each is cut by itself.

        >>> Grid.of((64, 4096, 1024), 2).chunk, Grid.of((257, 16384), 4).chunk
        ((1, 2048, 1024), (52, 16384))
        """
        if 0 in shape:
            return cls(shape, tuple(max(1, size) for size in shape))
        for dim, size in enumerate(shape):
            row_bytes = itemsize * math.prod(shape[dim + 1 :])
            if row_bytes <= TARGET_BYTES:
                runs = _ceil(size, TARGET_BYTES // row_bytes)
                return cls(shape, (*(1 for _ in shape[:dim]), _ceil(size, runs), *shape[dim + 1 :]))
        return cls(shape, ())

    @cached_property
    def counts(self) -> Shape:
        """Chunks along each dim."""
        return tuple(_ceil(size, chunk) for size, chunk in zip(self.shape, self.chunk, strict=True))

    @property
    def num_chunks(self) -> int:
        return math.prod(self.counts)

    @property
    def chunk_numel(self) -> int:
        """Elements that a chunk stores, its filling included."""
        return math.prod(self.chunk)

    def index(self, number: int) -> Shape:
        """Position of a chunk along each dim."""
        index: list[int] = []
        for count in reversed(self.counts):
            number, i = divmod(number, count)
            index.append(i)
        return tuple(reversed(index))

    def box(self, number: int) -> tuple[Shape, Shape]:
        """The global box (start, stop) that a chunk covers, its filling left out."""
        start = tuple(i * size for i, size in zip(self.index(number), self.chunk, strict=True))
        return start, tuple(min(a + c, s) for a, c, s in zip(start, self.chunk, self.shape, strict=True))

    def valid_numel(self, number: int) -> int:
        """Elements of the tensor in a chunk."""
        start, stop = self.box(number)
        return math.prod(b - a for a, b in zip(start, stop, strict=True))

    def overlapping(self, start: Shape, stop: Shape) -> Iterator[int]:
        """The chunks that meet a global box, ascending."""
        ranges = [range(a // c, _ceil(b, c)) for a, b, c in zip(start, stop, self.chunk, strict=True)]
        for index in product(*ranges):
            number = 0
            for i, count in zip(index, self.counts, strict=True):
                number = number * count + i
            yield number


@dataclass(frozen=True)
class Piece:
    """The intersection of a chunk and a slice that a rank has (``held``), as the index of it inside each."""

    held: Slice
    in_held: tuple[slice, ...]
    in_chunk: tuple[slice, ...]

    @property
    def numel(self) -> int:
        return math.prod(s.stop - s.start for s in self.in_held)

    def of_local(self, flat: np.ndarray) -> np.ndarray:
        """View into a rank's flattened tensor."""
        held = flat[self.held.offset : self.held.offset + self.held.numel].reshape(self.held.shape)
        return _view(held, self.in_held)

    def of_chunk(self, chunk: np.ndarray) -> np.ndarray:
        """View into an array of the chunk's full shape."""
        return _view(chunk, self.in_chunk)


def pieces(layout: Layout, coords: Coords, grid: Grid) -> dict[int, list[Piece]]:
    """What a rank holds of each chunk, by chunk number; chunks of which it holds nothing are left out."""
    found: dict[int, list[Piece]] = {}
    for held in layout.slices(coords):
        for number in grid.overlapping(held.start, held.stop):
            origin, end = grid.box(number)
            start = tuple(map(max, held.start, origin))
            stop = tuple(map(min, held.stop, end))
            piece = Piece(held, _relative(start, stop, held.start), _relative(start, stop, origin))
            found.setdefault(number, []).append(piece)
    return found


def _view(array: np.ndarray, index: tuple[Any, ...]) -> np.ndarray:
    return array[(*index, ...)]  # the ellipsis keeps a view where there are no dims


def _relative(start: Shape, stop: Shape, origin: Shape) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, origin, strict=True))


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
