"""The token store: the tokens of one source under one tokenizer, as a zarr v3 group.

    <store>/tokens             [tokens] uint16 or uint32, documents one after another, each ending with end-of-text
            doc_offsets        [documents + 1] int64, first token of each document, then the number of tokens
            doc_bytes          [documents] int64, length of the text in UTF-8 bytes (for bits per byte)
            doc_id             [documents, 2] uint64, xxh3-128 of the text (high word, low word)
            doc_masked         [documents] bool, true where no token of the document is a target
            doc_source_row     [documents, 2] int64, number of the input file and of the record in it; -1 if not known
            doc_weight         [documents] float32, how much the document should count; 1 unless a stage says otherwise
            doc_lang           [documents] uint16, index in the manifest's `languages`; 65535 if not known
            doc_flags          [documents] uint32, bits that a recipe gives a meaning
            checks/<array>     uint32, what each array is checked against when it is touched (``checks.py``)
            input_files.json   names of the input files, by number
            files.json         size and SHA-256 of every file
            manifest.json      counts, tokenizer, licences, languages, inputs, hash of files.json, `dataset_id`

A store is written once, into a folder beside its place, and renamed there when it is whole; it is never changed.
Profiles: ``hot`` is mapped, for training; ``cold`` is compressed; ``repack`` makes one of the other (``shards.py``).

`dataset_id` is the hash of what the arrays hold: however they are cut into chunks and shards, compressed, and by how
many processes written, the same documents in the same order have the same id, and a run goes on with either.
Version 1 had the hash of its files, no side arrays after `doc_masked`, and one checksum a chunk; it is read as it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataio.checks import Checks, table_of, table_rows
from dataio.manifest import (
    NO_LANGUAGE,
    SIDE_ARRAYS,
    About,
    grid_of,
    language_order,
    partial_folder,
    read_json,
    read_manifest,
    require_absent,
    require_files,
    seal,
    side_default,
    vocabulary_dtype,
)
from dataio.readers import ArrayReader, ColdArray, HotArray, Loaded
from dataio.shards import Grid, Profile, ShardWriter, Written, read_array, write_side
from dataio.types import TokenizerId
from stoker.errors import Refusal
from stoker.hashing import sha256_file

#: 128 KiB of uint16: zstd-3 gains little above it (2.37x there, 2.45x at 1 MiB; measured 2026-11 on web and code).
CHUNK_TOKENS = 65_536
#: A shard is 64 MiB of uint16, its index 8 KiB; a cold one is 256 MiB before compression: fewer objects.
SHARD_CHUNKS: dict[Profile, int] = {"hot": 512, "cold": 2048}


def token_grid(
    tokenizer: TokenizerId, tokens: int, chunk_tokens: int, shard_chunks: int | None, profile: Profile
) -> Grid:
    """Of the `tokens` of a store. Refuses a chunk that is not a power of two: units of checks would not divide it."""
    if chunk_tokens < 1 or chunk_tokens & (chunk_tokens - 1):
        raise Refusal(f"chunk_tokens={chunk_tokens} must be a power of two; the usual is {CHUNK_TOKENS}")
    shard_chunks = SHARD_CHUNKS[profile] if shard_chunks is None else shard_chunks
    if shard_chunks < 1:
        raise Refusal(f"shard_chunks={shard_chunks} must be at least 1; the usual is {SHARD_CHUNKS[profile]}")
    return Grid(vocabulary_dtype(tokenizer), (tokens,), chunk_tokens, shard_chunks, profile)


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
        shard_chunks: int | None = None,
        profile: Profile = "hot",
    ) -> None:
        self.path, self.source, self.tokenizer, self.profile = Path(path), source, tokenizer, profile
        grid = token_grid(tokenizer, 0, chunk_tokens, shard_chunks, profile)
        require_absent(self.path)
        self._folder = partial_folder(self.path)
        self._tokens = ShardWriter(self._folder / "tokens", grid)
        self._lengths: list[NDArray[np.int64]] = []
        self._sides: dict[str, list[NDArray[Any]]] = {name: [] for name in SIDE_ARRAYS}
        self._languages: dict[str, int] = {}

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
        *,
        source_row: NDArray[Any] | None = None,
        weight: NDArray[Any] | None = None,
        languages: Sequence[str | None] | None = None,
        flags: NDArray[Any] | None = None,
    ) -> None:
        """Append n documents: `tokens` [sum of lengths], `lengths`, `doc_bytes`, `masked`, `weight`, `languages` and
        `flags` [n], `doc_id` and `source_row` [n, 2]."""
        lengths, count = np.asarray(lengths, np.int64), len(lengths)
        if not count:
            return
        if lengths.min() < 1 or lengths.sum() != len(tokens):
            raise Refusal(f"store {self.source}: {len(tokens)} tokens do not make up documents of the lengths given")
        if int(tokens.max()) >= self.tokenizer.vocab_size or int(tokens.min()) < 0:
            raise Refusal(f"store {self.source}: token outside the vocabulary of {self.tokenizer.vocab_size}")
        if (tokens[np.cumsum(lengths) - 1] != self.tokenizer.eos_id).any():
            raise Refusal(f"store {self.source}: a document does not end with end-of-text ({self.tokenizer.eos_id})")
        given = {
            "doc_bytes": doc_bytes,
            "doc_id": doc_id,
            "doc_masked": masked,
            "doc_source_row": source_row,
            "doc_weight": weight,
            "doc_lang": None if languages is None else self._numbers(languages),
            "doc_flags": flags,
        }
        rows = {
            name: side_default(name, count) if values is None else np.asarray(values, SIDE_ARRAYS[name].dtype)
            for name, values in given.items()
        }
        wrong = [name for name, values in rows.items() if values.shape != (count, *SIDE_ARRAYS[name].columns)]
        if wrong:
            raise Refusal(f"store {self.source}: {', '.join(wrong)} must have a row for each of {count} documents")
        self._tokens.append(np.asarray(tokens))
        self._lengths.append(lengths)
        for name, values in rows.items():
            self._sides[name].append(values)

    def _numbers(self, languages: Sequence[str | None]) -> list[int]:
        """Of languages as they come; `commit` puts them in order."""
        known = self._languages
        return [NO_LANGUAGE if name is None else known.setdefault(name, len(known)) for name in languages]

    def commit(
        self,
        licences: Mapping[str, Any] | None = None,
        inputs: Mapping[str, str] | None = None,
        input_files: Sequence[str] = (),
    ) -> Store:
        """Write side arrays and manifest, make all of it durable, move it to its place and open it.

        `licences`, `inputs`, `input_files`: see ``About``.
        """
        if self._tokens.size < 2:
            raise Refusal(f"store {self.source}: {self._tokens.size} tokens; a store needs an input and a target")
        lengths = np.concatenate(self._lengths)
        sides = {name: np.concatenate(values) for name, values in self._sides.items()}
        languages, rank = language_order(list(self._languages))
        sides["doc_lang"] = rank[sides["doc_lang"]]
        written = {"tokens": self._tokens.close()}
        for name, values in {"doc_offsets": np.concatenate(([0], np.cumsum(lengths))), **sides}.items():
            written[name] = write_document_array(self._folder, name, values, self.profile)
        about = About(
            self.source,
            self.tokenizer,
            documents=len(lengths),
            bytes=int(sides["doc_bytes"].sum()),
            languages=languages,
            licences=dict(licences or {}),
            inputs=dict(inputs or {}),
            input_files=list(input_files),
        )
        seal(self._folder, self.path, about, written, self.profile)
        return Store.open(self.path)


def write_document_array(folder: Path, name: str, values: NDArray[Any], profile: Profile) -> Written:
    """A side array of the store in `folder`; `values` may be a map, of which a chunk is read at a time."""
    dtype = "int64" if name == "doc_offsets" else SIDE_ARRAYS[name].dtype
    grid = Grid.side(dtype, values.shape, profile)
    return write_side(folder / name, grid, lambda low, high: values[low:high])


class Store:
    """A store opened for reading, through ``Store.open``. Nothing is loaded: arrays are maps, checked as touched.

    The properties named after arrays are sound to the last byte, which costs a pass over that array when it is first
    asked for; training needs none of them, see ``documents_of``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.source: str = manifest["source"]
        self.profile: Profile = manifest["profile"]
        self.dataset_id: str = manifest["dataset_id"]
        self.tokenizer = TokenizerId(**manifest["tokenizer"])
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.num_bytes: int = manifest["bytes"]
        self.languages: tuple[str, ...] = tuple(manifest.get("languages", ()))
        first = manifest["format"]["version"] == 1
        #: Readers of the arrays, by name.
        self.arrays: dict[str, ArrayReader] = _first_arrays(path, manifest) if first else _arrays(path, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store. Refuses one that is missing, incomplete, damaged or newer than this release, naming the file.

        Here: the manifest's checksum, and that every file is there. What the files hold is checked as it is first
        touched; ``verify`` reads all of it. It takes a millisecond, and a listing of the shards.
        """
        path = Path(path)
        manifest = read_manifest(path)
        require_files(path, manifest)
        return cls(path, manifest)

    @property
    def doc_offsets(self) -> NDArray[np.int64]:
        """[documents + 1] first token of each document, then the number of tokens."""
        return self.arrays["doc_offsets"].whole()

    @property
    def doc_bytes(self) -> NDArray[np.int64]:
        """[documents] bytes of the text in UTF-8."""
        return self.arrays["doc_bytes"].whole()

    @property
    def doc_id(self) -> NDArray[np.uint64]:
        """[documents, 2] xxh3-128 of the text: high word, low word."""
        return self.arrays["doc_id"].whole()

    @property
    def doc_masked(self) -> NDArray[np.bool_]:
        """[documents] no token of it is a target."""
        return self.arrays["doc_masked"].whole()

    @property
    def doc_source_row(self) -> NDArray[np.int64]:
        """[documents, 2] index in ``input_files`` and record of that file, from 0; -1 if not known."""
        return self.arrays["doc_source_row"].whole()

    @property
    def doc_weight(self) -> NDArray[np.float32]:
        """[documents] how much it should count."""
        return self.arrays["doc_weight"].whole()

    @property
    def doc_lang(self) -> NDArray[np.uint16]:
        """[documents] index in ``languages``; NO_LANGUAGE if not known."""
        return self.arrays["doc_lang"].whole()

    @property
    def doc_flags(self) -> NDArray[np.uint32]:
        """[documents] bits that the recipe gives a meaning."""
        return self.arrays["doc_flags"].whole()

    @cached_property
    def input_files(self) -> list[str]:
        """Name of each input file, by number; empty if not known."""
        if "input_files_sha256" not in self.manifest:
            return []
        names: list[str] = read_json(self.path / "input_files.json", self.manifest["input_files_sha256"])
        return names

    @cached_property
    def files(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of each file, by its path in the store; all but manifest.json and the list itself."""
        if "files_sha256" in self.manifest:
            listed = read_json(self.path / "files.json", self.manifest["files_sha256"])
        else:
            listed = self.manifest["files"]
        return {name: (size, digest) for name, (size, digest) in listed.items()}

    def language(self, document: int) -> str | None:
        """Of a document; None if not known."""
        number = int(self.arrays["doc_lang"].rows(document, document + 1)[0])
        return None if number == NO_LANGUAGE else self.languages[number]

    @property
    def bytes_read(self) -> int:
        """Bytes of tokens that were handed out since the store was opened."""
        return self.arrays["tokens"].bytes_read

    @property
    def bytes_checked(self) -> int:
        """Bytes of all arrays that were read to find them sound since the store was opened."""
        return sum(array.bytes_checked for array in self.arrays.values())

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """[n, width] int32: the `lengths[j]` tokens from `starts[j]` on, then zeros. Refuses damaged ones by name."""
        return self.arrays["tokens"].gather(starts, lengths, width)

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """The tokens [start, stop)."""
        return self.gather(np.array([start]), np.array([stop - start]), stop - start)[0]

    def document_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the document that holds each token position. IndexError outside the store.

        A search passes through offsets that were not checked; those of the document it ends at are, and if they are
        sound and hold the position, it ended at the right one.
        """
        positions = np.asarray(positions, np.int64)
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < self.num_tokens:
            raise IndexError(f"{self.path}: token positions outside [0, {self.num_tokens})")
        array = self.arrays["doc_offsets"]
        offsets = array.unchecked
        found = np.searchsorted(offsets, positions, side="right") - 1
        clipped = np.clip(found, 0, self.num_documents - 1)
        array.check(clipped, clipped + 2)
        if (positions < offsets[clipped]).any() or (positions >= offsets[clipped + 1]).any():
            array.whole()  # names the damage that led astray
            raise Refusal(f"{self.path}: doc_offsets do not ascend; prepare this store again")
        return clipped

    def documents_of(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(the document that each window begins in, `doc_offsets`, `doc_masked`), of the latter two only what the
        documents of these windows have is known to be sound."""
        ends = np.maximum(starts, starts + lengths - 1)
        first, last = self.document_of(np.concatenate((starts, ends))).reshape(2, -1)
        offsets, masked = self.arrays["doc_offsets"], self.arrays["doc_masked"]
        offsets.check(first, last + 2)
        masked.check(first, last + 1)
        return first, offsets.unchecked, masked.unchecked

    def verify(self) -> list[str]:
        """Read every byte. A sentence for each damage, naming the file, and in `tokens` which; empty if sound."""
        return list(self._damages())

    def _damages(self) -> Iterator[str]:
        try:
            files = self.files
        except Refusal as refusal:
            yield str(refusal)
            return
        written = {digest: name for name, (_, digest) in files.items()}
        for name, (size, digest) in files.items():
            path = self.path / name
            if not path.is_file():
                yield f"{path}: missing"
                continue
            found = sha256_file(path)
            if found == digest:
                continue
            if found in written:
                yield f"{path}: holds what was written as {written[found]}: swapped, or copied over"
                continue
            wrong = []
            if path.stat().st_size == size and "/c/" in name and name.split("/")[0] in self.arrays:
                array, _, shard = name.partition("/c/")
                wrong = list(self.arrays[array].damaged(int(shard.split("/")[0])))
            yield from wrong or [f"{path}: damaged (its size or SHA-256 is not the one written)"]


def _arrays(path: Path, manifest: dict[str, Any]) -> dict[str, ArrayReader]:
    def reader(name: str) -> ArrayReader:
        grid = grid_of(manifest, name)

        def checks() -> Checks:
            folder = path / "checks" / name
            table = read_array(folder, "<u4", (table_rows(grid.num_units),), verify=False)
            return Checks(folder / "c/0", table, grid.num_units, manifest["arrays"][name]["checks_crc32c"])

        return (HotArray if manifest["profile"] == "hot" else ColdArray)(path / name, grid, checks)

    return {name: reader(name) for name in manifest["arrays"]}


def _first_arrays(path: Path, manifest: dict[str, Any]) -> dict[str, ArrayReader]:
    """Of a store of version 1: its side arrays are verified when it is opened, and the others have their defaults."""
    documents = manifest["documents"]
    chunk, size = manifest["chunk_tokens"], manifest["tokens"]
    tokens = Grid(manifest["dtype"], (size,), chunk, manifest["shard_chunks"], unit_rows=chunk)
    num_chunks = tokens.num_units

    def checks() -> Checks:
        units = read_array(path / "chunk_crc32c", "<u4", (num_chunks,))
        table, checksum = table_of(units)
        return Checks(path / "chunk_crc32c/c/0", table, num_chunks, checksum)

    arrays: dict[str, ArrayReader] = {"tokens": HotArray(path / "tokens", tokens, checks)}
    shapes = {"doc_offsets": ("<i8", (documents + 1,))}
    shapes |= {name: (side.dtype, (documents, *side.columns)) for name, side in SIDE_ARRAYS.items()}
    for name, (dtype, shape) in shapes.items():
        kept = (path / name).is_dir()
        values = read_array(path / name, dtype, shape) if kept else side_default(name, documents)
        arrays[name] = Loaded(path / name, values)
    return arrays
