"""The tokenizer loses nothing, splits digits, is repeatable, and keeps the end of a document out of its text."""

from __future__ import annotations

import base64
import itertools
import json
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


def ranks_of(path: Path) -> dict[bytes, int]:
    """Of a trained tokenizer: its tokens as bytes, without end-of-text."""
    byte_of = {character: byte for byte, character in enumerate(tokenizer._byte_characters())}
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    return {bytes(byte_of[c] for c in token): i for token, i in vocabulary.items() if token != END_OF_TEXT}


def tiktoken_file(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def by_ranks(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken does to a word, by its definition: join the leftmost pair of the least rank, while there is one."""
    parts = [bytes([byte]) for byte in word]
    while word not in ranks:
        joined = [ranks.get(a + b, 2**31) for a, b in itertools.pairwise(parts)]
        if not joined or min(joined) == 2**31:
            break
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[word]] if word in ranks else [ranks[part] for part in parts]


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, dict[bytes, int]]:
    folder = tmp_path_factory.mktemp("adopted")
    tokenizer.train(texts(), 330, folder / "trained.json")
    ranks = ranks_of(folder / "trained.json")
    source = tiktoken_file(folder / "some.tiktoken", ranks)
    return tokenizer.adopt(source, folder / "tokenizer.json", pattern=r"[\s\S]+"), ranks


@given(word=st.text(alphabet="defimportclasnuvbhtw é漢", min_size=1, max_size=12))
def test_an_adopted_tiktoken_file_joins_what_tiktoken_joins(
    adopted: tuple[Tokenizer, dict[bytes, int]], word: str
) -> None:
    found, ranks = adopted
    assert found.encode(word) == by_ranks(word.encode(), ranks)


def test_an_adopted_tokenizer_ends_documents_as_it_does_itself(tmp_path: Path, trained: Tokenizer) -> None:
    tokenizer.train(texts(), 320, tmp_path / "trained.json")
    ranks = ranks_of(tmp_path / "trained.json")
    source = tiktoken_file(tmp_path / "r50k_base.tiktoken", ranks)
    plain = tokenizer.adopt(source, tmp_path / "plain.json")
    assert (plain.id.eos_id, plain.id.vocab_size) == (320, 321)
    gaps = tokenizer.adopt(source, tmp_path / "gaps.json", special_tokens={"<eos>": 400, "<|fim|>": 500})
    assert (gaps.id.eos_id, gaps.id.vocab_size) == (400, 501)
    assert 400 not in gaps.encode("a<eos><|fim|>b") and gaps.decode(gaps.encode("a<eos>b")) == "a<eos>b"
    again = tokenizer.adopt(tmp_path / "gaps.json", tmp_path / "copy.json")
    assert again.id == gaps.id


def test_p7_what_cannot_be_adopted_is_refused(tmp_path: Path) -> None:
    tokenizer.train(texts(), 320, tmp_path / "trained.json")
    ranks, out = ranks_of(tmp_path / "trained.json"), tmp_path / "out.json"
    with pytest.raises(Refusal, match="does not say how texts are split"):
        tokenizer.adopt(tiktoken_file(tmp_path / "x.tiktoken", ranks), out)
    for broken in ({**ranks, b"qzj": 5}, {token: rank for token, rank in ranks.items() if token != b"a"}):
        with pytest.raises(Refusal, match="is it a tiktoken file"):
            tokenizer.adopt(tiktoken_file(tmp_path / "x.tiktoken", broken), out, pattern=".")
    (tmp_path / "x.tiktoken").write_text("!!!! 1\n")
    with pytest.raises(Refusal, match="line 1: not a token in base64 and a rank"):
        tokenizer.adopt(tmp_path / "x.tiktoken", out, pattern=".")
    with pytest.raises(Refusal, match="cannot be read"):
        tokenizer.adopt(tmp_path / "none.json", out)
    assert not out.exists()
