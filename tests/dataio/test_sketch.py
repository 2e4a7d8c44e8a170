"""Signatures agree as often as the shingles of two texts do: against sets of shingles, made by a regular expression."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.dedup.sketch import EMPTY, NUM_BANDS, NUM_BINS, SHINGLE_WORDS, band_keys, signatures

#: The definition: word characters beyond ASCII are whatever is not ASCII, ideographs are words of their own.
_WORD = re.compile(r"[\u3000-\u9fff]|(?:[A-Za-z0-9_]|[^\x00-\x7f\u3000-\u9fff])+")
_UPPER = str.maketrans({chr(c): chr(c + 32) for c in range(65, 91)})


def words(text: str) -> list[str]:
    return _WORD.findall(text.translate(_UPPER))


def shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    last = max(len(found) - SHINGLE_WORDS, 0)
    return {tuple(found[i : i + SHINGLE_WORDS]) for i in range(last + 1)} if found else set()


def jaccard(a: str, b: str) -> float:
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


def sign(*texts: str) -> np.ndarray:
    return signatures([text.encode() for text in texts])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="aB1_ .,\n-éß漢字かなü한", max_size=60), min_size=1, max_size=6))
def test_texts_of_the_same_shingles_have_the_same_signature_and_others_do_not(texts: list[str]) -> None:
    signed = sign(*texts)
    for i, a in enumerate(texts):
        assert (signed[i] == EMPTY).all() == (not words(a))
        for j, b in enumerate(texts):
            if shingles(a) == shingles(b):
                assert (signed[i] == signed[j]).all(), (a, b)
            else:
                assert (signed[i] != signed[j]).any(), (a, b)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=8), st.randoms())
def test_any_bytes_have_a_signature_that_no_other_text_moves(texts: list[bytes], order: random.Random) -> None:
    together = signatures(texts)
    shuffled = list(range(len(texts)))
    order.shuffle(shuffled)
    again = signatures([texts[i] for i in shuffled])
    assert all((again[place] == together[i]).all() for place, i in enumerate(shuffled))
    assert all((signatures([text])[0] == together[i]).all() for i, text in enumerate(texts))


@pytest.mark.parametrize("length", [30, 100, 400, 3000])
@pytest.mark.parametrize("changed", [0.005, 0.02, 0.06, 0.15])
def test_agreement_estimates_the_jaccard_similarity(length: int, changed: float) -> None:
    """300 pairs whose words are replaced at random: the mean error is within 4 standard errors, and the spread is that
    of 256 independent draws (short texts share bins, which widens it)."""
    generator = random.Random(length)
    errors, deviations = [], []
    for _ in range(300):
        a = [f"w{generator.randrange(10**6)}" for _ in range(length)]
        b = [f"x{generator.randrange(10**6)}" if generator.random() < changed else word for word in a]
        exact = jaccard(" ".join(a), " ".join(b))
        first, second = sign(" ".join(a), " ".join(b))
        errors.append(float((first == second).mean()) - exact)
        deviations.append(np.sqrt(exact * (1 - exact) * (1 / NUM_BINS + 1 / max(length - SHINGLE_WORDS + 1, 1))))
    assert abs(np.mean(errors)) <= 4 * np.mean(deviations) / np.sqrt(300) + 1e-3
    assert np.std(errors) <= 1.3 * np.mean(deviations) + 1e-3


def test_a_band_is_shared_as_often_as_its_bins_agree() -> None:
    generator = random.Random(0)
    shared, expected = [], []
    for _ in range(400):
        a = [f"w{generator.randrange(10**6)}" for _ in range(500)]
        b = [f"x{generator.randrange(10**6)}" if generator.random() < 0.03 else word for word in a]
        signed = sign(" ".join(a), " ".join(b))
        keys = band_keys(signed)
        agree = (signed[0] == signed[1]).reshape(NUM_BANDS, -1).all(1)
        assert ((keys[:, 0] == keys[:, 1]) == agree).all()
        shared.append(agree.any())
        expected.append(1 - (1 - jaccard(" ".join(a), " ".join(b)) ** 8) ** NUM_BANDS)
    assert abs(np.mean(shared) - np.mean(expected)) <= 0.05


def test_bands_of_different_places_never_meet() -> None:
    """The same bins in another band have another key."""
    keys = band_keys(np.full((1, NUM_BINS), 7, np.uint32))
    assert len(np.unique(keys)) == NUM_BANDS
