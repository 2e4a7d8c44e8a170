"""N-grams of evaluation items, and where they stand in texts: what `decontaminate` finds items by, on arrays alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from dataio.dedup.arrays import save
from dataio.dedup.evaluation import Item
from dataio.dedup.texts import Words, words_of
from stoker import canonical
from stoker.files import write_atomic

#: N-grams of a document that are looked at; one with more holds whole evaluation sets, or one idiom over and over.
MAX_MATCHES = 1 << 16
_BASE = 0x9E3779B97F4A7C15  # of the polynomials, modulo 2^64, that words are joined by


class Index(NamedTuple):
    """Of n-gram i the items are owners[edges[i] : edges[i + 1]]. An n-gram that an item has twice counts once."""

    grams: NDArray[np.uint64]  # hashes, rising
    lengths: NDArray[np.int64]  # words of each
    edges: NDArray[np.int64]
    owners: NDArray[np.int64]
    names: list[str]  # of the items, rising
    sizes: NDArray[np.int64]  # n-grams of each item
    longest: NDArray[np.int64]  # words of each item's longest passage

    @property
    def num_items(self) -> NDArray[np.int64]:
        """Of each n-gram."""
        return np.diff(self.edges)


_ARRAYS = ("grams", "lengths", "edges", "owners", "sizes", "longest")
#: Files of an index in its folder.
FILES = (*(f"{name}.npy" for name in _ARRAYS), "items.json")


def build(items: Sequence[Item], ngram: int, shortest: int) -> Index:
    """N-grams of `ngram` words; of a passage with fewer, but at least `shortest`, all its words are one."""
    hashes, lengths, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    longest = np.zeros(len(items), np.int64)
    for number, item in enumerate(items):
        texts = [passage.encode() for passage in item.passages]
        words = words_of(np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)]))
        longest[number] = np.diff(words.bounds).max(initial=0)
        for first, last in zip(words.bounds[:-1], words.bounds[1:]):
            length = min(int(last - first), ngram)
            if length >= shortest:
                hashes.append(_hashes(words.hashes[first:last], length, _power(length)))
                lengths.append(np.full(len(hashes[-1]), length))
                owners.append(np.full(len(hashes[-1]), number))
    of, length_of, owner = (np.concatenate(columns) for columns in (hashes, lengths, owners))
    order = np.lexsort((owner, of))
    of, length_of, owner = of[order], length_of[order], owner[order]
    once = np.insert((of[1:] != of[:-1]) | (owner[1:] != owner[:-1]), 0, True)[: len(of)]
    of, length_of, owner = of[once], length_of[once], owner[once]
    grams, first = np.unique(of, return_index=True)
    sizes = np.bincount(owner, minlength=len(items))
    names = [item.name for item in items]
    return Index(grams, length_of[first], np.append(first, len(of)), owner, names, sizes, longest)


def store(index: Index, folder: Path) -> None:
    """Write the `FILES`."""
    for name in _ARRAYS:
        save(folder / f"{name}.npy", getattr(index, name))
    write_atomic(folder / "items.json", canonical.dumps(index.names))


def load(folder: Path) -> Index:
    """What `store` wrote."""
    names = json.loads((folder / "items.json").read_bytes())
    return Index(names=names, **{name: np.load(folder / f"{name}.npy") for name in _ARRAYS})


class Finder:
    """Finds the n-grams of an index, and counts in how many documents each of them stands (`frequency`)."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.frequency = np.zeros(len(index.grams), np.int64)
        self.cut_short = 0  # n-grams that stand in documents with more than `MAX_MATCHES`
        self._lengths = np.unique(index.lengths)
        self._powers = np.array([_power(int(length)) for length in self._lengths], np.uint64)
        self._last = np.full(len(index.grams), -1)
        self._documents = 0
        # Which first bits hashes have: of 16 that are not in the index about one passes.
        self._shift = 64 - max(16, (16 * len(index.grams)).bit_length())
        self._sieve = np.zeros(1 << (64 - self._shift), np.bool_)
        self._sieve[index.grams >> np.uint64(self._shift)] = True

    def find(self, words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """How many n-grams each text has; which of the index they are; which of all the words their first is."""
        counts = np.zeros(len(words.bounds) - 1, np.int64)
        found, at = [np.empty((0, 2), np.int64)], 0
        while at < len(counts):
            buffer = np.empty((4 * MAX_MATCHES, 2), np.int64)
            at, count, left_out = _find(
                words.hashes,
                words.bounds,
                at,
                self._lengths,
                self._powers,
                self.index.grams,
                self._sieve,
                np.uint64(self._shift),
                self._documents,
                self._last,
                self.frequency,
                buffer,
                counts,
            )
            found.append(buffer[:count].copy())
            self.cut_short += left_out
        self._documents += len(counts)
        grams, first = np.concatenate(found).T
        return counts, grams, first


def _power(length: int) -> np.uint64:
    return np.uint64(pow(_BASE, length - 1, 2**64))


@numba.njit(inline="always")
def _mix(h: np.uint64, length: int) -> np.uint64:
    """The hash of an n-gram; those of other lengths have others."""
    h = (h ^ np.uint64(length)) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(32))


@numba.njit(nogil=True, cache=True)
def _hashes(words: NDArray[np.uint64], length: int, leaving: np.uint64) -> NDArray[np.uint64]:
    """Of every n-gram of `length` words in a row."""
    found = np.empty(len(words) - length + 1, np.uint64)
    rolling = np.uint64(0)
    for i in range(len(words)):
        rolling = rolling * np.uint64(_BASE) + words[i]
        if i >= length - 1:
            found[i - length + 1] = _mix(rolling, length)
            rolling -= words[i - length + 1] * leaving
    return found


@numba.njit(nogil=True, cache=True)
def _find(
    words: NDArray[np.uint64],
    bounds: NDArray[np.int64],
    begin: int,
    lengths: NDArray[np.int64],
    powers: NDArray[np.uint64],
    grams: NDArray[np.uint64],
    sieve: NDArray[np.bool_],
    shift: np.uint64,
    first_document: int,
    last: NDArray[np.int64],
    frequency: NDArray[np.int64],
    matches: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> tuple[int, int, int]:
    """N-grams and first words in the documents from `begin` on, and how many each has. Returns the document to go on
    with, where `matches` may not hold all of it; how many matches; and how many had to be left out.

    `last`: the document in which an n-gram was counted last.
    """
    total = left_out = 0
    for document in range(begin, len(bounds) - 1):
        if total + MAX_MATCHES > len(matches):
            return document, total, left_out
        count = 0
        for k in range(len(lengths)):
            length, leaving = lengths[k], powers[k]
            rolling = np.uint64(0)
            for i in range(bounds[document], bounds[document + 1]):
                rolling = rolling * np.uint64(_BASE) + words[i]
                start = i - length + 1
                if start < bounds[document]:
                    continue
                h = _mix(rolling, length)
                rolling -= words[start] * leaving
                if not sieve[h >> shift]:
                    continue
                place = np.searchsorted(grams, h)
                if place == len(grams) or grams[place] != h:
                    continue
                if count == MAX_MATCHES:
                    left_out += 1
                    continue
                matches[total + count, 0], matches[total + count, 1] = place, start
                count += 1
                if last[place] != first_document + document:
                    last[place] = first_document + document
                    frequency[place] += 1
        counts[document] = count
        total += count
    return len(bounds) - 1, total, left_out
