"""The emulated thread block: it catches what a GPU may forgive, and its instructions are those of the PTX ISA."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kernels.programs import bfloat16, executable, from_bfloat16, library, pointer

SEEDS = range(4)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return executable("faults.cpp", tmp_path_factory.mktemp("faults"))


def run(program: Path, name: str, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, name, str(seed)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["none", "copy", "product", "bulk"])
def test_a_kernel_without_fault_passes(name: str, faults: Path) -> None:
    for seed in SEEDS:
        done = run(faults, name, seed)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("read too early", "overwrites what was read"),
        ("overwritten too early", "overwrites what was read"),
        ("two writers", "overwrites a value"),
        ("copy without barrier", "reads a value"),
        ("product without barrier", "reads a value"),
        ("bulk without barrier", "overwrites a value"),
        ("bulk overwritten", "writes over a bulk copy"),
        ("bulk without wait", "has not waited for the bulk copy"),
        ("bulk without wait of one", "has not waited for the bulk copy"),
        ("bulk of the other parity", "has not waited for the bulk copy"),
        ("bulk read a phase early", "has not waited for the bulk copy"),
    ],
)
def test_a_missing_barrier_or_wait_is_a_race_in_every_order_of_threads(name: str, said: str, faults: Path) -> None:
    """Whichever of two threads comes first, one of the two accesses is told."""
    outputs = [run(faults, name, seed) for seed in SEEDS]
    assert [done.returncode for done in outputs] == [1] * len(SEEDS)
    assert all("faulty, block (0, 0): thread" in done.stderr for done in outputs)
    assert any(said in done.stderr for done in outputs)


def test_a_box_without_swizzle_is_another_layout(faults: Path) -> None:
    """Of eight rows one lies the same."""
    assert run(faults, "bulk without swizzle", 1).stdout == "56\n"


@pytest.mark.parametrize(
    "name",
    [
        "copy without wait",
        "read under a copy",
        "product without wait",
        "operand overwritten",
        "uninitialised shared",
        "uninitialised local",
    ],
)
def test_what_is_not_there_yet_is_nan(name: str, faults: Path) -> None:
    assert [run(faults, name, seed).stdout for seed in SEEDS] == ["64\n"] * len(SEEDS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("misaligned copy", "a 16-byte copy is not aligned"),
        ("misaligned source", "a 16-byte copy is not aligned"),
        ("outside", "leaves shared memory at byte 5"),
        ("before", "leaves shared memory at byte -4"),
        ("product without fence", "a product reads what its writer has not fenced"),
        ("product without begin", "a warpgroup's product outside warpgroup_begin and warpgroup_end"),
        ("product of another layout", "an operand is not in the 128-byte swizzle"),
        ("product left behind", "products that nobody waited for"),
        ("bulk of more than announced", "waits for 0 threads and -16 bytes"),
        ("bulk of less than announced", "waits for 0 threads and 16 bytes"),
        ("bulk without arrival", "waits for 1 threads and 0 bytes"),
        ("bulk over an unfenced write", "a bulk copy to where a write was not fenced"),
        ("bulk for an unfenced barrier", "a bulk copy for a barrier that was not fenced"),
        ("bulk for no barrier", "a barrier that was never made"),
        ("bulk misaligned", "a box is not aligned to 128 bytes"),
        ("bulk left behind", "bulk copies that nobody waited for"),
        ("barrier of a half", "32 threads wait for others that never come"),
        ("shuffle of a half", "32 threads wait for others that never come"),
    ],
)
def test_what_no_gpu_can_go_on_from_stops_the_run(name: str, said: str, faults: Path) -> None:
    done = run(faults, name, 1)
    assert done.returncode == -6
    assert said in done.stderr


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library("instructions.cpp", tmp_path_factory.mktemp("instructions"))


def test_multiply_add_takes_and_leaves_the_fragments_of_the_ptx_isa(instructions: ctypes.CDLL) -> None:
    """PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16", floating point: element i of a lane with group = lane / 4 and
    member = lane % 4. Whole numbers, so that any order of the sum is exact."""
    generator = np.random.default_rng(0)
    A, B, D = (generator.integers(-9, 10, size).astype(np.float32) for size in ((16, 16), (16, 8), (16, 8)))
    a, b, d = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16), np.zeros((32, 4), np.float32)
    a_bits, b_bits, places = bfloat16(A), bfloat16(B), {}
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = member * 2 + (i & 1) + (8 if i >= 4 else 0)
            a[lane, i] = a_bits[row, column]
        for i in range(4):
            b[lane, i] = b_bits[member * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            places[lane, i] = (group if i < 2 else group + 8, member * 2 + (i & 1))
            d[lane, i] = D[places[lane, i]]
    assert instructions.run_multiply(pointer(a), pointer(b), pointer(d)) == 0
    assert sorted(places.values()) == [(row, column) for row in range(16) for column in range(8)]
    expected = A @ B + D
    assert all(d[lane, i] == expected[place] for (lane, i), place in places.items())


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices_gives_every_lane_the_pair_of_the_ptx_isa(transposed: bool, instructions: ctypes.CDLL) -> None:
    """PTX ISA 9.0, ldmatrix .x4: lane l names row l % 8 of matrix l / 8 and receives, of every matrix, elements
    2 (l % 4) and the next of row l / 4; with .trans of the transposed matrix."""
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    to = np.zeros((32, 4), np.uint32)
    assert instructions.run_load(pointer(matrices), pointer(to), int(transposed)) == 0
    seen = matrices.swapaxes(1, 2) if transposed else matrices
    for lane in range(32):
        first = seen[:, lane // 4, lane % 4 * 2].astype(np.uint32)
        assert np.array_equal(to[lane], first | seen[:, lane // 4, lane % 4 * 2 + 1].astype(np.uint32) << 16)


def test_shuffles_read_the_named_lane(instructions: ctypes.CDLL) -> None:
    values, to = np.arange(32, dtype=np.float32), np.zeros((32, 2), np.float32)
    assert instructions.run_shuffle(pointer(values), pointer(to)) == 0
    assert np.array_equal(to, np.stack((values[::-1], values[np.arange(32) ^ 5]), axis=1))


@pytest.mark.parametrize("valid", [0, 1, 32])
def test_copies_that_are_not_valid_write_zeros(valid: int, instructions: ctypes.CDLL) -> None:
    values, to = np.ones((32, 4), np.float32), np.full((64, 4), np.nan, np.float32)
    assert instructions.run_copy(pointer(values), pointer(to), valid) == 0
    assert np.array_equal(to[:32], np.where(np.arange(32)[:, None] < valid, values, 0))
    assert np.array_equal(to[32:], to[:32])


def test_a_box_is_swizzled_by_128_bytes_and_zero_beyond_the_tensor(instructions: ctypes.CDLL) -> None:
    """PTX ISA 9.0, "Swizzling Modes", 128 bytes: of every eight rows, part p of row r lies where part p ^ r would.
    The tensor has 96 columns and 9 rows in each of 3 planes; whole numbers that name their place."""
    elements = np.arange(3 * 9 * 96, dtype=np.uint16).reshape(3, 9, 96)
    memory = np.zeros(elements.size + 8, np.uint16)
    start = -memory.ctypes.data % 16 // 2
    tensor = memory[start : start + elements.size]
    tensor[:] = elements.ravel()
    for x, y, z in [(0, 0, 0), (64, 3, 1), (32, -5, 2), (0, 1, 3), (-8, 0, -1)]:
        expected = np.zeros((16, 64), np.uint16)
        for r in range(16):
            for c in range(64):
                if 0 <= z < 3 and 0 <= y + r < 9 and 0 <= x + c < 96:
                    expected[r, c] = elements[z, y + r, x + c]
        to = np.zeros((16, 8, 8), np.uint16)
        assert instructions.run_box(pointer(tensor), pointer(to), x, y, z) == 0
        part, row = np.arange(8), np.arange(16)[:, None]
        assert np.array_equal(to[row, part ^ row % 8].reshape(16, 64), expected), (x, y, z)


@pytest.mark.parametrize(
    ("changed", "to"), [("base", 8), ("stride", 24), ("stride", 1 << 40), ("columns", 0), ("rows", 257), ("wide", 128)]
)
def test_a_map_that_the_driver_would_refuse_is_refused(changed: str, to: int, instructions: ctypes.CDLL) -> None:
    """CUDA driver API 13.0, cuTensorMapEncodeTiled."""
    right = {"base": 4096, "columns": 192, "stride": 512, "rows": 64, "wide": 64}
    assert encoded(instructions, right) == 0
    assert encoded(instructions, right | {changed: to}) == -1000002


def encoded(instructions: ctypes.CDLL, map_of: dict[str, int]) -> int:
    return int(instructions.run_encode(*map(ctypes.c_uint64, map_of.values())))


def rounded(instructions: ctypes.CDLL, bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    to = np.zeros(bits.shape, np.uint16)
    instructions.round_all(pointer(bits), pointer(to), ctypes.c_int64(bits.size))
    return to


def test_bfloat16_rounds_as_torch_does(instructions: ctypes.CDLL) -> None:
    """Every bfloat16, each with the low halves where rounding turns, and a million floats of random bits; a NaN stays a
    NaN of the same sign."""
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    turns = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    generator = np.random.default_rng(0)
    bits = np.concatenate(((high | turns).ravel(), generator.integers(0, 1 << 32, 1 << 20, np.uint32)))
    actual = rounded(instructions, bits)
    expected = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.uint16).numpy()
    nan = np.isnan(bits.view(np.float32))
    assert np.array_equal(actual[~nan], expected[~nan])
    assert np.isnan(from_bfloat16(actual[nan])).all()
    assert np.array_equal(actual[nan] >> 15, (bits[nan] >> 31).astype(np.uint16))


def test_every_bfloat16_is_widened_exactly_and_survives_a_round_trip(instructions: ctypes.CDLL) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.zeros(bits.shape, np.float32)
    instructions.widen_all(pointer(bits), pointer(wide), ctypes.c_int64(bits.size))
    assert np.array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)
    quiet = ~np.isnan(wide) | (bits & 0x40 > 0)
    assert np.array_equal(rounded(instructions, wide.view(np.uint32))[quiet], bits[quiet])
