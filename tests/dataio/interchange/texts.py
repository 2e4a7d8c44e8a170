"""Texts that hold what a text may hold, as a store, and what two stores of the same documents have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataio.documents import document_id
from dataio.store import Store, StoreWriter
from dataio.tokenizer import Tokenizer

TEXTS = ["", "def f(x):\n    return x + 1\n", "größer als 東京 🙂", "a <|endoftext|> b", "\x00\x01 \ufeff", "x" * 300]


def store_of(path: Path, tokenizer: Tokenizer, texts: Sequence[str] = TEXTS) -> Store:
    tokens, lengths = tokenizer.encode_batch(texts)
    raw = [text.encode() for text in texts]
    ids = np.frombuffer(b"".join(map(document_id, raw)), ">u8").reshape(-1, 2)
    with StoreWriter(path, "s", tokenizer.id) as writer:
        writer.append(tokens, lengths, np.array([len(data) for data in raw]), ids)
        return writer.commit()


def assert_same_documents(one: Store, other: Store) -> None:
    np.testing.assert_array_equal(one.read(0, one.num_tokens), other.read(0, other.num_tokens))
    for name in ("doc_offsets", "doc_bytes", "doc_id"):
        np.testing.assert_array_equal(one.arrays[name].whole(), other.arrays[name].whole(), name)
