"""P2: a first value is a function of (seed, global name, global index) only."""

from __future__ import annotations

import hashlib
import math
import time
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.layout import Slice
from pretrain.initialise import CUT, initialise, values
from pretrain.model.sharding import layouts
from pretrain.spec import Init
from tests.parity.specs import HYBRID, ONE, plan

NORMAL = Init("normal", 0.02)
KINDS = [
    NORMAL,
    Init("uniform", -0.5, 0.25),
    Init("constant", 3.0),
    Init("log_uniform", 1.0, 16.0),
    Init("inverse_softplus", 1e-3, 1e-1),
]


def box(start: tuple[int, ...], stop: tuple[int, ...]) -> Slice:
    return Slice(start, stop, 0)


def whole(init: Init, shape: tuple[int, ...], seed: int = 7, name: str = "layers.0.mixer.q.weight") -> np.ndarray:
    return values(init, seed, name, shape, box((0,) * len(shape), shape)).reshape(shape)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Slice]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return shape, box(start, tuple(draw(st.integers(a + 1, size)) for a, size in zip(start, shape, strict=True)))


@given(boxes(), st.sampled_from(KINDS))
def test_p2_any_slice_is_the_slice_of_the_whole(case: tuple[tuple[int, ...], Slice], init: Init) -> None:
    shape, piece = case
    index = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
    made = values(init, 7, "layers.0.mixer.q.weight", shape, piece)
    np.testing.assert_array_equal(made.reshape(piece.shape), whole(init, shape)[index])


@pytest.mark.parametrize("degrees", [{"tp": 2, "etp": 2}, {"tp": 3}, {"ep": 6}, {"tp": 2, "pp": 2, "ep": 2}])
def test_p2_every_rank_of_a_layout_starts_with_its_part_of_the_same_tensors(degrees: dict[str, int]) -> None:
    layout = plan(12, **degrees)
    one, cut = layouts(HYBRID, ONE), layouts(HYBRID, layout)
    poison = {name: torch.full(one[name].shape, math.nan) for name in one}
    initialise(HYBRID, poison, one, ONE.coords(0), seed=5)
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        local = {name: torch.full(cut[name].allocated_shape, math.nan) for name in cut if cut[name].holds(coords)}
        initialise(HYBRID, local, cut, coords, seed=5)
        for name, tensor in local.items():
            flat, valid = tensor.flatten(), 0
            for piece in cut[name].slices(coords):
                index = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
                found = flat[piece.offset : piece.offset + piece.numel].view(piece.shape)
                assert torch.equal(found, poison[name][index]), f"rank {rank}: {name}"
                valid += piece.numel
            assert int((flat == 0).sum()) >= flat.numel() - valid, f"rank {rank}: padding of {name} is not zero"


def splitmix64(key: int, index: int) -> int:
    """Output ``index`` of SplitMix64 seeded with ``key``, in Python's integers: the state is advanced by the golden
    gamma before it is mixed (Steele, Lea, Flood 2014, figure 13)."""
    mask = (1 << 64) - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_reimplementation_is_splitmix64() -> None:
    # Output of the published C code (prng.di.unimi.it/splitmix64.c) for the seed 1234567.
    assert [splitmix64(1234567, index) for index in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("index", [0, 1, 63, 64, 65, 500, 2**40 + 17, 2**63 + 1])
def test_p2_a_value_is_that_of_the_published_generator(index: int) -> None:
    name, shape = "embed.weight", (2**32, 2**32)
    row, column = divmod(index, 2**32)
    (found,) = values(NORMAL, 11, name, shape, box((row, column), (row + 1, column + 1)))
    key = int.from_bytes(hashlib.sha256(f"stoker.initialise/11/{name}".encode()).digest()[:8], "little")
    u = ((splitmix64(key, index) >> 11) + 0.5) / 2**53
    low = NormalDist().cdf(-CUT)
    assert found == pytest.approx(0.02 * NormalDist().inv_cdf(low + (1 - 2 * low) * u), rel=1e-9, abs=1e-15)


def test_p2_four_mebibytes_of_a_tensor_of_a_terabyte_take_less_than_a_second() -> None:
    shape = (2**19, 2**19)  # 2^38 elements of 4 bytes
    values(NORMAL, 1, "warm", (2,), box((0,), (2,)))
    start = time.perf_counter()
    made = values(NORMAL, 1, "layers.9.ffn.up.weight", shape, box((77, 1000), (78, 1000 + 2**18)))
    made = np.append(made, values(NORMAL, 1, "layers.9.ffn.up.weight", shape, box((400_000, 0), (400_768, 1024))))
    assert made.size == 2**20
    assert time.perf_counter() - start < 1.0


def test_p2_normal_values_have_mean_zero_their_deviation_and_a_cut_at_three() -> None:
    drawn = whole(NORMAL, (1000, 1000)) / 0.02
    density = math.exp(-(CUT**2) / 2) / math.sqrt(2 * math.pi)
    deviation = math.sqrt(1 - 2 * CUT * density / math.erf(CUT / math.sqrt(2)))  # of a normal cut at +-CUT
    assert abs(drawn.mean()) < 5e-3
    assert drawn.std() == pytest.approx(deviation, rel=3e-3)
    assert 2.99 < np.abs(drawn).max() <= CUT
    within_one = math.erf(1 / math.sqrt(2)) / math.erf(CUT / math.sqrt(2))
    assert (np.abs(drawn) < 1).mean() == pytest.approx(within_one, abs=2e-3)


def test_p2_the_other_distributions_are_what_the_spec_says() -> None:
    uniform, log_uniform, dt = (whole(init, (100_000,)) for init in (KINDS[1], KINDS[3], KINDS[4]))
    assert -0.5 < uniform.min() < -0.4999
    assert 0.2499 < uniform.max() < 0.25
    assert np.exp(log_uniform).mean() == pytest.approx(8.5, rel=1e-2)
    assert log_uniform.min() > 0.0
    assert log_uniform.max() < math.log(16)
    steps = np.log1p(np.exp(dt))  # softplus brings back exp of a uniform between the logarithms
    assert 1e-3 < steps.min() < steps.max() < 1e-1
    assert np.log(steps).mean() == pytest.approx(math.log(1e-2), rel=1e-2)


@pytest.mark.parametrize("other", [(8, "a"), (7, "b"), (7 + 2**32, "a")])
def test_p2_another_seed_or_name_gives_uncorrelated_values(other: tuple[int, str]) -> None:
    first = whole(NORMAL, (200_000,), 7, "a")
    second = whole(NORMAL, (200_000,), *other)
    lagged = max(abs(np.corrcoef(first[lag:], second[: len(second) - lag])[0, 1]) for lag in (0, 1, 64))
    assert lagged < 5 / math.sqrt(200_000)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / math.sqrt(200_000)
