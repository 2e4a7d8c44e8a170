"""What a model must beat: unigram and bigram models of the same tokens, in nats per target as the trainer counts them.

A target is every token but the first of its document, unless its document is masked. A probability is (count + k) /
(total + k * vocabulary), the smoothing `k` being the one of `SMOOTHING` that serves the held-out text best: a choice in
the baseline's favour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from dataio.store import Store
from stoker.errors import Refusal

SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
#: Tokens read at a time.
CHUNK = 1 << 22
#: Largest vocabulary whose table of pairs is held: 16384^2 counts of 8 bytes are 2 GiB.
MAX_BIGRAM_VOCABULARY = 16_384


@dataclass(frozen=True)
class Baseline:
    """A count model: `counts` [contexts, vocabulary], one context for a unigram, one per token before for a bigram."""

    counts: NDArray[np.int64]

    @property
    def entropy(self) -> float:
        """Entropy of the targets it was fitted on, given the context, in nats per target."""
        seen = self.counts[self.counts > 0].astype(np.float64)
        totals = self.counts.sum(axis=1)
        totals = totals[totals > 0].astype(np.float64)
        return float((totals * np.log(totals)).sum() - (seen * np.log(seen)).sum()) / float(totals.sum())

    def cross_entropy(self, stores: Sequence[Store], k: float | None = None) -> float:
        """Nats per target of `stores` (same vocabulary) under this model; `k` None takes the best of `SMOOTHING`."""
        held_out = _count(stores, len(self.counts))
        context, target = held_out.nonzero()
        weight = held_out[context, target].astype(np.float64)
        seen, total = self.counts[context, target], self.counts.sum(axis=1)[context]
        vocabulary = self.counts.shape[1]
        return min(
            float(-(weight * np.log((seen + smooth) / (total + smooth * vocabulary))).sum() / weight.sum())
            for smooth in (SMOOTHING if k is None else (k,))
        )


def unigram(stores: Sequence[Store]) -> Baseline:
    """Fit the frequency of each token."""
    return Baseline(_count(stores, 1))


def bigram(stores: Sequence[Store]) -> Baseline:
    """Fit the frequency of each token after each other. Refuses a vocabulary whose table would not fit in memory."""
    vocabulary = stores[0].tokenizer.vocab_size
    if vocabulary > MAX_BIGRAM_VOCABULARY:
        raise Refusal(
            f"bigram baseline: a vocabulary of {vocabulary} is above {MAX_BIGRAM_VOCABULARY}; use the unigram"
        )
    return Baseline(_count(stores, vocabulary))


def _count(stores: Sequence[Store], contexts: int) -> NDArray[np.int64]:
    """[contexts, vocabulary] how often each target follows each context: the token before, or 0 if there is but one."""
    if len({store.tokenizer for store in stores}) != 1:
        raise Refusal("baseline: the stores must be made with one tokenizer")
    counts = np.zeros((contexts, stores[0].tokenizer.vocab_size), np.int64)
    for store in stores:
        for start, tokens in _chunks(store):
            document = int(store.document_of(np.array([start]))[0])
            _add(counts, tokens, start, document, store.doc_offsets, store.doc_masked)
    return counts


def _chunks(store: Store) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """(first, tokens): pieces that overlap by one token, so that each target has the token before it."""
    for start in range(0, store.num_tokens - 1, CHUNK):
        yield start, store.read(start, min(start + CHUNK + 1, store.num_tokens))


@numba.njit(nogil=True, cache=True)
def _add(counts, tokens, start, document, doc_offsets, doc_masked):  # type: ignore[no-untyped-def]
    """Count the targets tokens[1:], the first of which lies at `start` + 1; `document` holds tokens[0]."""
    for index in range(1, len(tokens)):
        if start + index == doc_offsets[document + 1]:
            document += 1
        elif not doc_masked[document]:
            context = tokens[index - 1] if len(counts) > 1 else 0
            counts[context, tokens[index]] += 1
