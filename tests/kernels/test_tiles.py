"""What tile programs are made of, against numpy: the operations of both executors, the layouts of tiles and chunks."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import toolchain
from kernels.chunk_size import CHUNK
from kernels.delta_native import slot_shapes
from kernels.toolchain.sources import ISA_FLAGS
from tests.kernels.programs import bfloat16, from_bfloat16, library, pointer

Array = NDArray[Any]


class Arrays(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "x", "out", "tile")),
        ("rows", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("token", ctypes.c_int),
    )


@dataclass(frozen=True)
class Executor:
    """``element`` None: bfloat16. ``admitted``: relative error of a sum of a few thousand numbers."""

    name: str
    element: type[np.floating[Any]] | None
    real: type[np.floating[Any]]
    admitted: float

    def elements(self, x: Array) -> Array:
        return bfloat16(x.astype(np.float32)) if self.element is None else x.astype(self.element)

    def numbers(self, elements: Array) -> Array:
        return from_bfloat16(elements) if self.element is None else elements

    def rounded(self, x: Array) -> Array:
        """To an element, ties to even, for finite numbers."""
        if self.element is not None:
            return x.astype(self.element)
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


EXECUTORS = [
    Executor("block", None, np.float32, 1e-6),
    Executor("warpgroups", None, np.float32, 1e-6),
    Executor("bulk", None, np.float32, 1e-6),
    Executor("bf16", None, np.float32, 1e-6),
    Executor("float", np.float32, np.float32, 1e-6),
    Executor("double", np.float64, np.float64, 1e-14),
]
#: Those that a GPU runs.
BLOCKS = ("block", "warpgroups", "bulk")
executors = pytest.mark.parametrize("executor", EXECUTORS, ids=lambda executor: executor.name)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    of_warps = library("tiles.cpp", tmp_path_factory.mktemp("tiles"))
    of_groups = library("tiles.cpp", tmp_path_factory.mktemp("warpgroups"), "baseline", "STOKER_WARPGROUP")
    bulk = library("tiles.cpp", tmp_path_factory.mktemp("bulk"), "baseline", "STOKER_WARPGROUP", "STOKER_TMA")
    of_warps.run_warpgroups, of_warps.run_bulk = of_groups.run_block, bulk.run_block
    return of_warps


def run(
    tiles: ctypes.CDLL,
    executor: Executor,
    operation: int,
    rows: int = 0,
    seed: int = 5,
    token: int = 0,
    **arrays: Array,
) -> None:
    """``seed``: of the order in which the threads of a block run."""
    params = Arrays(rows=rows, seed=seed, token=token, **{name: pointer(array) for name, array in arrays.items()})
    assert getattr(tiles, f"run_{executor.name}")(operation, ctypes.byref(params)) == 0


def aligned(shape: tuple[int, ...], dtype: Any, fill: float = 0) -> Array:
    """A block copies 16 bytes at a time."""
    dtype = np.dtype(dtype)
    memory = np.zeros(int(np.prod(shape)) * dtype.itemsize + 16, np.uint8)
    start = -memory.ctypes.data % 16
    array = memory[start : len(memory) - 16 + start].view(dtype).reshape(shape)
    array[...] = fill
    return array


def placed(x: Array) -> Array:
    array = aligned(x.shape, x.dtype)
    array[...] = x
    return array


def whole(size: tuple[int, ...], most: int = 8) -> Array:
    """Whole numbers: sums of their products are exact in any order."""
    return np.random.default_rng(0).integers(-most, most + 1, size).astype(np.float64)


def random(size: tuple[int, ...]) -> Array:
    return np.random.default_rng(0).standard_normal(size)


#: Rows, columns and terms of the sum: of every four operations, one for each transposition.
PRODUCTS = [(64, 128, 64), (128, 64, 128), (64, 64, 128), (128, 128, 64)]


@executors
@pytest.mark.parametrize("transposition", range(4))
@pytest.mark.parametrize("size", range(len(PRODUCTS)), ids=[str(size) for size in PRODUCTS])
def test_products_of_every_transposition_are_exact(
    size: int, transposition: int, executor: Executor, tiles: ctypes.CDLL
) -> None:
    """Added to what is there, and alone; both are under way at once."""
    rows, columns, inner = PRODUCTS[size]
    operation = 100 + 4 * size + transposition
    A, B, start = whole((rows, inner)), whole((inner, columns)), whole((rows, columns))
    a = placed(executor.elements(A.T if transposition & 1 else A))
    b = placed(executor.elements(B.T if transposition & 2 else B))
    out = placed(start.astype(executor.real))
    tile = aligned((rows, columns), a.dtype)
    run(tiles, executor, operation, a=a, b=b, out=out, tile=tile)
    assert np.array_equal(out, start + A @ B)
    assert np.array_equal(executor.numbers(tile), executor.rounded(A @ B))


@executors
def test_a_tile_survives_being_handed_over(executor: Executor, tiles: ctypes.CDLL) -> None:
    """By blocks also in pieces of 64 columns, so that kernels may cut the values as they like."""
    values = executor.elements(whole((64, 128)))
    image, tile = aligned((64, 128), values.dtype), aligned((192, 64), values.dtype)
    run(tiles, executor, 7, a=placed(values), out=image, tile=tile)
    assert np.array_equal(tile[:128].reshape(64, 128), values)
    if executor.name in BLOCKS:
        assert np.array_equal(tile[128:], values[:, 64:])


@executors
@pytest.mark.parametrize("rows", [0, 1, 63, 64])
def test_rows_beyond_the_segment_are_zero_and_never_written(rows: int, executor: Executor, tiles: ctypes.CDLL) -> None:
    values = whole((64, 136))
    values[rows:] = np.nan
    out, tile = aligned((64, 128), executor.real), placed(executor.elements(np.full((64, 136), 512.0)))
    run(tiles, executor, 8, rows, a=placed(executor.elements(values)), out=out, tile=tile)
    inside = np.zeros((64, 128))
    inside[:rows] = values[:rows, :128]
    assert np.array_equal(out, inside)
    written = np.full((64, 136), 512.0)
    written[:rows, :128] = executor.rounded(inside * np.arange(64)[:, None])[:rows]
    assert np.array_equal(executor.numbers(tile), written)


@executors
@pytest.mark.parametrize(("token", "rows"), [(0, 1), (0, 63), (0, 64), (17, 64), (36, 64), (37, 63), (98, 1), (99, 1)])
def test_a_chunk_is_the_rows_of_its_own_sequence(token: int, rows: int, executor: Executor, tiles: ctypes.CDLL) -> None:
    """Of packed tokens: what the next sequence has behind them, and what lies beyond the tensor, is zero."""
    packed = np.full((110, 200), np.nan)
    packed[:100, :192] = whole((100, 192))
    expected, other = np.zeros((64, 128)), np.zeros((64, 64))
    expected[:rows] = packed[token : token + rows, 64:192]
    other[:18] = packed[:18, 128:192]
    tile = aligned((192, 64), executor.elements(packed[:1, :1]).dtype)
    a = placed(executor.elements(np.nan_to_num(packed, nan=512.0)))
    run(tiles, executor, 15, rows, token=token, a=a, tile=tile)
    assert np.array_equal(executor.numbers(tile[:128]).reshape(64, 128), expected)
    assert np.array_equal(executor.numbers(tile[128:]), other)


@executors
@pytest.mark.parametrize("rows", [1, 63, 64])
def test_sums_over_an_accumulator_are_those_of_numpy(rows: int, executor: Executor, tiles: ctypes.CDLL) -> None:
    x, a = random((64, 64)).astype(executor.real), whole((64, 64))
    out = aligned((5, 64), executor.real)
    run(tiles, executor, 9, rows, x=placed(x), a=placed(executor.elements(a)), out=out)
    exact = x.astype(np.float64)
    r, j, i = np.ogrid[:64, :64, :64]
    passing = np.einsum("ri,rji->j", exact, ((r >= j) & (j > i)).astype(np.float64))
    running = np.cumsum(np.where(np.arange(64) < rows, exact[0], 0))
    expected = [(exact * a).sum(1), exact.sum(0), np.full(64, (exact * a).sum()), passing, running]
    for actual, sums in zip(out, expected, strict=True):
        assert np.linalg.norm(actual - sums) <= 10 * executor.admitted * np.linalg.norm(sums)


@executors
def test_what_passes_a_token_keeps_its_digits_beside_large_numbers(executor: Executor, tiles: ctypes.CDLL) -> None:
    """Additions only: what large pairs before and after a token leave in a difference would drown it."""
    token = np.arange(64)
    crossing = (token[:, None] >= 29) & (token < 29)
    x = np.tril(np.where(crossing, 1e-6, 1e6) * np.abs(random((64, 64))), -1).astype(executor.real)
    out = aligned((5, 64), executor.real)
    run(tiles, executor, 9, 64, x=placed(x), a=placed(executor.elements(np.ones((64, 64)))), out=out)
    exact = x[crossing].astype(np.float64).sum()
    assert abs(out[3, 29] - exact) <= 10 * executor.admitted * exact


#: What an inverse is made of, below the diagonal: equal keys with beta 1 and less, and systems of random numbers.
SYSTEMS = {
    "identity": np.zeros((64, 64)),
    "equal keys": np.ones((64, 64)),
    "nearly equal keys": np.random.default_rng(0).uniform(0.95, 1, (64, 64)),
    "equal keys, beta 0.99": np.full((64, 64), 0.99),
    "small": 0.1 * random((64, 64)),
    "large": random((64, 64)),
}


@executors
@pytest.mark.parametrize("system", SYSTEMS)
def test_inverse_of_a_unit_lower_triangle_less_the_identity(
    system: str, executor: Executor, tiles: ctypes.CDLL
) -> None:
    """What stands on and above the diagonal is not looked at, NaN included. The error is that of rounding to an element
    and, before it, 2e-5 of the largest number on the block, whose products take operands of two bfloat16."""
    x = np.where(np.tri(64, k=-1) > 0, SYSTEMS[system], np.nan).astype(executor.real)
    tile = placed(executor.elements(np.ones((64, 64))))
    run(tiles, executor, 10, x=placed(x), tile=tile)
    inverse = np.eye(64, dtype=np.longdouble)  # a large system's has numbers up to 1e10 and no digits to spare
    for r in range(64):
        inverse[r] -= x[r, :r].astype(np.longdouble) @ inverse[:r]
    exact = np.tril(inverse, -1).astype(np.float64)
    actual = executor.numbers(tile).astype(np.float64)
    rounding = np.exp2(np.floor(np.log2(np.abs(exact), where=exact != 0, out=np.full_like(exact, -np.inf))) - 8)
    before = np.maximum(np.abs(actual - exact) - (rounding if executor.element is None else 0), 0).max()
    relative = before / max(1.0, np.abs(exact).max())
    print(f"{executor.name}, {system}: {relative:.1e} of the largest number, before rounding")
    assert relative <= (2e-5 if executor.name in BLOCKS else 10 * executor.admitted)
    assert not np.triu(actual).any()


@executors
@pytest.mark.parametrize("rows", [1, 33, 64])
@pytest.mark.parametrize("channels", [64, 128])
def test_decays_and_sums_along_the_tokens_are_those_of_numpy(
    channels: int, rows: int, executor: Executor, tiles: ctypes.CDLL
) -> None:
    g = -np.abs(random((64, channels))).astype(executor.real)
    a = whole((64, channels))
    out = aligned((7, 64, channels), executor.real)
    run(tiles, executor, 11 if channels == 64 else 12, rows, x=placed(g), a=placed(executor.elements(a)), out=out)
    G = np.where(np.arange(64)[:, None] < rows, g.astype(np.float64), 0).cumsum(0)
    sums = a.cumsum(0)
    expected = [np.exp(G), np.exp(G[-1] - G), a, sums[-1] - sums + a, sums - a, 2 * a]
    for actual, exact in zip(out, expected):
        assert np.abs(actual - exact).max() <= 10 * executor.admitted * max(1.0, np.abs(exact).max())
    for actual, exact in ((out[6, 0], np.exp(G[-1])), (out[6, 1, :64], a.sum(1))):
        assert np.abs(actual - exact).max() <= 10 * executor.admitted * max(1.0, np.abs(exact).max())


@pytest.mark.parametrize("executor", [e for e in EXECUTORS if e.name not in BLOCKS], ids=lambda executor: executor.name)
@pytest.mark.parametrize("columns", [64, 128])
def test_half_sums_are_suffixes_in_later_halves_and_what_is_before_in_earlier_ones(
    columns: int, executor: Executor, tiles: ctypes.CDLL
) -> None:
    x = random((64, columns)).astype(executor.real)
    start = random((6, 64, columns)).astype(executor.real)
    out = placed(start)
    run(tiles, executor, 13 if columns == 64 else 14, x=placed(x), out=out)
    j, t = np.ogrid[:64, :64]
    for half, actual, before in zip((32, 16, 8, 4, 2, 1), out, start, strict=True):
        summed = (j // half == t // half) & np.where(j // half % 2, t >= j, t < j)
        sums = before.astype(np.float64) + summed @ x.astype(np.float64)
        assert np.linalg.norm(actual - sums) <= 10 * executor.admitted * np.linalg.norm(sums), half


@pytest.mark.parametrize("operation", range(9, 13))
def test_a_block_gives_the_same_bits_in_whatever_order_its_threads_run(operation: int, tiles: ctypes.CDLL) -> None:
    x, a = random((64, 128)).astype(np.float32), placed(EXECUTORS[0].elements(whole((64, 128))))
    results = []
    for seed in range(1, 7):
        out, tile = aligned((7, 64, 128), np.float32), aligned((64, 64), np.uint16)
        run(tiles, EXECUTORS[0], operation, 64, seed, x=placed(x), a=a, out=out, tile=tile)
        results.append((out.tobytes(), tile.tobytes()))
    assert len(set(results)) == 1


def test_log_decays_are_cut_where_their_factor_is_zero(tiles: ctypes.CDLL) -> None:
    """On the block, whose sums are float: one decay of -1000 costs those after it none of their digits."""
    x = np.full((64, 64), -1e-3, np.float32)
    x[0, 3] = -1000
    sums, a = aligned((5, 64), np.float32), placed(EXECUTORS[0].elements(np.ones((64, 64))))
    run(tiles, EXECUTORS[0], 9, 64, x=placed(x), a=a, out=sums)
    np.testing.assert_allclose(sums[4], np.cumsum([-1e-3, -1e-3, -1e-3, -104, *[-1e-3] * 60]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
def test_a_tile_is_a_permutation_whose_reads_and_writes_never_share_a_bank(
    shape: tuple[int, int], tiles: ctypes.CDLL
) -> None:
    """Shared memory has 32 banks of 4 bytes (CUDA C++ Programming Guide 13.0, compute capability 9.0)."""
    index = np.zeros(shape, np.int32)
    tiles.tile_indices(*shape, pointer(index))
    assert np.array_equal(np.sort(index.ravel()), np.arange(index.size))
    parts = index.reshape(shape[0], -1, 8)
    assert (parts[..., 0] % 8 == 0).all() and (np.diff(parts, axis=2) == 1).all()  # 16 bytes stay together
    words = index[:, ::2] // 2
    for top in range(0, shape[0], 8):
        rows = slice(top, top + 8)
        for part in range(0, shape[1] // 2, 4):  # ldmatrix: 16 bytes of eight rows; fragments: one word of each lane
            assert sorted((words[rows, part : part + 4] % 32).ravel()) == list(range(32))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """For every instruction set that this processor has."""
    order = list(ISA_FLAGS)
    place = tmp_path_factory.mktemp("host")
    return {isa: library("host.cpp", place, isa) for isa in order[: order.index(toolchain.best_isa()) + 1]}


@pytest.fixture(params=list(ISA_FLAGS))
def host(request: pytest.FixtureRequest, hosts: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    if request.param not in hosts:
        pytest.skip(f"this processor has no {request.param}")
    return hosts[request.param]


@pytest.mark.parametrize("transposed", range(4), ids=["ab", "a^T b", "a b^T", "a^T b^T"])
@pytest.mark.parametrize("name", ["float", "double", "bf16"])
def test_host_products_are_exact_in_every_size_and_stride(name: str, transposed: int, host: ctypes.CDLL) -> None:
    executor = next(executor for executor in EXECUTORS if executor.name == name)
    sizes = [(8, 16, 8), (16, 48, 24), (64, 32, 40), *([] if transposed & 2 else [(8, 16, 1), (24, 64, 13)])]
    for rows, columns, inner in sizes:
        A, B, start = whole((rows, inner)), whole((inner, columns)), whole((rows, columns))
        operands = []
        for matrix, turned in ((A, transposed & 1), (B, transposed & 2)):
            stored = matrix.T if turned else matrix
            wide = np.full((stored.shape[0], stored.shape[1] + 3), 99.0)  # rows further apart than they are long
            wide[:, :-3] = stored
            operands.append(executor.elements(wide))
        acc = start.astype(executor.real)
        a, b = operands
        product = host[f"product_{name}"]
        arguments = (pointer(acc), pointer(a), a.shape[1], pointer(b), b.shape[1])
        assert product(transposed, rows, columns, inner, *arguments) == 0
        assert np.array_equal(acc, start + A @ B), (rows, columns, inner)


def test_host_exponential_is_within_four_thirds_of_an_ulp_and_zero_below_the_normal_numbers(host: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    x = np.concatenate((np.linspace(-87.3, 88, 1 << 20), -generator.exponential(1, 1 << 18), [0.0, -0.0, -1e-30]))
    x = x.astype(np.float32)
    x = x[x >= np.float32(-87.3)]
    y = np.zeros_like(x)
    host.exponentials(pointer(x), pointer(y), ctypes.c_int64(x.size))
    exact = np.exp(x.astype(np.float64))
    ulps = np.abs(y - exact) / np.spacing(exact.astype(np.float32))
    print(f"largest error {ulps.max():.3f} ulp")
    assert ulps.max() <= 4 / 3
    assert (y[x == 0] == 1).all()
    low = np.array([-87.4, -104, -1000, -np.finfo(np.float32).max, -np.inf, np.nan], np.float32)
    out = np.ones_like(low)
    host.exponentials(pointer(low), pointer(out), ctypes.c_int64(low.size))
    assert np.array_equal(out, [0, 0, 0, 0, 0, np.nan], equal_nan=True)


def allocated_slots(num_tokens: int, num_segments: int) -> int:
    states, *_ = slot_shapes(1, num_tokens, num_segments, num_v_heads=1, key_dim=1, value_dim=1)
    return states[0]


LENGTH = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 130]), st.integers(0, 400))


@given(st.lists(LENGTH, min_size=1, max_size=40))
def test_chunk_slots_rise_with_the_token_and_are_found_again(hosts: dict[str, ctypes.CDLL], lengths: list[int]) -> None:
    """Against a plain walk over the tokens; the number of slots is what Python allocates."""
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    tokens = int(cu_seqlens[-1])
    walked = [
        (start + at, min(CHUNK, length - at))
        for start, length in zip(cu_seqlens[:-1].tolist(), lengths, strict=True)
        for at in range(0, length, CHUNK)
    ]
    bound = allocated_slots(tokens, len(lengths))
    chunks, found = np.zeros((bound + 1, 3), np.int32), np.full((bound + 1, 3), -7, np.int32)
    assert hosts["baseline"].chunk_rows(pointer(cu_seqlens), len(lengths), pointer(chunks)) == len(walked)
    assert hosts["baseline"].slot_rows(pointer(cu_seqlens), tokens, len(lengths), pointer(found)) == bound
    rows = chunks[: len(walked)].tolist()
    assert [(token, count) for token, count, _ in rows] == walked
    slots = [slot for *_, slot in rows]
    assert slots == sorted(set(slots)) and all(0 <= slot < bound for slot in slots)
    expected = {slot: row for *_, slot in rows for row in rows if row[2] == slot}
    assert found.tolist() == [*(expected.get(slot, [-1, -1, -1]) for slot in range(bound)), [-7, -7, -7]]


def test_thousands_of_segments_have_slots_of_their_own(hosts: dict[str, ctypes.CDLL]) -> None:
    lengths = np.random.default_rng(0).choice([0, 1, 63, 64, 65, 500], 5000)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    bound = allocated_slots(int(cu_seqlens[-1]), len(lengths))
    chunks, found = np.zeros((bound, 3), np.int32), np.zeros((bound, 3), np.int32)
    count = hosts["baseline"].chunk_rows(pointer(cu_seqlens), len(lengths), pointer(chunks))
    assert hosts["baseline"].slot_rows(pointer(cu_seqlens), int(cu_seqlens[-1]), len(lengths), pointer(found)) == bound
    assert count == np.ceil(lengths / CHUNK).sum() and (np.diff(chunks[:count, 2]) > 0).all()
    assert np.array_equal(found[found[:, 2] >= 0], chunks[:count])
