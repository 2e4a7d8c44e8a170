"""Near-duplicates: found where the exact similarity says so, whatever files the documents lie in."""

from __future__ import annotations

import os
import random
import re
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dataio import documents
from dataio.dedup import near
from dataio.dedup.arrays import key_range, parts_within, save
from dataio.dedup.sketch import EMPTY, NUM_BANDS, NUM_BINS
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


def synthetic(folder: Path, sizes: Sequence[int], keys: NDArray[np.uint64], signed: NDArray[np.uint16]) -> list[Path]:
    """Folders as `sketch` leaves them, of documents that are all alive, whose ids repeat."""
    generator = np.random.default_rng(5)
    ids = generator.integers(0, 1 << 40, (len(keys), 2), np.uint64)
    ids[::3] = ids[0]
    columns = {
        near.SIGNATURES: signed,
        near.IDS: ids,
        near.TIMES: np.zeros(len(keys), np.int64),
        near.ORIGINS: generator.integers(0, 1 << 63, len(keys), np.uint64),
        "alive.npy": np.ones(len(keys), np.bool_),
    }
    edges, folders = np.cumsum([0, *sizes]), [folder / str(i) for i in range(len(sizes))]
    for to, start, stop in zip(folders, edges, edges[1:]):
        save(to / near.KEYS, np.tile(keys[start:stop], (NUM_BANDS, 1)))
        for name, rows in columns.items():
            save(to / name, rows[start:stop])
    return folders


def banded(folders: Sequence[Path], part: int, parts: int, out: Path, budget_bytes: int) -> NDArray[np.uint64]:
    near.band(folders, [folder / "alive.npy" for folder in folders], 3, part, parts, out, budget_bytes)
    return np.asarray(np.load(out))


def test_pairs_are_those_of_the_definition_whatever_the_budget(tmp_path: Path) -> None:
    """Runs of equal keys longer than a block, of more texts than can lead, some wordless: against plain Python."""
    generator = np.random.default_rng(2)
    keys = generator.choice(np.array([5, 6, 2**63, 2**64 - 1, 9], np.uint64), 500, p=[0.6, 0.2, 0.1, 0.09, 0.01])
    bases = generator.integers(0, 1 << 16, (40, NUM_BINS), np.uint16)
    signed = bases[generator.integers(0, 40, 500)]
    for row in signed:
        row[: generator.integers(60, 90)] += 1  # some agree in 180 bins with what leads them, some do not
    signed[::17] = EMPTY & 0xFFFF
    folders = synthetic(tmp_path, [63, 0, 1, 300, 136], keys, signed)
    ids, origins = (np.concatenate([np.load(f / name) for f in folders]) for name in (near.IDS, near.ORIGINS))
    expected, leaders = list[tuple[int, int]](), dict[int, list[int]]()
    for i in sorted(range(500), key=lambda i: (keys[i], *ids[i], origins[i])):
        if (signed[i] != EMPTY & 0xFFFF).any():
            leads = leaders.setdefault(int(keys[i]), [])
            first = next((k for k in leads if (signed[k] == signed[i]).sum() >= near.AGREEING_BINS), None)
            if first is not None:
                expected.append((first, i))
            elif len(leads) < near.MAX_LEADERS:
                leads.append(i)
    assert 100 <= len(expected) <= 400 and max(map(len, leaders.values())) == near.MAX_LEADERS
    for budget in (1, 4 * 600 * 7, 1 << 30):
        assert banded(folders, 0, 1, tmp_path / "pairs.npy", budget).tolist() == [[*pair] for pair in expected], budget


