"""``stoker bench data``: what prepares and reads data against its peers, on the same texts in the same run, as ratios.

A speed is bytes of text in UTF-8 (10^6) per second of processor time of this process, all its threads together: what a
core does, however many there are and whoever else uses them. The candidates take turns, each on texts that it has not
seen, the first call of each is not measured, and the median of three counts. Peers are in the extra `bench`; one that
is not installed is a row that says so.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataio import assemble, backends, bench_corpus, bench_peers, bench_stages, tokenizer
from dataio.bench_corpus import Corpus, jaccard
from dataio.dedup.sketch import NUM_BANDS, signatures
from dataio.store import Store, StoreWriter
from dataio.types import TokenizerId

#: Different texts, and changed copies beside them. The seed has been used for nothing else.
CORPUS_BYTES, COPIED_SHARE, SEED = 32_000_000, 0.35, 2027
#: Text that the peers of the sketch get at a time: the slowest takes seconds for it.
PEER_BYTES = 4_000_000
#: Text that is made a store, none of it a copy, as much as is installed of it: a store of however little text takes a
#: tenth of a second, which is no part of a rate.
STORE_BYTES = 256_000_000

VOCAB_SIZE, TRAINING_BYTES = 32_768, 6_000_000
#: A store of 64 MiB, read in windows of 2,048 tokens and their targets.
STORE_TOKENS, WINDOW, BATCH = 1 << 25, 2049, 64
ROUNDS = 3
OURS = "Stoker"

#: What is wanted: DESIGN.md, section 10.
SKETCH_MB_S, STAGE_MB_S, TOKENS_MB_S, LOADER_RATIO = 150.0, 60.0, 70.0, 0.9
SKETCH_RATIOS = {"rensa": 8.0, "datasketch": 20.0, "datatrove": 100.0}
RECALL, RECALL_JUST_ABOVE, PRECISION = 0.99, 0.97, 0.95


@dataclass(frozen=True)
class Row:
    """One figure. `ours_over_it`: how many times faster Stoker is; `wanted`: the least that this row should show, of
    the ratio where there is one. Empty where there is nothing to say; a value that is None is unknown."""

    measurement: str
    tool: str
    value: float | None
    unit: str
    ours_over_it: float | str = ""
    wanted: float | str = ""
    note: str = ""


def run() -> list[Row]:
    """All measurements, minutes on one core. Uses scratch space of about ten times `CORPUS_BYTES`."""
    corpus = bench_corpus.build(CORPUS_BYTES, COPIED_SHARE, SEED)
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as scratch:
        folder = Path(scratch)
        return [
            *sketches(corpus),
            *near_duplicates(corpus, folder),
            *exact_copies(corpus, folder),
            *tokenization(corpus, folder),
            *storing(bench_corpus.build(STORE_BYTES, 0.0, SEED), folder / "storing"),
            *loading(folder),
        ]


def speeds(
    tools: Mapping[str, Callable[[Any], object]], works: Sequence[Any], amounts: Sequence[float]
) -> dict[str, float]:
    """Amount per second of processor time of each tool: the median over works, none of which it has seen before."""
    found: dict[str, list[float]] = {name: [] for name in tools}
    for work, amount in zip(works, amounts):
        for name, tool in tools.items():
            before = time.process_time()
            tool(work)
            found[name].append(amount / (time.process_time() - before))
    return {name: statistics.median(values) for name, values in found.items()}


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def compared(
    measurement: str,
    unit: str,
    found: Mapping[str, float],
    absent: Mapping[str, str],
    wanted: Mapping[str, float],
    note: str,
) -> list[Row]:
    """A row for every tool, ours first; `wanted` by the first word of a tool's name."""
    ours = found[OURS]
    rows = [
        Row(measurement, name, value, unit, "" if name == OURS else ours / value, wanted.get(name.split()[0], ""))
        for name, value in found.items()
    ]
    rows[0] = replace(rows[0], note=note)
    return rows + [Row(measurement, name, None, unit, note=why) for name, why in absent.items()]


