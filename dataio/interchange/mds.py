"""MosaicML's shards (MDS, mosaicml-streaming 0.13): FOLDER/index.json and FOLDER/shard.00000.mds and so on.

    index.json   {"version": 2, "shards": [...]}: of each its columns (names in order, encodings, sizes in bytes or
                 null), samples, file name, bytes and hashes, and those of its compressed form if it has one
    shard        uint32 samples n, uint32 [n + 1] byte at which each sample begins, and the last ends; JSON of the
                 columns again; the samples: uint32 size of each column that has none of its own, then the columns.
                 Little-endian.

Token columns are ``ndarray:<dtype>`` (a byte: 4 * dimensions + log2 of the bytes of a length; the lengths; values),
``ndarray:<dtype>:<length>`` (values), ``ndarray`` (a byte for the dtype first) or ``bytes`` (values of a dtype that
only their maker knows; LLM Foundry has int64). ``pkl`` columns would run code and are never decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from dataio.interchange.incoming import BATCH_TOKENS, Ends, Incoming, require_new, write_store
from dataio.shards import ZSTD_LEVEL, map_file, write_file
from dataio.stages import content_hash
from dataio.store import Store
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal
from stoker.files import sync_directory, write_atomic

#: Bytes of a shard before compression, the library's default.
SHARD_BYTES = 1 << 26
_HASH = "xxh3_128"
#: Of values, where a sample names its dtype.
_DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_NAMES = {np.dtype(dtype).name: dtype for dtype in _DTYPES.values()}


def export_mds(store: Store, out: str | os.PathLike[str], compress: bool = False) -> None:
    """Write the documents of `store` to the folder `out`: a sample for each, with the columns `id` (str: 32 hexadecimal
    digits) and `tokens` (ndarray, end-of-text included). Weights, masks and the other side arrays are not kept.

    `compress`: shards in zstd. Refuses damage in the store, and an `out` that exists.
    """
    path = Path(out)
    require_new(path)
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        writer = _Writer(folder, store.arrays["tokens"].grid.dtype, compress)
        doc_offsets, doc_id = store.doc_offsets, store.doc_id
        for first, last in _runs(doc_offsets):
            offsets = doc_offsets[first : last + 1]
            tokens = store.arrays["tokens"].rows(int(offsets[0]), int(offsets[-1]))
            for number, document in enumerate(np.split(tokens, offsets[1:-1] - offsets[0]), first):
                high, low = (int(word) for word in doc_id[number])
                writer.write(f"{high << 64 | low:032x}".encode(), document)
        writer.close()
        sync_directory(folder)
        os.rename(folder, path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _runs(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """[first, last) documents of about `BATCH_TOKENS` together."""
    first, count = 0, len(offsets) - 1
    while first < count:
        last = int(np.searchsorted(offsets, offsets[first] + BATCH_TOKENS, side="right")) - 1
        last = min(max(last, first + 1), count)
        yield first, last
        first = last


class _Writer:
    def __init__(self, folder: Path, dtype: str, compress: bool) -> None:
        self._folder, self._stored = folder, np.dtype(dtype).newbyteorder("<")
        self._columns = {
            "column_encodings": ["str", f"ndarray:{dtype}"],
            "column_names": ["id", "tokens"],
            "column_sizes": [None, None],
            "compression": f"zstd:{ZSTD_LEVEL}" if compress else None,
            "format": "mds",
            "hashes": [_HASH],
            "size_limit": SHARD_BYTES,
            "version": 2,
        }
        self._header = json.dumps(self._columns, sort_keys=True).encode()
        self._samples: list[bytes] = []
        self._size = 0
        self._shards: list[dict[str, Any]] = []

    def write(self, name: bytes, tokens: NDArray[Any]) -> None:
        shape = _length(len(tokens))
        values = np.ascontiguousarray(tokens, self._stored).tobytes()
        sizes = np.array([len(name), len(shape) + len(values)], "<u4").tobytes()
        sample = b"".join((sizes, name, shape, values))
        if self._samples and self._size + len(sample) + 4 > SHARD_BYTES - len(self._header) - 8:
            self._flush()
        self._samples.append(sample)
        self._size += len(sample) + 4

    def _flush(self) -> None:
        count = len(self._samples)
        first = 4 + 4 * (count + 1) + len(self._header)
        begins = first + np.concatenate(([0], np.cumsum([len(sample) for sample in self._samples])))
        if begins[-1] >= 2**32:
            raise Refusal(f"a document of {begins[-1]} bytes of tokens; MDS counts those of a shard in 32 bits")
        data = b"".join((np.uint32(count).tobytes(), begins.astype("<u4").tobytes(), self._header, *self._samples))
        name = f"shard.{len(self._shards):05}.mds"
        entry = {**self._columns, "samples": count, "raw_data": _file_entry(name, data), "zip_data": None}
        if self._columns["compression"]:
            data = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)
            name = f"{name}.zstd"
            entry["zip_data"] = _file_entry(name, data)
        write_file(self._folder / name, data)
        self._shards.append(entry)
        self._samples, self._size = [], 0

    def close(self) -> None:
        if self._samples:
            self._flush()
        write_atomic(self._folder / "index.json", json.dumps({"version": 2, "shards": self._shards}, sort_keys=True))


def _file_entry(name: str, data: bytes) -> dict[str, Any]:
    return {"basename": name, "bytes": len(data), "hashes": {_HASH: xxhash.xxh3_128_hexdigest(data)}}


def _length(length: int) -> bytes:
    """How an array of one dimension begins."""
    log2 = next(log2 for log2 in range(4) if length < 1 << (8 << log2))
    return bytes([4 | log2]) + length.to_bytes(1 << log2, "little")


def import_mds(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    source: str,
    tokenizer: Tokenizer,
    ends: Ends = "present",
    column: str = "tokens",
    bytes_dtype: str | None = None,
) -> Store:
    """Make a store of the token `column` of an MDS folder; `tokenizer`: the one it was made with.

    A sample is a document, unless ``ends="split"``: LLM Foundry's are windows of a fixed length. `bytes_dtype`: what a
    column of ``bytes`` holds, such as "int64". `doc_source_row` has the shard and the sample in it. Sizes and hashes
    that the index states are checked. Memory: one shard.
    """
    folder = Path(folder)
    shards = _read_index(folder)
    names = [(entry["zip_data"] if _zipped(folder, entry) else entry["raw_data"])["basename"] for entry in shards]
    inputs = {name: content_hash(folder / name) for name in names if (folder / name).is_file()}
    return write_store(path, source, tokenizer, _batches(folder, shards, column, bytes_dtype), ends, inputs, names)


def _read_index(folder: Path) -> list[dict[str, Any]]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        shards: list[dict[str, Any]] = index["shards"]
        for entry in shards:
            lengths = {len(entry[f"column_{what}"]) for what in ("names", "encodings", "sizes")}
            if len(lengths) != 1 or entry["samples"] < 0:
                raise ValueError("columns without a name, encoding or size")
            if (entry["format"], entry["version"]) != ("mds", 2):
                raise Refusal(f"{path}: a shard in {entry['format']} {entry['version']}, where mds 2 can be read")
            for file in (entry["raw_data"], entry["zip_data"] or entry["raw_data"]):
                if Path(file["basename"]).name != file["basename"] or file["bytes"] < 0:
                    raise Refusal(f"{path}: {file['basename']!r} is not the name of a file in this folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{path}: not the index of an MDS data set ({error!r}); give the folder of one") from None
    return shards


def _zipped(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Only the compressed form is there."""
    return bool(entry["zip_data"]) and not (folder / entry["raw_data"]["basename"]).is_file()


