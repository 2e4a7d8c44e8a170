"""Repeated passages: byte for byte what the definition says, by a suffix array and by looking at every window."""

from __future__ import annotations

import os
import random
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pydivsufsort
import pytest

from dataio import documents
from dataio.dedup import substring, windows
from dataio.dedup.arrays import save
from dataio.dedup.substring import Options
from dataio.documents import Document, read_groups, write_documents

START = datetime(2020, 1, 1, tzinfo=UTC)
#: (path, row) -> spans
Spans = dict[tuple[str, int], list[tuple[int, int]]]


def find(
    folder: Path,
    files: Sequence[Sequence[Document]],
    options: Options,
    parts: int = 1,
    budget_bytes: int = 1 << 26,
    dead: Collection[tuple[str, int]] = (),
) -> Spans:
    """All three steps over document files."""
    names = range(len(files))
    paths, folders = [folder / f"{i}.parquet" for i in names], [folder / f"{i}.anchors" for i in names]
    firsts = [0]
    for path, to, held in zip(paths, folders, files):
        write_documents(path, held)
        save(folder / "alive.npy", np.array([(d.path, d.row) not in dead for d in held], np.bool_))
        firsts.append(firsts[-1] + substring.anchors(path, folder / "alive.npy", to, options)["bytes_in"])
    matched = [folder / f"match{part}.npy" for part in range(parts)]
    for part, path in enumerate(matched):
        assert substring.match(folders, part, parts, path, options, budget_bytes)["forgotten"] == 0
    found: Spans = {}
    for path, to, first in zip(paths, folders, firsts):
        attributes = path.with_suffix(".attributes")
        substring.decide(path, to, first, matched, attributes)
        for group in read_groups(path, ["path", "row"], {attributes: substring.SCHEMA.names}):
            for row in group.to_pylist():
                spans = [(span["start"], span["stop"]) for span in row["substring"]]
                assert row["substring_bytes"] == sum(stop - start for start, stop in spans)
                found[row["path"], row["row"]] = spans
    return found


def order(document: Document) -> tuple[datetime, bytes]:
    return document.timestamp or datetime.max.replace(tzinfo=UTC), document.id


def marked(held: Sequence[Document], options: Options) -> dict[tuple[str, int], bytearray]:
    """The definition: 1 for every byte in a window that occurs earlier without overlapping it."""
    first: dict[bytes, tuple[Document, int]] = {}
    marks = {(d.path, d.row): bytearray(d.bytes) for d in held}
    size = options.min_bytes
    for document in sorted(held, key=order):
        text = document.text.encode()
        for i in range(len(text) - size + 1):
            other, at = first.setdefault(text[i : i + size], (document, i))
            if other is not document or i - at >= size:
                marks[document.path, document.row][i : i + size] = b"\1" * size
                if not options.keep_first:
                    marks[other.path, other.row][at : at + size] = b"\1" * size
    return marks


def spans_of(marks: Sequence[int], text: bytes) -> list[tuple[int, int]]:
    """Stretches of marked bytes, without what is part of a character at their ends."""
    starts = [i for i, mark in enumerate(marks) if mark and (i == 0 or not marks[i - 1])]
    stops = [i + 1 for i, mark in enumerate(marks) if mark and (i + 1 == len(marks) or not marks[i + 1])]
    begins = [i for i, byte in enumerate(text) if byte & 0xC0 != 0x80] + [len(text)]
    spans = [(begins[bisect_left(begins, a)], begins[bisect_right(begins, b) - 1]) for a, b in zip(starts, stops)]
    return [(start, stop) for start, stop in spans if start < stop]


def defined(held: Sequence[Document], options: Options) -> Spans:
    marks = marked(held, options)
    return {(d.path, d.row): spans_of(marks[d.path, d.row], d.text.encode()) for d in held}


def documents_of(texts: Sequence[str], generator: random.Random, path: str = "a") -> list[Document]:
    times = [None, *(START + timedelta(days=365 * years) for years in (-80, 0, 1))]
    return [Document(text, "s", path, file=0, row=i, timestamp=generator.choice(times)) for i, text in enumerate(texts)]


def patchwork(generator: random.Random, alphabet: str, num_texts: int) -> list[str]:
    """Texts of pieces that come again, some often, some cut short, some periodic."""
    pieces = ["".join(generator.choices(alphabet, k=generator.randrange(1, 150))) for _ in range(12)]
    pieces += [generator.choice(alphabet) * 150, "".join(generator.choices(alphabet, k=3)) * 40]
    texts = []
    for _ in range(num_texts):
        cuts = (piece[: generator.randrange(1, 151)] for piece in generator.choices(pieces, k=generator.randrange(9)))
        texts.append("".join(cuts))
    return list(dict.fromkeys(texts))


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("alphabet", ["ab", "abcdefghij \n", "aéß日本😀 "])
def test_what_is_cut_is_what_the_definition_says(tmp_path: Path, alphabet: str, keep_first: bool) -> None:
    generator = random.Random(alphabet)
    for size in (32, 33, 63, 64, 65):
        held = documents_of(patchwork(generator, alphabet, 60), generator)
        options = Options(min_bytes=size, keep_first=keep_first)
        expected = defined(held, options)
        assert sum(map(len, expected.values())) > 20
        assert find(tmp_path, [held[:25], [], held[25:]], options) == expected


