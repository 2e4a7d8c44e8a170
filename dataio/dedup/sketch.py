"""Signatures whose agreement estimates how alike two texts are: one-permutation MinHash over shingles of words.

A word is a run of letters, digits, ``_`` and everything beyond ASCII, in lower case as far as ASCII goes; a Chinese or
Japanese character is a word. A shingle is five words in a row (all of them where a text has fewer). Every shingle falls
into one of 256 bins by the first bits of its hash, and a bin keeps the least of what falls into it (Li, Owen, Zhang:
One Permutation Hashing, 2012). Empty bins borrow from others in an order that depends on the bin alone (Shrivastava:
Optimal Densification, 2017). So two texts agree in a bin with the probability of their Jaccard similarity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

#: Bins of a signature. Agreement has a standard deviation of sqrt(J (1 - J) / 256): 0.025 at J = 0.8.
NUM_BINS = 256
_BIN_BITS = 8
#: Words of a shingle.
SHINGLE_WORDS = 5
#: Bands of a signature and bins of a band: two texts share one with probability 1 - (1 - J^8)^32, 0.997 at J = 0.8.
NUM_BANDS, BAND_BINS = 32, 8
#: What a bin without a shingle holds while bins are filled, and every bin of a text without a word.
EMPTY = 0xFFFFFFFF

_SEPARATOR, _LETTER, _IDEOGRAPH = 0, 1, 2


def _classes() -> NDArray[np.uint8]:
    """Of a byte: is it between words, in one, or the first of three that are one (U+3000 to U+9FFF)."""
    kinds = np.zeros(256, np.uint8)
    kinds[[*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"]] = _LETTER
    kinds[0x80:] = _LETTER
    kinds[0xE3:0xEA] = _IDEOGRAPH
    return kinds


_CLASS = _classes()
_LOWER = np.array([*bytes(range(256)).lower()], np.uint64)


@numba.njit(inline="always")
def _mix(x: np.uint64) -> np.uint64:
    """A bijection of 64 bits in which every bit of the input moves every bit of the output (Stafford's mix 13)."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _least_by_bin(
    text: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    lower: NDArray[np.uint64],
    least: NDArray[np.uint32],
) -> None:
    words = np.empty(SHINGLE_WORDS, np.uint64)
    prime, spread = np.uint64(0x100000001B3), np.uint64(0x9E3779B97F4A7C15)
    for document in range(len(offsets) - 1):
        bins = least[document]
        count, word, inside = 0, np.uint64(0), False
        position, end = offsets[document], offsets[document + 1]
        while position <= end:
            kind = kinds[text[position]] if position < end else 0
            if kind == 1:
                word = (word ^ lower[text[position]]) * prime
                inside = True
                position += 1
                continue
            complete = 0
            if inside:
                complete = 1
                inside = False
            else:
                position += 1
                if kind == 2:
                    word = np.uint64(text[position - 1])
                    for _ in range(2):
                        if position < end:
                            word = (word ^ np.uint64(text[position])) * prime
                            position += 1
                    complete = 1
            if not complete:
                continue
            # Words in the order of their places in the shingle, the newest last; hashed as one number.
            words[count % SHINGLE_WORDS] = word
            word = np.uint64(0)
            count += 1
            if count >= SHINGLE_WORDS:
                shingle = np.uint64(0)
                for back in range(SHINGLE_WORDS):
                    shingle = (shingle ^ words[(count + back) % SHINGLE_WORDS]) * spread
                _put(bins, shingle)
        if 0 < count < SHINGLE_WORDS:
            shingle = np.uint64(count)
            for first in range(count):
                shingle = (shingle ^ words[first]) * spread
            _put(bins, shingle)


@numba.njit(inline="always")
def _put(bins: NDArray[np.uint32], shingle: np.uint64) -> None:
    hashed = _mix(shingle)
    place, value = hashed >> np.uint64(64 - _BIN_BITS), np.uint32(hashed & np.uint64(0xFFFFFFFE))
    if value < bins[place]:
        bins[place] = value


@numba.njit(nogil=True, cache=True)
def _fill_empty_bins(least: NDArray[np.uint32]) -> None:
    empty = np.uint32(EMPTY)
    for document in range(len(least)):
        bins = least[document]
        filled = 0
        for place in range(NUM_BINS):
            filled += bins[place] != empty
        if filled == 0 or filled == NUM_BINS:
            continue
        own = bins.copy()
        for place in range(NUM_BINS):
            attempt = np.uint64(0)
            at = np.int64(place)
            while own[at] == empty:
                attempt += np.uint64(1)
                draw = _mix(np.uint64(place) * np.uint64(0x9E3779B97F4A7C15) + attempt)
                at = np.int64(draw >> np.uint64(64 - _BIN_BITS))
            bins[place] = own[at]


def signatures(texts: Sequence[bytes]) -> NDArray[np.uint32]:
    """[n, 256] signatures of texts in UTF-8 (any bytes will do). A text without a word has `EMPTY` in every bin.

    >>> a, b = signatures([b"the quick brown fox jumps over dogs", b"The quick, brown fox jumps over DOGS"])
    >>> float((a == b).mean())
    1.0
    """
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    least = np.full((len(texts), NUM_BINS), EMPTY, np.uint32)
    _least_by_bin(np.frombuffer(b"".join(texts), np.uint8), offsets, _CLASS, _LOWER, least)
    _fill_empty_bins(least)
    return least


@numba.njit(nogil=True, cache=True)
def _band_keys(signatures: NDArray[np.uint32], keys: NDArray[np.uint64]) -> None:
    for document in range(len(signatures)):
        for band in range(NUM_BANDS):
            key = np.uint64(band + 1)
            for place in range(band * BAND_BINS, (band + 1) * BAND_BINS):
                key = _mix(key ^ np.uint64(signatures[document, place])) * np.uint64(0x9E3779B97F4A7C15)
            keys[band, document] = key


def band_keys(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """[32, n] hashes of the bands: texts with a key in common are looked at as candidates."""
    keys = np.empty((NUM_BANDS, len(signatures)), np.uint64)
    _band_keys(signatures, keys)
    return keys
