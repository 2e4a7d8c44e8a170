"""What a character is, for loops over UTF-8 that are compiled: a table of kinds by code point, and a decoder."""

from __future__ import annotations

import unicodedata
from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

#: Scripts written without spaces between words, as ranges of code points: Thai, Lao, Tibetan, Burmese, Khmer, kana,
#: bopomofo, Chinese characters, Yi.
UNSPACED_RANGES = (
    (0x0E00, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3040, 0x312F),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0xA4CF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
    (0x1B000, 0x1B16F),
    (0x20000, 0x323AF),
)
#: What ends a sentence, what may follow it, what else ends a line that is one (C4 and FineWeb, beyond English too).
ENDS = ".!?…؟۔।॥።။។‼⁇⁈⁉。！？｡．"
QUOTES = "\"'”’»›」』"
CLOSINGS = QUOTES + ")]}）】〉》*_`"
BULLETS = "•‣⁃◦▪▫●○■□∙·"
#: A bullet only where it stands alone.
DASHES = "-*+–—"

#: Kinds of characters, bits of a table's entry. `UNSPACED`: of a script without spaces; `ENDING`: ends a line that is a
#: sentence; `WIDE`: two columns wide.
SPACE, LETTER, UNSPACED, TERMINAL, ENDING, CLOSING, WIDE, BULLET = (1 << bit for bit in range(8))


@cache
def kinds() -> NDArray[np.uint8]:
    """What the characters are, by code point; those beyond the table are none of it."""
    table = np.zeros(0x323B0, np.uint8)
    for code in range(len(table)):
        character = chr(code)
        wide = unicodedata.east_asian_width(character) in "WF"
        table[code] = SPACE * character.isspace() + LETTER * character.isalpha() + WIDE * wide
    for first, last in UNSPACED_RANGES:
        table[first : last + 1] |= UNSPACED
    sets = ((ENDS, TERMINAL), (ENDS + QUOTES, ENDING), (CLOSINGS, CLOSING), (BULLETS, BULLET))
    for characters, kind in sets:
        table[[ord(character) for character in characters]] |= kind
    return table


@numba.njit(inline="always")
def decoded(text: NDArray[np.uint8], at: int) -> tuple[np.int64, int]:
    """Code point at a place and its bytes in UTF-8."""
    first = np.int64(text[at])
    if first < 0x80:
        return first, 1
    size = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    if at + size > len(text):
        return first, 1
    code = first & (0x7F >> size)
    for place in range(at + 1, at + size):
        code = code << 6 | np.int64(text[place]) & 0x3F
    return code, size
