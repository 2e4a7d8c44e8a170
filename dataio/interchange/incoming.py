"""Tokens that others made, as a store: documents that end with end-of-text, with the bytes and ids of their texts.

Other formats keep tokens only. Texts are decoded again to count their bytes (bits per byte need them) and to find their
ids: those of the documents the tokens came from, wherever the tokenizer gives back what it was given, as byte-level
ones do, and the text was not edited before.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataio.documents import document_id
from dataio.store import Store, StoreWriter
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal

#: Tokens that a reader hands over at a time, about.
BATCH_TOKENS = 1 << 20

#: What ends a document. "present": its last token is end-of-text. "append": add it where it is not. "split": the format
#: holds windows cut without regard to documents; join them, and let each end-of-text end one.
Ends = Literal["present", "append", "split"]


@dataclass(frozen=True)
class Incoming:
    """Some sequences of a file: `tokens`, `lengths` of the sequences, number of the `file` and of the `first` one."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    file: int
    first: int


def write_store(
    path: str | os.PathLike[str],
    source: str,
    tokenizer: Tokenizer,
    batches: Iterable[Incoming],
    ends: Ends,
    inputs: Mapping[str, str],
    input_files: Sequence[str],
) -> Store:
    """Write what is read from `batches` to a store. Refuses tokens that the tokenizer does not know, and documents
    without end-of-text unless `ends` says what to do with them."""
    if ends not in ("present", "append", "split"):
        raise Refusal(f"ends={ends!r}: what ends a document is one of present, append and split")
    with StoreWriter(path, source, tokenizer.id) as writer:
        for batch in _split(batches, tokenizer.id.eos_id) if ends == "split" else _whole(batches, tokenizer, ends):
            _append(writer, tokenizer, *batch)
        return writer.commit(inputs=inputs, input_files=input_files)


_Documents = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]  # tokens, lengths, [n, 2] source rows


def _whole(batches: Iterable[Incoming], tokenizer: Tokenizer, ends: Ends) -> Iterable[_Documents]:
    """Each sequence that is not empty is a document."""
    eos_id = tokenizer.id.eos_id
    for batch in batches:
        tokens, rows = batch.tokens, batch.first + np.flatnonzero(batch.lengths)
        lengths = batch.lengths[batch.lengths > 0]
        open_ended = tokens[np.cumsum(lengths) - 1] != eos_id
        if open_ended.any():
            if ends == "present":
                raise Refusal(
                    f"document {rows[open_ended][0]} does not end with end-of-text ({eos_id}): made with another "
                    "tokenizer, or without it; `append` adds it, `split` cuts where it stands"
                )
            tokens = np.insert(tokens, np.cumsum(lengths)[open_ended], eos_id)
            lengths = lengths + open_ended
        yield tokens, lengths, np.stack([np.full(len(rows), batch.file), rows], axis=1)


def _split(batches: Iterable[Incoming], eos_id: int) -> Iterable[_Documents]:
    """Each end-of-text ends a document; what is left in the end is ended by one that is added."""
    begun: list[NDArray[Any]] = []  # the document that goes on in the next batch
    began_at = (0, 0)
    for batch in batches:
        sequence = np.repeat(batch.first + np.arange(len(batch.lengths)), batch.lengths)
        stops = np.flatnonzero(batch.tokens == eos_id) + 1
        starts = np.concatenate(([0], stops))[: len(stops)]
        rest = int(stops[-1]) if len(stops) else 0
        if len(stops):
            before = sum(map(len, begun))
            rows = np.stack([np.full(len(stops), batch.file), sequence[starts]], axis=1)
            if before:
                rows[0] = began_at
            lengths = np.diff(stops, prepend=-before)
            yield np.concatenate([*begun, batch.tokens[:rest]]), lengths, rows
            begun = []
        if rest < len(batch.tokens):
            if not begun:
                began_at = (batch.file, int(sequence[rest]))
            begun.append(np.array(batch.tokens[rest:]))
    if begun:
        tokens = np.concatenate([*begun, np.array([eos_id], begun[0].dtype)])
        yield tokens, np.array([len(tokens)]), np.array([began_at])


def _append(
    writer: StoreWriter,
    tokenizer: Tokenizer,
    tokens: NDArray[Any],
    lengths: NDArray[np.int64],
    source_row: NDArray[np.int64],
) -> None:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.id.vocab_size:
        raise Refusal(
            f"a token outside the vocabulary of {tokenizer.id.vocab_size}: made with another tokenizer; give its own"
        )
    stops = np.cumsum(lengths) - 1  # end-of-text is no part of the text
    documents = [tokens[stop + 1 - length : stop].tolist() for stop, length in zip(stops, lengths)]
    texts = [text.encode() for text in tokenizer.inner.decode_batch(documents, skip_special_tokens=False)]
    ids = np.frombuffer(b"".join(map(document_id, texts)), ">u8").reshape(-1, 2)
    writer.append(tokens, lengths, np.array([len(text) for text in texts], np.int64), ids, source_row=source_row)


def require_new(*paths: Path) -> None:
    """Refuse to write over what is there."""
    for path in paths:
        if path.exists():
            raise Refusal(f"{path}: exists already; remove it or choose another path")
