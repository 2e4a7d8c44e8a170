"""Where an address, a key or a password could be: one pass over the bytes of texts, at the speed of reading them.

A place is found by two bytes in a row and a look around that is bounded, whatever the text; what it is, if anything,
`redact_checks` decides. Addresses of mail and of IPv4 are found from end to end, of other things where they begin.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from dataio.filters.redact_forms import BEGINS, PRIVATE_KEY

#: What was found. From `PREFIX` on the number says which of `PREFIXES`.
EMAIL, IPV4, IPV6, URL, ASSIGNED, PREFIX = range(6)
PREFIXES = (*(way for way, _ in BEGINS), PRIVATE_KEY)
#: Longest local part of an e-mail address and longest domain, in bytes (RFC 5321, 4.5.3.1).
LOCAL_BYTES, DOMAIN_BYTES = 64, 255
#: Longest user and password of a URL together.
URL_USER_BYTES = 386
#: Longest name that is looked at before "=" or ":".
NAME_BYTES = 64

#: Kinds of bytes, and what two bytes in a row may be part of.
_DIGIT, _LETTER, _MARK = 1, 2, 3
_BEGIN, _AT, _DOT, _COLON, _EQUALS = 1, 2, 3, 4, 5
#: Last three letters of names of secrets: key, token, secret, password, passwd, pwd, passphrase, credential(s), pass.
_NAME_ENDS = np.array(
    [int.from_bytes(end, "big") for end in b"key ken ret ord swd pwd ase ial als ass".split()], np.int64
)


def _kinds() -> NDArray[np.uint8]:
    kinds = np.zeros(256, np.uint8)
    kinds[[*b"0123456789"]] = _DIGIT
    kinds[[*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = _LETTER
    kinds[[*b"_-"]] = _MARK
    return kinds


def _pairs() -> NDArray[np.uint8]:
    """Of two bytes, whether something could be here."""
    pairs = np.zeros((256, 256), np.uint8)
    pairs[ord("@")] = _AT
    pairs[ord(":")] = _COLON
    pairs[ord("=")] = _EQUALS
    pairs[ord("."), ord("0") : ord("9") + 1] = _DOT
    for prefix in PREFIXES:
        pairs[prefix[0], prefix[1]] = _BEGIN
    return pairs.ravel()


def _table() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    lengths = np.array([len(prefix) for prefix in PREFIXES], np.int64)
    table = np.zeros((len(PREFIXES), lengths.max()), np.uint8)
    for row, prefix in zip(table, PREFIXES):
        row[: len(prefix)] = [*prefix]
    return table, lengths


_KINDS, _PAIRS = _kinds(), _pairs()
_PREFIX_TABLE, _PREFIX_LENGTHS = _table()


def candidates(content: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n, 3]: what, first byte and end, in the order of the places where they were noticed. `starts`: of the
    documents in `content`, and its end; nothing is looked for across two of them."""
    found = np.empty((1024 + len(content) // 256, 3), np.int64)
    while True:
        count = _scan(content, starts, _KINDS, _PAIRS, _PREFIX_TABLE, _PREFIX_LENGTHS, _NAME_ENDS, found)
        if count <= len(found):
            return found[:count]
        found = np.empty((count, 3), np.int64)


@numba.njit(nogil=True)
def _scan(
    content: NDArray[np.uint8],
    starts: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    pairs: NDArray[np.uint8],
    prefixes: NDArray[np.uint8],
    lengths: NDArray[np.int64],
    name_ends: NDArray[np.int64],
    found: NDArray[np.int64],
) -> int:
    """How many were found; the first of them are in `found`, as far as it reaches."""
    count = 0
    for document in range(len(starts) - 1):
        low, high = starts[document], starts[document + 1]
        for place in range(low, high - 1):
            kind = pairs[np.int64(content[place]) << 8 | np.int64(content[place + 1])]
            if kind == 0:
                continue
            what, first, last = -1, place, place
            if kind == _BEGIN:
                if place > low and kinds[content[place - 1]] != 0:
                    continue
                for number in range(len(lengths)):
                    size = lengths[number]
                    if place + size <= high and _same(content, place, prefixes[number], size):
                        what, last = PREFIX + number, place + size
                        break
            elif kind == _AT:
                first, last = _email(content, place, low, high, kinds)
                what = EMAIL if first < last else -1
            elif kind == _DOT:
                first, last = _ipv4(content, place, low, high, kinds)
                what = IPV4 if first < last else -1
            else:
                if kind == _COLON and place + 2 < high and content[place + 1] == 47 and content[place + 2] == 47:
                    what, last = URL if _has_user(content, place + 3, high) else -1, place + 3
                elif kind == _COLON and _begins_ipv6(content, place, low, kinds):
                    what, first, last = IPV6, place - 4, place
                else:
                    first = _secret_name(content, place, low, kinds, name_ends)
                    what = ASSIGNED if first >= 0 else -1
            if what >= 0:
                if count < len(found):
                    found[count, 0], found[count, 1], found[count, 2] = what, first, last
                count += 1
    return count


@numba.njit(inline="always")
def _same(content: NDArray[np.uint8], place: int, prefix: NDArray[np.uint8], size: int) -> bool:
    at = 0
    while at < size and content[place + at] == prefix[at]:
        at += 1
    return at == size


@numba.njit(inline="always")
def _has_user(content: NDArray[np.uint8], place: int, high: int) -> bool:
    """Whether an @ follows before a URL's path, or the URL, ends."""
    end = min(high, place + URL_USER_BYTES)
    while place < end and content[place] > 32 and content[place] != 47 and content[place] != 34:
        if content[place] == 64:
            return True
        place += 1
    return False


@numba.njit
def _email(content: NDArray[np.uint8], place: int, low: int, high: int, kinds: NDArray[np.uint8]) -> tuple[int, int]:
    """First byte and end of the address around an @; equal where there is none. A local part may have Latin letters
    beyond ASCII, which UTF-8 writes with a byte from C3 to C9 and another."""
    first = place
    while first > low and place - first < LOCAL_BYTES:
        byte = content[first - 1]
        if kinds[byte] != 0 or byte == 46 or byte == 43 or byte == 37:  # . + %
            first -= 1
        elif 0x80 <= byte < 0xC0 and first - 1 > low and 0xC3 <= content[first - 2] <= 0xC9:
            first -= 2
        else:
            break
    while first < place and (content[first] == 46 or content[first] == 45 or content[first] == 37):
        first += 1
    end = place + 1
    dots, last_dot = 0, place
    while end < high and end - place <= DOMAIN_BYTES:
        byte = content[end]
        if byte == 46:
            if end == last_dot + 1:
                break
            dots, last_dot = dots + 1, end
        elif not (kinds[byte] != 0 and byte != 95):
            break
        end += 1
    while end > place and (content[end - 1] == 46 or content[end - 1] == 45):
        end -= 1
        dots -= content[end] == 46
    if first == place or dots < 1:
        return place, place
    return first, end


@numba.njit
def _ipv4(content: NDArray[np.uint8], place: int, low: int, high: int, kinds: NDArray[np.uint8]) -> tuple[int, int]:
    """First byte and end of the four numbers whose first dot is at a place; equal where there are none."""
    first = place
    while first > low and place - first < 3 and kinds[content[first - 1]] == _DIGIT:
        first -= 1
    if first == place or (first > low and (kinds[content[first - 1]] != 0 or content[first - 1] == 46)):
        return place, place
    end = first
    for number in range(4):
        value, digits = np.int64(0), 0
        while end < high and digits < 4 and kinds[content[end]] == _DIGIT:
            value = value * 10 + np.int64(content[end]) - 48
            digits += 1
            end += 1
        leading = digits > 1 and content[end - digits] == 48
        if digits == 0 or digits > 3 or value > 255 or leading:
            return place, place
        if number < 3:
            if end >= high or content[end] != 46:
                return place, place
            end += 1
    if end < high:
        after = content[end]
        more = end + 1 < high and kinds[content[end + 1]] != 0
        if kinds[after] == _DIGIT or kinds[after] == _LETTER or after == 95 or ((after == 46 or after == 45) and more):
            return place, place
    return first, end


@numba.njit(inline="always")
def _begins_ipv6(content: NDArray[np.uint8], place: int, low: int, kinds: NDArray[np.uint8]) -> bool:
    """Whether four hexadecimal digits of a global unicast address, 2000::/3, stand before a colon."""
    if place - 4 < low or not (content[place - 4] == 50 or content[place - 4] == 51):
        return False
    for at in range(place - 3, place):
        byte = content[at] | 32
        if kinds[content[at]] != _DIGIT and not 97 <= byte <= 102:
            return False
    return place - 4 == low or not (kinds[content[place - 5]] != 0 or content[place - 5] == 58)


@numba.njit
def _secret_name(
    content: NDArray[np.uint8], place: int, low: int, kinds: NDArray[np.uint8], name_ends: NDArray[np.int64]
) -> int:
    """First byte of the name before "=" or ":" if it ends as names of secrets do, -1 if not."""
    end = place
    floor = max(low, place - 4)
    while end > floor and (content[end - 1] == 32 or content[end - 1] == 9):
        end -= 1
    if end > low and content[end - 1] == 93:  # ]
        end -= 1
    if end > low and (content[end - 1] == 34 or content[end - 1] == 39):
        end -= 1
    if end - 3 < low:
        return -1
    tail = (
        (np.int64(content[end - 3]) | 32) << 16
        | (np.int64(content[end - 2]) | 32) << 8
        | np.int64(content[end - 1])
        | 32
    )
    for known in name_ends:
        if tail == known:
            first = end - 3
            while (
                first > low
                and end - first < NAME_BYTES
                and (kinds[content[first - 1]] != 0 or content[first - 1] == 46)
            ):
                first -= 1
            return first
    return -1
