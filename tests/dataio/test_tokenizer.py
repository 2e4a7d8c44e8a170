"""The tokenizer loses nothing, splits digits, is repeatable, and keeps the end of a document out of its text."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from dataio import tokenizer
from dataio.backends import encoder
from dataio.probes import probes
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


def save(inner: tokenizers.Tokenizer, path: Path) -> Path:
    inner.add_special_tokens([END_OF_TEXT])
    inner.save(str(path))
    return path


def words_only(path: Path) -> Path:
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "def": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return save(inner, path)


def words_without_a_name_for_others(path: Path) -> Path:
    inner = tokenizers.Tokenizer(models.WordLevel({"the": 0, "def": 1}, unk_token="<unk>"))
    return save(inner, path)


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A byte-level BPE, but for something."""
    tokenizer.train(texts(), 320, path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def lowercase(path: Path) -> Path:
    return changed(path, lambda content: content.update(normalizer={"type": "Lowercase"}))


def nfkc(path: Path) -> Path:
    return changed(path, lambda content: content.update(normalizer={"type": "NFKC"}))


def no_byte_f1(path: Path) -> Path:
    """It begins no character that Unicode has today."""
    return changed(path, lambda content: content["model"]["vocab"].pop(tokenizer._byte_characters()[0xF1]))


def strips(path: Path) -> Path:
    def change(content: dict[str, Any]) -> None:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<x>", "lstrip": True})
        content["added_tokens"][-1]["special"] = False

    return changed(path, change)


LOSSY = [words_only, words_without_a_name_for_others, lowercase, nfkc, no_byte_f1, strips]


@pytest.mark.parametrize("make", LOSSY)
def test_p7_a_tokenizer_that_loses_what_a_text_holds_is_not_adopted(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = make(tmp_path / "theirs.json")
    with pytest.raises(Refusal, match=r"theirs\.json: (loses what a text holds: .* comes back as|does not encode)"):
        tokenizer.adopt(source, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(Refusal, match=r"theirs\.json"):
        encoder(source)


def test_p7_one_that_writes_accents_otherwise_is_adopted_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = changed(tmp_path / "theirs.json", lambda content: content.update(normalizer={"type": "NFC"}))
    with caplog.at_level(logging.WARNING):
        found = tokenizer.adopt(source, tmp_path / "out.json")
    assert found.decode(found.encode("e\u0301")) == "\u00e9"
    (message,) = [record.getMessage() for record in caplog.records]
    assert "theirs.json: changes texts to Unicode's normal form C" in message
    caplog.clear()
    tokenizer.adopt(changed(source, lambda content: None), tmp_path / "out.json")
    assert caplog.records == []


def test_probes_hold_every_byte_that_utf8_has() -> None:
    held = {*"".join(probes([])).encode()}
    assert {*range(256)} - held == {0xC0, 0xC1, *range(0xF5, 0x100)}
