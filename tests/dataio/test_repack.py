"""The same data in another form is the same data: every array, and its identity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataio.repack import repack
from dataio.store import Store
from dataio.types import TokenizerId
from stoker.errors import Refusal
from tests.dataio import synthetic

FIXTURE = Path(__file__).parents[1] / "fixtures/store_v1"


def assert_same(one: Store, other: Store) -> None:
    np.testing.assert_array_equal(one.read(0, one.num_tokens), other.read(0, one.num_tokens))
    for name in one.arrays.keys() - {"tokens"}:
        np.testing.assert_array_equal(one.arrays[name].whole(), other.arrays[name].whole(), name)
    for key in ("source", "tokenizer", "tokens", "documents", "bytes", "licences", "inputs"):
        assert one.manifest[key] == other.manifest[key]
    assert (one.languages, one.input_files) == (other.languages, other.input_files)


@pytest.mark.parametrize("num_tokens", [2, 65, 1000])
@pytest.mark.parametrize("vocab_size", [257, 2**16 + 1])
def test_cold_and_back_is_the_same_store_to_the_byte(tmp_path: Path, num_tokens: int, vocab_size: int) -> None:
    tokenizer = TokenizerId("5a" * 32, vocab_size, 256)
    hot = synthetic.random_store(tmp_path / "hot", num_tokens, masked_share=0.5, tokenizer=tokenizer)
    cold = repack(hot, tmp_path / "cold", "cold", chunk_tokens=128, shard_chunks=2)
    back = repack(cold, tmp_path / "back", "hot", chunk_tokens=64, shard_chunks=4)
    assert hot.dataset_id == cold.dataset_id == back.dataset_id
    assert_same(hot, cold)
    assert cold.verify() == back.verify() == []
    assert hot.files == back.files


def test_a_cold_store_of_text_is_smaller(tmp_path: Path) -> None:
    documents = [[ord(letter) for letter in f"line {number} of a text that repeats itself. "] for number in range(2000)]
    hot = synthetic.store(tmp_path / "hot", documents, chunk_tokens=65_536, shard_chunks=8)
    cold = repack(hot, tmp_path / "cold", "cold")
    size = {s.path.name: sum(f.stat().st_size for f in (s.path / "tokens").rglob("*")) for s in (hot, cold)}
    assert size["cold"] * 2.4 < size["hot"]


def test_windows_of_a_cold_store_are_those_of_the_hot_one(tmp_path: Path) -> None:
    hot = synthetic.random_store(tmp_path / "hot", 3001)
    cold = repack(hot, tmp_path / "cold", "cold", chunk_tokens=32, shard_chunks=8)
    rng = np.random.default_rng(1)
    starts = rng.integers(0, 3001, 200)
    lengths = np.minimum(rng.integers(0, 500, 200), 3001 - starts)
    np.testing.assert_array_equal(hot.gather(starts, lengths, 500), cold.gather(starts, lengths, 500))
    stores = ({"s": hot}, {"s": cold})
    streams = [synthetic.stream(of, seq_len=64, global_batch=4) for of in stores]  # type: ignore[arg-type]
    assert streams[0].log.hash() == streams[1].log.hash(), "a run goes on with either"


def test_a_store_of_version_1_becomes_one_of_today(tmp_path: Path) -> None:
    first = Store.open(FIXTURE)
    copy = repack(first, tmp_path / "s", "hot", chunk_tokens=64, shard_chunks=4)
    assert_same(first, copy)
    assert copy.verify() == [] and copy.manifest["format"]["version"] == 2
    assert copy.dataset_id == synthetic.random_store(tmp_path / "again", 700, seed=11, masked_share=0.3).dataset_id


def test_damage_is_refused_by_name_and_nothing_is_left(tmp_path: Path) -> None:
    store = synthetic.random_store(tmp_path / "s", 700)
    for name in ("tokens/c/1", "doc_weight/c/0"):
        whole = (store.path / name).read_bytes()
        (store.path / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(Refusal, match=name):
            repack(Store.open(store.path), tmp_path / "out", "cold")
        (store.path / name).write_bytes(whole)
    assert list(tmp_path.iterdir()) == [store.path]
    with pytest.raises(Refusal, match="exists already"):
        repack(store, store.path, "cold")
    assert store.verify() == []
