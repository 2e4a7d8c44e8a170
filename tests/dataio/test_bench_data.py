"""``stoker bench data``: its corpus is as alike as it says, and every figure and every absent peer has a row."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import pytest

from dataio import bench, bench_peers
from dataio.bench_corpus import CHANGES, Corpus, build
from tests.dataio import test_sketch

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
    "phi",
]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installed code and prose of one's own."""
    for number in range(60):
        text = " ".join(f"{word}_{number}_{at}" for at in range(8) for word in WORDS)
        (tmp_path / f"{number}{('.py', '.md')[number % 2]}").write_text(text.replace("_0 ", "\n"))
    (tmp_path / "again.py").write_text((tmp_path / "0.py").read_text())
    (tmp_path / "short.py").write_text("too short\n")
    (tmp_path / "latin.py").write_bytes(b"\xe9 " * 200)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_the_corpus_is_a_function_of_its_seed_and_says_how_alike_its_copies_are(packages: Path) -> None:
    corpus = build(1 << 30, 0.5, seed=1)
    assert corpus == build(1 << 30, 0.5, seed=1) != build(1 << 30, 0.5, seed=2)
    assert len({*corpus.texts}) == len(corpus.texts) == 60 + len(corpus.copies) > 80
    unchanged = {*CHANGES} - {copy.change for copy in corpus.copies}
    assert all(change.endswith("of words") for change in unchanged), "by chance no word of a text was substituted"
    for copy in corpus.copies:
        independent = test_sketch.jaccard(corpus.texts[copy.text], corpus.texts[copy.of])
        assert copy.jaccard == pytest.approx(independent), copy.change
        assert (copy.jaccard == 1) == (copy.change in ("white space", "upper case"))
    assert corpus.num_bytes == sum(len(text.encode()) for text in corpus.texts)


def test_a_budget_is_spent_half_on_code_and_half_on_prose(packages: Path) -> None:
    corpus = build(40_000, 0.0, seed=0)
    code = {path.read_text() for path in packages.glob("*[0-9].py")}
    sizes = [sum(len(text) for text in corpus.texts if (text in code) == kind) for kind in (True, False)]
    assert all(20_000 <= size < 20_000 + 3000 for size in sizes)


def test_parts_are_different_texts_of_about_the_size_asked_for() -> None:
    corpus = Corpus([f"{number:010d}" for number in range(10)], [], 100)
    assert [[int(text) for text in part] for part in corpus.parts(25, 4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_peer_that_is_missing_or_fails_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Callable[[Sequence[str]], object]:
        raise TypeError("of another version")

    monkeypatch.setitem(sys.modules, "rensa", None)
    peers: dict[str, Callable[[], Callable[[Sequence[str]], object]]] = {
        "rensa": lambda: len,
        "numpy": fails,
        "pytest": lambda: len,
    }
    tools, absent = bench_peers.usable(peers, (), (["a"],))
    assert list(tools) == [f"pytest {metadata.version('pytest')}"]
    assert absent == {
        "rensa": "not installed: pip install 'stoker[bench]'",
        f"numpy {metadata.version('numpy')}": "fails: TypeError: of another version",
    }


@pytest.mark.filterwarnings("ignore")
def test_every_measurement_gives_its_rows_and_finds_what_is_there(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "PEER_BYTES": 10_000,
        "TRAINING_BYTES": 30_000,
        "VOCAB_SIZE": 300,
        "STORE_TOKENS": 100_000,
        "STORE_BYTES": 100_000,
    }
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    rows = bench.run()
    ours = {row.measurement: row for row in rows if row.tool == bench.OURS}
    assert list(ours) == [
        "near-duplicate sketch",
        "near-duplicates, whole stage",
        "recall, J >= 0.8",
        "recall, 0.8 <= J < 0.85",
        "precision",
        "exact copies, whole stage",
        "tokenization",
        "documents to a committed store",
        "random windows",
    ]
    assert ours["recall, J >= 0.8"].value == 1 and (ours["precision"].value or 0) > 0.9
    assert all(row.value is None or row.value > 0 for row in rows)
    for measurement, peers in (
        ("near-duplicate sketch", bench_peers.SKETCHES),
        ("tokenization", bench_peers.TOKENIZERS),
        ("random windows", bench_peers.STORES),
    ):
        told = [row for row in rows if row.measurement == measurement and row.tool.split()[0] in peers]
        assert {row.tool.split()[0] for row in told} == {*peers}
        for row in told:
            assert (row.value is None) == bool(row.note) and (row.ours_over_it == "") == (row.value is None), row


def test_tiktoken_gives_the_tokens_of_the_same_vocabulary(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken", reason="tiktoken is not installed: pip install 'stoker[bench]'")
    texts = list(build(1 << 30, 0.0, seed=0).texts)
    path = tmp_path / "tokenizer.json"
    trained = bench.tokenizer.train(texts, 300, path)
    samples = [*texts[:3], "don't 123 é 漢字\n\n  <|endoftext|>"]
    assert bench_peers.TOKENIZERS["tiktoken"](path)(samples) == [trained.encode(text) for text in samples]
