"""What becomes of a text whose passages are cut out or replaced: the one place where texts are rewritten.

Spans are byte offsets into UTF-8, half-open, at the boundaries of characters.
"""

from __future__ import annotations

from collections.abc import Iterable


def apply(text: bytes, cuts: Iterable[tuple[int, int]], replacements: Iterable[tuple[int, int, bytes]]) -> bytes:
    """`text` without the bytes of any span; where a replacement began there stands what it says instead.

    Spans may come in any order and overlap. A replacement that lies in a cut leaves nothing; one that is cut in part is
    made whole, for the rest of a secret is one too. ValueError for a span that is not one of this text.

    >>> apply(b"my key is 1234, remember it", [(14, 27)], [(10, 14, b"<key>")])
    b'my key is <key>'
    """
    pieces: list[bytes] = []
    done = cut_to = 0
    spans = [*((start, stop, None) for start, stop in cuts), *replacements]
    # Of a cut and a replacement that begin together the cut comes first.
    for start, stop, instead in sorted(spans, key=lambda span: (span[0], span[2] is not None, span[1])):
        if not (0 <= start <= stop <= len(text) and _is_boundary(text, start) and _is_boundary(text, stop)):
            raise ValueError(f"bytes {start} to {stop} are no characters of a text of {len(text)} bytes")
        if instead is None:
            cut_to = max(cut_to, stop)
        elif stop <= cut_to:
            continue
        pieces += [text[done:start], instead or b""]
        done = max(done, stop)
    return b"".join([*pieces, text[done:]])


def _is_boundary(text: bytes, at: int) -> bool:
    return at == len(text) or text[at] & 0xC0 != 0x80
