"""The token store: the tokens of one source under one tokenizer, as a zarr v3 group.

    <store>/tokens             [tokens] uint16 or uint32, documents one after another, each ending with end-of-text
            chunk_crc32c       [chunks] uint32, CRC32C of every inner chunk of `tokens`
            doc_offsets        [documents + 1] int64, first token of each document, then the number of tokens
            doc_bytes          [documents] int64, length of the text in UTF-8 bytes (for bits per byte)
            doc_id             [documents, 2] uint64, xxh3-128 of the text (high word, low word)
            doc_masked         [documents] bool, true where no token of the document is a target
            manifest.json      counts, tokenizer, licences, inputs, SHA-256 of every file, and over them `dataset_id`

A store is written once, into a folder beside its place, and renamed there when it is whole; it is never changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataio.shards import ShardReader, ShardWriter, read_array, write_array
from dataio.types import TokenizerId
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import sync_directory, write_atomic
from stoker.hashing import sha256_file
from stoker.version import VERSION, code_commit

FORMAT = "stoker.store"
VERSION_READ = 1
#: 128 KiB of uint16: checking a chunk costs 17 microseconds, and zstd-3 gains little above it (2.37x there, 2.45x at
#: 1 MiB; measured 2026-11 on web and code). A shard is 64 MiB: few files, and an index of 8 KiB.
CHUNK_TOKENS = 65_536
SHARD_CHUNKS = 512


class StoreWriter:
    """Writes a store: ``append`` documents in their final order, then ``commit``; a context manager that cleans up.

    >>> with StoreWriter(path, "code", tokenizer_id) as writer:
    ...     writer.append(tokens, lengths, doc_bytes, doc_id)
    ...     store = writer.commit()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: str,
        tokenizer: TokenizerId,
        chunk_tokens: int = CHUNK_TOKENS,
        shard_chunks: int = SHARD_CHUNKS,
    ) -> None:
        self.path, self.source, self.tokenizer = Path(path), source, tokenizer
        if self.path.exists():
            raise Refusal(
                f"{self.path}: exists already, and a store is never changed; remove it or choose another path"
            )
        self._folder = self.path.with_name(f".{self.path.name}.partial")
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a writer that was killed
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self._tokens = ShardWriter(self._folder / "tokens", dtype, chunk_tokens, shard_chunks)
        self._lengths: list[NDArray[np.int64]] = []
        self._bytes: list[NDArray[np.int64]] = []
        self._ids: list[NDArray[np.uint64]] = []
        self._masked: list[NDArray[np.bool_]] = []

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def append(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[Any],
        doc_bytes: NDArray[Any],
        doc_id: NDArray[Any],
        masked: NDArray[np.bool_] | None = None,
    ) -> None:
        """Append n documents: `tokens` [sum of lengths], `lengths`, `doc_bytes`, `masked` [n], `doc_id` [n, 2]."""
        lengths, count = np.asarray(lengths, np.int64), len(lengths)
        if not count:
            return
        if lengths.min() < 1 or lengths.sum() != len(tokens):
            raise Refusal(f"store {self.source}: {len(tokens)} tokens do not make up documents of the lengths given")
        if int(tokens.max()) >= self.tokenizer.vocab_size or int(tokens.min()) < 0:
            raise Refusal(f"store {self.source}: token outside the vocabulary of {self.tokenizer.vocab_size}")
        if (tokens[np.cumsum(lengths) - 1] != self.tokenizer.eos_id).any():
            raise Refusal(f"store {self.source}: a document does not end with end-of-text ({self.tokenizer.eos_id})")
        masked = np.zeros(count, np.bool_) if masked is None else np.asarray(masked, np.bool_)
        doc_bytes, doc_id = np.asarray(doc_bytes, np.int64), np.asarray(doc_id, np.uint64)
        if doc_bytes.shape != (count,) or doc_id.shape != (count, 2) or masked.shape != (count,):
            raise Refusal(f"store {self.source}: bytes, ids and masks of {count} documents were expected")
        self._tokens.append(np.asarray(tokens))
        self._lengths.append(lengths)
        self._bytes.append(doc_bytes)
        self._ids.append(doc_id)
        self._masked.append(masked)

    def commit(self, licences: Mapping[str, Any] | None = None, inputs: Mapping[str, str] | None = None) -> Store:
        """Write side arrays and manifest, make all of it durable, move it to its place and open it.

        `licences`: what is known of them, by SPDX name; `inputs`: hash of each thing the store was made from.
        """
        if self._tokens.size < 2:
            raise Refusal(f"store {self.source}: {self._tokens.size} tokens; a store needs an input and a target")
        self._tokens.close()
        lengths = np.concatenate(self._lengths)
        arrays: dict[str, NDArray[Any]] = {
            "chunk_crc32c": np.array(self._tokens.checksums, np.uint32),
            "doc_offsets": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            "doc_bytes": np.concatenate(self._bytes),
            "doc_id": np.concatenate(self._ids),
            "doc_masked": np.concatenate(self._masked),
        }
        for name, array in arrays.items():
            write_array(self._folder / name, array)
        attributes = {"format": formats.stamp(FORMAT, VERSION_READ), "source": self.source}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        write_atomic(self._folder / "zarr.json", canonical.dumps(group))
        files = {str(path.relative_to(self._folder)): _describe(path) for path in _files(self._folder)}
        manifest = {
            "format": formats.stamp(FORMAT, VERSION_READ),
            "profile": "hot",
            "source": self.source,
            "tokenizer": vars(self.tokenizer),
            "tokens": self._tokens.size,
            "documents": len(lengths),
            "bytes": int(arrays["doc_bytes"].sum()),
            "dtype": self._tokens.dtype.name,
            "chunk_tokens": self._tokens.chunk,
            "shard_chunks": self._tokens.shard_chunks,
            "licences": dict(licences or {}),
            "inputs": dict(inputs or {}),
            "code": {"version": VERSION, "commit": code_commit()},
            "files": files,
            "dataset_id": canonical.sha256(files),
        }
        manifest["checksum"] = canonical.sha256(manifest)
        write_atomic(self._folder / "manifest.json", canonical.dumps(manifest))
        for folder, _, _ in os.walk(self._folder):
            sync_directory(folder)
        os.rename(self._folder, self.path)
        sync_directory(self.path.parent)
        return Store.open(self.path)