def _batches(folder: Path, shards: list[dict[str, Any]], column: str, bytes_dtype: str | None) -> Iterator[Incoming]:
    for number, entry in enumerate(shards):
        shard = _Shard(folder, entry, column, bytes_dtype)
        held: list[NDArray[Any]] = []
        first = 0
        for sample in range(shard.samples):
            held.append(shard.tokens(sample))
            if sample + 1 == shard.samples or sum(map(len, held)) >= BATCH_TOKENS:
                yield Incoming(
                    np.concatenate(held), np.array([len(tokens) for tokens in held], np.int64), number, first
                )
                held, first = [], sample + 1


class _Shard:
    """One shard opened for its tokens."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], column: str, bytes_dtype: str | None) -> None:
        self.path = folder / entry["raw_data"]["basename"]
        names, encodings, self._sizes = entry["column_names"], entry["column_encodings"], entry["column_sizes"]
        if column not in names:
            raise Refusal(f"{self.path}: has no column {column}; it has {', '.join(names)}")
        self._column = names.index(column)
        self._decode = _decoder(f"{self.path}, column {column}", encodings[self._column], bytes_dtype)
        self._data = _read(folder, entry)
        self.samples = int(entry["samples"])
        begins = self._data[4 : 4 + 4 * (self.samples + 1)]
        if len(begins) != 4 * (self.samples + 1) or int(self._data[:4].view("<u4")[0]) != self.samples:
            raise self._damage()
        self._begins = begins.view("<u4").astype(np.int64)
        if (np.diff(self._begins) < 0).any() or self._begins[-1] > len(self._data):
            raise self._damage()

    def tokens(self, sample: int) -> NDArray[Any]:
        data = self._data[self._begins[sample] : self._begins[sample + 1]]
        stated = sum(1 for size in self._sizes if size is None)
        try:
            sizes = iter(data[: 4 * stated].view("<u4").tolist())
            ends = 4 * stated + np.cumsum([next(sizes) if size is None else size for size in self._sizes])
            low = 4 * stated if self._column == 0 else int(ends[self._column - 1])
            if int(ends[-1]) != len(data):
                raise ValueError("columns that do not fill it")
            return self._decode(data[low : int(ends[self._column])])
        except (ValueError, IndexError, StopIteration, KeyError) as error:
            raise self._damage(f"sample {sample}: {error}") from None

    def _damage(self, what: str = "its index of samples") -> Refusal:
        return Refusal(f"{self.path}: damaged ({what}); make it again or restore the file")


def _read(folder: Path, entry: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The bytes of a shard, decompressed, of the size and with the hashes that the index states."""
    raw = entry["raw_data"]
    if not _zipped(folder, entry):
        data = map_file(folder / raw["basename"])
    else:
        method, path = str(entry["compression"]).split(":")[0], folder / entry["zip_data"]["basename"]
        if method != "zstd":
            raise Refusal(f"{path}: compressed with {method}, and only zstd can be read; decompress it first")
        packed = map_file(path)
        _require(path, packed, entry["zip_data"])
        try:
            with zstandard.ZstdDecompressor().stream_reader(packed.data) as reader:
                data = np.frombuffer(reader.read(int(raw["bytes"]) + 1), np.uint8)
        except zstandard.ZstdError as error:
            raise Refusal(f"{path}: damaged ({error}); restore the file") from None
    _require(folder / raw["basename"], data, raw)
    return data


