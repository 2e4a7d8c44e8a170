"""From raw files to token stores: the same bytes whoever did the work and however often it was killed."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import yaml

from dataio import funnel
from dataio.dedup.exact import normalised
from dataio.documents import read_groups
from dataio.estimate import estimate
from dataio.filters.redact import replacement
from dataio.prepare import prepare
from dataio.recipe import load, parse
from dataio.stages import LocalPool
from dataio.store import Store
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal

STAGES = {"substring": {"min_bytes": 120}}
SOURCES = [
    {"name": "help", "format": "jsonl", "paths": ["help.jsonl.gz", "more.jsonl"], "unit_bytes": 200_000},
    {"name": "code", "format": "code", "paths": ["tree"], "unit_bytes": 100_000, "licence": "PSF-2.0"},
]
RECIPE = {
    "output": "out",
    "seed": 3,
    "sources": SOURCES,
    "stages": STAGES,
    "tokenizer": {"vocab_size": 700},
}


def corpus(folder: Path) -> None:
    """Prose with copies, and a tree of two repositories of code."""
    texts = [text for _, text in sorted(topics.items())]
    again = [text.upper() for text in texts[:5]] + [text + "\nOne more line." for text in texts[10:20]]
    (folder / "tree").mkdir(parents=True)
    with gzip.open(folder / "help.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "url": f"help/{i}"}) + "\n" for i, text in enumerate(texts))
    with open(folder / "more.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text, "url": f"more/{i}"}) + "\n" for i, text in enumerate(again))
    library = Path(os.__file__).parent
    for name in ("json", "email"):
        shutil.copytree(library / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "tree" / name / "LICENSE").write_text("SPDX-License-Identifier: PSF-2.0\n")
    shutil.copy(library / "json" / "decoder.py", folder / "tree" / "email" / "vendored_decoder.py")


def written(folder: Path, name: str = "recipe.yaml", **changes: object) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("timings.jsonl", ".lock")
    }


def run(folder: Path, workers: int = 1) -> Path:
    recipe, base = load(written(folder))
    with LocalPool(workers) as pool:
        prepare(recipe, base, pool)
    return base / recipe.output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpus(folder)
    return run(folder)


def test_every_document_that_was_read_is_in_a_store_or_has_a_reason(prepared: Path) -> None:
    found = funnel.read(prepared)
    kept = 0
    for source in ("help", "code"):
        store = Store.open(prepared / "stores" / source)
        assert store.verify() == []
        assert store.num_documents == found.total(source, "kept").documents
        kept += store.num_documents
    dropped = sum(amount.documents for _, amount in found.reasons())
    documents = [path for path in sorted((prepared / "documents").rglob("*.parquet"))]
    assert len(documents) > 3
    read = sum(group.num_rows for path in documents for group in read_groups(path, ["id"]))
    assert kept + dropped == read == found.total().documents
    reasons = dict(found.reasons("help"))
    assert reasons["exact.copy"].documents >= 3 and reasons["near.copy"].documents >= 3


def test_no_two_kept_documents_are_the_same(prepared: Path) -> None:
    kept = []
    for path in sorted((prepared / "documents").rglob("*.parquet")):
        attributes = prepared / "attributes" / "select" / path.relative_to(prepared / "documents")
        for group in read_groups(path, ["text"], {attributes: ["reason"]}):
            kept += [normalised(row["text"]) for row in group.to_pylist() if row["reason"] is None]
    assert len(set(kept)) == len(kept) > 50


def expected_text(row: dict[str, Any]) -> str:
    """What a document file and the attributes beside it say that is trained on."""
    raw = row["text"].encode()
    edits = [(span["start"], span["stop"], b"") for span in row["substring"] or ()]
    edits += [(s["start"], s["stop"], replacement(s["kind"]).encode()) for s in row["redactions"] or ()]
    for start, stop, instead in sorted(edits, reverse=True):
        raw = raw[:start] + instead + raw[stop:]
    return raw.decode()


def test_a_store_holds_the_texts_that_were_kept_and_says_where_they_are_from(prepared: Path) -> None:
    expected: dict[tuple[Any, ...], str] = {}
    for path in sorted((prepared / "documents" / "help").glob("*.parquet")):
        of = {stage: prepared / "attributes" / stage / "help" / path.name for stage in ("redact", "substring")}
        beside = {of["redact"]: ["redactions"], of["substring"]: ["substring"]}
        for group in read_groups(path, ["id", "text", "file", "row"], beside):
            expected |= {(row["id"], row["file"], row["row"]): expected_text(row) for row in group.to_pylist()}
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    store = Store.open(prepared / "stores" / "help")
    for number in range(store.num_documents):
        start, stop = map(int, store.doc_offsets[number : number + 2])
        high, low = map(int, store.doc_id[number])
        document = ((high << 64 | low).to_bytes(16, "big"), *map(int, store.doc_source_row[number]))
        assert tokenizer.decode(store.read(start, stop - 1)) == expected[document]
        assert store.doc_bytes[number] == len(expected[document].encode())


def test_a_second_run_does_nothing(prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.json") if "manifests" in path.parts}
    run(prepared.parent)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@contextmanager
def anew(prepared: Path) -> Iterator[Path]:
    """The folder of the recipe without its output, which comes back in the end."""
    aside = prepared.with_name("aside")
    prepared.rename(aside)
    try:
        yield prepared.parent
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
        aside.rename(prepared)


def test_other_workers_give_the_same_bytes(prepared: Path) -> None:
    expected = tree(prepared)
    with anew(prepared) as folder:
        assert tree(run(folder, workers=2)) == expected


def test_a_threshold_measures_nothing_again(prepared: Path) -> None:
    with anew(prepared) as folder:
        shutil.copytree(folder / "aside", prepared)
        loose = {**STAGES, "prose": {"max_duplicate_line_share": None}}
        recipe, base = load(written(folder, "loose.yaml", stages=loose))
        before = {path: path.stat().st_mtime_ns for path in (prepared / "attributes").rglob("*.parquet")}
        prepare(recipe, base, LocalPool(1))
        again = {path.relative_to(prepared).parts[1] for path, time in before.items() if path.stat().st_mtime_ns > time}
    assert "filter" in again and not again & {"licence", "code", "language", "prose", "redact"}


def kill_at_random(folder: Path, kills: int, generator: random.Random) -> None:
    """Start the command again and again, killing it, until it has ended by itself."""
    command = [sys.executable, "-m", "launch.cli", "data", "prepare", str(written(folder)), "--workers", "2"]
    while True:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills == 0:
            _, errors = child.communicate(timeout=280)
            assert child.returncode == 0, errors.decode()
            return
        time.sleep(generator.uniform(1.5, 9))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills -= 1
        _, errors = child.communicate()
        if child.returncode != -signal.SIGKILL:
            assert child.returncode == 0, errors.decode()
            shutil.rmtree(folder / "out")  # it was faster: once more from the start
        time.sleep(0.5)  # its workers end with it


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.verify, pytest.mark.timeout(1800)])])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(prepared: Path, kills: int) -> None:
    expected = tree(prepared)
    with anew(prepared) as folder:
        kill_at_random(folder, kills, random.Random(kills))
        assert tree(prepared) == expected


@pytest.mark.parametrize("megabytes", [1, 3, 5])
def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(prepared: Path, megabytes: int) -> None:
    expected = tree(prepared)
    with anew(prepared) as folder:
        prepared.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(prepared)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here: needs root")
        try:
            with pytest.raises(Refusal, match="no space left"):
                run(folder)
            subprocess.run(["mount", "-o", "remount,size=200m", str(prepared)], check=True)
            assert tree(run(folder)) == expected
        finally:
            subprocess.run(["umount", str(prepared)], check=True)


def test_two_at_once_are_refused(prepared: Path) -> None:
    from dataio.pipeline import locked

    with locked(prepared), pytest.raises(Refusal, match="another process"):
        run(prepared.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"nera": {}}}, "did you mean stages.near"),
        ({"preset": "cod"}, "did you mean code"),
        ({"sources": []}, "sources"),
        ({"sources": [*SOURCES, SOURCES[0]]}, "help is the name of two"),
        ({"tokenizer": {"vocab_size": 100}}, "vocab_size"),
        ({"format": {"name": "stoker.recipe", "version": 9}}, "newer release"),
        ({"output": ""}, "output"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        parse({**RECIPE, **changes})


def test_a_dry_run_names_stages_and_what_is_missing_and_writes_nothing(tmp_path: Path) -> None:
    corpus(tmp_path)
    recipe, base = load(written(tmp_path, tokenizer={"path": "nowhere.json"}, stages={"near": None}))
    found = estimate(recipe, base)
    assert next(source.files for source in found.sources) == 2 and found.sources[1].files > 20
    names = [stage.name for stage in found.stages]
    assert "near" not in names and names[0] == "ingest" and names[-1] == "assemble"
    assert any("nowhere.json" in sentence for sentence in found.missing)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refusal, match="no such file"):
        estimate(*load(written(tmp_path, sources=[{"name": "x", "paths": ["missing"]}])))


def test_too_many_malformed_records_stop_it_with_samples(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    recipe, base = load(written(tmp_path, sources=[{"name": "bad", "paths": ["bad.jsonl"]}]))
    with pytest.raises(Refusal, match="1 of 2 records are malformed"):
        prepare(recipe, base, LocalPool(1))
    samples = (base / "out" / "quarantine" / "bad" / "00000.jsonl").read_text()
    assert "not json" in samples and np.all([json.loads(line) for line in samples.splitlines()])
