"""A store is whole, verified and readable by others, or it is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from dataio.shards import Profile
from dataio.store import Store, StoreWriter
from dataio.types import TokenizerId
from stoker import canonical
from stoker.errors import Refusal
from tests.dataio import synthetic

FIXTURE = Path(__file__).parents[1] / "fixtures/store_v1"


def values(store: Store) -> dict[str, np.ndarray]:
    """Everything a store holds, through its own readers."""
    side = {name: array.whole() for name, array in store.arrays.items() if name != "tokens"}
    return {"tokens": store.read(0, store.num_tokens), "input_files": np.array(store.input_files), **side}


@pytest.mark.parametrize("profile", ["hot", "cold"])
@pytest.mark.parametrize(
    "num_tokens, vocab_size, dtype",
    [
        *((size, 257, "uint16") for size in (2, 63, 64, 65, 256, 257, 1000)),
        (500, 2**16, "uint16"),
        (500, 2**16 + 1, "uint32"),
    ],
)
def test_zarr_python_and_tensorstore_read_every_array_that_was_written(
    tmp_path: Path, num_tokens: int, vocab_size: int, dtype: str, profile: Profile
) -> None:
    tokenizer = TokenizerId("00" * 32, vocab_size, vocab_size - 1)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocab_size - 1, num_tokens)
    tokens[-1] = tokens[num_tokens // 3] = vocab_size - 1
    lengths = np.diff([-1, *np.flatnonzero(tokens == vocab_size - 1)])
    n = len(lengths)
    languages = [["python", None, "c"][number % 3] for number in range(n)]
    expected = {
        "tokens": tokens,
        "doc_offsets": [0, *np.cumsum(lengths)],
        "doc_bytes": lengths * 2,
        "doc_id": rng.integers(0, 2**64, (n, 2), np.uint64),
        "doc_masked": np.arange(n) % 2 == 1,
        "doc_source_row": rng.integers(0, 2**40, (n, 2)),
        "doc_weight": rng.random(n, np.float32),
        "doc_flags": rng.integers(0, 2**32, n, np.uint32),
        "doc_lang": [{"c": 0, "python": 1, None: 65535}[language] for language in languages],
    }
    if "c" not in languages:
        expected["doc_lang"] = [{"python": 0, None: 65535}[language] for language in languages]
    with StoreWriter(tmp_path / "s", "code", tokenizer, 64, 4, profile) as writer:
        for rows in np.array_split(np.arange(n), 3):  # in pieces, which may be empty
            low, high = ([0, *np.cumsum(lengths)][row] for row in (rows[0], rows[-1] + 1)) if len(rows) else (0, 0)
            writer.append(
                tokens[low:high],
                lengths[rows],
                lengths[rows] * 2,
                expected["doc_id"][rows],
                expected["doc_masked"][rows],
                source_row=expected["doc_source_row"][rows],
                weight=expected["doc_weight"][rows],
                languages=[languages[row] for row in rows],
                flags=expected["doc_flags"][rows],
            )
        store = writer.commit({"MIT": 1}, input_files=["a.jsonl", "b.jsonl"])

    group = zarr.open_group(tmp_path / "s", mode="r")
    assert group["tokens"].dtype == dtype
    for name, array in expected.items():
        np.testing.assert_array_equal(group[name][:], array)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s" / name)}}
        np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), array)
        if name != "tokens":
            np.testing.assert_array_equal(store.arrays[name].whole(), array)
    np.testing.assert_array_equal(store.read(0, num_tokens), tokens)
    assert [store.language(number) for number in range(n)] == languages
    assert store.verify() == [] and store.input_files == ["a.jsonl", "b.jsonl"]
    assert (store.num_tokens, store.num_documents, store.num_bytes) == (num_tokens, n, 2 * num_tokens)


def test_a_store_of_version_1_opens_with_defaults_for_what_it_lacks() -> None:
    store = Store.open(FIXTURE)
    assert store.dataset_id == "1cac6f8d34c3dc02689e9567995c0aaa079d686f4e7fc77c011f55492d4ae711"
    group = zarr.open_group(FIXTURE, mode="r")
    np.testing.assert_array_equal(store.read(0, 700), group["tokens"][:])
    for name in ("doc_offsets", "doc_bytes", "doc_id", "doc_masked"):
        np.testing.assert_array_equal(store.arrays[name].whole(), group[name][:])
    assert store.doc_masked.sum() == 8 and store.verify() == [] and store.input_files == []
    assert (store.doc_weight == 1).all() and (store.doc_source_row == -1).all() and (store.doc_flags == 0).all()
    assert {store.language(number) for number in range(18)} == {None}


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


@pytest.mark.parametrize("form", ["hot", "cold", "version 1"])
def test_p7_any_flipped_byte_is_named_and_never_read(tmp_path: Path, form: str) -> None:
    """Damage where our reader does not look (zarr.json, a hot shard's index, the last checksum) harms others only."""
    path = tmp_path / "s"
    if form == "version 1":
        shutil.copytree(FIXTURE, path)
    else:
        synthetic.random_store(path, 700, profile="hot" if form == "hot" else "cold")
    sound = {name: array.copy() for name, array in values(Store.open(path)).items()}
    rng = np.random.default_rng(4)
    refused = 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for at in rng.integers(0, len(whole), 6):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            try:
                damaged = Store.open(path)
                assert any(str(file) in sentence for sentence in damaged.verify()), (file, at)
                for name, array in values(damaged).items():
                    np.testing.assert_array_equal(array, sound[name], f"{file} {at}")
            except Refusal as refusal:
                assert str(file) in str(refusal), (file, at)
                refused += 1
        file.write_bytes(whole)
    assert Store.open(path).verify() == [] and refused > 20


@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_a_damaged_chunk_is_named_and_the_others_stay_readable(tmp_path: Path, profile: Profile) -> None:
    store = synthetic.random_store(tmp_path / "s", 700, profile=profile)
    shard = store.path / "tokens/c/1"  # shards of 4 chunks of 64: chunk 2 of shard 1 holds tokens 384 to 448
    whole = bytearray(shard.read_bytes())
    at = 2 * 128 if profile == "hot" else np.frombuffer(whole[-4 - 16 * 4 : -4], "<u8").reshape(4, 2)[2, 0]
    whole[int(at) + 5] ^= 1
    shard.write_bytes(whole)
    damaged = Store.open(store.path)
    np.testing.assert_array_equal(damaged.read(0, 384), store.read(0, 384))
    np.testing.assert_array_equal(damaged.read(448, 700), store.read(448, 700))
    with pytest.raises(Refusal, match=r"tokens/c/1: tokens 384 to 448 are damaged"):
        damaged.read(380, 390)
    assert len(damaged.verify()) == 1


@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_a_search_through_damaged_offsets_never_ends_at_the_wrong_document(tmp_path: Path, profile: Profile) -> None:
    rng = np.random.default_rng(5)
    documents = [[1] * length for length in rng.integers(0, 4, 5000)]
    store = synthetic.store(tmp_path / "s", documents, profile=profile)
    positions = np.arange(store.num_tokens)
    truth = np.repeat(np.arange(5000), [len(document) + 1 for document in documents])
    np.testing.assert_array_equal(store.document_of(positions), truth)
    file = store.path / "doc_offsets/c/0"
    whole = file.read_bytes()
    for at in rng.integers(0, min(len(whole), 40_000), 20):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        damaged, refused = Store.open(store.path), 0
        for position in rng.integers(0, store.num_tokens, 20):
            try:
                assert damaged.document_of(np.array([position])) == truth[position]
            except Refusal as refusal:
                assert str(file) in str(refusal)
                refused += 1
        with pytest.raises(Refusal):
            damaged.doc_offsets[:]
    for outside in (-1, store.num_tokens):
        with pytest.raises(IndexError):
            store.document_of(np.array([outside]))


def test_opening_reads_no_array_and_a_window_checks_two_pages_for_each_that_it_has(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    documents = [rng.integers(0, 256, length).tolist() for length in rng.integers(0, 1200, 2000)]
    store = synthetic.store(tmp_path / "s", documents, chunk_tokens=65_536, shard_chunks=8)
    assert store.num_tokens > 1_000_000 and store.bytes_checked == 0
    store.gather(np.array([8 * 4096]), np.array([2049]), 2049)
    assert store.bytes_checked == 8192
    store.gather(np.array([8 * 4096 + 2048]), np.array([2049]), 2049)  # runs into the next unit by one token
    assert store.bytes_checked == 2 * 8192
    store.gather(np.array([8 * 4096]), np.array([4097]), 4097)
    assert store.bytes_checked == 2 * 8192, "what was found sound is not read again"
    store.documents_of(np.array([8 * 4096]), np.array([2048]))
    assert store.bytes_checked <= 2 * 8192 + 2 * 8192 + 2000, "offsets in at most two units, masks of 2000 bytes"


@pytest.mark.parametrize("lost", ["tokens/c/1", "doc_offsets/c/0", "manifest.json", "tokens/zarr.json"])
def test_p7_a_missing_file_is_refused_by_name(tmp_path: Path, lost: str) -> None:
    store = synthetic.random_store(tmp_path / "s", 700)
    (store.path / lost).unlink()
    with pytest.raises(Refusal, match=lost):
        Store.open(store.path)


@pytest.mark.parametrize("profile", ["hot", "cold"])
@pytest.mark.parametrize("name", ["tokens/c/1", "doc_offsets/c/0", "checks/tokens/c/0"])
@pytest.mark.parametrize("size", [0, 1, 30, -1])
def test_p7_a_file_cut_off_is_refused_by_name(tmp_path: Path, profile: Profile, name: str, size: int) -> None:
    store = synthetic.random_store(tmp_path / "s", 700, profile=profile)
    (store.path / name).write_bytes((store.path / name).read_bytes()[:size])
    with pytest.raises(Refusal, match=name):
        values(Store.open(store.path))
    assert any(name in sentence for sentence in Store.open(store.path).verify())


@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_p7_swapped_shards_are_found(tmp_path: Path, profile: Profile) -> None:
    store = synthetic.random_store(tmp_path / "s", 768, profile=profile)
    first, second = (store.path / "tokens/c" / name for name in "01")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert Store.open(store.path).verify() == [
        f"{first}: holds what was written as tokens/c/1: swapped, or copied over",
        f"{second}: holds what was written as tokens/c/0: swapped, or copied over",
    ]
    with pytest.raises(Refusal, match="tokens/c/0"):
        Store.open(store.path).read(0, 10)


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


def test_the_dataset_id_is_a_function_of_the_content_alone(tmp_path: Path) -> None:
    def store_id(name: str, seed: int = 1, **options: object) -> str:
        return synthetic.random_store(tmp_path / name, 500, seed, **options).dataset_id

    first = store_id("a")
    assert first == store_id("b") == store_id("c", chunk_tokens=16, shard_chunks=3) == store_id("d", profile="cold")
    assert len({first, store_id("e", seed=2), store_id("f", masked_share=1.0)}) == 3


@pytest.mark.parametrize("options", [{"chunk_tokens": 1000}, {"chunk_tokens": 0}, {"shard_chunks": 0}])
def test_a_store_that_cannot_be_cut_so_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(Refusal, match=next(iter(options))):
        StoreWriter(tmp_path / "s", "code", synthetic.TOKENIZER, **options)
    assert list(tmp_path.iterdir()) == []


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
