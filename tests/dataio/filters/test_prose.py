"""Every value of prose agrees with its definition, written slowly; every rule drops what is beyond its threshold."""

from __future__ import annotations

import inspect
import math
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataio import documents
from dataio.documents import Document, read_groups, write_documents
from dataio.filters import prose
from dataio.filters.characters import BULLETS, CLOSINGS, DASHES, ENDS, QUOTES, UNSPACED_RANGES
from dataio.filters.prose_values import STOP_WORDS, prose_values

_UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED_RANGES)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_LOWER = str.maketrans({chr(c): chr(c + 32) for c in range(65, 91)})
_POLICY = re.compile(r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies")


def measured(*texts: str, columns: int = 30) -> list[dict[str, float]]:
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    found = prose_values(np.frombuffer(b"".join(encoded), np.uint8), offsets, columns)
    return [{name: float(values[i]) for name, values in found.items()} for i in range(len(texts))]


def width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def over(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def defined(text: str, columns: int = 30) -> dict[str, float]:
    """The values as they are documented. ASCII letters are lowered first: no value tells their case."""
    text = text.translate(_LOWER)
    words = _WORD.findall(text)
    characters = sum(map(len, words))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [part for part in re.split(r"\n(?:[^\S\n]*\n)+", f"\n\n{text}\n\n") if part.strip()]
    letters = [c for c in text if c.isalpha()]
    sentence_end = re.compile(rf"[{re.escape(ENDS)}][{re.escape(CLOSINGS)}]*\Z")

    def share(held: list[bool]) -> float:
        return over(sum(held), len(held))

    values = {
        "words": len(words),
        "unspaced_share": over(len(re.findall(f"[{_UNSPACED}]", text)), characters),
        "mean_word_length": over(sum(map(width, words)), len(words)),
        "hash_share": over(text.count("#"), len(words)),
        "ellipsis_share": over(text.count("...") + text.count("…"), len(words)),
        "bullet_line_share": share([line[0] in BULLETS or _WORD.findall(line)[0] in [*DASHES] for line in lines]),
        "ellipsis_line_share": share([line.endswith(("...", "…")) for line in lines]),
        "alpha_word_share": share([any(map(str.isalpha, word)) for word in words]),
        "terminal_line_share": share([line[-1] in ENDS + QUOTES for line in lines]),
        "short_line_share": share([width(line) <= columns for line in lines]),
        "newlines_per_word": over(text.count("\n"), len(words)),
        "sentences": sum(any(map(str.isalpha, word)) and bool(sentence_end.search(word)) for word in words),
        "curly_brackets": text.count("{"),
        "lorem_ipsum": text.count("lorem ipsum"),
        "javascript_line_share": share(["javascript" in line for line in lines]),
        "policy_line_share": share([bool(_POLICY.search(line)) for line in lines]),
        "stop_words": max(len({*stops.split()} & {*words}) for stops in STOP_WORDS.values()),
    }
    if 2 * sum(c < "\u0530" for c in letters) < len(letters):
        values["stop_words"] = math.nan
    for kind, units in (("line", lines), ("paragraph", paragraphs)):
        split = [[_WORD.findall(line) for line in unit.split("\n") if line.strip()] for unit in units]
        copies = [unit for i, unit in enumerate(split) if unit in split[:i]]
        values[f"duplicate_{kind}_share"] = over(len(copies), len(split))
        length = sum(len(word) for unit in copies for line in unit for word in line)
        values[f"duplicate_{kind}_char_share"] = over(length, characters)
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if n <= 4:
            several = [(times, len("".join(gram))) for gram, times in Counter(grams).items() if times > 1]
            times, length = max(several, default=(0, 0))
            values[f"top_{n}gram_share"] = min(1, over(times * length, characters)) if words else math.nan
        else:
            covered = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
            values[f"duplicate_{n}gram_share"] = over(sum(len(words[i]) for i in covered), characters)
    return values


ODD = "".join(
    [
        "aAbB zé#{.…!?'\")*-•+–",
        "\n\n\n   \t\u00a0\u2028\x1c\x85",
        "漢字かなไทย한국",
        "。！？」۔।",
        "\u0301\u200b😀𠀀\ud7ff\0",
    ]
)
PHRASES = st.one_of(
    st.sampled_from(
        [*STOP_WORDS["en"].split(), "JavaScript", "Privacy", "Policy", "и", "...", "....", "a.", "b!", "-"]
    ),
    st.sampled_from(
        ["\n", "\n\n", " \n\t\n", "lorem ipsum", "we use cookies", "Terms of use", "x " * 9, "a line.\n" * 2]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(st.sampled_from(ODD), max_size=12), PHRASES), max_size=40), st.integers(1, 40))
@example(["a a a a a a a a a a a a a"], 5)
@example(["lorem ipsu"], 1)
@example(["...\n.. .\n....\n……"], 3)
def test_every_value_is_what_its_definition_says(parts: list[str], columns: int) -> None:
    text = "".join(parts)
    assert measured(text, columns=columns) == [pytest.approx(defined(text, columns), nan_ok=True, rel=1e-12)]


def test_every_value_of_real_documentation_is_what_its_definition_says() -> None:
    texts = [inspect.getdoc(module) or "" for module in (re, random, math, np, np.einsum, np.fft)]
    texts += [inspect.getsource(re), inspect.getsource(prose)]
    assert sum(map(len, texts)) > 30_000
    for text, values in zip(texts, measured(*texts)):
        assert values == pytest.approx(defined(text), nan_ok=True, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.sampled_from(ODD), max_size=99), max_size=6), st.randoms())
