"""Texts on which tokenizers fail, if they do: what each one, and each library that runs it, is tried on."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def probes(special: Sequence[str]) -> list[str]:
    """Texts on which encoders have been seen to differ, or to lose something: special tokens as text, long lines, runs
    of white space, capitals, control characters, contractions, scripts without spaces, signs that vocabularies use for
    white space, every byte that UTF-8 has, and all of Unicode at random."""
    texts = [
        "",
        *special,
        *(f"a{name}b {name}\n{name}{name[1:]}" for name in special),
        "def f(x):\n    return {'a': 10_000, \"b\": x[1:]}\n\n\n\t\tpass  \r\n",
        "DON'T don't we’ve I'LL 'S ſ's 'ſ K's it'd\n'twas",
        "漢字かな交じり文。中文，沒有空格 한국어 ภาษาไทย हिन्दी العربية עברית\u200f",
        "🙂👩‍👩‍👧‍👧🏳️‍🌈 e\u0301\u0301 ﬁ ǅ ½ Ⅷ ١٢٣ \u200d\ufeff \U0010fffd",
        "▁a ▁▁ b▁ Ġ Ċ ## </w> <unk> <0x0A>",
        "".join(map(chr, range(0xA1))) * 2,
        _every_byte(),
        "\u0085\u2028\u2029\u3000 a \u00a0b\u180e",
        "x" * 5000 + " " * 5000 + "y" + "\n" * 999 + "=-" * 2000 + "7" * 300,
    ]
    draw = random.Random(0)
    known = np.flatnonzero(known_characters()).tolist()
    signs = [ord(sign) for sign in " \n\r\t'sdmt0.,_A"]
    for _ in range(64):
        chosen = [draw.choice(draw.choice((known, known, range(0x100), range(0x20, 0x800), signs))) for _ in range(40)]
        texts.append("".join(chr(character) for character in chosen))
    return texts


def _every_byte() -> str:
    """A character for every byte that one may begin with, and for every byte within."""
    begins = [
        *range(0x80),
        *range(0x80, 0x800, 0x40),
        *range(0x800, 0x10000, 0x800),
        *range(0x10000, 0x110000, 0x30000),
    ]
    within = range(0x80, 0x80 + 0x40)
    return "".join(chr(character) for character in [*begins, *within] if not 0xD800 <= character < 0xE000)


@lru_cache(maxsize=1)
def known_characters() -> NDArray[np.bool_]:
    """[0x110000] whether Python knows the character; of what is not looked up, only two private planes are in use."""
    known = np.zeros(0x110000, np.bool_)
    for start, stop in ((0, 0xD800), (0xE000, 0x40000), (0xE0000, 0xE1000)):
        known[start:stop] = [unicodedata.category(chr(character)) != "Cn" for character in range(start, stop)]
    known[0xF0000:] = True
    return known