def sketches(corpus: Corpus) -> list[Row]:
    warm, *parts = corpus.parts(PEER_BYTES, ROUNDS + 1)
    tools, absent = bench_peers.usable(bench_peers.SKETCHES, (), (warm[:20],))
    _sketch(warm)
    found = speeds({OURS: _sketch, **tools}, parts, [megabytes(part) for part in parts])
    note = f"shingles and signature, {sum(map(len, parts)):,} texts, {sum(map(megabytes, parts)):.1f} MB"
    return compared("near-duplicate sketch", "MB/s", found, absent, {OURS: SKETCH_MB_S, **SKETCH_RATIOS}, note)


def _sketch(texts: Sequence[str]) -> object:
    return signatures([text.encode() for text in texts])


def near_duplicates(corpus: Corpus, folder: Path) -> list[Row]:
    """The whole stage from document files to attributes, and whether it found what is there."""
    files = bench_stages.document_files(corpus, folder)
    cpu, wall = _stage(lambda: bench_stages.near(files, folder / "near"))
    note = f"read, sketch, {NUM_BANDS} bands, verify, join, write; {_spent(corpus, cpu, wall)}"
    speed = corpus.num_bytes / 1e6 / cpu
    rows = [Row("near-duplicates, whole stage", OURS, speed, "MB/s", "", STAGE_MB_S, note)]
    decided = bench_stages.attributes(files, folder / "near", ["near_cluster", "near_keep"])
    cluster, kept = [row["near_cluster"] for row in decided], [row["near_keep"] for row in decided]
    for low, high, wanted in ((0.8, 1.01, RECALL), (0.8, 0.85, RECALL_JUST_ABOVE)):
        hits = [
            cluster[copy.text] is not None and cluster[copy.text] == cluster[copy.of]
            for copy in corpus.copies
            if low <= copy.jaccard < high
        ]
        said = "J >= 0.8" if high > 1 else f"{low} <= J < {high}"
        share = float(np.mean(hits)) if hits else None
        rows.append(Row(f"recall, {said}", OURS, share, "share", "", wanted, f"{len(hits):,} changed copies"))
    keepers = defaultdict(list)
    for number, name in enumerate(cluster):
        if kept[number]:
            keepers[name].append(corpus.texts[number])
    right = [
        any(jaccard(corpus.texts[number], text) >= 0.7 for text in keepers[name])
        for number, name in enumerate(cluster)
        if not kept[number]
    ]
    note = f"{len(right):,} removed, of which so many have J >= 0.7 with one of their cluster that is kept"
    return [*rows, Row("precision", OURS, float(np.mean(right)), "share", "", PRECISION, note)]


def exact_copies(corpus: Corpus, folder: Path) -> list[Row]:
    files = bench_stages.document_files(corpus, folder)
    cpu, wall = _stage(lambda: bench_stages.exact(files, folder / "exact"))
    note = f"read, normalise, hash, sort, write; {_spent(corpus, cpu, wall)}"
    return [Row("exact copies, whole stage", OURS, corpus.num_bytes / 1e6 / cpu, "MB/s", note=note)]


def tokenization(corpus: Corpus, folder: Path) -> list[Row]:
    """Texts to ids on their own."""
    path = folder / "tokenizer.json"
    training, *parts = corpus.parts(TRAINING_BYTES, ROUNDS + 1)
    tokenizer.train(training, VOCAB_SIZE, path)
    tools, absent = bench_peers.usable(bench_peers.TOKENIZERS, (path,), (training[:20],))
    encoder = backends.encoder(path)

    def ours(texts: Sequence[str]) -> object:
        return encoder.encode([text.encode() for text in texts])

    ours(training[:20])
    found = speeds({OURS: ours, **tools}, parts, [megabytes(part) for part in parts])
    note = f"{encoder.name}, a vocabulary of {VOCAB_SIZE:,}, texts that were not seen before"
    return compared("tokenization", "MB/s", found, absent, {}, note)