def test_a_text_has_its_values_whatever_lies_beside_it(texts: list[str], order: random.Random) -> None:
    shuffled = order.sample(texts, len(texts))
    for text, values in zip(shuffled, measured(*shuffled)):
        assert values == pytest.approx(measured(text)[0], nan_ok=True, abs=0)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_bytes_that_are_no_utf8_are_measured_without_harm(text: bytes) -> None:
    values = prose_values(np.frombuffer(text, np.uint8), np.array([0, len(text)]), 30)
    assert 0 <= values["words"][0] <= len(text)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500])
def test_n_times_the_same_word_is_all_repetition(length: int) -> None:
    values = measured(" ".join(["echo"] * length))[0]
    assert values["words"] == length
    for n in range(5, 11):
        assert values[f"duplicate_{n}gram_share"] == (pytest.approx((length - 1) / length) if length > n else 0)


GOOD = """The committee met on Monday to discuss the state of the old bridge and what was to be done with it. Nobody
had crossed it for years, and most of those who spoke said that they would not miss it.

An engineer then explained that iron of that age cannot be welded. He had brought photographs, which were passed
around the table in silence, and a list of firms that might take the work on before winter comes.

After an hour the chair asked for a vote. It was close: seven hands for repair, six against, with one member who would
not say. The minutes will be published as soon as the clerk has checked every name in them.
"""
BAD = {
    "min_words": "The end of the world. It is near. And it will be with us.",
    "max_words": GOOD,
    "min_mean_word_length": "I am of it. " * 3 + " ".join(f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"),
    "max_mean_word_length": GOOD.replace("committee", "c" * 999),
    "max_hash_share": GOOD.replace("the", "#the ##"),
    "max_ellipsis_share": GOOD.replace(",", "...").replace("and", "… and").replace("the", "the…"),
    "max_bullet_line_share": "".join(f"- {line}\n" for line in GOOD.split("\n") if line),
    "max_ellipsis_line_share": GOOD.replace("\n", "...\n"),
    "min_alpha_word_share": GOOD + " 1 2 3 4 5 6 7 8 9 10" * 5,
    "min_stop_words": " ".join(f"Lone{chr(97 + i % 26)}{'xyz'[i // 26]} walk{chr(97 + i % 26)}." for i in range(60)),
    "max_duplicate_line_share": GOOD + "Next\n\n" * 9,
    "max_duplicate_paragraph_share": GOOD + "Next\n\n" * 9,
    "max_duplicate_line_char_share": GOOD + GOOD.split("\n")[0],
    "max_duplicate_paragraph_char_share": f"{GOOD}\n{GOOD}",
    "max_top_2gram_share": GOOD.replace("the", "extraordinary circumstances"),
    "max_top_3gram_share": GOOD.replace("the", "in extraordinary circumstances"),
    "max_top_4gram_share": GOOD.replace("the", "in most extraordinary circumstances"),
    **{f"max_duplicate_{n}gram_share": GOOD + GOOD for n in range(5, 11)},
    "min_terminal_line_share": GOOD.replace(".", ";"),
    "max_short_line_share": re.sub(r"((?:\S+ ){4})", r"\1\n", GOOD),
    "max_newlines_per_word": GOOD.replace(" ", "\n"),
    "min_sentences": GOOD.replace(".", ","),
    "max_curly_brackets": GOOD + "{",
    "max_lorem_ipsum": GOOD + "Lorem Ipsum dolor.",
    "max_javascript_line_share": GOOD.replace("\n", " JavaScript.\n"),
    "max_policy_line_share": GOOD.replace("\n", " We use cookies.\n"),
}
OFF = dict.fromkeys((name for name in prose.Options.model_fields if name[:4] in ("min_", "max_")), None)


def attributes(folder: Path, held: list[Document], options: prose.Options | None = None) -> pa.Table:
    write_documents(folder / "d.parquet", held)
    counts = prose.measure(folder / "d.parquet", folder / "a.parquet", options or prose.Options())
    assert counts["documents"] == len(held) and counts["bytes_in"] == sum(len(d.text.encode()) for d in held)
    beside = {folder / "a.parquet": prose.SCHEMA.names}
    return pa.concat_tables(read_groups(folder / "d.parquet", prose.COLUMNS, beside))


def documents_of(*texts: str, language: str | None = None) -> list[Document]:
    return [Document(text, "s", f"{i}", file=0, row=i, language=language) for i, text in enumerate(texts)]


def test_every_rule_drops_its_text_and_is_switched_off_by_none(tmp_path: Path) -> None:
    assert BAD.keys() == OFF.keys()
    table = attributes(tmp_path, documents_of(GOOD, *BAD.values()))
    assert prose.judge(table, prose.Options(**OFF)) == [None] * table.num_rows
    for row, rule in enumerate(BAD, start=1):
        default = prose.Options.model_fields[rule].default
        only = prose.Options(**{**OFF, rule: 90 if rule == "max_words" else default})
        assert prose.judge(table.slice(row, 1), only) == [rule], rule
        if rule != "max_words":
            assert prose.judge(table.slice(0, 1), only) == [None], rule


def test_of_several_rules_the_first_is_the_reason(tmp_path: Path) -> None:
    table = attributes(tmp_path, documents_of("short {", f"{GOOD}{{", GOOD))
    assert prose.judge(table, prose.Options()) == ["min_words", "max_curly_brackets", None]
    assert prose.judge(table, prose.Options(min_words=None))[0] != "min_words"


def test_a_value_on_the_threshold_is_kept(tmp_path: Path) -> None:
    table = attributes(tmp_path, documents_of(GOOD + "a b c. " * 9))
    for name in OFF:
        value = table[name[4:]][0].as_py()
        assert prose.judge(table, prose.Options(**{**OFF, name: value})) == [None], name
    ten = attributes(tmp_path, documents_of("# a a a a a a a a a"))  # 1 in 10: no binary fraction
    assert prose.judge(ten, prose.Options(**{**OFF, "max_hash_share": 0.1})) == [None]
    assert prose.judge(ten, prose.Options(**{**OFF, "max_hash_share": 0.0999})) == ["max_hash_share"]


CHINESE = """北京是中华人民共和国的首都，也是全国的政治中心、文化中心和国际交往中心。城市位于华北平原的北部。
城市的历史可以追溯到三千多年前，先后有许多王朝在这里建都，留下了大量的宫殿、园林、庙宇和陵墓。
今天的北京是一座现代化的大都市，拥有众多的高等学校和科研机构，同时也面临着交通拥堵和空气污染等问题。
"""
THAI = "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย เป็นศูนย์กลางการปกครอง การศึกษา\n"
KOREAN = """서울은 대한민국의 수도이자 최대 도시이다. 한강을 끼고 있으며 북한산과 관악산으로 둘러싸여 있다.
오늘날 이 도시에는 약 천만 명의 사람이 살고 있으며, 전국 인구의 다섯 명 가운데 한 명이 여기에 산다.
지하철은 세계에서 가장 길고 편리한 것 가운데 하나로 꼽힌다. 조선 시대부터 이 나라의 중심이었다.
고궁과 시장, 그리고 높은 건물이 나란히 서 있는 모습은 이곳을 찾는 많은 사람에게 깊은 인상을 남긴다.
"""
GERMAN = """Der Ausschuss trat am Montag zusammen, um über den Zustand der alten Brücke zu beraten und darüber, was mit
ihr geschehen soll. Seit Jahren hat sie niemand mehr überquert, und die meisten Redner sagten, sie würden sie nicht
vermissen. Ein Ingenieur erklärte dann, dass man Eisen dieses Alters nicht schweißen kann. Er hatte Bilder mitgebracht.
"""


@pytest.mark.parametrize("text", [CHINESE, THAI, KOREAN, GERMAN], ids=["zh", "th", "ko", "de"])
def test_prose_of_other_languages_is_not_dropped_for_what_they_do_not_have(tmp_path: Path, text: str) -> None:
    assert prose.judge(attributes(tmp_path, documents_of(text)), prose.Options()) == [None]


def test_rules_that_need_no_words_still_hold_without_spaces(tmp_path: Path) -> None:
    table = attributes(tmp_path, documents_of(CHINESE + CHINESE, CHINESE + "{", "。\n".join(CHINESE) * 2))
    reasons = prose.judge(table, prose.Options())
    assert reasons == ["max_duplicate_line_share", "max_curly_brackets", "max_duplicate_line_share"]


def test_stop_words_are_not_asked_for_where_there_is_no_list(tmp_path: Path) -> None:
    only = prose.Options(**{**OFF, "min_stop_words": 2})
    swahili = "Watu wote wamezaliwa huru, hadhi zao ni sawa."
    stated = attributes(tmp_path, documents_of(swahili, language="sw"))
    assert prose.judge(stated, only) == [None]
    for language in (None, "markdown", "en"):
        assert prose.judge(attributes(tmp_path, documents_of(swahili, language=language)), only) == ["min_stop_words"]


def test_code_has_no_values_and_is_kept_and_groups_are_those_of_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 3)
    held = documents_of(*[GOOD] * 4, language="en") + documents_of("x" * 9, "", GOOD, language="python")
    held += documents_of("", GOOD, language="markdown")
    table = attributes(tmp_path, held)
    assert [words is None for words in table["words"].to_pylist()] == [False] * 4 + [True] * 3 + [False] * 2
    assert all(table[name].null_count == 3 + (table[name][7].as_py() is None) for name in prose.SCHEMA.names)
    assert prose.judge(table, prose.Options()) == [None] * 7 + ["min_words", None]
    first = (tmp_path / "a.parquet").read_bytes()
    prose.measure(tmp_path / "d.parquet", tmp_path / "a.parquet", prose.Options())
    assert (tmp_path / "a.parquet").read_bytes() == first


def test_a_file_without_documents_has_attributes_without_rows(tmp_path: Path) -> None:
    write_documents(tmp_path / "d.parquet", [])
    counts = prose.measure(tmp_path / "d.parquet", tmp_path / "a.parquet", prose.Options())
    assert counts == {"documents": 0, "measured": 0, "bytes_in": 0}
    assert (
        prose.judge(prose.SCHEMA.empty_table().append_column("language", pa.array([], pa.string())), prose.Options())
        == []
    )


def test_only_measured_options_change_the_attributes(tmp_path: Path) -> None:
    before = attributes(tmp_path, documents_of(GOOD))
    assert attributes(tmp_path, documents_of(GOOD), prose.Options(**OFF)).equals(before)
    assert not attributes(tmp_path, documents_of(GOOD), prose.Options(short_line_columns=150)).equals(before)