@pytest.fixture(scope="module")
def sources() -> list[Document]:
    """Three megabytes of the standard library, which repeats itself in passages rather than files."""
    folder = Path(os.__file__).parent
    paths = [p for name in ("idlelib", "email", "asyncio", "encodings") for p in sorted((folder / name).glob("*.py"))]
    return documents_of([path.read_text("utf-8") for path in paths], random.Random(1))


def by_suffix_array(held: Sequence[Document], size: int) -> Spans:
    """The definition once more, by the ranges of the suffix array whose common prefix has `size` bytes."""
    held = sorted(held, key=order)
    texts = [document.text.encode() for document in held]
    text = b"".join(texts)
    edges = np.cumsum([0, *map(len, texts)])
    suffixes = pydivsufsort.divsufsort(text)
    shared = pydivsufsort.kasai(text, suffixes)  # of a suffix with the next one
    groups = np.cumsum(np.insert(shared[:-1] < size, 0, 0))
    of = np.searchsorted(edges, suffixes, side="right") - 1
    whole = suffixes + size <= edges[of + 1]  # not across the end of a document
    first = np.full(groups[-1] + 1, len(text))
    np.minimum.at(first, groups[whole], suffixes[whole])
    first = first[groups]
    cut = whole & ((np.searchsorted(edges, first, side="right") - 1 != of) | (suffixes - first >= size))
    marks = np.zeros(len(text) + 1, np.int64)
    np.add.at(marks, suffixes[cut], 1)
    np.add.at(marks, suffixes[cut] + size, -1)
    covered = np.cumsum(marks) > 0
    return {(d.path, d.row): spans_of(covered[edges[i] : edges[i + 1]].tolist(), texts[i]) for i, d in enumerate(held)}


@pytest.mark.parametrize("size", [64, 200])
def test_a_suffix_array_finds_the_same_in_source_code(tmp_path: Path, sources: list[Document], size: int) -> None:
    expected = by_suffix_array(sources, size)
    cut = sum(stop - start for spans in expected.values() for start, stop in spans)
    print(f"{cut} of {sum(d.bytes for d in sources)} bytes are repeated, {size} at a time")
    assert cut > 20_000
    assert find(tmp_path, [sources[::2], sources[1::2]], Options(min_bytes=size), parts=3) == expected


def test_files_parts_budget_and_order_change_nothing(
    tmp_path: Path, sources: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(4)
    held = [*sources[:40], *documents_of(patchwork(generator, "abc", 40), generator, "b")]
    held += [Document(d.text, "s", f"copy/{d.path}", 0, d.row, timestamp=d.timestamp) for d in held[::5]]
    options = Options(min_bytes=65)
    expected = find(tmp_path, [held], options)
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 7)
    monkeypatch.setattr(substring, "RUN_ANCHORS", 100)
    for count, parts, budget_bytes in ((3, 1, 1 << 20), (5, 3, 1 << 26), (1, 8, 1 << 20)):
        generator.shuffle(held)
        assert find(tmp_path, [held[i::count] for i in range(count)], options, parts, budget_bytes) == expected


