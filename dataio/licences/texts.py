"""Which licence a text is: the known texts by hashes of their four-word runs, so wrapping, punctuation, letter case,
names and what stands around a text do not matter.

A known text is kept as a sample of the hashes of its runs, those that divide by a power of two which grows with its
length. All texts sample alike, so one text of a family is told from another (BSD with two, three or four clauses; MPL
and NPL) by what each has and the other lacks. The table beside this file is made by `table` from the texts of SPDX's
list as the npm package spdx-license-list 6.12.0 (CC0-1.0) carries them, of LGPL-3.0 without the GPL that follows it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

_TABLE = Path(__file__).with_name("texts.json")
#: Words of a run: fewer than a filled-in name spoils, enough that runs of unrelated texts do not meet.
RUN_WORDS = 4
#: Share of a known text's runs that must be there: 0.98 of BSD-3-Clause is left with the university's name filled in,
#: 0.85 with a company's in every place; MIT without its one condition, which is MIT-0, has 0.79 of MIT.
COVERAGE = 0.8
#: Words that may stand before a text: titles, owners, how it came to be. After more of them, what stands first is a
#: licence that is not known, and the known text is somebody else's, passed on with it.
PREAMBLE_WORDS = 400
#: Longest text looked at, in characters: ten times the longest licence of SPDX's list.
LONGEST = 1 << 20
_WORD = re.compile(r"[a-z0-9]+")
_OWNER = re.compile(r"(?im)^.{0,20}\b(copyright|\(c\)|©)\s*(\(c\)|©|\d|<|\[|by\b).*$")


@dataclass(frozen=True)
class _Known:
    name: str  # SPDX identifier
    rate: int  # of how many hashes one is kept
    hashes: frozenset[int]


def identify(text: str) -> str | None:
    """SPDX identifier of the licence text that a file consists of or, where there are several, begins with.

    The GNU licences do not say in their texts whether later versions may be used: ``-only`` is what is certain.

    >>> identify("Permission to use, copy, modify, and/or distribute this software for any purpose ...") is None
    True
    """
    runs = _runs(text[:LONGEST])
    found: list[tuple[float, int, int, str]] = []  # score, first and last place, name
    for known in _known():
        places = [runs[hashed] for hashed in known.hashes if hashed in runs]
        if len(places) >= COVERAGE * len(known.hashes):
            score = known.rate * (2 * len(places) - len(known.hashes))
            low, high = np.percentile(places, [10, 90])
            found.append((score, int(low), int(high), known.name))
    # Best first; of texts at the same place only the best counts.
    separate: list[tuple[int, int, str]] = []
    for _, low, high, name in sorted(found, key=lambda match: (-match[0], match[3])):
        if all(high < other_low or low > other_high for other_low, other_high, _ in separate):
            separate.append((low, high, name))
    if not separate:
        return None
    low, high, name = min(separate)
    begins = low - (high - low) // 8
    return name if begins <= PREAMBLE_WORDS else None


def table(texts: Mapping[str, str]) -> str:
    """What is kept of known texts, {SPDX identifier: text}: JSON of {identifier: [rate, 24-bit hashes in base 64]}."""
    rows = {}
    for name, text in sorted(texts.items()):
        runs = _runs(_OWNER.sub(" ", text))
        rate = 2 if len(runs) < 400 else 8 if len(runs) < 2000 else 32
        kept = np.array(sorted(run for run in runs if run % rate == 0), "<u4")
        packed = np.ascontiguousarray(kept.view(np.uint8).reshape(-1, 4)[:, :3])
        rows[name] = [rate, base64.b64encode(packed.tobytes()).decode()]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f"{{\n{lines}\n}}\n"


def known() -> frozenset[str]:
    """Identifiers of the known texts."""
    return frozenset(entry.name for entry in _known())


@cache
def _known() -> tuple[_Known, ...]:
    return tuple(
        _Known(name, rate, frozenset(_unpacked(packed).tolist()))
        for name, (rate, packed) in json.loads(_TABLE.read_text("utf-8")).items()
    )


def _unpacked(packed: str) -> NDArray[np.uint32]:
    parts = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(-1, 3)
    return np.pad(parts, [(0, 0), (0, 1)]).view("<u4").ravel()


def _runs(text: str) -> dict[int, int]:
    """24-bit hash of every run of words, and where it comes first."""
    words = _WORD.findall(text.lower().replace("'", "").replace("’", ""))
    runs: dict[int, int] = {}
    for place in range(max(1, len(words) - RUN_WORDS + 1)):
        run = " ".join(words[place : place + RUN_WORDS])
        runs.setdefault(xxhash.xxh3_64_intdigest(run.encode()) & 0xFFFFFF, place)
    return runs
