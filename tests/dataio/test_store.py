"""A store is whole, verified and readable by others, or it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from dataio.store import Store, StoreWriter
from dataio.types import TokenizerId
from stoker import canonical
from stoker.errors import Refusal
from tests.dataio import synthetic


@pytest.mark.parametrize("vocab_size, dtype", [(257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
@pytest.mark.parametrize("num_tokens", [2, 63, 64, 65, 256, 257, 1000])
def test_zarr_python_reads_every_array_that_was_written(
    tmp_path: Path, vocab_size: int, dtype: str, num_tokens: int
) -> None:
    tokenizer = TokenizerId("00" * 32, vocab_size, vocab_size - 1)
    tokens = np.random.default_rng(1).integers(0, vocab_size - 1, num_tokens)
    tokens[-1] = tokens[num_tokens // 3] = vocab_size - 1
    lengths = np.diff([-1, *np.flatnonzero(tokens == vocab_size - 1)])
    ids = np.random.default_rng(2).integers(0, 2**64, (len(lengths), 2), np.uint64)
    masked = np.arange(len(lengths)) % 2 == 1
    with StoreWriter(tmp_path / "s", "code", tokenizer, chunk_tokens=64, shard_chunks=4) as writer:
        writer.append(tokens, lengths, lengths * 2, ids, masked)
        store = writer.commit({"MIT": 1})

    group = zarr.open_group(tmp_path / "s", mode="r")
    assert group["tokens"].dtype == dtype
    np.testing.assert_array_equal(group["tokens"][:], tokens)
    np.testing.assert_array_equal(group["doc_offsets"][:], [0, *np.cumsum(lengths)])
    np.testing.assert_array_equal(group["doc_bytes"][:], lengths * 2)
    np.testing.assert_array_equal(group["doc_id"][:], ids)
    np.testing.assert_array_equal(group["doc_masked"][:], masked)
    np.testing.assert_array_equal(store.read(0, num_tokens), tokens)
    assert store.verify() == []
    assert (store.num_tokens, store.num_documents, store.num_bytes) == (num_tokens, len(lengths), 2 * num_tokens)


def test_windows_are_the_tokens_wherever_they_start_and_across_shards(tmp_path: Path) -> None:
    store = synthetic.random_store(tmp_path / "s", 3001)
    tokens = zarr.open_group(tmp_path / "s", mode="r")["tokens"][:].astype(np.int32)
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 3001, 200)
    lengths = np.minimum(rng.integers(0, 700, 200), 3001 - starts)
    found = store.gather(starts, lengths, 700)
    for row, start, length in zip(found, starts, lengths):
        np.testing.assert_array_equal(row, np.pad(tokens[start : start + length], (0, 700 - length)))
    assert store.bytes_read == 2 * lengths.sum()
    for start, length in ((-1, 5), (2999, 3), (0, 701)):
        with pytest.raises(IndexError):
            store.gather(np.array([start]), np.array([length]), 700)


def test_p7_any_flipped_byte_is_named_and_never_read(tmp_path: Path) -> None:
    store = synthetic.random_store(tmp_path / "s", 700)
    rng = np.random.default_rng(4)
    for path in sorted(p for p in store.path.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 4):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            refused = None
            try:
                damaged = Store.open(store.path)
                assert any(path.name in sentence for sentence in damaged.verify()), (path, at)
                damaged.read(0, 700)
            except Refusal as refusal:
                refused = str(refusal)
            metadata_only = path.name == "zarr.json"  # for other readers; ours reads the manifest
            assert metadata_only or (refused is not None and str(path) in refused), (path, at)
        path.write_bytes(whole)
    assert Store.open(store.path).verify() == []


def test_a_damaged_chunk_is_named_and_the_others_stay_readable(tmp_path: Path) -> None:
    store = synthetic.random_store(tmp_path / "s", 700)
    shard = store.path / "tokens/c/1"  # shards of 4 chunks of 64: chunk 2 of shard 1 holds tokens 384 to 448
    whole = bytearray(shard.read_bytes())
    whole[2 * 128 + 5] ^= 1
    shard.write_bytes(whole)
    damaged = Store.open(store.path)
    np.testing.assert_array_equal(damaged.read(0, 384), store.read(0, 384))
    with pytest.raises(Refusal, match=r"tokens/c/1: chunk 2 \(tokens 384 to 448\) is damaged"):
        damaged.read(380, 390)
    assert len(damaged.verify()) == 1


@pytest.mark.parametrize("lost", ["tokens/c/1", "doc_offsets/c/0", "manifest.json", "tokens/zarr.json"])
def test_p7_a_missing_file_is_refused_by_name(tmp_path: Path, lost: str) -> None:
    store = synthetic.random_store(tmp_path / "s", 700)
    (store.path / lost).unlink()
    with pytest.raises(Refusal, match=lost):
        Store.open(store.path)


def test_p7_swapped_shards_are_found(tmp_path: Path) -> None:
    store = synthetic.random_store(tmp_path / "s", 768)
    first, second = (store.path / "tokens/c" / name for name in "01")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(Refusal, match="tokens/c/0"):
        Store.open(store.path).read(0, 10)
    assert {sentence.split(":")[0].rsplit("/", 1)[-1] for sentence in Store.open(store.path).verify()} == {"0", "1"}


def test_p7_a_newer_store_is_refused(tmp_path: Path) -> None:
    store = synthetic.random_store(tmp_path / "s", 100)
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["format"]["version"] += 1
    (store.path / "manifest.json").write_text(canonical.dumps(manifest))
    with pytest.raises(Refusal, match="newer"):
        Store.open(store.path)


def test_a_store_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(fail: bool) -> None:
        with StoreWriter(tmp_path / "s", "code", synthetic.TOKENIZER) as writer:
            writer.append(np.array([1, 256]), np.array([2]), np.array([1]), np.zeros((1, 2)))
            if fail:
                raise KeyboardInterrupt
            writer.commit()

    with pytest.raises(KeyboardInterrupt):
        write(fail=True)
    assert list(tmp_path.iterdir()) == []
    write(fail=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]
    with pytest.raises(Refusal, match="exists already"):
        write(fail=False)


def test_the_dataset_id_is_a_function_of_the_content(tmp_path: Path) -> None:
    first, again, other = (
        synthetic.random_store(tmp_path / name, 500, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.dataset_id == again.dataset_id != other.dataset_id


@pytest.mark.parametrize(
    "tokens, lengths, message",
    [
        ([1, 2, 256], [1, 1], "lengths"),
        ([1, 256], [2, 0], "lengths"),
        ([1, 257, 256], [3], "outside the vocabulary"),
        ([1, 256, 3], [2, 1], "end-of-text"),
    ],
)
def test_what_is_not_documents_is_refused(tmp_path: Path, tokens: list[int], lengths: list[int], message: str) -> None:
    with StoreWriter(tmp_path / "s", "code", synthetic.TOKENIZER) as writer, pytest.raises(Refusal, match=message):
        n = len(lengths)
        writer.append(np.array(tokens), np.array(lengths), np.ones(n), np.zeros((n, 2)))
