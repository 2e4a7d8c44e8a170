"""MDS is written and read by its layout, which this file spells out once more, byte by byte."""

from __future__ import annotations

import hashlib
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from dataio.interchange.mds import export_mds, import_mds
from dataio.store import Store
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal
from tests.dataio import synthetic
from tests.dataio.interchange.texts import assert_same_documents, store_of


def write_folder(
    folder: Path, shards: list[list[list[bytes]]], encodings: dict[str, str], sizes: list[int | None], **entry: Any
) -> None:
    """An MDS folder of samples (of columns in order, already encoded)."""
    folder.mkdir(exist_ok=True)
    columns = {"column_names": sorted(encodings), "column_encodings": [encodings[name] for name in sorted(encodings)]}
    index = []
    for number, samples in enumerate(shards):
        bodies = [
            b"".join(struct.pack("<I", len(value)) for value, size in zip(sample, sizes) if size is None)
            + b"".join(sample)
            for sample in samples
        ]
        header = json.dumps({**columns, "column_sizes": sizes}).encode()
        first = 4 + 4 * (len(bodies) + 1) + len(header)
        begins = first + np.concatenate(([0], np.cumsum([len(body) for body in bodies])))
        data = struct.pack("<I", len(bodies)) + begins.astype("<u4").tobytes() + header + b"".join(bodies)
        name = f"shard.{number:05}.mds"
        (folder / name).write_bytes(data)
        raw = {"basename": name, "bytes": len(data), "hashes": {"sha1": hashlib.sha1(data).hexdigest(), "new": "00"}}
        about = {"format": "mds", "version": 2, "compression": None, "samples": len(bodies), "zip_data": None}
        index.append({**columns, "column_sizes": sizes, "raw_data": raw, **about, **entry})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": index}))


def documents(store: Store) -> list[np.ndarray]:
    return np.split(store.read(0, store.num_tokens), store.doc_offsets[1:-1])


def array(values: np.ndarray, log2: int, dtype: str) -> bytes:
    """An ndarray of one dimension whose length takes 2^log2 bytes."""
    return bytes([4 + log2]) + len(values).to_bytes(1 << log2, "little") + values.astype(dtype).tobytes()


@pytest.mark.parametrize(
    "encoding, encode, options",
    [
        ("ndarray:uint16", lambda tokens: array(tokens, 0 if len(tokens) < 256 else 1, "<u2"), {}),
        ("ndarray:int32", lambda tokens: array(tokens, 2, "<i4"), {}),
        ("ndarray", lambda tokens: bytes([65]) + array(tokens, 3, "<i8"), {}),
        ("bytes", lambda tokens: tokens.astype("<i8").tobytes(), {"bytes_dtype": "int64"}),
        ("bytes", lambda tokens: tokens.astype("<u2").tobytes(), {"bytes_dtype": "uint16"}),
    ],
)
def test_every_encoding_of_tokens_is_read(
    tmp_path: Path,
    tokenizer: Tokenizer,
    encoding: str,
    encode: Any,
    options: dict[str, str],
) -> None:
    expected = store_of(tmp_path / "expected", tokenizer)
    samples = [[b"\x07" * 8, encode(tokens), b"\xff"] for tokens in documents(expected)]
    encodings = {"a": "int", "tokens": encoding, "z": "pkl"}  # the last is never decoded
    write_folder(tmp_path / "mds", [samples[:2], samples[2:]], encodings, [8, None, None])
    found = import_mds(tmp_path / "mds", tmp_path / "s", "s", tokenizer, **options)  # type: ignore[arg-type]
    assert_same_documents(expected, found)
    np.testing.assert_array_equal(found.doc_source_row, [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [1, 3]])
    assert found.input_files == ["shard.00000.mds", "shard.00001.mds"] == sorted(found.manifest["inputs"])


