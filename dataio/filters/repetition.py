"""Words, lines and paragraphs that a text has more than once.

Repeated sequences of n words are found among those whose first and last n - 1 words are repeated, so all lengths
together cost little more than pairs. Sequences are compared exactly, words and lines by hashes of 64 bits.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

#: Lengths of sequences of words: of the most frequent one, and of those that came before (Gopher, table A1).
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)

#: Hashes and characters of words, lines or paragraphs, in the order of the text.
Units = tuple[NDArray[np.uint64], NDArray[np.int32]]
#: A hash table to be used again: places that keys were met at, -1 where a slot is free, and the keys.
Table = tuple[NDArray[np.int32], NDArray[np.uint64]]
Int32s = NDArray[np.int32]
#: An odd number whose multiples have well mixed high bits (2^64 over the golden ratio).
SPREAD = 0x9E3779B97F4A7C15


@numba.njit(inline="always")
def _first_with(key: np.uint64, place: np.int32, keys: NDArray[np.uint64], places: Int32s, bits: int) -> np.int32:
    """The place that a key was first met at: `place` where it is new. A hash table of 2^bits slots, -1 where free."""
    slot = np.int64((key ^ key >> np.uint64(32)) * np.uint64(SPREAD) >> np.uint64(64 - bits))
    while places[slot] >= 0:
        if keys[slot] == key:
            return places[slot]
        slot = (slot + 1) & ((1 << bits) - 1)
    keys[slot], places[slot] = key, place
    return place


@numba.njit(inline="always")
def _cleared(places: Int32s, num_keys: int) -> int:
    """Bits of a hash table that is at most half full of so many keys, made free."""
    bits = 1
    while (1 << bits) < 2 * num_keys:
        bits += 1
    places[: 1 << bits] = -1
    return bits


@numba.njit(nogil=True, cache=True)
def seen_before(units: Units, count: int, table: Table) -> tuple[int, int]:
    """How many units are copies of an earlier one, and their characters."""
    hashes, lengths = units
    places, keys = table
    bits = _cleared(places, count)
    copies = characters = 0
    for i in range(count):
        if _first_with(hashes[i], i, keys, places, bits) != i:
            copies += 1
            characters += lengths[i]
    return copies, characters


@numba.njit(nogil=True, cache=True)
def repeated_words(
    words: Units, count: int, scratch: Int32s, table: Table, top: NDArray[np.int64], duplicate: NDArray[np.int64]
) -> None:
    """Characters of the most frequent sequence of n words, all its occurrences counted (of equally frequent ones the
    longest; 0 where none comes twice), and of the words in sequences that came before."""
    hashes, lengths = words
    places, keys = table
    # `same`: where a word was first met. `first`: where the sequence that begins here was, -1 if it comes but once.
    same, first, times, repeated, sums = scratch
    sums[0] = 0
    bits = _cleared(places, count)
    for i in range(count):
        sums[i + 1] = sums[i] + lengths[i]
        repeated[i], times[i] = i, 0
        same[i] = first[i] = _first_with(hashes[i], np.int32(i), keys, places, bits)
        times[first[i]] += 1
    left = _several(first, times, repeated, count)
    for n in range(2, DUPLICATE_NGRAMS[-1] + 1):
        bits = _cleared(places, left)
        for k in range(left):
            i = repeated[k]
            times[i] = 0
            if i + n > count or first[i + 1] < 0:
                first[i] = -1
                continue
            key = np.uint64(first[i]) << np.uint64(32) | np.uint64(same[i + n - 1])
            first[i] = _first_with(key, np.int32(i), keys, places, bits)
            times[first[i]] += 1
        left = _several(first, times, repeated, left)
        if left and n <= TOP_NGRAMS[-1]:
            top[n - TOP_NGRAMS[0]] = _most_frequent(times, sums, repeated[:left], n)
        elif left:
            duplicate[n - DUPLICATE_NGRAMS[0]] = _covered(first, sums, repeated[:left], n)


@numba.njit(nogil=True, cache=True)
def _several(first: Int32s, times: Int32s, repeated: Int32s, count: int) -> int:
    """Keep of the sequences those that come more than once; returns how many."""
    left = 0
    for k in range(count):
        i = repeated[k]
        if first[i] >= 0 and times[first[i]] > 1:
            repeated[left] = i
            left += 1
        else:
            first[i] = -1
    return left


@numba.njit(nogil=True, cache=True)
def _most_frequent(times: Int32s, sums: Int32s, repeated: Int32s, n: int) -> int:
    most = characters = 0
    for i in repeated:
        length = sums[i + n] - sums[i]
        if times[i] > most or (times[i] == most and length > characters):
            most, characters = times[i], length
    return most * characters


@numba.njit(nogil=True, cache=True)
def _covered(first: Int32s, sums: Int32s, repeated: Int32s, n: int) -> int:
    characters = end = 0
    for i in repeated:
        if first[i] < i:
            characters += sums[i + n] - sums[max(i, end)]
            end = i + n
    return characters