@pytest.mark.parametrize("longest", [2, 6000])
def test_a_band_stays_within_its_budget_where_every_document_has_a_copy(longest: int, tmp_path: Path) -> None:
    """`longest`: documents of one key."""
    count = 12_000
    keys = np.repeat(np.random.default_rng(1).integers(0, 2**64, count // 2, np.uint64), 2)
    keys[:longest] = key_range(1, 2)[0]
    signed = np.repeat(np.random.default_rng(2).integers(0, 1 << 16, (count // 2, NUM_BINS), np.uint16), 2, axis=0)
    folders = synthetic(tmp_path, [count // 2] * 2, keys, signed)
    budget = count * near.BYTES_PER_DOCUMENT
    assert parts_within(count, near.BYTES_PER_DOCUMENT, budget) == 1
    banded(folders, 0, 1, tmp_path / "pairs.npy", budget)  # what is compiled takes memory once
    tracemalloc.start()
    pairs = banded(folders, 0, 1, tmp_path / "pairs.npy", budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) >= (count - longest) // 2 and peak <= budget, f"{peak / count:.0f} bytes a document"


def test_a_band_opens_only_the_files_of_documents_that_share_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = np.arange(60, dtype=np.uint64)
    keys[[7, 31]] = 99
    folders = synthetic(tmp_path, [3] * 20, keys, np.zeros((60, NUM_BINS), np.uint16))
    opened, memmap = list[Path](), np.memmap
    monkeypatch.setattr(np, "memmap", lambda path, *args, **more: opened.append(path) or memmap(path, *args, **more))
    assert len(banded(folders, 0, 1, tmp_path / "pairs.npy", 1 << 20)) == 1
    for name in (near.SIGNATURES, near.IDS):
        assert [path for path in opened if path.name == name] == [folders[2] / name, folders[10] / name]


def test_clusters_take_the_memory_stated_for_each_member(tmp_path: Path) -> None:
    count = 20_000
    folders = synthetic(tmp_path, [count], np.zeros(count, np.uint64), np.zeros((count, NUM_BINS), np.uint16))
    pairs = np.arange(count, dtype=np.uint64).reshape(2, -1).T
    save(tmp_path / "pairs.npy", pairs)
    near.cluster([tmp_path / "pairs.npy"], folders, tmp_path / "clusters.npy")
    tracemalloc.start()
    counts = near.cluster([tmp_path / "pairs.npy"], folders, tmp_path / "clusters.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts == {"documents": count, "clusters": count // 2, "dropped": count // 2}
    signatures_read = 2 * min(count, near.CLUSTERED_TOGETHER) * NUM_BINS
    assert peak <= count * near.BYTES_PER_MEMBER + pairs.nbytes + signatures_read, f"{peak / count:.0f} bytes a member"


def test_a_sketch_holds_a_row_group_however_long_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 100)
    peaks = []
    for count in (300, 3000):
        write_documents(tmp_path / "d.parquet", documents_of(f"document {i} of them all" for i in range(count)))
        near.sketch(tmp_path / "d.parquet", tmp_path / "sketch")
        tracemalloc.start()
        assert near.sketch(tmp_path / "d.parquet", tmp_path / "sketch")["documents"] == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.2 * peaks[0], peaks
    assert sorted(path.name for path in (tmp_path / "sketch").iterdir()) == sorted(near.FILES)


def test_of_equal_texts_of_one_time_neither_files_nor_their_order_choose(tmp_path: Path, sources: list[str]) -> None:
    """As where the stage exact is left out."""
    held = [Document(sources[0], "s", f"p{i}", 0, i) for i in range(6)]
    kept = set()
    for name, order in (("a", held), ("b", held[::-1]), ("c", held[3:] + held[:3])):
        for i, files in enumerate(([order], [order[:2], order[2:]])):
            folder = tmp_path / f"{name}{i}"
            deduplicate(folder, files)
            paths = [(folder / f"{k}.parquet", folder / f"{k}.near.parquet") for k in range(len(files))]
            rows = (
                row
                for path, beside in paths
                for g in read_groups(path, ["path"], {beside: ["near_keep"]})
                for row in g.to_pylist()
            )
            kept.add(tuple(row["path"] for row in rows if row["near_keep"]))
    assert len(kept) == 1 and len(next(iter(kept))) == 1


def test_copies_that_are_weighed_stay_alive(tmp_path: Path, sources: list[str]) -> None:
    held = documents_of([sources[0], sources[0] + " and more", sources[1], "dead"])
    expected = deduplicate(tmp_path, [held], dead={held[3].id})
    assert sorted(keep for _, _, keep in expected.values()) == [False, True, True, True]
    paths = [tmp_path / name for name in ("0.parquet", "clusters.npy", "0.alive.npy", "weighed.parquet", "weighed.npy")]
    counts = near.decide(paths[0], 0, *paths[1:], drop=False)
    assert counts == {"documents": 4, "dropped": 0}
    assert paths[4].read_bytes() == paths[2].read_bytes()
    assert paths[3].read_bytes() == (tmp_path / "0.near.parquet").read_bytes()