def test_windows_of_fixed_length_are_documents_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    expected = store_of(tmp_path / "expected", tokenizer)
    tokens = expected.read(0, expected.num_tokens)
    windows = tokens[: len(tokens) // 16 * 16].reshape(-1, 16)
    samples = [[window.astype("<u2").tobytes()] for window in windows]
    write_folder(tmp_path / "mds", [samples[:9], samples[9:]], {"tokens": "ndarray:uint16:16"}, [32])
    found = import_mds(tmp_path / "mds", tmp_path / "s", "s", tokenizer, ends="split")
    np.testing.assert_array_equal(found.read(0, windows.size), windows.ravel())
    complete = int((windows == tokenizer.id.eos_id).sum())
    np.testing.assert_array_equal(found.doc_id[:complete], expected.doc_id[:complete])
    assert found.num_tokens == windows.size + 1, "the last document was cut, and is ended"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("vocab_size, dtype", [(257, "uint16"), (2**16 + 1, "uint32")])
def test_an_export_is_the_layout_to_the_byte(
    tmp_path: Path, vocab_size: int, dtype: str, compress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataio.interchange.mds.SHARD_BYTES", 5000)
    identity = synthetic.TokenizerId("00" * 32, vocab_size, 256)
    store = synthetic.random_store(tmp_path / "s", 5000, mean_document=300, tokenizer=identity)
    export_mds(store, tmp_path / "mds", compress)
    index = json.loads((tmp_path / "mds/index.json").read_text())
    names = ["shard.{:05}.mds" + (".zstd" if compress else "")] * len(index["shards"])
    assert index["version"] == 2 and len(names) >= 3
    expected = iter(documents(store))
    seen = 0
    for number, (entry, name) in enumerate(zip(index["shards"], names)):
        data = (tmp_path / "mds" / name.format(number)).read_bytes()
        assert (entry["zip_data"] if compress else entry["raw_data"])["bytes"] == len(data)
        data = zstandard.ZstdDecompressor().decompress(data) if compress else data
        assert entry["raw_data"]["bytes"] == len(data) <= 5000
        (count,) = struct.unpack_from("<I", data)
        begins = struct.unpack_from(f"<{count + 1}I", data, 4)
        header = json.loads(data[4 * (count + 2) : begins[0]])
        for key in ("column_names", "column_encodings", "column_sizes"):
            assert entry[key] == header[key]
        assert (entry["column_names"], entry["column_encodings"]) == (["id", "tokens"], ["str", f"ndarray:{dtype}"])
        assert (entry["samples"], begins[-1]) == (count, len(data))
        for low, high in pairwise(begins):
            size_id, size_tokens = struct.unpack_from("<2I", data, low)
            assert low + 8 + size_id + size_tokens == high
            tokens = next(expected)
            assert data[low + 8 : low + 8 + size_id].decode() == f"{7:016x}{seen:016x}"
            assert data[low + 8 + size_id : high] == array(tokens, 0 if len(tokens) < 256 else 1, dtype)
            seen += 1
    assert seen == store.num_documents and next(expected, None) is None


@pytest.mark.parametrize("compress", [False, True])
def test_there_and_back_is_the_same_documents_with_the_same_ids(
    tmp_path: Path,
    tokenizer: Tokenizer,
    compress: bool,
) -> None:
    store = store_of(tmp_path / "s", tokenizer)
    export_mds(store, tmp_path / "mds", compress)
    back = import_mds(tmp_path / "mds", tmp_path / "back", "s", tokenizer)
    assert_same_documents(store, back)
    with pytest.raises(Refusal, match="exists already"):
        export_mds(store, tmp_path / "mds")


def test_mosaicml_streaming_reads_an_export(tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming", reason="no mosaicml-streaming: the layout alone is tested")
    store = synthetic.random_store(tmp_path / "s", 3000)
    export_mds(store, tmp_path / "mds")
    samples = streaming.LocalDataset(str(tmp_path / "mds"))
    for sample, tokens in zip(samples, documents(store), strict=True):
        np.testing.assert_array_equal(sample["tokens"], tokens)


def test_what_is_no_sound_mds_of_tokens_is_refused_by_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "mds"
    good = [[np.array([5, tokenizer.id.eos_id], "<u2").tobytes()]] * 3

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(Refusal, match=match):
            import_mds(folder, tmp_path / "s", "s", tokenizer, **options)
        assert not (tmp_path / "s").exists()

    refused(r"index\.json: not the index")
    fixed: tuple[dict[str, str], list[int | None]] = ({"tokens": "ndarray:uint16:2"}, [4])
    write_folder(folder, [good], *fixed)
    refused("has no column text; it has tokens", column="text")
    for encoding in ("ndarray:float32", "ndarray:uint16:2,1", "pkl", "str"):
        write_folder(folder, [good], {"tokens": encoding}, [4])
        refused(rf"00000\.mds, column tokens: {encoding}; tokens are bytes or an ndarray of integers")
    write_folder(folder, [good], {"tokens": "bytes"}, [4])
    refused("give bytes_dtype, one of uint8")
    write_folder(folder, [good], {"tokens": "ndarray:uint16"}, [4])
    refused(r"00000\.mds: damaged \(sample 0")
    write_folder(folder, [[[bytes([8, 1, 1, 0, 0])]]], {"tokens": "ndarray:uint16"}, [None])
    refused("2 dimensions")
    write_folder(folder, [good], *fixed, samples=4)
    refused(r"00000\.mds: damaged")
    write_folder(folder, [good], *fixed, format="csv")
    refused("csv 2")
    write_folder(folder, [good], *fixed, raw_data={"basename": "../../secret", "bytes": 1, "hashes": {}})
    refused("is not the name of a file in this folder")
    write_folder(folder, [good], *fixed)
    data = bytearray((folder / "shard.00000.mds").read_bytes())
    data[-1] ^= 1
    (folder / "shard.00000.mds").write_bytes(data)
    refused(r"00000\.mds: damaged \(its size or hash")
    (folder / "shard.00000.mds").unlink()
    refused(r"00000\.mds: missing")
    write_folder(folder, [good], *fixed)
    index = json.loads((folder / "index.json").read_text())
    raw = index["shards"][0]["raw_data"]
    index["shards"][0] |= {"compression": "br:11", "zip_data": {**raw, "basename": "shard.00000.mds.br"}}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / raw["basename"]).rename(folder / "shard.00000.mds.br")
    refused(r"mds\.br: compressed with br")
    index["shards"][0]["compression"] = "zstd"
    (folder / "index.json").write_text(json.dumps(index))
    refused(r"00000\.mds")
