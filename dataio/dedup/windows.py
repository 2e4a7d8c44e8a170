"""Windows of N bytes, and which of them say the same: what `substring` finds repeated passages by, on arrays alone.

A window's anchor is, of its substrings of N // 2 bytes, the one with the least hash, the leftmost of equal ones. Equal
windows have equal anchors at equal places, and neighbours mostly share one: there is one for about every N / 4 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

#: An anchor that `repeats` looks at. Its windows begin `near` to `far` bytes before it.
ROW = np.dtype(
    [
        ("hash", np.uint64),
        ("file", np.int64),
        ("document", np.int64),  # over all files
        ("position", np.int64),  # in the texts of all files
        ("far", np.uint16),
        ("near", np.uint16),
    ]
)

_BASE = 0x9E3779B97F4A7C15  # of the polynomials, modulo 2^64, that bytes are hashed by


def num_grams(window: int) -> int:
    """How many places in a window its anchor may have."""
    return window - window // 2 + 1


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 2**64))


@numba.njit(inline="always")
def _mix(h: np.uint64) -> np.uint64:
    """A bijection of 64 bits whose order, and whose low bits, have nothing to do with those of the text."""
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


@numba.njit(nogil=True, cache=True)
def _same(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    for i in range(len(a)):  # noqa: SIM110 - a generator is not compiled
        if a[i] != b[i]:
            return False
    return True


class Anchors(NamedTuple):
    """In the order of the text. `reaches` [n, 2]: far and near of `ROW`. `spans` [m, 2]: windows known to be repeated,
    whose anchors are left out."""

    hashes: NDArray[np.uint64]
    positions: NDArray[np.int64]
    reaches: NDArray[np.uint16]
    spans: NDArray[np.int64]


def anchors_of(text: NDArray[np.uint8], bounds: NDArray[np.int64], window: int, skip_runs: bool) -> Anchors:
    """Anchors of all windows of documents, of which one begins at each of `bounds` but the last.

    With `skip_runs`, where a stretch repeats itself every few bytes, as a line of dashes does, only those near its
    start are among them; the others, else one for every byte, repeat these within their document.
    """
    size = len(text)  # an anchor for every byte would be most; what is not written to takes no memory
    found = Anchors(
        np.empty(size, np.uint64),
        np.empty(size, np.int64),
        np.empty((size, 2), np.uint16),
        np.empty((size, 2), np.int64),
    )
    count, num_spans = _choose(text, bounds, window, _power(window // 2 - 1), skip_runs, *found)
    hashes, positions, reaches, spans = found
    return Anchors(hashes[:count].copy(), positions[:count].copy(), reaches[:count].copy(), spans[:num_spans].copy())


@numba.njit(nogil=True, cache=True)
def _choose(
    text: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    window: int,
    leaving: np.uint64,
    skip_runs: bool,
    hashes: NDArray[np.uint64],
    positions: NDArray[np.int64],
    reaches: NDArray[np.uint16],
    spans: NDArray[np.int64],
) -> tuple[int, int]:
    gram = window // 2
    grams = window - gram + 1
    size = 1
    while size < grams:
        size *= 2
    ring, mask = np.empty(size, np.uint64), size - 1  # hashes of the last grams
    num_anchors = num_spans = 0
    for document in range(len(bounds) - 1):
        begin, end = bounds[document], bounds[document + 1]
        if end - begin < window:
            continue
        rolling = np.uint64(0)
        for i in range(begin, begin + gram - 1):
            rolling = rolling * np.uint64(_BASE) + np.uint64(text[i])
        least, least_at = np.uint64(0), np.int64(-1)
        anchor, anchor_hash, first = np.int64(-1), np.uint64(0), begin  # and the first window whose anchor it is
        start, start_hash = np.int64(-1), np.uint64(0)  # the first of the anchors in a row that have one hash
        for i in range(begin, end - gram + 2):
            at = np.int64(i - grams + 1)  # the window that ends with the gram at i
            if i <= end - gram:
                rolling = rolling * np.uint64(_BASE) + np.uint64(text[i + gram - 1])
                h = _mix(rolling)
                rolling -= np.uint64(text[i]) * leaving
                ring[i & mask] = h
                if least_at < 0 or h < least:
                    least, least_at = h, np.int64(i)
                if at < begin:
                    continue
                if least_at < at:
                    least, least_at = ring[at & mask], at
                    for j in range(at + 1, i + 1):
                        if ring[j & mask] < least:
                            least, least_at = ring[j & mask], np.int64(j)
                if least_at == anchor:
                    continue
            # The anchor changes, or the document ends: the last one's windows begin from `first` to before `at`.
            repeated = False
            if anchor >= 0 and start >= 0 and anchor_hash == start_hash:
                shift, right = anchor - start, at - 1 + window
                if skip_runs and shift >= window and first - shift >= begin:
                    repeated = _same(text[first - shift : right - shift], text[first:right])
                if repeated and num_spans and first < spans[num_spans - 1, 1]:
                    spans[num_spans - 1, 1] = right
                elif repeated:
                    spans[num_spans, 0], spans[num_spans, 1] = first, right
                    num_spans += 1
                elif shift >= window:
                    start = anchor
            else:
                start, start_hash = anchor, anchor_hash
            if anchor >= 0 and not repeated:
                # Mixed again: of hashes that were the least among others most are small.
                hashes[num_anchors], positions[num_anchors] = _mix(anchor_hash), anchor
                reaches[num_anchors, 0], reaches[num_anchors, 1] = anchor - first, anchor - (at - 1)
                num_anchors += 1
            anchor, anchor_hash, first = least_at, least, at
    return num_anchors, num_spans


@numba.njit(nogil=True, cache=True)
def copy_around(
    text: NDArray[np.uint8],
    start: int,
    rows: NDArray[Any],
    here: NDArray[np.int64],
    window: int,
    around: NDArray[np.uint8],
) -> None:
    """Fill in `around` [n, num_grams - 1 + window] for the rows `here`, whose file's text begins at `start`: the bytes
    of an anchor's windows, the anchor itself at `num_grams` - 1. What none of its windows has stays as it is."""
    middle = around.shape[1] - window
    for i in here:
        far, near = np.int64(rows[i].far), np.int64(rows[i].near)
        left = rows[i].position - start - far
        around[i, middle - far : middle - near + window] = text[left : left + far - near + window]


