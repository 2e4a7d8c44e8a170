"""Megatron-core's indexed data set: PREFIX.bin and PREFIX.idx (megatron/core/datasets/indexed_dataset.py, 0.16).

    .bin   tokens, sequence after sequence
    .idx   9 bytes b"MMIDIDX\\0\\0", uint64 version 1, uint8 code of the dtype, uint64 sequences n, uint64 boundaries m,
           int32 [n] tokens of each sequence, int64 [n] byte at which each begins in .bin, int64 [m] the sequence at
           which each document begins and, last, n. Little-endian. (Multimodal sets go on; such are refused.)

There are no checksums, no ids, weights or masks: an export keeps tokens and documents, in order.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataio.interchange.incoming import BATCH_TOKENS, Ends, Incoming, require_new, write_store
from dataio.shards import map_file
from dataio.stages import content_hash
from dataio.store import Store
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal
from stoker.files import sync_directory

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_UINT16, _INT32 = 8, 4


def export_megatron(store: Store, prefix: str | os.PathLike[str]) -> None:
    """Write the documents of `store` as PREFIX.bin and PREFIX.idx, one sequence each, end-of-text included.

    Memory: about 40 bytes a document. Refuses damage in the store, files that exist, and what int32 cannot count.
    """
    folder, name = Path(prefix).parent, Path(prefix).name
    paths = [folder / f"{name}.bin", folder / f"{name}.idx"]
    require_new(*paths)
    folder.mkdir(parents=True, exist_ok=True)
    partial = [folder / f".{path.name}.partial" for path in paths]
    code = _UINT16 if store.arrays["tokens"].grid.dtype == "uint16" else _INT32  # as its readers expect
    dtype = np.dtype(_DTYPES[code])
    lengths = np.diff(store.doc_offsets)
    if lengths.max() >= 2**31:
        raise Refusal(f"{store.path}: a document of {lengths.max()} tokens; Megatron counts them in 31 bits")
    try:
        with open(partial[0], "wb") as file:
            for low in range(0, store.num_tokens, BATCH_TOKENS):
                rows = store.arrays["tokens"].rows(low, min(low + BATCH_TOKENS, store.num_tokens))
                file.write(np.ascontiguousarray(rows, dtype).data)
            _end(file)
        with open(partial[1], "wb") as file:
            count = store.num_documents
            file.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
            file.write(lengths.astype("<i4").data)
            file.write((store.doc_offsets[:-1] * dtype.itemsize).astype("<i8").data)
            file.write(np.arange(count + 1, dtype="<i8").data)
            _end(file)
        for written, path in zip(partial, paths):
            os.rename(written, path)
        sync_directory(folder)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _end(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def import_megatron(
    prefix: str | os.PathLike[str],
    path: str | os.PathLike[str],
    source: str,
    tokenizer: Tokenizer,
    ends: Ends = "present",
) -> Store:
    """Make a store of PREFIX.bin and PREFIX.idx; `tokenizer`: the one they were made with.

    Documents are those of the index; with ``ends="split"`` those between end-of-texts. `doc_source_row` has the
    number of the document in the index. Empty documents are left out.
    """
    index = _Index.read(Path(f"{prefix}.idx"))
    tokens = map_file(Path(f"{prefix}.bin"))
    if len(tokens) != int(index.offsets[-1]) * index.dtype.itemsize:
        raise Refusal(
            f"{prefix}.bin: {len(tokens)} bytes where its index has {index.offsets[-1]} tokens of "
            f"{index.dtype.itemsize}; the two do not belong together, or one was cut off"
        )
    inputs = {Path(name).name: content_hash(name) for name in (f"{prefix}.bin", f"{prefix}.idx")}
    batches = _batches(index, tokens.view(index.dtype))
    return write_store(path, source, tokenizer, batches, ends, inputs, [Path(f"{prefix}.bin").name])


def _batches(index: _Index, tokens: NDArray[Any]) -> Iterator[Incoming]:
    """Whole documents, about `BATCH_TOKENS` at a time."""
    first, count = 0, len(index.offsets) - 1
    while first < count:
        last = int(np.searchsorted(index.offsets, index.offsets[first] + BATCH_TOKENS, side="right")) - 1
        last = min(max(last, first + 1), count)
        low, high = int(index.offsets[first]), int(index.offsets[last])
        yield Incoming(tokens[low:high], np.diff(index.offsets[first : last + 1]), 0, first)
        first = last


@dataclass(frozen=True)
class _Index:
    dtype: np.dtype[Any]
    offsets: NDArray[np.int64]  # [documents + 1] first token of each document, then the number of tokens

    @classmethod
    def read(cls, path: Path) -> _Index:
        data = map_file(path)
        magic, version, code, sequences, boundaries = _HEADER.unpack(
            data[: _HEADER.size].tobytes().ljust(_HEADER.size, b"\0")
        )
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise Refusal(
                f"{path}: not the index of a Megatron token data set (version 1, of integers); give the prefix of one"
            )
        if len(data) != _HEADER.size + 12 * sequences + 8 * boundaries:
            raise Refusal(
                f"{path}: {len(data)} bytes do not hold {sequences} sequences and {boundaries} boundaries: cut off, or "
                "multimodal; only token data sets can be read"
            )
        at = _HEADER.size + 4 * sequences
        lengths = data[_HEADER.size : at].view("<i4").astype(np.int64)
        begins = data[at : at + 8 * sequences].view("<i8")
        documents = data[at + 8 * sequences :].view("<i8")
        dtype = np.dtype(_DTYPES[code])
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        if (
            lengths.min(initial=0) < 0
            or not np.array_equal(begins, offsets[:-1] * dtype.itemsize)
            or not len(documents)
            or documents[0] != 0
            or documents[-1] != sequences
            or (np.diff(documents) < 0).any()
        ):
            raise Refusal(f"{path}: sequences that are not one after another, or documents that are not: damaged")
        return cls(dtype, offsets[documents])
