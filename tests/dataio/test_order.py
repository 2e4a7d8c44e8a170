"""The order of a source: keyed, invertible, every input once an epoch, also where the sequence length changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio import order
from dataio.order import Cursor, Order, Walk
from stoker.errors import Refusal

MASK = 2**64 - 1


def mix(state: int) -> int:
    """SplitMix64's finaliser in integers without bounds: the oracle of the compiled one."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def reference_permutation(value: int, size: int, key: int) -> int:
    """The bijection of ``order.permute`` by its definition."""
    gamma = 0x9E3779B97F4A7C15
    L = next(n for n in range(1, size + 1) if n * n >= size)
    S = -(-size // L)
    while True:
        left, right = divmod(value, S)
        for turn in range(order.ROUNDS):
            salt = (key + gamma * (turn + 1)) & MASK
            if turn % 2:
                right = (right + mix(salt ^ mix((left + gamma) & MASK)) % S) % S
            else:
                left = (left + mix(salt ^ mix((right + gamma) & MASK)) % L) % L
        value = left * S + right
        if value < size:
            return value


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 257, 500, 1021])
def test_the_permutation_is_a_bijection_with_an_inverse_and_equals_its_definition(size: int) -> None:
    key = order.key("test", size)
    every = np.arange(size)
    image = order.permute(every, size, key)
    assert sorted(image) == every.tolist()
    np.testing.assert_array_equal(order.invert(image, size, key), every)
    assert image.tolist() == [reference_permutation(value, size, key) for value in range(size)]


def test_permutations_of_a_large_source_scatter_neighbours() -> None:
    size = 10**12 + 39
    first = np.random.default_rng(0).integers(0, size - 1, 20_000)
    key = order.key("scatter")
    image, after = order.permute(first, size, key), order.permute(first + 1, size, key)
    np.testing.assert_array_equal(order.invert(image, size, key), first)
    assert abs(np.corrcoef(image, after)[0, 1]) < 0.03  # 4 standard errors of 20,000 independent pairs
    counts = np.histogram(image, bins=16, range=(0, size))[0]
    assert ((counts - 1250) ** 2 / 1250).sum() < 45  # chi-square, 15 degrees of freedom: p = 1e-4


def test_small_permutations_are_all_reached_about_equally() -> None:
    keys = [order.key("small", k) for k in range(12_000)]
    counts: dict[tuple[int, ...], int] = {}
    for key in keys:
        image = tuple(order.permute(np.arange(4), 4, key).tolist())
        counts[image] = counts.get(image, 0) + 1
    assert len(counts) == 24
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 70  # chi-square, 23 degrees: p < 1e-6


def inputs(windows: tuple[np.ndarray, ...], epoch: int) -> list[int]:
    """The input positions that windows read in an epoch, in order."""
    return [p for e, start, length in zip(*windows) if e == epoch for p in range(start, start + length)]


DIVISORS = (1, 2, 3, 4, 6, 8, 12, 24)


@given(num_tokens=st.integers(2, 400), seq_len=st.sampled_from(DIVISORS), group_blocks=st.integers(1, 5))
def test_p1_every_token_but_the_first_is_a_target_exactly_once_an_epoch(
    num_tokens: int, seq_len: int, group_blocks: int
) -> None:
    walk = Walk(Order("s", num_tokens, 5, block_tokens=24, group_blocks=group_blocks), seq_len)
    windows = walk.windows(0, num_tokens + 1)
    assert sorted(inputs(windows, epoch=0)) == list(range(num_tokens - 1))
    for window, (_, start, length) in enumerate(zip(*windows)):
        assert 1 <= length <= seq_len
        assert start // 24 == (start + length - 1) // 24, f"window {window} crosses a block"
    assert np.all(np.diff(windows[0]) >= 0)


def test_the_tail_of_a_source_is_a_short_block_and_costs_one_short_window() -> None:
    walk = Walk(Order("s", 24 * 4 + 17 + 1, 5, block_tokens=24, group_blocks=2), seq_len=8)
    epoch, start, length = walk.windows(0, 4 * 3 + 3)
    assert set(epoch) == {0} and walk.windows(15, 16)[0][0] == 1
    assert sorted(length.tolist()) == [1] + [8] * 14
    assert start[length == 1] == 24 * 4 + 16