def repeats(
    around: NDArray[np.uint8], rows: NDArray[Any], window: int, keep_first: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Spans [m, 2] of windows that repeat an earlier one of the same anchor without overlapping it, of rows (`ROW`) by
    hash and of one hash the earlier first; and [n] in which rows a window's content is met first.

    Without `keep_first` the windows that are met first are among them as well.
    """
    repeated, leads = _repeats(around, rows, window, _power(window - 1), keep_first)
    return union(_spans(repeated, rows["position"], window)), leads


@numba.njit(nogil=True, cache=True)
def _repeats(
    around: NDArray[np.uint8], rows: NDArray[Any], window: int, leaving: np.uint64, keep_first: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """All windows at one distance from the anchors of one hash go through a table of contents, the earlier first."""
    num_rows, middle = len(rows), around.shape[1] - window
    repeated, leads = np.zeros((num_rows, middle + 1), np.bool_), np.zeros(num_rows, np.bool_)
    rolling = np.zeros(num_rows, np.uint64)
    alike = np.full(num_rows, -1, np.int64)  # the row whose window was the same at the last distance
    end = 0
    while end < num_rows:
        begin = end
        while end < num_rows and rows[end].hash == rows[begin].hash:
            end += 1
        size = 2
        while size < 2 * (end - begin):
            size *= 2
        table = np.empty(size, np.int64)
        for distance in range(middle, -1, -1):
            table[:] = -1
            left, right = middle - distance, middle - distance + window
            for i in range(begin, end):
                if distance > rows[i].far or distance < rows[i].near:
                    continue
                if distance == rows[i].far:
                    h = np.uint64(0)
                    for k in range(left, right):
                        h = h * np.uint64(_BASE) + np.uint64(around[i, k])
                else:
                    h = rolling[i] - np.uint64(around[i, left - 1]) * leaving
                    h = h * np.uint64(_BASE) + np.uint64(around[i, right - 1])
                rolling[i] = h
                slot = np.int64(_mix(h) & np.uint64(size - 1))
                while True:
                    other = table[slot]
                    if other < 0:
                        table[slot], leads[i], alike[i] = i, True, -1
                        break
                    if rolling[other] == h:
                        unknown = right - 1 if alike[i] == other else left
                        if _same(around[i, unknown:right], around[other, unknown:right]):
                            alike[i] = other
                            apart = rows[i].position - rows[other].position >= window
                            if apart or rows[i].document != rows[other].document:
                                repeated[i, distance] = True
                                repeated[other, distance] |= not keep_first
                            break
                    slot = (slot + 1) & (size - 1)
    return repeated, leads


@numba.njit(nogil=True, cache=True)
def _spans(repeated: NDArray[np.bool_], positions: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Of every stretch of repeated windows, where the first begins and the last ends."""
    num_rows, distances = repeated.shape
    spans = np.empty((repeated.sum(), 2), np.int64)
    count = 0
    for i in range(num_rows):
        for distance in range(distances):  # from right to left
            if repeated[i, distance]:
                if distance == 0 or not repeated[i, distance - 1]:
                    spans[count, 1] = positions[i] - distance + window
                    count += 1
                spans[count - 1, 0] = positions[i] - distance
    return spans[:count]


def union(spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spans [n, 2] of what is in any of these, rising. Two that only touch stay two: a document may end there."""
    if len(spans) == 0:
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    first = np.insert(spans[1:, 0] >= np.maximum.accumulate(spans[:, 1])[:-1], 0, True)
    return np.stack([spans[first, 0], np.maximum.reduceat(spans[:, 1], np.flatnonzero(first))], axis=1)


@numba.njit(nogil=True, cache=True)
def cuts_of(
    text: NDArray[np.uint8], bounds: NDArray[np.int64], spans: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spans within their documents, drawn in to whole characters of UTF-8; and how many each document has."""
    cuts, counts = np.empty_like(spans), np.zeros(len(bounds) - 1, np.int64)
    count = at = 0
    for document in range(len(counts)):
        end = bounds[document + 1]
        while at < len(spans) and spans[at, 0] < end:
            start, stop = spans[at]
            at += 1
            while at < len(spans) and spans[at, 0] == stop and stop < end:
                stop = spans[at, 1]
                at += 1
            while start < stop and text[start] & 0xC0 == 0x80:
                start += 1
            while stop > start and stop < end and text[stop] & 0xC0 == 0x80:
                stop -= 1
            if start < stop:
                cuts[count, 0], cuts[count, 1] = start - bounds[document], stop - bounds[document]
                counts[document] += 1
                count += 1
    return cuts[:count], counts