def _require(path: Path, data: NDArray[np.uint8], stated: Mapping[str, Any]) -> None:
    if len(data) != stated["bytes"] or any(
        _hash(name, data) not in (None, of) for name, of in stated["hashes"].items()
    ):
        raise Refusal(f"{path}: damaged (its size or hash is not the one in index.json); restore the file")


def _hash(name: str, data: NDArray[np.uint8]) -> str | None:
    """Hexadecimal digest; None by a method that is not known."""
    if name in xxhash.algorithms_available:
        digest: str = getattr(xxhash, f"{name}_hexdigest")(data.data)
        return digest
    known = name in hashlib.algorithms_guaranteed and not name.startswith("shake_")
    return hashlib.new(name, data.data, usedforsecurity=False).hexdigest() if known else None


@dataclass(frozen=True)
class _Array:
    """Decodes an array of one dimension. `dtype` None: a byte says it; `fixed`: its length is the column's."""

    dtype: str | None
    fixed: bool

    def __call__(self, data: NDArray[np.uint8]) -> NDArray[Any]:
        dtype = self.dtype
        if dtype is None:
            dtype, data = _DTYPES[int(data[0])], data[1:]
        if not self.fixed:
            dimensions, width = int(data[0]) >> 2, 1 << (int(data[0]) & 3)
            if dimensions != 1:
                raise ValueError(f"tokens in {dimensions} dimensions")
            length, data = int.from_bytes(data[1 : 1 + width].tobytes(), "little"), data[1 + width :]
            if length * np.dtype(dtype).itemsize != len(data):
                raise ValueError("values that are not of the length stated")
        return np.frombuffer(data.tobytes(), dtype)


def _decoder(what: str, encoding: str, bytes_dtype: str | None) -> _Array:
    if encoding == "bytes":
        if bytes_dtype not in _NAMES:
            raise Refusal(f"{what}: bytes, which do not say of what; give bytes_dtype, one of {', '.join(_NAMES)}")
        return _Array(_NAMES[bytes_dtype], fixed=True)
    kind, *rest = encoding.split(":")
    if kind != "ndarray" or (rest and rest[0] not in _NAMES) or (len(rest) == 2 and "," in rest[1]):
        raise Refusal(f"{what}: {encoding}; tokens are bytes or an ndarray of integers in one dimension")
    return _Array(_NAMES[rest[0]] if rest else None, fixed=len(rest) == 2)
