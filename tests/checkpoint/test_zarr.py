"""refs.json: plain zarr-python reads a checkpoint, and its crc32c codec finds a flipped bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from pretrain.checkpoint.chunks import Grid
from pretrain.checkpoint.store import CheckpointStore
from tests.checkpoint.state import global_state, plan
from tests.checkpoint.whole import flip
from tests.checkpoint.world import save


def opened(folder: Path, **options: Any) -> zarr.Group:
    return zarr.open_group("reference://", mode="r", storage_options={"fo": str(folder / "refs.json"), **options})


def read(group: zarr.Group, name: str) -> np.ndarray:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, 5, global_state(), plan(6, tp=3, ep=2))
    return tmp_path / "step_00000005"


def test_zarr_lists_and_reads_every_tensor(folder: Path) -> None:
    group, state = opened(folder), global_state()
    arrays = {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert arrays == state.keys()
    assert group.attrs["step"] == 5
    for name, tensor in state.items():
        bits = tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor
        assert np.array_equal(read(group, name), bits.numpy()), name
        assert group[name].attrs["dtype"] == str(tensor.dtype).removeprefix("torch.")


def test_zarr_reads_a_folder_that_was_moved(folder: Path) -> None:
    moved = folder.parent / "elsewhere"
    shutil.move(folder, moved)
    group = opened(moved, template_overrides={"here": str(moved)})
    assert np.array_equal(read(group, "final_norm.weight"), global_state()["final_norm.weight"].numpy())


def test_zarr_finds_a_flipped_bit(folder: Path) -> None:
    at = CheckpointStore(folder.parent).manifest(5).tensors["final_norm.weight"].chunks[0]
    flip(folder / at.file, at.offset + 3)
    with pytest.raises(ValueError, match=r"[Cc]hecksum"):
        read(opened(folder), "final_norm.weight")


def test_chunks_at_the_end_of_a_dim_are_filled_with_zeros(folder: Path) -> None:
    stored = CheckpointStore(folder.parent).manifest(5).tensors["embed.weight"]
    assert stored.grid == Grid((257, 12), (37, 12))
    last = stored.chunks[-1]
    raw = (folder / last.file).read_bytes()[last.offset :][: stored.chunk_bytes]
    rows = np.frombuffer(raw, np.uint16).reshape(37, 12)
    assert (rows[257 - 6 * 37 :] == 0).all() and (rows[: 257 - 6 * 37] != 0).any()
