"""Exact copies: those of the definition, whatever files they lie in, and one of each is kept."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio import documents
from dataio.dedup import exact
from dataio.dedup.arrays import key_range, parts_within, pieces, save
from dataio.documents import Document, read_groups, write_documents

START = datetime(2020, 1, 1, tzinfo=UTC)
#: (path, row) -> (copies, keep)
Found = dict[tuple[str, int], tuple[int, bool]]


def deduplicate(
    folder: Path, files: Sequence[Sequence[Document]], parts: int, dead: Collection[tuple[str, int]] = ()
) -> Found:
    paths = [folder / f"{i}.parquet" for i in range(len(files))]
    digests = [folder / f"{i}.npy" for i in range(len(files))]
    alive, after = ([folder / f"{i}.{name}.npy" for i in range(len(files))] for name in ("alive", "after"))
    counts = []
    for path, to, living, held in zip(paths, digests, alive, files):
        write_documents(path, held)
        save(living, np.array([(d.path, d.row) not in dead for d in held], np.bool_))
        counts.append(exact.digest(path, to)["documents"])
    gathered = [folder / f"part{i}.npy" for i in range(parts)]
    for i, path in enumerate(gathered):
        exact.gather(digests, alive, i, parts, path)
    found: Found = {}
    for i, path in enumerate(paths):
        beside = folder / f"{i}.exact.parquet"
        counted = exact.decide(path, sum(counts[:i]), gathered, alive[i], beside, after[i])
        assert counted == {"documents": counts[i], "dropped": np.load(alive[i]).sum() - np.load(after[i]).sum()}
        for group in read_groups(path, ["path", "row"], {beside: exact.ATTRIBUTES.names}):
            for row in group.to_pylist():
                found[row["path"], row["row"]] = row["exact_copies"], row["exact_keep"]
        living = [found[d.path, d.row][1] and (d.path, d.row) not in dead for d in files[i]]
        assert np.load(after[i]).tolist() == living
    return found


def corpus() -> list[Document]:
    generator = random.Random(1)
    texts = ["", " ", "a b", "A  b", "\ta\nB ", "ab", "Straße", "STRASSE", *(f"text {i % 40}" for i in range(100))]
    return [
        Document(text, "s", f"p{i}", 0, i, timestamp=generator.choice([None, START, START - timedelta(days=50 * 365)]))
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (3, 1), (1, 7), (4, 3)])
def test_copies_are_counted_and_the_earliest_kept_in_whatever_files(
    count: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 13)
    held = corpus()
    copies = Counter(exact.normalised(document.text) for document in held)
    random.Random(count * parts).shuffle(held)
    found = deduplicate(tmp_path, [[], *(held[i::count] for i in range(count))], parts)
    kept = [document for document in held if found[document.path, document.row][1]]
    assert sorted(exact.normalised(document.text) for document in kept) == sorted(copies)
    last = datetime.max.replace(tzinfo=UTC)
    earliest = {text: min(d.timestamp or last for d in held if exact.normalised(d.text) == text) for text in copies}
    assert all((d.timestamp or last) == earliest[exact.normalised(d.text)] for d in kept)
    assert all(found[d.path, d.row][0] == copies[exact.normalised(d.text)] for d in held)


def test_files_parts_and_order_change_nothing(tmp_path: Path) -> None:
    held = corpus()
    expected = deduplicate(tmp_path / "one", [held], 1)
    random.Random(5).shuffle(held)
    assert deduplicate(tmp_path / "two", [held[:30], held[30:]], 4) == expected


def test_documents_that_were_dropped_before_are_no_copies(tmp_path: Path) -> None:
    held = corpus()
    dead = {(d.path, d.row) for d in held[::3]}
    expected = deduplicate(tmp_path / "without", [[d for d in held if (d.path, d.row) not in dead]], 1)
    assert deduplicate(tmp_path / "with", [held], 2, dead) == expected | dict.fromkeys(dead, (1, True))


@given(st.integers(1, 1000), st.integers(0, 2**64 - 1))
def test_every_key_lies_in_one_range(parts: int, key: int) -> None:
    ranges = [tuple(map(int, key_range(part, parts))) for part in range(parts)]
    assert ranges[0][0] == 0 and ranges[-1][1] == 2**64 - 1
    assert sum(low <= key <= high for low, high in ranges) == 1


def test_a_range_fits_the_budget() -> None:
    assert parts_within(10**6, 64, 64 * 10**6) == 1
    assert parts_within(10**6 + 1, 64, 64 * 10**6) == 2
    assert parts_within(0, 64, 1) == 1


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (5, 7)])
def test_an_array_written_in_pieces_is_the_array_as_numpy_writes_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint64).reshape(shape)
    order = [*range(0, values.size, 2), *range(1, values.size, 2)]
    np.save(tmp_path / "expected.npy", values)
    with pieces(tmp_path / "a" / "found.npy", np.uint64, shape) as write:
        for at in order:
            write(at, values.ravel()[at : at + 1])
        assert not (tmp_path / "a" / "found.npy").exists()
    assert (tmp_path / "a" / "found.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    with pytest.raises(ValueError, match="torn"), pieces(tmp_path / "b" / "found.npy", np.uint64, shape):
        raise ValueError("torn")
    assert not [*(tmp_path / "b").iterdir()]
