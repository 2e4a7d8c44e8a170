"""The tokenizer loses nothing, splits digits, is repeatable, and keeps the end of a document out of its text."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio import tokenizer
from dataio.tokenizer import END_OF_TEXT, Tokenizer
from stoker.errors import Refusal

WORDS = [
    "def",
    "return",
    "import",
    "class",
    "self",
    "for",
    "None",
    "the",
    "of",
    "and",
    "is",
    "that",
    "numbers",
    "value",
]


def texts(seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choice(["\n", "\n    ", " ", " ", "(", "): ", " = "]) + rng.choice(WORDS) for _ in range(200))
        for _ in range(50)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer.train(texts(), 320, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@given(text=st.text(max_size=60))
def test_every_text_decodes_to_itself(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_documents_end_with_end_of_text_and_their_tokens_are_those_of_encode(trained: Tokenizer) -> None:
    documents = ["def f():\n    return 12\n", "", "naïve ∑ 🙂", "the end"]
    tokens, lengths = trained.encode_batch(documents)
    assert tokens.dtype == "uint16"
    expected = [[*trained.encode(text), trained.id.eos_id] for text in documents]
    assert tokens.tolist() == list(itertools.chain(*expected)) and lengths.tolist() == [len(ids) for ids in expected]
    assert trained.encode_batch([])[1].tolist() == []


def test_a_text_that_mentions_end_of_text_is_not_cut_by_it(trained: Tokenizer) -> None:
    ids = trained.encode(f"a {END_OF_TEXT} b")
    assert trained.id.eos_id not in ids and trained.decode(ids) == f"a {END_OF_TEXT} b"
    assert trained.decode([trained.id.eos_id]) == END_OF_TEXT


def test_digits_are_single_tokens_and_indentation_keeps_the_word_after_it(trained: Tokenizer) -> None:
    assert [trained.decode([i]) for i in trained.encode("120345")] == list("120345")
    deep, flat = trained.encode("\n            return"), trained.encode(" return")
    assert deep[-len(flat) :] == flat


def test_training_is_repeatable_and_identified_by_its_file(tmp_path: Path, trained: Tokenizer) -> None:
    again = tokenizer.train(texts(), 320, tmp_path / "again.json")
    other = tokenizer.train(texts(1), 320, tmp_path / "other.json")
    assert again.id == trained.id and other.id.sha256 != trained.id.sha256
    assert Tokenizer.load(tmp_path / "again.json").id == again.id
    assert (again.id.vocab_size, again.id.eos_id) == (320, 0)


def test_p7_what_is_no_tokenizer_is_refused(tmp_path: Path, trained: Tokenizer) -> None:
    with pytest.raises(Refusal, match="no tokenizer here"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(Refusal, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "broken.json")
    with pytest.raises(Refusal, match="ask for fewer than vocab_size=5000"):
        tokenizer.train(texts(), 5000, tmp_path / "large.json")
    with pytest.raises(Refusal, match="must exceed the 256 bytes"):
        tokenizer.train(texts(), 256, tmp_path / "small.json")