def test_a_dead_document_is_neither_cut_nor_a_reason_to_cut(tmp_path: Path, sources: list[Document]) -> None:
    options, dead = Options(min_bytes=64), {(d.path, d.row) for d in sources[::3]}
    found = find(tmp_path, [sources[:30], sources[30:]], options, dead=dead)
    assert found == {
        **by_suffix_array([d for d in sources if (d.path, d.row) not in dead], 64),
        **{key: [] for key in dead},
    }


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 129, 500])
def test_a_run_keeps_one_passage(tmp_path: Path, length: int) -> None:
    """Of one letter N bytes stay, and of what repeats itself every few bytes the fewest whole periods that hold N."""
    texts = ["a" * length, "bcd" * (length // 3), "ü" * (length // 2)]
    found = find(tmp_path, [[Document(t, "s", str(i), 0, i) for i, t in enumerate(texts)]], Options(min_bytes=64))
    for i, (text, kept) in enumerate(zip(texts, (64, 66, 64))):
        stop = len(text.encode())
        assert found[str(i), i] == ([(kept, stop)] if stop >= kept + 64 else [])


@pytest.mark.parametrize("period", [1, 2, 7, 37])
def test_a_periodic_text_has_few_anchors(tmp_path: Path, period: int) -> None:
    text = "".join(random.Random(period).choices("abcdef", k=period)) * (1_000_000 // period)
    write_documents(tmp_path / "d.parquet", [Document(text, "s", "p", 0, 0), Document(text + "!", "s", "q", 0, 1)])
    save(tmp_path / "alive.npy", np.ones(2, np.bool_))
    counts = substring.anchors(tmp_path / "d.parquet", tmp_path / "alive.npy", tmp_path / "a", Options())
    assert counts["anchors"] <= 2 * (200 + 101)


def test_what_does_not_fit_the_budget_is_counted(tmp_path: Path) -> None:
    """An anchor in ever other surroundings: one block cannot hold what a later one is to be compared with."""
    generator = random.Random(2)
    noise = ["".join(generator.choices("abcdefgh", k=200)) for _ in range(600)]
    middle = "".join(generator.choices("abcdefgh", k=130))
    write_documents(tmp_path / "d.parquet", [Document(n + middle + n, "s", str(i), 0, i) for i, n in enumerate(noise)])
    save(tmp_path / "alive.npy", np.ones(len(noise), np.bool_))
    substring.anchors(tmp_path / "d.parquet", tmp_path / "alive.npy", tmp_path / "a", Options())
    forgotten = [
        substring.match([tmp_path / "a"], 0, 1, tmp_path / "m.npy", Options(), budget)["forgotten"]
        for budget in (1 << 16, 1 << 24)
    ]
    assert forgotten[0] > 0 and forgotten[1] == 0


def test_ranges_of_hashes_hold_about_the_same(tmp_path: Path, sources: list[Document]) -> None:
    """So that one of them fits the budget: hashes that were chosen for being small are not small any more."""
    write_documents(tmp_path / "d.parquet", sources)
    save(tmp_path / "alive.npy", np.ones(len(sources), np.bool_))
    substring.anchors(tmp_path / "d.parquet", tmp_path / "alive.npy", tmp_path / "a", Options())
    counts = [
        substring.match([tmp_path / "a"], part, 10, tmp_path / "m.npy", Options(), 1 << 26)["anchors"]
        for part in range(10)
    ]
    assert max(counts) < 1.2 * sum(counts) / 10


def test_windows_of_one_hash_that_differ_are_told_apart() -> None:
    """A polynomial modulo 2^64 hashes the 1024 first signs of the Thue-Morse sequence as it does their opposites."""
    signs = [i.bit_count() % 2 for i in range(1024)]
    texts = [[*signs, *range(76)], [*(1 - sign for sign in signs), *range(76)]]
    hashes = {sum(byte * pow(windows._BASE, -i, 2**64) for i, byte in enumerate(text)) % 2**64 for text in texts}
    assert len(hashes) == 1
    around = np.zeros((3, windows.num_grams(1100) - 1 + 1100), np.uint8)
    around[:, -1100:] = [*texts, texts[0]]
    rows = np.zeros(3, windows.ROW)
    rows["document"], rows["position"] = range(3), range(0, 6000, 2000)
    spans, leads = windows.repeats(around, rows, 1100, True)
    assert spans.tolist() == [[4000, 5100]] and leads.tolist() == [True, True, False]


def test_a_document_that_is_mostly_repeated_is_dropped() -> None:
    table = pa.table({"bytes": [100, 100, 0, 100], "substring_bytes": [50, 51, 0, 100]})
    assert substring.judge(table, Options(max_share=0.5)) == [None, "mostly_repeated", None, "mostly_repeated"]
    assert substring.judge(table, Options(max_share=None)) == [None] * 4


def test_no_documents_are_no_work(tmp_path: Path) -> None:
    assert find(tmp_path, [[], []], Options(), parts=2) == {}
    held = [Document("", "s", "a", 0, 0), Document("short", "s", "b", 0, 1)]
    assert find(tmp_path, [held], Options()) == {("a", 0): [], ("b", 1): []}


@pytest.mark.parametrize("code", [False, True])
def test_passages_of_code_are_cut_where_that_is_asked_for(tmp_path: Path, code: bool) -> None:
    passage = "the same words, again and again, in one text after another\n" * 3
    held = [
        Document(f"{language} {number}\n{passage}", "s", f"{language}{number}", 0, number, language=language)
        for language in ("python", "en", None)
        for number in range(2)
    ]
    spans = find(tmp_path, [held], Options(min_bytes=100, code=code))
    cut = {path for (path, _), found in spans.items() if found}
    assert any(path.startswith("python") for path in cut) == code
    assert len(cut) == (5 if code else 3)  # all but the earliest
