"""P6, P8: whatever layout saves, the same chunks are written; whatever layout loads, it gets its part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.planning.layout import Flat, Layout
from parallel.planning.plan import ParallelPlan
from pretrain.checkpoint import datafile
from pretrain.checkpoint.store import CheckpointStore
from tests.checkpoint.state import (
    EXCHANGE_BYTES,
    Tensors,
    bits_equal,
    global_state,
    layouts,
    part,
    parts,
    plan,
)
from tests.checkpoint.world import load, on_ranks, save

PLANS: list[ParallelPlan] = [
    plan(world, **degrees)
    for world, degrees in [
        (1, {}),
        (2, {"tp": 2, "sequence_parallel": True}),
        (3, {"tp": 3}),
        (4, {"tp": 4}),
        (6, {"tp": 6}),
        (2, {}),
        (3, {}),
        (4, {}),
        (3, {"zero": 0}),
        (2, {"pp": 2}),
        (4, {"pp": 4}),
        (2, {"pp": 2, "vpp": 2}),
        (2, {"ep": 2}),
        (3, {"ep": 3}),
        (4, {"ep": 4, "zero": 0}),
        (6, {"ep": 3}),
        (2, {"tp": 2, "etp": 2}),
        (4, {"tp": 2, "etp": 2, "ep": 2}),
        (4, {"tp": 2, "ep": 2}),
        (4, {"tp": 2, "ep": 4}),
        (4, {"tp": 2, "etp": 2}),
        (4, {"tp": 2, "pp": 2}),
        (4, {"pp": 2, "ep": 2}),
        (4, {"pp": 2}),
        (4, {"tp": 2}),
        (6, {"tp": 3}),
        (6, {"tp": 3, "ep": 2}),
        (6, {"tp": 2, "pp": 3}),
        (6, {"pp": 3, "ep": 2, "zero": 0}),
        (8, {"tp": 2, "pp": 2, "ep": 2}),
        (8, {"tp": 2, "pp": 2, "etp": 2}),
        (8, {"tp": 4, "etp": 4, "ep": 2}),
    ]
]


def describe(plan: ParallelPlan) -> str:
    degrees: dict[str, Any] = {axis: getattr(plan, axis) for axis in ("tp", "pp", "vpp", "ep", "etp", "dp", "zero")}
    return ".".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1 or axis == "zero")


def crcs(root: Path, step: int) -> dict[str, list[int]]:
    tensors = CheckpointStore(root).manifest(step).tensors
    return {name: [at.crc for at in stored.chunks] for name, stored in tensors.items()}


@pytest.fixture(scope="module")
def state() -> Tensors:
    return global_state()


@pytest.fixture(scope="module")
def reference(state: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Chunk CRCs of a save by one process."""
    root = tmp_path_factory.mktemp("reference")
    save(root, 5, state, PLANS[0])
    return crcs(root, 5)


@pytest.mark.parametrize("index", range(len(PLANS)), ids=[describe(plan) for plan in PLANS])
def test_p6_same_chunks_from_every_layout_and_its_part_for_every_layout(
    index: int, state: Tensors, reference: dict[str, list[int]], tmp_path: Path
) -> None:
    saved, loaded = PLANS[index], PLANS[(index + 7) % len(PLANS)]
    save(tmp_path, 5, state, saved)
    assert crcs(tmp_path, 5) == reference

    where = layouts(loaded)
    for rank, (tensors, meta) in enumerate(load(tmp_path, 5, loaded)):
        coords = loaded.coords(rank)
        expected = parts(state, where, coords)
        assert tensors.keys() == expected.keys()
        assert meta == {"step": 5}
        wrong = [name for name in expected if not bits_equal(tensors[name], expected[name])]
        assert wrong == []


