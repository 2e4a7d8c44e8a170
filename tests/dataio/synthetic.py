"""Small stores and logs for tests, also of other rooms: ``store`` from documents, ``random_store``, ``stream``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dataio.log import DataLog, Segment
from dataio.shards import Profile
from dataio.store import Store, StoreWriter
from dataio.stream import BlendedStream
from dataio.types import TokenizerId

TOKENIZER = TokenizerId("5a" * 32, vocab_size=257, eos_id=256)


def store(
    path: Path,
    documents: Sequence[Sequence[int]],
    masked: Sequence[bool] | None = None,
    source: str = "source",
    tokenizer: TokenizerId = TOKENIZER,
    chunk_tokens: int = 64,
    shard_chunks: int = 4,
    profile: Profile = "hot",
) -> Store:
    """A store of these documents; end-of-text is added to each."""
    whole = [[*document, tokenizer.eos_id] for document in documents]
    lengths = np.array([len(document) for document in whole])
    ids = np.stack([np.full(len(whole), 7), np.arange(len(whole))], axis=1).astype(np.uint64)
    with StoreWriter(path, source, tokenizer, chunk_tokens, shard_chunks, profile) as writer:
        mask = None if masked is None else np.array(masked)
        writer.append(np.concatenate(whole), lengths, lengths * 3, ids, mask)
        return writer.commit()


def random_store(
    path: Path, num_tokens: int, seed: int = 0, mean_document: int = 40, masked_share: float = 0.0, **options: object
) -> Store:
    """A store of exactly `num_tokens` random tokens in documents of uneven length."""
    rng = np.random.default_rng(seed)
    documents, left = [], num_tokens
    while left:
        length = min(left, int(rng.integers(1, 2 * mean_document)))
        documents.append(rng.integers(0, 256, length - 1).tolist())
        left -= length
    masked = (rng.random(len(documents)) < masked_share).tolist()
    return store(path, documents, masked, **options)  # type: ignore[arg-type]


def stream(
    stores: Mapping[str, Store],
    seq_len: int,
    global_batch: int,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    block_tokens: int = 768,
    group_blocks: int = 2,
) -> BlendedStream:
    """A stream of one segment over these stores, evenly blended unless said."""
    datasets = {name: store.dataset_id for name, store in stores.items()}
    segment = Segment.of(0, seq_len, global_batch, weights or dict.fromkeys(stores, 1.0), datasets)
    tokenizer = next(iter(stores.values())).tokenizer
    return BlendedStream(DataLog(seed, tokenizer, (segment,), block_tokens, group_blocks), stores)
