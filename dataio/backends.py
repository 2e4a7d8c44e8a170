"""Texts to token ids through the fastest library that gives the ids of `tokenizers`, which defines what is right.

    found = encoder(path)                   gigatoken, fastokens or tokenizers itself
    found.check(texts)                      on a sample of what will be encoded
    ids, lengths = found.encode(texts)

The fast libraries are young and optional. Before one is used it encodes texts made to break it, and then a sample of
every file; one that is missing or wrong is given up with a warning that says what that costs. Their tables of Unicode
may be older or newer than those of `tokenizers`, so a text with a character that Python's own tables do not know goes
through `tokenizers` whatever happens.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from dataio.probes import known_characters, probes
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal

logger = logging.getLogger(__name__)

#: Token ids of all texts in a row, uint32, without end-of-text; tokens of each, int64.
Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]

#: Libraries from fast to slow, and MB/s of text per core: 150 MB of code and 50 MB of prose, vocabulary of 32,768,
#: gigatoken 0.10.0, fastokens 0.3.5, tokenizers 0.23.3; measured 2026-11-22 on an AVX-512 EPYC.
SPEEDS = {"gigatoken": 200, "fastokens": 55, "tokenizers": 2.5}
#: gigatoken remembers every word it has seen, 7 bytes for each byte of text that never repeats. When the process has
#: grown by this much it begins anew, which takes a tenth of a second.
CACHE_BYTES = 256 << 20
#: Of a file's texts, what is compared with `tokenizers`: 8 ms at its speed.
SAMPLE_TEXTS, SAMPLE_BYTES = 32, 640


class Backend(Protocol):
    def encode(self, texts: Sequence[bytes]) -> Encoded: ...


class _Reference:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._inner = tokenizer.inner

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        encodings = self._inner.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return np.concatenate([np.empty(0, np.uint32), *ids]), np.array([len(found) for found in ids], np.int64)


class _Gigatoken:
    def __init__(self, content: str) -> None:
        import gigatoken

        self._open = lambda: gigatoken.Tokenizer.from_json(content)
        self._begin()

    def _begin(self) -> None:
        self._inner = self._open()
        self._grown_from = _resident_bytes()

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        # Without threads of its own: processes are one to a core, and were forked, perhaps.
        layout = self._inner.encode_batch(list(texts), parallel=False).layout.to_ListOffsetArray64(True)
        offsets = np.asarray(layout.offsets.data, np.int64)
        ids = np.asarray(layout.content.data, np.uint32)[: offsets[-1]]
        if _resident_bytes() - self._grown_from > CACHE_BYTES:
            self._begin()
        return ids, offsets[1:] - offsets[:-1]


class _Fastokens:
    def __init__(self, content: str) -> None:
        import fastokens

        self._inner = fastokens.Tokenizer.from_json_str(content)

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        ids, offsets = self._inner.encode_batch_flat([text.decode() for text in texts], add_special_tokens=False)
        bounds = np.frombuffer(offsets, np.int64)
        return np.frombuffer(ids, np.uint32), bounds[1:] - bounds[:-1]


#: Opened with the tokenizer.json that `_of_texts` makes.
FAST: dict[str, Callable[[str], Backend]] = {"gigatoken": _Gigatoken, "fastokens": _Fastokens}


class Encoder:
    """The fastest back end that holds; its ids are those of `tokenizers`. Not for several threads."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.load(path)
        self.tokenizer.require_lossless(path)
        self._content = _of_texts(path)
        self._reference = _Reference(self.tokenizer)
        self._known = known_characters()
        self._left = list(FAST)
        self._probes = [text.encode() for text in probes(self.tokenizer.special_names())]
        self.name = ""
        self._backend: Backend = self._reference
        self._next("")

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """Ids of texts in UTF-8. Special tokens in them are text."""
        if self.name == "tokenizers" or not texts:
            return self._reference.encode(texts)
        newer = self._newer(texts)
        if not newer.any():
            return self._backend.encode(texts)
        fast = self._backend.encode([text for text, new in zip(texts, newer) if not new])
        slow = self._reference.encode([text for text, new in zip(texts, newer) if new])
        lengths = np.empty(len(texts), np.int64)
        lengths[newer], lengths[~newer] = slow[1], fast[1]
        ids = np.empty(lengths.sum(), np.uint32)
        of_newer = np.repeat(newer, lengths)
        ids[of_newer], ids[~of_newer] = slow[0], fast[0]
        return ids, lengths

    def check(self, texts: Sequence[bytes]) -> None:
        """Compare with `tokenizers` on how some of `texts` begin; if they differ, go on with the next library."""
        some = texts[:: -(-len(texts) // SAMPLE_TEXTS) or 1]
        heads = [text[:SAMPLE_BYTES].decode(errors="ignore").encode() for text in some]
        while self.name != "tokenizers" and (why := self._differs(heads)):
            self._next(f"{self.name} {why}")

    def _next(self, why: str) -> None:
        """The next library that opens this tokenizer and gives the right ids of the probes; `tokenizers` at last."""
        fastest = next(iter(SPEEDS))
        reasons = [why] if why else []
        while self._left:
            self.name = self._left.pop(0)
            try:
                self._backend = FAST[self.name](self._content)
                wrong = self._differs(self._probes)
            except ImportError:
                wrong = "is not installed (pip install 'stoker[data]')"
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException as error:  # what Rust panics with is no Exception
                wrong = f"does not take this tokenizer ({_first_line(error)})"
            if not wrong:
                break
            reasons.append(f"{self.name} {wrong}")
        else:
            self.name, self._backend = "tokenizers", self._reference
        if reasons:
            cost = SPEEDS[fastest] / SPEEDS[self.name]
            logger.warning("%s: tokens are made by %s, about %.0f times slower", "; ".join(reasons), self.name, cost)

    def _differs(self, texts: Sequence[bytes]) -> str | None:
        expected = _split(self._reference.encode(texts))
        for ids, right in zip(_split(self.encode(texts)), expected):
            if ids != right:
                at = next((i for i, (a, b) in enumerate(zip(ids, right)) if a != b), min(len(ids), len(right)))
                before = self.tokenizer.decode(right[max(0, at - 3) : at + 3])
                return f"differs from tokenizers at token {at} of a text, by {before[:40]!r}"
        return None

    def _newer(self, texts: Sequence[bytes]) -> NDArray[np.bool_]:
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        found = np.zeros(len(texts), np.bool_)
        _find_unknown(np.frombuffer(b"".join(texts), np.uint8), offsets, self._known, found)
        return found


def encoder(path: Path) -> Encoder:
    """Of a tokenizer.json; the one opened last is kept, for the tasks of a process mostly want the same.

    Refuses what ``Tokenizer.load`` and ``Tokenizer.require_lossless`` refuse.
    """
    try:
        return _opened(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise Refusal(f"{path}: there is no tokenizer here; run its stage, or give the path of one") from None


@lru_cache(maxsize=1)
def _opened(path: Path, _mtime_ns: int) -> Encoder:
    return Encoder(path)


def _of_texts(path: Path) -> str:
    """The tokenizer.json for libraries that have no switch for special tokens in texts: without these, and without
    what would cut or pad a text."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    added = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    return json.dumps({**content, "added_tokens": added, "truncation": None, "padding": None})


@numba.njit(nogil=True, cache=True)
def _find_unknown(
    text: NDArray[np.uint8], offsets: NDArray[np.int64], known: NDArray[np.bool_], found: NDArray[np.bool_]
) -> None:
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            first = np.int64(text[at])
            if first < 0x80:
                at += 1
                while at + 32 <= end:  # one comparison where all is ASCII
                    block, together = text[at : at + 32], np.uint8(0)
                    for near in range(32):
                        together |= block[near]
                    if together >= 0x80:
                        break
                    at += 32
                continue
            size = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            character = first & (0x7F >> size)
            for more in range(at + 1, min(at + size, end)):
                character = (character << 6) | (np.int64(text[more]) & 0x3F)
            if character > 0x10FFFF or not known[character]:
                found[document] = True
                break
            at += size


def _split(encoded: Encoded) -> list[list[int]]:
    ids, lengths = encoded
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
