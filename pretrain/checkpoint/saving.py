"""The collective part of a save: from the tensors of every rank to durable data files and the addresses in them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.planning.layout import Coords, Flat, Layout, Split
from pretrain.checkpoint.assembly import Entry, Task, assign, rounds
from pretrain.checkpoint.datafile import DataWriter
from pretrain.checkpoint.dtypes import storage_dtype
from pretrain.checkpoint.manifest import Address, Stored, data_file, refuse_tensor_name
from pretrain.checkpoint.peers import Peers
from pretrain.checkpoint.shards import Shards, dtype_name
from stoker.errors import Refusal

Tensors = Mapping[str, tuple[Layout, torch.Tensor]]


def entries(tensors: Tensors, coords: Coords) -> dict[str, Entry]:
    """What this rank holds. Raises Refusal for a tensor that is not what its layout says."""
    held = {}
    for name, (layout, tensor) in tensors.items():
        refuse_tensor_name(name)
        if not layout.holds(coords):
            raise Refusal(f"tensor {name}: its layout puts it on pipeline stages {layout.stages}, not {coords['pp']}")
        if tuple(tensor.shape) != (expected := layout.local_shape(coords)):
            raise Refusal(f"tensor {name}: local shape {tuple(tensor.shape)} where its layout has {expected}")
        held[name] = Entry(dtype_name(name, tensor), layout)
    return held


def catalog(peers: Peers, mine: Mapping[str, Entry], coords: Coords) -> tuple[dict[str, Entry], list[dict[str, int]]]:
    """Collective: every tensor of the checkpoint, and the coordinates of every rank.

    Each tensor is announced once, by the owner of its first shard, so the traffic does not grow with the ranks.
    Raises Refusal where ranks disagree about a tensor.
    """
    announced = {
        name: asdict(entry) for name, entry in mine.items() if entry.layout.owner(coords) and _is_first(entry, coords)
    }
    told = peers.gather({"coords": dict(coords), "entries": announced})
    known = {name: _entry(fields) for rank in told for name, fields in rank["entries"].items()}
    with peers.together():
        if (count := sum(len(rank["entries"]) for rank in told)) != len(known):
            raise Refusal(f"{count - len(known)} tensors are announced twice: two ranks have the same coordinates")
        for name, entry in mine.items():
            _refuse_disagreement(name, entry, known.get(name), coords)
    return known, [rank["coords"] for rank in told]


def _is_first(entry: Entry, coords: Coords) -> bool:
    flat = entry.layout.flat
    # Of a flat range, who holds the first element: ranks before it may have nothing of the tensor, and leave it out.
    if flat is not None and coords[flat.axis] != min(flat.offset // flat.shard, flat.parts - 1):
        return False
    return all(coords[split.axis] == 0 for split in entry.layout.splits)


def _entry(fields: Mapping[str, Any]) -> Entry:
    layout = fields["layout"]
    return Entry(
        fields["dtype"],
        Layout(
            tuple(layout["shape"]),
            tuple(Split(**split) for split in layout["splits"]),
            layout["family"],
            tuple(layout["stages"]),
            Flat(**layout["flat"]) if layout["flat"] else None,
            tuple(layout["partial"]),
        ),
    )


def _refuse_disagreement(name: str, mine: Entry, known: Entry | None, coords: Coords) -> None:
    if known is None:
        raise Refusal(f"tensor {name}: the rank that owns its first shard does not save it")
    # Replicas may lie elsewhere (a tied embedding has another place in the buckets of each stage); owners must agree.
    same = (mine.dtype, mine.layout.shape) == (known.dtype, known.layout.shape)
    if not same or (mine.layout.owner(coords) and mine != known):
        raise Refusal(f"tensor {name}: here {mine}, and {known} for the owner of its first shard")


def write_data(
    peers: Peers, folder: Path, known: Mapping[str, Entry], coords: list[dict[str, int]], tensors: Tensors
) -> tuple[dict[str, Stored], dict[str, int]]:
    """Collective: write every chunk once, durably. Returns the tensors as stored and the bytes of each data file.

    Chunks that lie on one rank are written by it straight away; the others are assembled by their writers, in rounds
    of bounded size. Raises OSError on all ranks if a disk fails one of them.
    """
    tasks = assign(known, coords)
    shards = Shards({name: tensor for name, (_, tensor) in tensors.items()})
    writer = DataWriter(folder / data_file(peers.rank))
    written: list[tuple[str, int, int, int]] = []

    def write(batch: Iterable[Task], arrived: Mapping[int, _Parcel]) -> None:
        for task in batch:
            if task.writer == peers.rank:
                at = writer.append(_assemble(task, known[task.tensor], peers.rank, shards, arrived))
                written.append((task.tensor, task.chunk, at.offset, at.crc))

    with peers.together():
        write((task for task in tasks if not task.split), {})
    for batch in rounds([task for task in tasks if task.split]):
        received = peers.exchange(*_parcels(batch, peers.rank, shards))
        with peers.together():
            write(batch, {peer: _Parcel(data) for peer, data in received.items()})
    with peers.together():
        writer.close()
    reports = peers.gather({"bytes": writer.bytes, "written": written})
    return _addressed(known, [report["written"] for report in reports]), {
        data_file(rank): report["bytes"] for rank, report in enumerate(reports) if report["bytes"]
    }


class _Parcel:
    """The pieces that a peer sent in a round, one after another."""

    def __init__(self, data: np.ndarray) -> None:
        self._rest = data

    def take(self, like: np.ndarray) -> np.ndarray:
        """The next piece, of the shape and dtype of ``like``."""
        raw, self._rest = self._rest[: like.nbytes], self._rest[like.nbytes :]
        return raw.view(like.dtype).reshape(like.shape)


def _assemble(task: Task, entry: Entry, rank: int, shards: Shards, arrived: Mapping[int, _Parcel]) -> np.ndarray:
    """A chunk from this rank's tensor and what its peers sent; what no element fills is zero."""
    chunk = np.zeros(entry.grid.chunk, storage_dtype(entry.dtype))
    for peer, parts in task.parts.items():
        for piece in parts:
            place = piece.of_chunk(chunk)
            place[...] = piece.of_local(shards[task.tensor]) if peer == rank else arrived[peer].take(place)
    return chunk


def _parcels(batch: Iterable[Task], rank: int, shards: Shards) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """What ``rank`` sends to each writer, its pieces one after another, and the bytes that it gets from each peer."""
    outgoing: dict[int, list[np.ndarray]] = defaultdict(list)
    incoming: Counter[int] = Counter()
    for task in batch:
        if task.writer == rank:
            incoming.update({peer: task.bytes_from(peer) for peer in task.parts if peer != rank})
        else:
            for piece in task.parts.get(rank, ()):
                part = np.ascontiguousarray(piece.of_local(shards[task.tensor]))
                outgoing[task.writer].append(part.reshape(-1).view(np.uint8))
    return {peer: np.concatenate(parts) for peer, parts in outgoing.items()}, dict(incoming)


def _addressed(known: Mapping[str, Entry], written: list[list[tuple[str, int, int, int]]]) -> dict[str, Stored]:
    at = {
        (tensor, chunk): Address(data_file(rank), offset, crc)
        for rank, lines in enumerate(written)
        for tensor, chunk, offset, crc in lines
    }
    return {
        name: Stored(entry.dtype, entry.grid, tuple(at[name, chunk] for chunk in range(entry.grid.num_chunks)))
        for name, entry in known.items()
    }
