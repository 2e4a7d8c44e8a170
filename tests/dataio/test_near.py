"""Near-duplicates: found where the exact similarity says so, whatever files the documents lie in."""

from __future__ import annotations

import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from dataio import documents
from dataio.dedup import near
from dataio.dedup.arrays import save
from dataio.dedup.sketch import NUM_BANDS
from dataio.documents import Document, read_groups, write_documents
from tests.dataio.test_sketch import jaccard, words

#: id -> (cluster, size, keep)
Found = dict[bytes, tuple[bytes | None, int, bool]]
_WORD = re.compile(r"(\w+)")


def deduplicate(
    folder: Path, files: Sequence[Sequence[Document]], parts: int = 1, dead: Collection[bytes] = ()
) -> Found:
    """All steps over document files."""
    paths = [folder / f"{i}.parquet" for i in range(len(files))]
    sketches = [folder / f"sketch{i}" for i in range(len(files))]
    alive, after = ([folder / f"{i}.{name}.npy" for i in range(len(files))] for name in ("alive", "after"))
    for path, to, living, held in zip(paths, sketches, alive, files):
        write_documents(path, held)
        save(living, np.array([document.id not in dead for document in held], np.bool_))
        near.sketch(path, to)
    edges = [folder / f"edges{band}_{part}.npy" for band in range(NUM_BANDS) for part in range(parts)]
    for i, path in enumerate(edges):
        near.band(sketches, alive, i // parts, i % parts, parts, path)
    attributes = [folder / f"{i}.near.parquet" for i in range(len(files))]
    clusters, first = folder / "clusters.npy", 0
    near.cluster(edges, sketches, clusters)
    for i, path in enumerate(paths):
        near.decide(path, first, clusters, alive[i], attributes[i], after[i])
        first += len(files[i])
    rows = (
        row
        for path, beside in zip(paths, attributes)
        for group in read_groups(path, ["id"], {beside: near.ATTRIBUTES.names})
        for row in group.to_pylist()
    )
    return {row["id"]: (row["near_cluster"], row["near_size"], row["near_keep"]) for row in rows}


def documents_of(texts: Iterable[str]) -> list[Document]:
    return [Document(text, "s", f"{i}", file=0, row=i) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Modules of the standard library, most of them more alike in their licences than in anything else."""
    folder = Path(os.__file__).parent
    paths = [path for pattern in ("*.py", "[a-z]*/*.py") for path in sorted(folder.glob(pattern))]
    texts = (path.read_text("utf-8", "replace") for path in paths if path.parent.name != "site-packages")
    return list(dict.fromkeys(text for text in texts if len(words(text)) >= 80 and len(text) < 60_000))[:700]


def substituted(text: str, share: float, generator: random.Random, vocabulary: Sequence[str]) -> str:
    parts = _WORD.split(text)
    for i in range(1, len(parts), 2):
        if generator.random() < share:
            parts[i] = generator.choice(vocabulary)
    return "".join(parts)


HEADER = "Copyright the authors. Permission is granted to use, copy and change this text for any purpose at all.\n\n"
CHANGES: dict[str, Callable[[str, random.Random, Sequence[str]], str]] = {
    "white space": lambda text, *_: re.sub(r"[ \t]+", "  ", text),
    "upper case": lambda text, *_: text.upper(),
    "header": lambda text, *_: HEADER + text,
    "halves swapped": lambda text, *_: text[len(text) // 2 :] + text[: len(text) // 2],
    "truncated to 85 %": lambda text, *_: text[: int(len(text) * 0.85)],
    "truncated to 60 %": lambda text, *_: text[: int(len(text) * 0.6)],
    **{
        f"{share} of words": lambda text, generator, vocabulary, share=share: substituted(
            text, share, generator, vocabulary
        )
        for share in (0.005, 0.01, 0.02, 0.03, 0.04, 0.08)
    },
}


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path, sources: list[str]) -> None:
    """Recall 0.99 at J >= 0.8 and 0.97 just above it, precision 0.95 (share of the removed that have J >= 0.7 with
    another of their cluster), of changes with known similarity."""
    generator = random.Random(7)
    vocabulary = words(" ".join(sources[:50]))
    changed = [(text, change(text, generator, vocabulary)) for text in sources for change in CHANGES.values()]
    generator.shuffle(changed)
    changed = changed[:2500]
    held = documents_of(dict.fromkeys([*sources, *(after for _, after in changed)]))
    found = deduplicate(tmp_path, [held[:500], held[500:]])
    identity = {document.text: document.id for document in held}

    hits: dict[str, list[bool]] = defaultdict(list)
    for before, after in changed:
        if before != after and (similar := jaccard(before, after)) >= 0.8:
            cluster = found[identity[before]][0]
            hit = cluster is not None and cluster == found[identity[after]][0]
            hits["all"].append(hit)
            if similar < 0.85:
                hits["just above"].append(hit)
    recall = {name: float(np.mean(found)) for name, found in hits.items()}

    members: dict[bytes, list[str]] = defaultdict(list)
    for document in held:
        if (cluster := found[document.id][0]) is not None:
            members[cluster].append(document.text)
    removed = [document.text for document in held if not found[document.id][2]]
    right = [
        any(other != text and jaccard(text, other) >= 0.7 for other in members[found[identity[text]][0] or b""])
        for text in removed
    ]
    print(f"recall {recall}, {len(hits['just above'])} just above 0.8; precision {np.mean(right):.4f} of {len(right)}")
    assert recall["all"] >= 0.99 and recall["just above"] >= 0.97
    assert np.mean(right) >= 0.95
    assert len(hits["just above"]) >= 100 and len(right) >= 1000


def test_files_parts_and_order_change_nothing(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(3)
    texts = sources[:60]
    texts += [substituted(text, share, generator, ["other", "words"]) for text in texts for share in (0.01, 0.03)]
    texts += ["", "...", " - - ", "one word", "one word!"]
    held = documents_of(texts)
    expected = deduplicate(tmp_path / "one", [held])
    assert sum(not keep for _, _, keep in expected.values()) >= 60
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 7)
    for name, count, parts in (("a", 3, 1), ("b", 5, 3), ("c", 1, 8)):
        generator.shuffle(held)
        files = [held[i::count] for i in range(count)] + [[]]
        assert deduplicate(tmp_path / name, files, parts) == expected, name


def test_a_cluster_is_named_counted_and_keeps_one(tmp_path: Path, sources: list[str]) -> None:
    text = sources[0]
    copies = [text, text.upper(), text.replace(" ", "  "), f"{text}\nend"]
    start = datetime(2020, 1, 1, tzinfo=UTC)
    dated = [
        Document(copy, "s", str(i), 0, i, timestamp=None if i == 0 else start - timedelta(days=i % 3))
        for i, copy in enumerate(copies)
    ]
    alone = documents_of(["nothing like it at all, not one bit of it", "", "!"])
    found = deduplicate(tmp_path, [[*dated, *alone]])
    first = min(document.id for document in dated)
    assert [found[d.id] for d in dated] == [(first, 4, False), (first, 4, False), (first, 4, True), (first, 4, False)]
    assert [found[d.id] for d in alone] == [(None, 1, True)] * 3


def test_documents_that_were_dropped_before_join_nothing(tmp_path: Path, sources: list[str]) -> None:
    text = sources[0]
    middle = documents_of([text, text + " a few words more", "something else"])
    assert {size for _, size, _ in deduplicate(tmp_path / "all", [middle]).values()} == {1, 2}
    dead = {middle[1].id}
    assert set(deduplicate(tmp_path / "some", [middle], 2, dead).values()) == {(None, 1, True)}
