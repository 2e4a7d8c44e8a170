"""The demo corpus: permissive, without duplicates, its held-out text apart, repeatable, and made once."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dataio import demo, harvest, licences
from dataio.harvest import Candidate, Document
from dataio.store import Store
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal

inventory = harvest.candidates
NAMES = ["train/code", "train/prose", "heldout/code", "heldout/prose"]


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    """What is installed, looked up once for all builds of this file."""
    found, dropped = inventory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest, "candidates", lambda: (found, Counter(dropped)))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus from what is really installed, a fifth of it held out."""
    out = tmp_path_factory.mktemp("demo") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "HELD_OUT_ONE_IN", 5)
        demo.build(out, source_bytes=300_000, vocab_size=600)
    return out


def text_of(store: Store, trained: Tokenizer) -> list[str]:
    tokens, offsets = store.read(0, store.num_tokens), store.doc_offsets
    return [trained.decode(tokens[a : b - 1]) for a, b in itertools.pairwise(offsets)]


def test_training_and_held_out_text_share_no_document_and_none_occurs_twice(corpus: Path) -> None:
    trained = Tokenizer.load(corpus / "tokenizer.json")
    texts = {name: text_of(Store.open(corpus / name), trained) for name in NAMES}
    assert all(texts.values())
    plain = [" ".join(text.casefold().split()) for name in NAMES for text in texts[name]]
    assert len(set(plain)) == len(plain)


def test_stores_are_sound_and_count_utf8_bytes(corpus: Path) -> None:
    trained = Tokenizer.load(corpus / "tokenizer.json")
    for name in NAMES:
        store = Store.open(corpus / name)
        assert store.verify() == [] and store.tokenizer == trained.id
        assert [len(text.encode()) for text in text_of(store, trained)] == store.doc_bytes.tolist()
        assert len(np.unique(store.doc_id, axis=0)) == store.num_documents
        assert all(licences.permissive(licence) for licence in store.manifest["licences"])


def test_a_second_build_does_nothing_and_a_fresh_one_makes_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "HELD_OUT_ONE_IN", 5)
    fresh = demo.build(tmp_path / "fresh", source_bytes=300_000, vocab_size=600)
    times = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    monkeypatch.setattr(demo, "_build", lambda *_: pytest.fail("the second build works again"))
    again = demo.build(corpus, source_bytes=300_000, vocab_size=600)
    assert again == fresh
    assert times == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}


def test_a_damaged_corpus_is_made_again_and_a_foreign_folder_is_left_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_build", lambda *_: pytest.fail("made again"))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        demo.build(corpus, source_bytes=300_000, vocab_size=601)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(Refusal, match="not a demo corpus"):
        demo.build(tmp_path)
    assert demo.main([str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_only_distributions_that_state_a_permissive_licence_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = {
        "free-a": "License-Expression: MIT OR GPL-2.0-only",
        "free-b": "Classifier: License :: OSI Approved :: BSD License",
        "free-c": "License: Apache 2.0",
        "copyleft": "License-Expression: GPL-3.0-or-later",
        "half": "License-Expression: MPL-2.0 AND MIT",
        "silent": "Summary: says nothing",
    }
    for name, line in stated.items():
        folder, info = tmp_path / name.replace("-", "_"), tmp_path / f"{name}-1.0.dist-info"
        files = {folder / "a.py": "x = 1\n", folder / "_vendor/b.py": "y = 2\n", folder / "LICENSE.txt": "terms"}
        files[info / "METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{line}\n\nIt does things."
        files[info / "RECORD"] = "".join(f"{path.relative_to(tmp_path)},,\n" for path in files)
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found, dropped = inventory()
    ours = {(c.distribution, c.name) for c in found if not c.distribution.startswith("CPython")}
    free = [f"free-{letter}" for letter in "abc"]
    assert ours == {(f"{n} 1.0", name) for n in free for name in ("README", f"{n.replace('-', '_')}/a.py")}
    assert dropped["licence not stated"] == 4 and dropped["licence not permissive"] == 8
    assert dropped["vendored: another licence may hold"] == 3


@pytest.mark.parametrize(
    "kind, text, reason",
    [
        ("code", "x = 1\n", "shorter"),
        ("code", "x = 1\n" * 20_000, "longer"),
        ("code", "data = '" + "A" * 500 + "'\n" * 40, "long lines"),
        ("code", "# Code generated by a tool. DO NOT EDIT.\n" + "x = 1\n" * 100, "generated"),
        ("document", "word " * 20, "shorter"),
        ("document", "1.23 | 4.56 | 7.89\n" * 100, "letters and spaces"),
        ("docstrings", "def f():\n    return 'no docstring here'\n" * 100, "shorter"),
    ],
)
def test_a_text_that_teaches_nothing_is_left_out_with_the_reason(kind: harvest.Kind, text: str, reason: str) -> None:
    found = harvest.read(Candidate(kind, "d 1", "MIT", "n", text=text))
    assert isinstance(found, str) and reason in found


def test_docstrings_become_prose_without_their_code(tmp_path: Path) -> None:
    line = "Every word of this sentence is meant to be read."
    long = " ".join([line] * 5)
    source = f'"""{long}"""\n\ndef f(x):  # noqa\n    \'\'\'{line}\n\n    {long}\'\'\'\n    y = """no"""\n'
    (tmp_path / "a.py").write_text(source)
    document = harvest.read(Candidate("docstrings", "d 1", "MIT", "a.py", tmp_path / "a.py"))
    assert isinstance(document, Document)
    assert document.text == f"{long}\n\n{line}\n\n{long}\n"


def test_not_utf8_and_missing_files_are_reasons_not_errors(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xff\xfe" * 500)
    for name in ("a.py", "gone.py"):
        assert harvest.read(Candidate("code", "d 1", "MIT", name, tmp_path / name)) == "not UTF-8 text"
