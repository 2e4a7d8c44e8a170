"""Texts as those stages read them that compare passages: bytes without copies, and the words in them."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

#: Letters of scripts that set no spaces, each a word of its own: Thai and Lao, Burmese, Khmer, kana and bopomofo, Han.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x31FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))
_SEPARATOR, _LETTER, _WORD, _MARK = 0, 1, 2, 3


def alive_texts(column: pa.ChunkedArray, alive: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bytes of the alive texts of a row group, one after another, and the bounds of all, a dead one's empty."""
    kept = pa.concat_arrays(column.filter(pa.array(alive)).chunks or [pa.array([], pa.string())])
    bounds = np.zeros(len(alive) + 1, np.int64)
    if len(kept) == 0:
        return np.empty(0, np.uint8), bounds
    _, offsets, content = kept.buffers()
    edges = np.frombuffer(offsets, np.int32)[kept.offset : kept.offset + len(kept) + 1]
    bounds[1:][alive] = np.diff(edges)
    text = np.frombuffer(content, np.uint8) if content else np.empty(0, np.uint8)
    return text[edges[0] : edges[-1]], np.cumsum(bounds)


class Words(NamedTuple):
    """Of several texts, in order. Word i stands at bytes [starts[i], stops[i]); text t has those between `bounds`."""

    hashes: NDArray[np.uint64]
    starts: NDArray[np.int32]
    stops: NDArray[np.int32]
    bounds: NDArray[np.int64]


def words_of(text: NDArray[np.uint8], bounds: NDArray[np.int64]) -> Words:
    """Words of texts in UTF-8, which lie between `bounds`, with hashes that differ only where the words do.

    A word is a run of letters and digits; case, accents and compatibility forms make no difference, and what is neither
    letter nor digit only parts words, ``_`` too. Of scripts without spaces every letter is a word.

    >>> one, other = "Foo_bar(2.5)", "foo  BAR 2, 5"
    >>> both = np.frombuffer((one + other).encode(), np.uint8)
    >>> words = words_of(both, np.array([0, len(one), len(one + other)])).hashes
    >>> words[:4].tolist() == words[4:].tolist()
    True
    """
    kinds, folded = _tables()
    hashes = np.empty(len(text) + 1, np.uint64)  # what is not written to takes no memory
    places = np.empty((2, len(text) + 1), np.int32)
    edges = np.zeros(len(bounds), np.int64)
    count = _split(text, bounds, kinds, folded, hashes, places[0], places[1], edges)
    return Words(hashes[:count].copy(), places[0, :count].copy(), places[1, :count].copy(), edges)


@cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Of every character up to U+FFFF what it is, and what it is folded to."""
    kinds, folded = np.zeros(1 << 16, np.uint8), np.arange(1 << 16, dtype=np.uint16)
    for code in range(1 << 16):
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] == "M":
            kinds[code] = _MARK
        elif category[0] in "LN":
            kinds[code] = _LETTER
            first, *rest = [*unicodedata.normalize("NFKD", character)]
            # A letter with accents is the letter; what stands for several, as a Korean syllable does, is itself.
            if not any(unicodedata.category(other)[0] in "LN" for other in rest):
                character = first
            lower = character.casefold()
            if len(lower) == 1 and ord(lower) < 1 << 16:
                folded[code] = ord(lower)
    for low, high in _UNSPACED:
        here = kinds[low : high + 1]
        here[here == _LETTER] = _WORD
    return kinds, folded


@numba.njit(nogil=True, cache=True)
def _split(
    text: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    folded: NDArray[np.uint16],
    hashes: NDArray[np.uint64],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    edges: NDArray[np.int64],
) -> int:
    count = 0
    for number in range(len(bounds) - 1):
        at, end = bounds[number], bounds[number + 1]
        word, inside = np.uint64(0), False
        while at < end:
            code, size = np.int64(text[at]), 1
            if code >= 0x80:
                size = 2 if code < 0xE0 else 3 if code < 0xF0 else 4
                code &= 0x7F >> size
                for k in range(at + 1, min(at + size, end)):
                    code = code << 6 | np.int64(text[k]) & 0x3F
            kind = np.int64(kinds[code]) if code < 1 << 16 else _beyond(code)
            if inside and kind in (_SEPARATOR, _WORD):
                hashes[count - 1] = _mix(word)
                inside = False
            if kind in (_LETTER, _WORD):
                letter = np.uint64(folded[code]) if code < 1 << 16 else np.uint64(code)
                if not inside:
                    word = np.uint64(0)
                    starts[count] = at
                    count += 1
                word = (word ^ (letter + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
                word ^= word >> np.uint64(32)
                stops[count - 1] = at + size
                inside = kind == _LETTER
                if kind == _WORD:
                    hashes[count - 1] = _mix(word)
            elif kind == _MARK and inside:
                stops[count - 1] = at + size
            at += size
        if inside:
            hashes[count - 1] = _mix(word)
        edges[number + 1] = count
    return count


@numba.njit(inline="always")
def _beyond(code: int) -> int:
    """Beyond U+FFFF: Han is words, pictures and symbols part them, the rest is letters."""
    if code >= 0x20000:
        return _WORD if code < 0x40000 else _SEPARATOR
    return _SEPARATOR if 0x1D000 <= code < 0x1D400 or code >= 0x1F000 else _LETTER


@numba.njit(inline="always")
def _mix(h: np.uint64) -> np.uint64:
    """Stafford's mix 13, a bijection."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))