@given(data=st.data(), num_tokens=st.integers(2, 500), group_blocks=st.integers(1, 4))
def test_p6_windows_are_the_same_asked_for_in_any_pieces(
    data: st.DataObject, num_tokens: int, group_blocks: int
) -> None:
    source = Order("s", num_tokens, 1, 24, group_blocks)
    begun = Walk(source, 4).advance(data.draw(st.integers(0, 99)))
    walk = Walk(source, data.draw(st.sampled_from(DIVISORS)), begun)
    whole = walk.windows(0, 60)
    cuts = sorted({0, 60, *data.draw(st.lists(st.integers(0, 60), max_size=4))})
    pieces = [walk.windows(low, high) for low, high in itertools.pairwise(cuts)]
    for array, parts in zip(whole, zip(*pieces)):
        np.testing.assert_array_equal(array, np.concatenate(parts))


@given(
    num_tokens=st.integers(2, 400),
    group_blocks=st.integers(1, 5),
    changes=st.lists(st.tuples(st.sampled_from(DIVISORS), st.integers(0, 60)), min_size=1, max_size=6),
)
def test_p6_a_change_of_sequence_length_anywhere_neither_repeats_nor_skips(
    num_tokens: int, group_blocks: int, changes: list[tuple[int, int]]
) -> None:
    source = Order("s", num_tokens, 9, block_tokens=24, group_blocks=group_blocks)
    cursor, read = Cursor(), []
    for seq_len, count in [*changes, (4, num_tokens)]:
        walk = Walk(source, seq_len, cursor)
        windows = walk.windows(0, count)
        read += [(int(e), p) for e, s, n in zip(*windows) for p in range(s, s + n)]
        cursor = walk.advance(count)
        assert source.epochs(cursor) == pytest.approx(len(read) / source.num_inputs)
    assert len(set(read)) == len(read), "a token was repeated"
    last = max(epoch for epoch, _ in read)
    missing = {(e, p) for e in range(last) for p in range(num_tokens - 1)} - set(read)
    assert not missing, "a token was skipped"


@given(num_tokens=st.integers(2, 300), seq_len=st.sampled_from(DIVISORS), begun=st.integers(0, 100))
def test_the_window_of_a_token_is_found_without_searching(num_tokens: int, seq_len: int, begun: int) -> None:
    source = Order("s", num_tokens, 3, block_tokens=24, group_blocks=3)
    first = Walk(source, 6)
    walk = Walk(source, seq_len, first.advance(begun))
    before = {(int(e), p) for e, s, n in zip(*first.windows(0, begun)) for p in range(s, s + n)}
    epoch = walk.cursor.epoch
    for position in range(num_tokens - 1):
        window = walk.locate(epoch, position)
        assert (window is None) == ((epoch, position) in before)
        if window is not None:
            (found,), (start,), (length,) = walk.windows(window, window + 1)
            assert found == epoch and start <= position < start + length


def test_epochs_seeds_and_sources_have_orders_of_their_own() -> None:
    def starts(name: str, seed: int, first: int) -> list[int]:
        return Walk(Order(name, 24 * 40 + 1, seed, 24, 8), 24).windows(first, first + 40)[1].tolist()

    orders = [starts("a", 0, 0), starts("a", 0, 40), starts("a", 1, 0), starts("b", 0, 0)]
    assert len({tuple(o) for o in orders}) == 4 and all(sorted(o) == sorted(orders[0]) for o in orders)
    assert starts("a", 0, 0) == orders[0]


def test_a_sequence_length_that_does_not_divide_the_block_is_refused_with_the_nearest() -> None:
    with pytest.raises(Refusal, match="4096 and 8192"):
        Walk(Order("s", 10**6, 0), 5000)


def test_random_access_far_into_a_trillion_tokens_is_immediate() -> None:
    walk = Walk(Order("s", 10**12, 0), 4096)
    far = 2 * 10**12 // 4096 + 12345
    epoch, start, length = walk.windows(far, far + 3)
    assert epoch.tolist() == [2, 2, 2] and length.tolist() == [4096] * 3
    assert walk.locate(2, int(start[1]) + 17) == far + 1
