"""Ranks as threads of this process, so that a layout of eight ranks costs milliseconds; gloo has tests of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from parallel.planning.plan import ParallelPlan
from pretrain.checkpoint.peers import Peers
from pretrain.checkpoint.store import CheckpointStore
from stoker import canonical
from tests.checkpoint.state import Tensors, layouts, parts

_WAIT_S = 30.0


class Wire:
    """What the threads of one world share."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=_WAIT_S)
        self.values: list[Any] = [None] * size
        self.largest_bytes = 0
        self.exchanges = 0


class ThreadPeers(Peers):
    def __init__(self, wire: Wire, rank: int, size: int) -> None:
        super().__init__(None)
        self.rank, self.size, self._wire = rank, size, wire

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._share(canonical.dumps(value, allow_nan=True))]

    def exchange(self, outgoing: Mapping[int, np.ndarray], incoming: Mapping[int, int]) -> dict[int, np.ndarray]:
        told = self._share(outgoing)
        arrived = {rank: parcels[self.rank] for rank, parcels in enumerate(told) if self.rank in parcels}
        assert {rank: parcel.nbytes for rank, parcel in arrived.items()} == dict(incoming)
        moved = max(sum(p.nbytes for p in outgoing.values()), sum(incoming.values()))
        self._wire.largest_bytes = max(self._wire.largest_bytes, moved)
        self._wire.exchanges += self.rank == 0
        return arrived

    def _share(self, value: Any) -> list[Any]:
        self._wire.values[self.rank] = value
        self._wire.barrier.wait()
        values = list(self._wire.values)
        self._wire.barrier.wait()
        return values


def on_ranks(root: Path, size: int, job: Callable[[CheckpointStore, int], Any]) -> tuple[list[Any], Wire]:
    """``job(store, rank)`` on every rank at once; results by rank, or the exception of the lowest rank that raised."""
    wire = Wire(size)

    def run(rank: int) -> Any:
        store = CheckpointStore(root)
        store._peers = ThreadPeers(wire, rank, size)
        return job(store, rank)

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run, rank) for rank in range(size)]
        return [future.result() for future in futures], wire


def save(root: Path, step: int, state: Tensors, plan: ParallelPlan, attempt: int = 1, **extra: Any) -> Wire:
    """Save a global state under a plan. Padding is poison: none of it may reach a chunk."""
    where = layouts(plan)

    def job(store: CheckpointStore, rank: int) -> None:
        coords = plan.coords(rank)
        mine = parts(state, where, coords, padding=1)
        tensors = {name: (where[name], tensor) for name, tensor in mine.items()}
        store.save(step, tensors, extra.get("meta", {"step": step}), coords, attempt, extra.get("files")).wait()

    return on_ranks(root, plan.world_size, job)[1]


def load(root: Path, step: int | None, plan: ParallelPlan) -> list[tuple[Tensors, dict[str, Any]]]:
    """What every rank of a plan loads."""
    where = layouts(plan)
    return on_ranks(root, plan.world_size, lambda store, rank: store.load(step, where, plan.coords(rank)))[0]
