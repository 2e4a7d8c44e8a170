"""Cut and replaced passages: nothing of a span is left, whatever order and overlap they come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.edits import apply

TEXT = "aé漢🙂b c\nd".encode()
#: Where characters begin, and the end.
PLACES = [at for at in range(len(TEXT) + 1) if at == len(TEXT) or TEXT[at] & 0xC0 != 0x80]

spans = st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES)).map(sorted).map(tuple), max_size=4)


@given(spans, spans)
def test_what_is_left_are_the_bytes_in_no_span(cuts: list[tuple[int, int]], secrets: list[tuple[int, int]]) -> None:
    kept = [TEXT[i] for i in range(len(TEXT)) if not any(a <= i < b for a, b in cuts + secrets)]
    found = apply(TEXT, cuts, [(a, b, b"") for a, b in secrets])
    assert found == bytes(kept)
    found.decode()


@given(spans, spans)
def test_a_replacement_shows_once_unless_it_lies_in_a_cut(
    cuts: list[tuple[int, int]], secrets: list[tuple[int, int]]
) -> None:
    marked = [(a, b, b"\xff%d;" % i) for i, (a, b) in enumerate(secrets) if a < b]
    found = apply(TEXT, cuts, marked)
    for a, b, mark in marked:
        gone = all(any(c <= i < d for c, d in cuts) for i in range(a, b))
        within = any(c <= a and b <= d for c, d in cuts)
        assert found.count(mark) <= 1
        assert mark in found or gone
        assert not (within and mark in found)


def test_spans_that_do_not_overlap_are_replaced_in_their_places() -> None:
    assert apply(b"key=1234 and 5678;", [(8, 12)], [(4, 8, b"<k>"), (13, 17, b"<k>")]) == b"key=<k> <k>;"
    assert apply(b"abc", [], []) == b"abc"
    assert apply(b"", [(0, 0)], []) == b""


def test_of_a_secret_that_is_cut_in_part_nothing_is_left() -> None:
    assert apply(b"x secret y", [(0, 5)], [(2, 8, b"<s>")]) == b"<s> y"
    assert apply(b"x secret y", [(5, 10)], [(2, 8, b"<s>")]) == b"x <s>"


@pytest.mark.parametrize("span", [(-1, 1), (0, len(TEXT) + 1), (3, 1), (0, 2), (2, 3), (5, 6)])
def test_a_span_that_is_none_of_the_text_is_an_error(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"bytes {span[0]} to {span[1]} are no characters of a text of {len(TEXT)}"):
        apply(TEXT, [span], [])
    with pytest.raises(ValueError, match="are no characters"):
        apply(TEXT, [], [(*span, b"")])
