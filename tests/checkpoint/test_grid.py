"""The chunk grid: depends on shape and item size only, tiles the tensor in contiguous runs of at most 4 MiB."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.layout import Flat, Layout, Split
from pretrain.checkpoint import chunks
from pretrain.checkpoint.chunks import Grid, pieces

ITEM_SIZES = st.sampled_from([1, 2, 4, 8])
FEW_DIMS = st.lists(st.integers(1, 14), max_size=4).map(tuple)


@given(FEW_DIMS, ITEM_SIZES)
def test_chunks_tile_the_tensor_and_each_is_contiguous_in_it(shape: tuple[int, ...], itemsize: int) -> None:
    grid = Grid.of(shape, itemsize)
    assert grid.chunk_numel * itemsize <= chunks.TARGET_BYTES
    order = np.arange(math.prod(shape)).reshape(shape)
    position = 0
    for number in range(grid.num_chunks):
        start, stop = grid.box(number)
        inside = order[tuple(map(slice, start, stop))].reshape(-1)
        assert inside.size == grid.valid_numel(number) > 0
        assert np.array_equal(inside, np.arange(position, position + inside.size))
        position += inside.size
    assert position == math.prod(shape)


@given(FEW_DIMS, ITEM_SIZES)
def test_filling_is_less_than_a_row_for_each_run_of_rows(shape: tuple[int, ...], itemsize: int) -> None:
    grid = Grid.of(shape, itemsize)
    for size, chunk, count in zip(shape, grid.chunk, grid.counts, strict=True):
        assert 0 <= chunk * count - size < count


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunk"),
    [
        ((64, 512, 1024), 2, (4, 512, 1024)),  # four whole experts of 1 MiB
        ((64, 4096, 4096), 2, (1, 512, 4096)),  # an expert of 32 MiB in eight
        ((3, 5, 4 * 2**20), 4, (1, 1, 2**20)),  # a row of 16 MiB in four
        ((151936, 2048), 2, (1020, 2048)),  # 149 chunks of at most 1024 rows, 44 rows of filling in all
        ((2**20 + 1,), 4, (2**19 + 1,)),
        ((), 8, ()),
        ((0, 7), 4, (1, 7)),
    ],
)
def test_experts_are_kept_whole_or_cut_by_themselves(
    shape: tuple[int, ...], itemsize: int, chunk: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "TARGET_BYTES", 4 * 2**20)
    assert Grid.of(shape, itemsize).chunk == chunk


@given(
    st.integers(1, 70), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9)
)
def test_pieces_of_all_owners_fill_every_chunk_once(
    rows: int, columns: int, tp: int, dp: int, before: int, behind: int
) -> None:
    local = -(-rows // tp) * columns
    flat = Flat("dp", dp, before, -(-(before + local + behind) // dp))
    layout = Layout((rows, columns), (Split(0, "tp", tp),), flat=flat)
    grid = Grid.of((rows, columns), 8)
    whole = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
    filled = [np.full(grid.chunk, -1, np.int64) for _ in range(grid.num_chunks)]
    for t in range(tp):
        padded = np.full((-(-rows // tp) * tp, columns), -2, np.int64)
        padded[:rows] = whole
        mine = padded.reshape(tp, -1)[t]
        for d in range(dp):
            coords = {"tp": t, "cp": 0, "dp": d, "pp": 0, "etp": 0, "ep": 0, "edp": 0}
            shard = mine[max(0, d * flat.shard - before) : max(0, (d + 1) * flat.shard - before)]
            for number, found in pieces(layout, coords, grid).items():
                for piece in found:
                    assert (piece.of_chunk(filled[number]) == -1).all()
                    piece.of_chunk(filled[number])[...] = piece.of_local(shard)
    for number, chunk in enumerate(filled):
        start, stop = grid.box(number)
        inside = whole[tuple(map(slice, start, stop))]
        assert np.array_equal(chunk[tuple(slice(0, n) for n in inside.shape)], inside)
        assert (chunk == -1).sum() == chunk.size - inside.size
