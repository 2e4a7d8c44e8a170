"""Who writes which chunk. Computed by every rank from the same catalog, so nothing has to be agreed on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallel.planning.layout import Coords, Layout
from pretrain.checkpoint.chunks import Grid, Piece, pieces
from pretrain.checkpoint.dtypes import storage_dtype
from stoker.errors import Refusal

#: A rank sends and receives at most this many bytes of chunks at a time.
EXCHANGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint: its logical ``dtype``, and where its shards lie in this run."""

    dtype: str
    layout: Layout

    @property
    def grid(self) -> Grid:
        return Grid.of(self.layout.shape, storage_dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Task:
    """A chunk to be written by ``writer``; ``parts`` are the pieces of it that each rank contributes."""

    tensor: str
    chunk: int
    itemsize: int
    writer: int
    parts: Mapping[int, Sequence[Piece]]

    @property
    def split(self) -> bool:
        return self.parts.keys() != {self.writer}

    def bytes_from(self, rank: int) -> int:
        return self.itemsize * sum(piece.numel for piece in self.parts.get(rank, ()))

    def traffic(self) -> Counter[tuple[str, int]]:
        """Bytes that each (direction, rank) moves for this chunk."""
        sent = Counter({("sends", rank): self.bytes_from(rank) for rank in self.parts if rank != self.writer})
        sent["receives", self.writer] = sum(sent.values())
        return sent


def assign(catalog: Mapping[str, Entry], coords: Sequence[Coords]) -> list[Task]:
    """Every chunk of the catalog with its one writer: the rank that has most of it, then the rank that was given the
    fewest bytes so far. ``coords`` are those of each rank.

    Only owners contribute (``Layout.owner``): of equal replicas one speaks. Raises Refusal for a chunk of which the
    owners do not hold every element once, naming the tensor.
    """
    given = [0] * len(coords)
    tasks = []
    for name, entry in sorted(catalog.items()):
        grid, itemsize = entry.grid, storage_dtype(entry.dtype).itemsize
        held: dict[int, dict[int, list[Piece]]] = {number: {} for number in range(grid.num_chunks)}
        for rank, where in enumerate(coords):
            if entry.layout.owner(where):
                for number, found in pieces(entry.layout, where, grid).items():
                    held[number][rank] = found
        for number, parts in held.items():
            sizes = {rank: sum(piece.numel for piece in found) for rank, found in parts.items()}
            if sum(sizes.values()) != grid.valid_numel(number):
                raise Refusal(
                    f"tensor {name}: the ranks hold {sum(sizes.values())} of {grid.valid_numel(number)} elements of "
                    f"chunk {number}; every rank of the plan must take part in the save, with its own coordinates"
                )
            writer = min(sizes, key=lambda rank: (-sizes[rank], given[rank], rank))
            given[writer] += grid.chunk_numel * itemsize
            tasks.append(Task(name, number, itemsize, writer, parts))
    return tasks


def rounds(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks in order, cut so that in a round no rank sends or receives more than ``EXCHANGE_BYTES``."""
    batch: list[Task] = []
    moved: Counter[tuple[str, int]] = Counter()
    for task in tasks:
        traffic = task.traffic()
        if batch and any(moved[end] + size > EXCHANGE_BYTES for end, size in traffic.items()):
            yield batch
            batch, moved = [], Counter()
        batch.append(task)
        moved += traffic
    if batch:
        yield batch