class Store:
    """A store opened for reading, through ``Store.open``. Nothing is loaded: tokens and side arrays are memory maps."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.source: str = manifest["source"]
        self.dataset_id: str = manifest["dataset_id"]
        self.tokenizer = TokenizerId(**manifest["tokenizer"])
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.num_bytes: int = manifest["bytes"]
        chunk, shard_chunks = manifest["chunk_tokens"], manifest["shard_chunks"]
        documents, num_chunks = self.num_documents, -(-self.num_tokens // chunk)
        self.doc_offsets: NDArray[np.int64] = read_array(path / "doc_offsets", "<i8", (documents + 1,))
        self.doc_bytes: NDArray[np.int64] = read_array(path / "doc_bytes", "<i8", (documents,))
        self.doc_id: NDArray[np.uint64] = read_array(path / "doc_id", "<u8", (documents, 2))
        self.doc_masked: NDArray[np.bool_] = read_array(path / "doc_masked", np.bool_, (documents,))
        checksums = read_array(path / "chunk_crc32c", "<u4", (num_chunks,))
        self._tokens = ShardReader(path / "tokens", manifest["dtype"], self.num_tokens, chunk, shard_chunks, checksums)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store. Refuses one that is missing, incomplete, damaged or newer than this release, naming the file.

        Here: the manifest's checksum, size of every file, checksums of the side arrays. The tokens are checked chunk by
        chunk when they are first touched; ``verify`` reads them all.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, (size, _) in manifest["files"].items():
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "missing" if found is None else f"of {found} bytes"
                raise Refusal(
                    f"{file}: {state} where {size} bytes were written; prepare this store again or restore it"
                )
        return cls(path, manifest)

    @property
    def bytes_read(self) -> int:
        """Bytes of tokens that ``gather`` has copied since the store was opened."""
        return self._tokens.bytes_read

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """[n, width] int32: the `lengths[j]` tokens from `starts[j]` on, then zeros. Refuses damaged chunks by name."""
        return self._tokens.gather(starts, lengths, width)

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """The tokens [start, stop)."""
        return self.gather(np.array([start]), np.array([stop - start]), stop - start)[0]

    def document_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the document that holds each token position."""
        return np.searchsorted(self.doc_offsets, positions, side="right") - 1

    def verify(self) -> list[str]:
        """Read every byte. A sentence for each damage, naming the file, and in `tokens` the chunk; empty if sound."""
        return list(self._damages())

    def _damages(self) -> Iterator[str]:
        for name, (size, digest) in self.manifest["files"].items():
            path = self.path / name
            if not path.is_file():
                yield f"{path}: missing"
            elif path.stat().st_size != size or sha256_file(path) != digest:
                found = list(self._tokens.damaged(int(path.name))) if name.startswith("tokens/c/") else []
                yield from found or [f"{path}: damaged (its size or SHA-256 is not the one written)"]


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise Refusal(
            f"{path}: no token store here ({file.name} is missing); run `make data` or give its path"
        ) from None
    except (OSError, ValueError) as error:
        raise Refusal(f"{file}: cannot be read ({error}); prepare this store again") from None
    formats.require(manifest, FORMAT, VERSION_READ, file)
    checksum = manifest.pop("checksum", None)
    if checksum != canonical.sha256(manifest) or manifest["dataset_id"] != canonical.sha256(manifest["files"]):
        raise Refusal(f"{file}: damaged or edited (its checksum is wrong); prepare this store again")
    return manifest


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> list[Any]:
    return [path.stat().st_size, sha256_file(path)]
