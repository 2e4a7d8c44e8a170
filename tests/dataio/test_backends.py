"""The fast back ends give the ids of `tokenizers` or are not used, and giving one up is said aloud."""

from __future__ import annotations

import json
import logging
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio import backends, tokenizer
from dataio.backends import Encoded, Encoder, encoder
from dataio.probes import probes
from dataio.tokenizer import END_OF_TEXT, Tokenizer
from stoker.errors import Refusal
from tests.dataio.test_tokenizer import texts


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train(texts() + probes([]) * 2, 450, to)
    return to


@pytest.fixture(scope="module", params=[*backends.FAST])
def fast(path: Path, request: pytest.FixtureRequest) -> Encoder:
    pytest.importorskip(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FAST", {request.param: backends.FAST[request.param]})
        found = Encoder(path)
    assert found.name == request.param
    return found


def ids(found: Encoder, given: Sequence[str]) -> list[list[int]]:
    flat, lengths = found.encode([text.encode() for text in given])
    assert flat.dtype == np.uint32 and lengths.dtype == np.int64 and lengths.sum() == len(flat)
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] if given else []


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_ids_are_those_of_tokenizers(fast: Encoder, given: list[str]) -> None:
    assert ids(fast, given) == [fast.tokenizer.encode(text) for text in given]


def test_special_tokens_in_a_text_are_text(fast: Encoder) -> None:
    given = [END_OF_TEXT, f"a{END_OF_TEXT}\n{END_OF_TEXT}", ""]
    assert all(fast.tokenizer.id.eos_id not in found for found in ids(fast, given))
    assert [fast.tokenizer.decode(found) for found in ids(fast, given)] == given


def alphabet() -> list[str]:
    """Every character that Python knows but ideographs and syllables of Hangul, of which a few stand for all."""
    found = (chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    names = ("CJK UNIFIED", "HANGUL SYLL", "TANGUT", "CUNEIFORM", "EGYPTIAN", "ANATOLIAN", "CJK COMPAT", "YI SYLL")
    draw = random.Random(0)
    return [
        character
        for character in found
        if unicodedata.category(character) not in ("Cn", "Co")
        and (not unicodedata.name(character, "").startswith(names) or draw.random() < 0.02)
    ]


#: What splits differently according to what the character is.
AROUND = "a{0}b 1{0}2 {0}'s\n{0} "


def test_every_character_falls_into_the_class_that_tokenizers_has_for_it(fast: Encoder) -> None:
    given = [AROUND.format(character) for character in alphabet()]
    assert len(given) > 20_000
    wrong = [ascii(text) for text, a, b in zip(given, ids(fast, given), reference(fast, given)) if a != b]
    assert wrong == []


@pytest.mark.verify
def test_every_code_point_does(fast: Encoder) -> None:
    for start in range(0, 0x110000, 0x8000):
        given = [AROUND.format(chr(i)) for i in range(start, start + 0x8000) if not 0xD800 <= i < 0xE000]
        wrong = [ascii(text) for text, a, b in zip(given, ids(fast, given), reference(fast, given)) if a != b]
        assert wrong == []


def reference(found: Encoder, given: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in found.tokenizer.inner.encode_batch_fast(given, add_special_tokens=False)]


def test_a_text_with_a_character_newer_than_the_tables_goes_through_tokenizers(fast: Encoder) -> None:
    unknown = next(chr(i) for i in range(0x32000, 0x40000) if unicodedata.category(chr(i)) == "Cn")
    given = ["a", f"x {unknown}'m", "", f"{unknown}", "b" * 100, f"\U0010fffd{unknown[:0]}", "é漢🙂"]
    assert fast._newer([text.encode() for text in given]).tolist() == [False, True, False, True, False, False, False]
    assert ids(fast, given) == [fast.tokenizer.encode(text) for text in given]


def test_a_newer_character_is_found_wherever_it_stands_in_plain_text(fast: Encoder) -> None:
    unknown = next(chr(i) for i in range(0x32000, 0x40000) if unicodedata.category(chr(i)) == "Cn")
    given = ["x" * before + sign + "y" * 33 for before in range(100) for sign in (unknown, "é", "")]
    assert fast._newer([text.encode() for text in given]).tolist() == [unknown in text for text in given]


def test_a_cache_that_has_grown_is_begun_anew_and_ids_stay_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken")
    grown = iter(range(0, 10**15, 10**9))
    monkeypatch.setattr(backends, "_resident_bytes", lambda: next(grown))
    found = backends._Gigatoken(backends._of_texts(path))
    first = found._inner
    before = found.encode([b"def f(x):\n    return 12\n"])[0].tolist()
    assert found._inner is not first
    assert found.encode([b"def f(x):\n    return 12\n"])[0].tolist() == before


class Broken:
    """Ids of `tokenizers`, but for texts that hold something."""

    def __init__(self, path: Path, something: bytes) -> None:
        self._right, self._something = backends._Reference(Tokenizer.load(path)), something

    def encode(self, given: Sequence[bytes]) -> Encoded:
        flat, lengths = self._right.encode(given)
        return (flat + 1 if any(self._something in text for text in given) else flat), lengths


class Panic(BaseException):
    """What a library in Rust may raise."""


def _missing(content: str) -> Broken:
    raise ImportError


def _panics(content: str) -> Broken:
    raise Panic("no such model\nand a long story")


def test_libraries_that_are_missing_panic_or_are_wrong_are_given_up_aloud(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {"gigatoken": _missing, "fastokens": _panics}
    monkeypatch.setattr(backends, "FAST", wrong)
    with caplog.at_level(logging.WARNING):
        found = Encoder(path)
    assert found.name == "tokenizers"
    (message,) = [record.getMessage() for record in caplog.records]
    assert "gigatoken is not installed (pip install 'stoker[data]')" in message
    assert "fastokens does not take this tokenizer (no such model)" in message
    assert "tokens are made by tokenizers, about 80 times slower" in message
    assert ids(found, ["def", ""]) == [found.tokenizer.encode("def"), []]


def test_one_that_is_wrong_on_a_probe_or_on_the_data_is_given_up_aloud(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = {"gigatoken": lambda _: Broken(path, "漢字".encode()), "fastokens": lambda _: Broken(path, b"zebra")}
    monkeypatch.setattr(backends, "FAST", made)
    with caplog.at_level(logging.WARNING):
        found = Encoder(path)
        assert found.name == "fastokens"
        assert "gigatoken differs from tokenizers at token 0 of a text" in caplog.text
        found.check([b"", b"class A:"] * 100)
        assert found.name == "fastokens"
        found.check([b"x", b" zebra 1"])
    assert found.name == "tokenizers" and "fastokens differs from tokenizers" in caplog.text
    assert ids(found, [" zebra 1"]) == [found.tokenizer.encode(" zebra 1")]


def test_what_a_file_has_for_fine_tuning_cuts_and_pads_nothing(path: Path, tmp_path: Path) -> None:
    content = json.loads(path.read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    (tmp_path / "tuned.json").write_text(json.dumps(content))
    given = ["x", "def f(x):\n    return x\n" * 9]
    assert ids(encoder(tmp_path / "tuned.json"), given) == [Tokenizer.load(path).encode(text) for text in given]


def test_a_tokenizer_is_opened_once_until_its_file_changes(path: Path, tmp_path: Path) -> None:
    assert encoder(path) is encoder(path)
    with pytest.raises(Refusal, match="there is no tokenizer here"):
        encoder(tmp_path / "none.json")
