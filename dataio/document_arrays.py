"""The side arrays of a store, gathered from the document and attribute files of its units into the final order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataio import maps
from dataio.documents import read_groups
from dataio.manifest import NO_LANGUAGE, language_order
from stoker.errors import Refusal

#: Licence of documents that state none, in the words of SPDX.
UNSTATED = "NOASSERTION"
#: Rows worked on at a time.
BLOCK = 1 << 18

Licences = dict[str, dict[str, int]]


def fill(
    arrays: Mapping[str, NDArray[Any]],
    ranks: NDArray[np.int64],
    encoded: Sequence[Path],
    documents: Sequence[Path],
    selected: Sequence[Path],
) -> tuple[list[str], Licences]:
    """Fill `arrays` (zeros, named as in ``manifest.SIDE_ARRAYS``); (languages, documents and bytes of each licence).

    `ranks`: for the rows of all units, one unit after another, the place in the store or -1. Refuses one that has a
    place and was dropped.
    """
    known: dict[str, int] = {}
    licences: Licences = defaultdict(lambda: {"documents": 0, "bytes": 0})
    at = 0
    for folder, document_file, attributes in zip(encoded, documents, selected, strict=True):
        text_bytes = maps.load(folder / "bytes.npy", mapped=False)
        first = at
        beside: dict[Any, Sequence[str]] = {attributes: ["reason", "weight", "language", "flags"]}
        for table in read_groups(document_file, ["id", "file", "row", "licence"], beside):
            places = ranks[at : at + table.num_rows]
            rows = np.flatnonzero(places >= 0)
            kept, sizes = table.take(pa.array(rows)), text_bytes[at - first + rows]
            if kept["reason"].null_count != len(rows):
                raise Refusal(f"{attributes}: drops documents that have tokens; run the encode stage again")
            at += table.num_rows
            if len(rows):
                _place(arrays, places[rows], kept, sizes, known)
                _count(licences, kept["licence"], sizes)
        if at - first != len(text_bytes):
            raise Refusal(f"{document_file}: not the documents that {folder} was made of; run the encode stage again")
    languages, order = language_order(list(known))
    for low in range(0, len(arrays["doc_lang"]), BLOCK):
        arrays["doc_lang"][low : low + BLOCK] = order[arrays["doc_lang"][low : low + BLOCK]]
    return languages, dict(sorted(licences.items()))


def _place(
    arrays: Mapping[str, NDArray[Any]],
    places: NDArray[np.int64],
    kept: pa.Table,
    sizes: NDArray[np.int64],
    known: dict[str, int],
) -> None:
    ids = kept["id"].combine_chunks()
    arrays["doc_bytes"][places] = sizes
    arrays["doc_id"][places] = np.frombuffer(ids.buffers()[1], ">u8", 2 * len(ids), 16 * ids.offset).reshape(-1, 2)
    arrays["doc_source_row"][places] = np.stack([kept["file"].to_numpy(), kept["row"].to_numpy()], axis=1)
    arrays["doc_weight"][places] = kept["weight"].fill_null(1.0).to_numpy()
    arrays["doc_flags"][places] = kept["flags"].fill_null(0).to_numpy()
    words, numbers = _words(kept["language"])
    codes = [known.setdefault(word, len(known)) for word in words]
    arrays["doc_lang"][places] = np.array([*codes, NO_LANGUAGE], np.uint16)[numbers]


def _words(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int32]]:
    """(different words, number of each row's; -1 for null)."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)


def _count(licences: Licences, column: pa.ChunkedArray, sizes: NDArray[np.int64]) -> None:
    """Add documents and bytes of each licence."""
    words, numbers = _words(column)
    for index, word in [*enumerate(words), (-1, UNSTATED)]:
        of_word = numbers == index
        if of_word.any():
            licences[word]["documents"] += int(of_word.sum())
            licences[word]["bytes"] += int(sizes[of_word].sum())