def test_a_chunk_is_written_by_one_rank_and_every_rank_writes(state: Tensors, tmp_path: Path) -> None:
    many = plan(4, tp=2, ep=2)
    save(tmp_path, 5, state, many)
    manifest = CheckpointStore(tmp_path).manifest(5)
    assert sorted(manifest.data) == [f"data-{rank:05d}.bin" for rank in range(4)]
    # What dp replicas hold alike their first writes; here that leaves no rank more than twice its fair share.
    assert max(manifest.data.values()) < 2 * sum(manifest.data.values()) / 4


def test_boundary_chunks_are_assembled_in_rounds_of_bounded_size(state: Tensors, tmp_path: Path) -> None:
    wire = save(tmp_path, 5, state, plan(6, tp=3, ep=2))
    assert wire.exchanges > 3
    assert 0 < wire.largest_bytes <= EXCHANGE_BYTES


def test_ranks_that_hold_nothing_of_a_flat_range_may_leave_the_tensor_out(tmp_path: Path) -> None:
    four = plan(4)
    middle = Layout((10,), flat=Flat("dp", 4, offset=70, shard=30))  # all of it on data rank 2
    nothing = Layout((0, 3), flat=Flat("dp", 4, offset=120, shard=30))
    whole = {"middle": torch.arange(10.0), "nothing": torch.zeros(0, 3), "everywhere": torch.arange(3)}
    where = {"middle": middle, "nothing": nothing, "everywhere": Layout((3,))}

    def job(store: CheckpointStore, rank: int) -> int:
        mine = parts(whole, where, four.coords(rank))
        kept = {name: (where[name], t) for name, t in mine.items() if t.numel() or rank == 3}
        store.save(5, kept, {}, four.coords(rank), attempt=1).wait()
        loaded, _ = store.load(5, where, four.coords(rank))
        assert [name for name in mine if not bits_equal(loaded[name], mine[name])] == []
        return loaded["middle"].numel()

    assert on_ranks(tmp_path, 4, job)[0] == [0, 0, 10, 0]


def test_into_fills_given_tensors_and_zeroes_padding(state: Tensors, tmp_path: Path) -> None:
    save(tmp_path, 5, state, PLANS[0])
    many = plan(4, tp=4)
    where, coords = layouts(many), many.coords(3)
    expected = parts(state, where, coords)
    into = {name: torch.ones_like(tensor) for name, tensor in expected.items()}
    # A target that is not contiguous is filled through a copy.
    into["embed.weight"] = torch.ones(12, 65, dtype=torch.bfloat16).T
    tensors, _ = CheckpointStore(tmp_path).load(5, where, coords, into=into)
    assert all(tensors[name] is into[name] for name in into)
    assert [name for name in expected if not bits_equal(into[name].contiguous(), expected[name])] == []
    assert int((part(state["embed.weight"], where["embed.weight"], coords)[-3:] != 0).sum()) == 0  # three padded rows


def test_a_failed_disk_on_one_rank_fails_the_save_on_all_and_leaves_nothing(
    state: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = plan(3, tp=3)
    where = layouts(many)
    save(tmp_path, 4, state, many)

    real = datafile.DataWriter.append

    def full(self: Any, chunk: Any) -> Any:
        if self.bytes > 3000 and self._path.name == "data-00001.bin":
            raise OSError(28, "No space left on device")
        return real(self, chunk)

    monkeypatch.setattr(datafile.DataWriter, "append", full)

    def job(store: CheckpointStore, rank: int) -> str:
        coords = many.coords(rank)
        tensors = {name: (where[name], tensor) for name, tensor in parts(state, where, coords).items()}
        handle = store.save(5, tensors, {}, coords, attempt=1)
        assert handle.poll()
        with pytest.raises(OSError, match="rank 1"):
            handle.wait()
        return str(handle.error)

    errors, _ = on_ranks(tmp_path, 3, job)
    assert all("rank 1: [Errno 28] No space left on device" in error for error in errors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attempt.json", "latest", "step_00000004"]
    assert load(tmp_path, None, many)[2][1] == {"step": 4}