def storing(corpus: Corpus, folder: Path) -> list[Row]:
    """All of the way from documents to a committed store, and what of it a store of one short document takes."""
    path = folder / "tokenizer.json"
    folder.mkdir()
    (training,) = corpus.parts(TRAINING_BYTES, 1)
    form = assemble.Form(tokenizer.train(training, VOCAB_SIZE, path).id, "hot")
    opening = 0.0

    def forget() -> None:
        nonlocal opening
        os.utime(path)  # another file to `backends.encoder`, which begins with an empty memory of words
        before = time.process_time()
        backends.encoder(path)
        opening = time.process_time() - before

    def spent(of: Corpus, to: Path) -> tuple[float, float]:
        files = bench_stages.document_files(of, to)
        return _stage(lambda: bench_stages.to_store(files, to / "tokens", path, form), forget)

    least, _ = spent(Corpus(["a short document\n"] * bench_stages.FILES, [], 17 * bench_stages.FILES), folder / "least")
    cpu, wall = spent(corpus, folder)
    size = corpus.num_bytes / 1e6
    note = (
        f"read, encode, order, gather, write, commit; {_spent(corpus, cpu, wall)}; {least:.2f} s of it for however "
        f"little text ({size / (cpu - least):.0f} MB/s without); not in it: opening the tokenizer, {opening:.2f} s "
        "once a process"
    )
    return [Row("documents to a committed store", OURS, size / cpu, "MB/s", "", TOKENS_MB_S, note)]


def loading(folder: Path) -> list[Row]:
    """Random windows of a store whose pages are in memory and whose checksums have been verified."""
    store = _store(folder)
    flat = folder / "tokens.bin"
    with open(flat, "wb") as file:
        for start in range(0, store.num_tokens, 1 << 22):
            file.write(store.read(start, min(start + (1 << 22), store.num_tokens)).astype(np.uint16).tobytes())
    generator = np.random.default_rng(SEED)
    batches = [generator.integers(0, store.num_tokens - WINDOW, BATCH) for _ in range(200)]
    lengths = np.full(BATCH, WINDOW, np.int64)
    memory = {
        OURS: lambda starts, width: store.gather(starts, lengths, width),
        f"numpy {np.__version__} memmap": bench_peers.memmap(flat, store),
    }
    others, absent = bench_peers.usable(bench_peers.STORES, (store,), (batches[0], WINDOW))
    first = {name: read(batches[0], WINDOW) for name, read in {**memory, **others}.items()}
    assert all((windows == first[OURS]).all() for windows in first.values())
    rows: list[Row] = []
    # The two that read memory get many batches, the others, a hundred times slower, a few.
    for tools, part in ((memory, batches), ({OURS: memory[OURS], **others}, batches[:9])):
        many = {
            name: lambda work, read=read: [read(batch, WINDOW) for batch in work]  # type: ignore[misc]
            for name, read in tools.items()
        }
        works = [part[start::ROUNDS] for start in range(ROUNDS)]
        found = speeds(many, works, [len(work) * BATCH * WINDOW / 1e6 for work in works])
        note = f"{store.num_tokens / 1e6:.0f} M tokens of 2 bytes; {BATCH} windows of {WINDOW:,} at a time"
        made = compared("random windows", "Mtokens/s", found, absent if rows else {}, {"numpy": LOADER_RATIO}, note)
        rows += made[1:] if rows else made
    return rows


def _stage(run: Callable[[], None], before: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """Seconds of processor and of clock that the second of two runs takes: the first compiles."""
    for _ in range(2):
        before()
        cpu, wall = time.process_time(), time.perf_counter()
        run()
    return time.process_time() - cpu, time.perf_counter() - wall


def _spent(corpus: Corpus, cpu: float, wall: float) -> str:
    """What a stage was given and took; much more of clock than of processor is waiting for the disk or for a core."""
    size = f"{corpus.num_bytes / 1e6:.0f} MB in {bench_stages.FILES} files"
    return f"{size}, {cpu:.2f} s of processor in {wall:.2f} s, load {os.getloadavg()[0]:.1f}"


def _store(folder: Path) -> Store:
    """Random tokens in documents of a thousand."""
    generator = np.random.default_rng(SEED)
    count = STORE_TOKENS // 1000
    tokens = generator.integers(0, 32_767, (count, 1000), dtype=np.uint16)
    tokens[:, -1] = 32_767
    lengths = np.full(count, 1000)
    with StoreWriter(folder / "store", "bench", TokenizerId("00" * 32, 32_768, 32_767)) as writer:
        writer.append(tokens.reshape(-1), lengths, 4 * lengths, np.zeros((count, 2), np.uint64))
        return writer.commit()
