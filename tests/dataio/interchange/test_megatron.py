"""Megatron reads what is exported to it, and what it writes is read here: the same documents, and the same ids."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dataio.interchange.megatron import export_megatron, import_megatron
from dataio.tokenizer import Tokenizer
from stoker.errors import Refusal
from tests.dataio import synthetic
from tests.dataio.interchange.texts import TEXTS, assert_same_documents, store_of

indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write_index(path: Path, lengths: Sequence[int], documents: Sequence[int], code: int = 8, width: int = 2) -> None:
    """An index by its layout, independent of both sides."""
    begins = np.concatenate(([0], np.cumsum(lengths)))[:-1] * width
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(lengths), len(documents))
    arrays = np.array(lengths, "<i4"), begins.astype("<i8"), np.array(documents, "<i8")
    path.write_bytes(head + b"".join(array.tobytes() for array in arrays))


@pytest.mark.parametrize("vocab_size, dtype", [(257, np.uint16), (2**16 + 1, np.int32)])
def test_megatron_reads_the_documents_of_an_export(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    identity = synthetic.TokenizerId("00" * 32, vocab_size, 256)
    store = synthetic.random_store(tmp_path / "s", 1001, tokenizer=identity)
    export_megatron(store, tmp_path / "out/set")
    found = indexed.IndexedDataset(str(tmp_path / "out/set"))
    assert len(found) == store.num_documents and found.index.dtype == dtype
    for number, (low, high) in enumerate(zip(store.doc_offsets, store.doc_offsets[1:])):
        np.testing.assert_array_equal(found[number], store.read(int(low), int(high)))
    np.testing.assert_array_equal(found.document_indices, np.arange(store.num_documents + 1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["set.bin", "set.idx"]
    with pytest.raises(Refusal, match=r"set\.bin: exists already"):
        export_megatron(store, tmp_path / "out/set")


def test_there_and_back_is_the_same_documents_with_the_same_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = store_of(tmp_path / "s", tokenizer)
    export_megatron(store, tmp_path / "set")
    back = import_megatron(tmp_path / "set", tmp_path / "back", "s", tokenizer)
    assert_same_documents(store, back)
    assert back.verify() == [] and back.input_files == ["set.bin"]
    np.testing.assert_array_equal(back.doc_source_row, [[0, number] for number in range(len(TEXTS))])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16])
def test_documents_of_several_sequences_that_megatron_wrote_are_joined(
    tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "set.bin"), getattr(np, str(dtype).split(".")[1]))
    whole = [tokenizer.encode(text) for text in TEXTS]
    for tokens in whole:
        lengths = [len(piece) for piece in np.array_split(tokens, 3)]
        builder.add_document(torch.tensor(tokens, dtype=dtype), lengths)
    builder.finalize(str(tmp_path / "set.idx"))
    with pytest.raises(Refusal, match=r"document 1 does not end with end-of-text"):
        import_megatron(tmp_path / "set", tmp_path / "no", "s", tokenizer)
    assert not (tmp_path / "no").exists()
    found = import_megatron(tmp_path / "set", tmp_path / "s", "s", tokenizer, ends="append")
    assert_same_documents(store_of(tmp_path / "expected", tokenizer, TEXTS[1:]), found)  # the empty one is left out
    np.testing.assert_array_equal(found.doc_source_row[:, 1], np.arange(1, len(TEXTS)))


@pytest.mark.parametrize("batch_tokens", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("open_ended", [False, True])
def test_windows_cut_anywhere_are_documents_again(
    tmp_path: Path, tokenizer: Tokenizer, open_ended: bool, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataio.interchange.megatron.BATCH_TOKENS", batch_tokens)
    expected = store_of(tmp_path / "expected", tokenizer)
    tokens = expected.read(0, expected.num_tokens).astype(np.uint16)[: -1 if open_ended else None]
    lengths = [len(part) for part in np.array_split(tokens, len(tokens) // 13)]
    tokens.tofile(tmp_path / "set.bin")
    write_index(tmp_path / "set.idx", lengths, range(len(lengths) + 1))
    found = import_megatron(tmp_path / "set", tmp_path / "s", "s", tokenizer, ends="split")
    assert_same_documents(expected, found)
    windows = np.searchsorted(np.cumsum(lengths), found.doc_offsets[:-1], side="right")
    np.testing.assert_array_equal(found.doc_source_row[:, 1], windows)


def test_what_is_no_data_set_of_this_tokenizer_is_refused_by_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def refused(match: str) -> None:
        with pytest.raises(Refusal, match=match):
            import_megatron(tmp_path / "set", tmp_path / "s", "s", tokenizer)
        assert not (tmp_path / "s").exists()

    index, eos_id = tmp_path / "set.idx", tokenizer.id.eos_id
    refused(r"set\.idx: missing")
    np.array([5, 6, eos_id, 9, eos_id], "<u2").tofile(tmp_path / "set.bin")
    for content in (b"x", b"MMIDIDX\x00\x00" + bytes(25), b"PK" * 40):
        index.write_bytes(content)
        refused(r"set\.idx: not the index")
    for lengths, documents, match in (
        ([3, 1], [0, 1, 2], r"set\.bin: 10 bytes"),
        ([3, -1, 3], [0, 3], r"set\.idx: sequences"),
        ([3, 2], [0, 2, 1, 2], r"set\.idx: sequences"),
        ([3, 2], [1, 2], r"set\.idx: sequences"),
        ([3, 2], [0, 1], r"set\.idx: sequences"),
        ([3, 2], [], r"set\.idx: sequences"),
    ):
        write_index(index, lengths, documents)
        refused(match)
    write_index(index, [3, 2], [0, 1, 2], code=7, width=4)
    refused(r"set\.idx: not the index")
    write_index(index, [3, 2], [0, 1, 2])
    index.write_bytes(index.read_bytes() + bytes(2))  # modes, as multimodal sets have them
    refused(r"set\.idx: .* multimodal")
    index.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 2**60, 2**60))
    refused(r"set\.idx: 34 bytes do not hold")
    write_index(index, [3, 2], [0, 1, 2])
    np.array([5, 6, eos_id, 40_000, eos_id], "<u2").tofile(tmp_path / "set.bin")
    refused("outside the vocabulary")
