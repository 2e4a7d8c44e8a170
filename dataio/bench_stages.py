"""The stages that the benchmarks time, each all of the way from document files to what it leaves, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataio import assemble
from dataio import encode as encoding
from dataio.bench_corpus import Corpus
from dataio.dedup import arrays
from dataio.dedup import exact as exact_copies
from dataio.dedup import near as near_copies
from dataio.dedup.sketch import NUM_BANDS
from dataio.documents import Document, ParquetFile, read_groups, write_documents
from dataio.selection import SELECTED

#: Document files that they run on.
FILES = 4


def near(files: Sequence[Path], folder: Path) -> None:
    sketched = [folder / path.stem for path in files]
    alive = [_all_alive(path, folder / "alive" / f"{path.stem}.npy") for path in files]
    for path, to in zip(files, sketched):
        near_copies.sketch(path, to)
    pairs = [folder / f"pairs{band}.npy" for band in range(NUM_BANDS)]
    for band, to in enumerate(pairs):
        near_copies.band(sketched, alive, band, 0, 1, to)
    near_copies.cluster(pairs, sketched, folder / "clusters.npy")
    first = 0
    for path, living in zip(files, alive):
        after = folder / "after" / living.name
        counts = near_copies.decide(path, first, folder / "clusters.npy", living, beside(folder, path), after)
        first += counts["documents"]


def exact(files: Sequence[Path], folder: Path) -> None:
    alive = [_all_alive(path, folder / "alive" / f"{path.stem}.npy") for path in files]
    digests = [folder / f"{path.stem}.npy" for path in files]
    for path, to in zip(files, digests):
        exact_copies.digest(path, to)
    gathered = folder / "gathered.npy"
    exact_copies.gather(digests, alive, 0, 1, gathered)
    first = 0
    for path, living in zip(files, alive):
        after = folder / "after" / living.name
        first += exact_copies.decide(path, first, [gathered], living, beside(folder, path), after)["documents"]


def to_store(files: Sequence[Path], folder: Path, tokenizer: Path, form: assemble.Form) -> None:
    selected = [_select_all(path, folder / "selected" / path.name) for path in files]
    encoded = [folder / path.stem for path in files]
    for path, beside, to in zip(files, selected, encoded):
        encoding.encode(encoding.Texts(path, beside), tokenizer, to)
    places = [(unit, row) for unit, to in enumerate(encoded) for row in range(len(np.load(to / "lengths.npy")))]
    order, plan, shards = folder / "order.npy", folder / "plan", folder / "shards"
    arrays.save(order, np.random.default_rng(0).permutation(np.array(places, np.int64)))
    assemble.plan_shards(order, encoded, plan)
    for number in range(assemble.num_shards(plan, form)):
        assemble.write_shard(plan, encoded, form, number, shards)
    assemble.commit(plan, shards, encoded, files, selected, form, "bench", folder / "store")


def _select_all(path: Path, to: Path) -> Path:
    """What the stage before would have left; written once."""
    if to.exists():
        return to
    with ParquetFile(to, SELECTED) as file:
        for group in read_groups(path, ["file"]):
            count = group.num_rows
            columns = ([None] * count, [1.0] * count, ["python"] * count, [0] * count)
            file.write(pa.table([pa.array(c, entry.type) for c, entry in zip(columns, SELECTED)], schema=SELECTED))
    return to


def beside(folder: Path, path: Path) -> Path:
    return folder / "attributes" / path.name


def _all_alive(path: Path, to: Path) -> Path:
    arrays.save(to, np.ones(sum(group.num_rows for group in read_groups(path, ["file"])), np.bool_))
    return to


def attributes(files: Sequence[Path], folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What a stage wrote to `folder` of every document, in their order."""
    groups = (group for path in files for group in read_groups(path, ["file"], {beside(folder, path): names}))
    return [row for group in groups for row in group.to_pylist()]


def document_files(corpus: Corpus, folder: Path) -> list[Path]:
    """The corpus, its texts in their order, as document files; written once."""
    count = -(-len(corpus.texts) // FILES)
    paths = [folder / "documents" / f"{number:05d}.parquet" for number in range(FILES)]
    for number, path in enumerate(paths):
        if not path.exists():
            held = range(number * count, min((number + 1) * count, len(corpus.texts)))
            write_documents(path, (Document(corpus.texts[row], "bench", str(row), number, row) for row in held))
    return paths
