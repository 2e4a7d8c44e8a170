"""The baselines equal models counted by hand, over exactly the targets that the trainer counts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from dataio import baseline
from dataio.store import Store
from dataio.types import TokenizerId
from stoker.errors import Refusal
from tests.dataio import synthetic

TOKENIZER = TokenizerId("11" * 32, vocab_size=6, eos_id=5)


def pairs(store: Store) -> list[tuple[int, int]]:
    """(token before, target) of every target, from the documents themselves."""
    tokens, offsets = store.read(0, store.num_tokens).tolist(), store.doc_offsets.tolist()
    return [
        (tokens[position - 1], tokens[position])
        for document, masked in enumerate(store.doc_masked)
        for position in range(offsets[document] + 1, offsets[document + 1])
        if not masked
    ]


@pytest.fixture
def stores(tmp_path: Path) -> list[Store]:
    rng = __import__("random").Random(0)
    made = []
    for name in ("train", "heldout"):
        documents = [[rng.choice([0, 0, 0, 1, 2, 4]) for _ in range(rng.randrange(0, 30))] for _ in range(40)]
        masked = [rng.random() < 0.2 for _ in documents]
        made.append(synthetic.store(tmp_path / name, documents, masked, tokenizer=TOKENIZER))
    return made


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_unigram_and_bigram_equal_models_counted_by_hand(
    stores: list[Store], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "CHUNK", chunk)
    train, held_out = (pairs(store) for store in stores)
    seen, single = Counter(train), Counter(target for _, target in train)
    before = Counter(context for context, _ in train)

    def bigram(k: float) -> float:
        return -sum(math.log((seen[pair] + k) / (before[pair[0]] + 6 * k)) for pair in held_out) / len(held_out)

    def unigram(k: float) -> float:
        return -sum(math.log((single[t] + k) / (len(train) + 6 * k)) for _, t in held_out) / len(held_out)

    entropy = -sum(count * math.log(count / len(train)) for count in single.values()) / len(train)
    conditional = -sum(count * math.log(count / before[pair[0]]) for pair, count in seen.items()) / len(train)
    for fitted, by_hand, expected_entropy in (
        (baseline.unigram(stores[:1]), unigram, entropy),
        (baseline.bigram(stores[:1]), bigram, conditional),
    ):
        assert fitted.entropy == pytest.approx(expected_entropy, rel=1e-12)
        assert fitted.cross_entropy(stores[1:], k=0.5) == pytest.approx(by_hand(0.5), rel=1e-12)
        best = min(by_hand(k) for k in baseline.SMOOTHING)
        assert fitted.cross_entropy(stores[1:]) == pytest.approx(best, rel=1e-12)


def test_baselines_that_make_no_sense_are_refused(stores: list[Store], tmp_path: Path) -> None:
    other = synthetic.store(tmp_path / "other", [[1, 2]], tokenizer=TokenizerId("22" * 32, 6, 5))
    with pytest.raises(Refusal, match="one tokenizer"):
        baseline.unigram([stores[0], other])
    large = synthetic.store(tmp_path / "large", [[1, 2]], tokenizer=TokenizerId("22" * 32, 50_000, 5))
    with pytest.raises(Refusal, match="use the unigram"):
        baseline.bigram([large])
