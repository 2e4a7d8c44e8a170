"""Decontamination: which documents hold items of evaluation sets, wherever in the document they stand.

    index      of the evaluation sets: the n-grams of their words, and whose they are
    scan       of every document file: where these stand, and in how many documents
    total      of all files: in how many documents each n-gram stands
    decide     of one document file: how much of which items it holds, as attributes beside it
    report     of all files: for every item which documents hold it, with an excerpt to judge by

A word is a run of letters and digits, whatever its case and accents; what stands between words makes no difference
(texts.py). A passage of fewer than `ngram` words is one n-gram of all its words; one of fewer than `shortest` is not
looked for. An n-gram is evidence if few documents hold it; or if it lies in a long passage that the document has from
the item: of `long_words` words, or all there are if that is an n-gram or more. An idiom that everybody writes is
neither. A document is contaminated by the greatest share of one item's n-grams that are evidence in it. N-grams are
compared by 64-bit hashes; excerpts in the report are the text itself.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from dataio.dedup import ngrams
from dataio.dedup.arrays import save
from dataio.dedup.evaluation import HUMAN_EVAL, EvaluationSet, items
from dataio.dedup.texts import alive_texts, words_of
from dataio.dedup.windows import union
from dataio.documents import ParquetFile, read_groups
from dataio.stages import Counts
from stoker.files import write_atomic
from stoker.sections import Section

VERSION = 1
#: Documents of an item that the report lists, those that hold most of it, and characters of an excerpt.
REPORTED, EXCERPT = 20, 300


class Options(Section):
    """What is looked for, what counts as found, and from how much on a document is dropped."""

    sets: list[EvaluationSet] = Field(default=[HUMAN_EVAL], min_length=1)
    """Evaluation sets."""
    ngram: Annotated[int, Field(ge=2, le=50)] = 13
    """Words of an n-gram. 13 as in GPT-3 (Brown et al. 2020, appendix C)."""
    shortest: Annotated[int, Field(ge=2, le=50)] = 8
    """Words of the shortest passage that is looked for. 8 as in GPT-3."""
    common_documents: Annotated[int, Field(ge=1)] = 10
    """Documents from more than which on an n-gram is an idiom unless it lies in a long passage. 10 as in GPT-3."""
    long_words: Annotated[int, Field(ge=1)] = 26
    """Words of a passage that is no idiom however many documents hold it: two n-grams that do not overlap."""
    max_coverage: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of an item's n-grams from which on a document is dropped."""


MEASURED = frozenset({"sets", "ngram", "shortest", "common_documents", "long_words"})

_SPAN = [pa.field("start", pa.int32(), nullable=False), pa.field("stop", pa.int32(), nullable=False)]
_HELD = pa.struct(
    [
        pa.field("item", pa.string(), nullable=False),
        pa.field("coverage", pa.float32(), nullable=False),
        pa.field("words", pa.int32(), nullable=False),  # of the longest passage, which is at these bytes
        *_SPAN,
    ]
)
#: Beside the documents: the greatest coverage, and by which item; all items of which there is evidence, those covered
#: most first; and all spans of it.
SCHEMA = pa.schema(
    [
        pa.field("contamination", pa.float32(), nullable=False),
        pa.field("contamination_item", pa.string()),
        pa.field("contaminated_items", pa.list_(_HELD), nullable=False),
        pa.field("contamination_spans", pa.list_(pa.struct(_SPAN)), nullable=False),
    ]
)
COLUMNS: tuple[str, ...] = ()


def judge(table: pa.Table, options: Options) -> list[str | None]:
    """`evaluation_item`: the document holds `max_coverage` of one, or more."""
    limit = np.float32(options.max_coverage)  # as coverage is stored
    shares = table["contamination"].to_pylist()
    return ["evaluation_item" if share > 0 and share >= limit else None for share in shares]


def index(options: Options, base: Path, folder: Path) -> Counts:
    """Write the `ngrams.FILES` of the evaluation sets, whose paths are relative to `base`. Refuses as `items` does."""
    known = ngrams.build(items(options.sets, base), options.ngram, options.shortest)
    ngrams.store(known, folder)
    return {"items": len(known.names), "too_short": int((known.sizes == 0).sum()), "ngrams": len(known.grams)}


#: Beside the documents, for `decide`: n-grams of the index, by their place in it, and which word of the text is the
#: first, from 0.
MATCHES = pa.schema(
    [
        pa.field(
            "matches",
            pa.list_(pa.struct([pa.field("gram", pa.int32()), pa.field("word", pa.int32()), *_SPAN])),
            nullable=False,
        )
    ]
)


def scan(documents: Path, alive: Path, index: Path, matches: Path, frequencies: Path) -> Counts:
    """Write of a document file where n-grams of the index stand in documents that are alive (`MATCHES`); and in how
    many of these documents each does (int64 [n-grams])."""
    finder, living = ngrams.Finder(ngrams.load(index)), np.load(alive)
    row = size = matched = 0
    with ParquetFile(matches, MATCHES) as file:
        for group in read_groups(documents, ["text"]):
            text, bounds = alive_texts(group["text"], living[row : row + group.num_rows])
            words = words_of(text, bounds)
            counts, gram, first = finder.find(words)
            of = np.repeat(np.arange(len(counts)), counts)
            last = first + finder.index.lengths[gram] - 1
            places = [first - words.bounds[of], words.starts[first] - bounds[of], words.stops[last] - bounds[of]]
            file.write(pa.table([_lists(MATCHES.field(0), counts, [gram, *places])], schema=MATCHES))
            row, size, matched = row + group.num_rows, size + len(text), matched + int((counts > 0).sum())
    save(frequencies, finder.frequency)
    return {"documents": row, "bytes_in": size, "matched": matched, "cut_short": finder.cut_short}


def total(frequencies: Sequence[Path], out: Path) -> Counts:
    """Write in how many documents of all files each n-gram of the index stands."""
    sums = np.load(frequencies[0])
    for path in frequencies[1:]:
        sums += np.load(path)
    save(out, sums)
    return {"ngrams": len(sums), "found": int((sums > 0).sum())}


def _lists(field: pa.Field, counts: NDArray[np.int64], columns: Sequence[Any]) -> pa.ListArray:
    """Lists of structs of a field's type: how many each row has, and what the structs have, one after another."""
    kinds = list(field.type.value_type)
    structs = pa.StructArray.from_arrays([pa.array(c, kind.type) for c, kind in zip(columns, kinds)], fields=kinds)
    edges = pa.array(np.cumsum(np.insert(counts, 0, 0)), pa.int32())
    return pa.ListArray.from_arrays(edges, structs, type=field.type)


def decide(documents: Path, matches: Path, index: Path, frequency: Path, attributes: Path, options: Options) -> Counts:
    """Write the attributes of a document file; `frequency` as `total` wrote it."""
    known, common = ngrams.load(index), np.load(frequency) > options.common_documents
    row = found = 0
    with ParquetFile(attributes, SCHEMA) as file:
        for group in read_groups(documents, ["file"], {matches: MATCHES.names}):
            table = _judged(group["matches"], known, common, options)
            file.write(table)
            row += table.num_rows
            found += table.num_rows - table["contamination_item"].null_count
    return {"documents": row, "with_evidence": found}


def _judged(column: pa.ChunkedArray, known: ngrams.Index, common: NDArray[np.bool_], options: Options) -> pa.Table:
    num_rows, (row, item, gram, word, start, stop) = len(column), _lines(column, known)
    # A pair is a row and an item; its passages are n-grams that overlap or touch.
    pair, end = _numbered(row, item), word + known.lengths[gram]
    reach = np.maximum.accumulate(pair << 32 | end)
    apart = np.append(False, (pair << 32 | word)[1:] > reach[:-1])[: len(pair)]
    passage = _numbered(pair, np.cumsum(apart))
    first = _firsts(passage)
    words = np.maximum.reduceat(end, first) - word[first] if len(first) else first
    stops = np.maximum.reduceat(stop, first) if len(first) else first
    long = np.where(known.longest < options.ngram, options.long_words, np.minimum(known.longest, options.long_words))
    evident = ~common[gram] | (words >= long[item[first]])[passage]

    # Of every pair with evidence: its coverage, where an n-gram counts once, and its longest passage.
    once = np.unique(pair[evident] << 32 | gram[evident]) >> 32
    pairs, counts = np.unique(once, return_counts=True)
    line = _firsts(pair)[pairs]
    coverage = counts / known.sizes[item[line]]
    passages = np.unique(passage[evident])
    passages = passages[np.lexsort((-words[passages], pair[first[passages]]))]
    longest = passages[_firsts(pair[first[passages]])]

    order = np.lexsort((item[line], -coverage, row[line]))
    rows, coverage, longest = row[line][order], coverage[order], longest[order]
    names = [known.names[i] for i in item[line][order].tolist()]
    most = _firsts(rows)
    share, of = np.zeros(num_rows), np.full(num_rows, None, object)
    share[rows[most]], of[rows[most]] = coverage[most], [names[i] for i in most]
    held = [names, coverage, words[longest], start[first[longest]], stops[longest]]
    spans = union(np.stack([row << 32 | start, row << 32 | stop], axis=1)[evident])
    at_row = spans[:, 0] >> 32
    return pa.table(
        [
            pa.array(share, pa.float32()),
            pa.array(of, pa.string()),
            _lists(SCHEMA.field(2), np.bincount(rows, minlength=num_rows), held),
            _lists(SCHEMA.field(3), np.bincount(at_row, minlength=num_rows), [*(spans - (at_row << 32)[:, None]).T]),
        ],
        schema=SCHEMA,
    )


def _lines(column: pa.ChunkedArray, known: ngrams.Index) -> list[NDArray[np.int64]]:
    """Row, item, n-gram, first word, start and stop of every n-gram for every item that has it; by row and item, then
    as they stand in the text."""
    lists = pa.concat_arrays(column.chunks)
    gram, word, start, stop = (values.to_numpy().astype(np.int64) for values in lists.flatten().flatten())
    row = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    owners = known.num_items[gram]
    match = np.repeat(np.arange(len(gram)), owners)
    nth = np.arange(len(match)) - np.repeat(np.cumsum(owners) - owners, owners)
    item = known.owners[known.edges[gram[match]] + nth]
    order = np.lexsort((gram[match], word[match], item, row[match]))
    match = match[order]
    return [row[match], item[order], gram[match], word[match], start[match], stop[match]]


def _numbered(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Stretches of lines with equal keys, from 0."""
    new = np.zeros(len(keys[0]), np.bool_)
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    return np.cumsum(new)


def _firsts(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where stretches of equal numbers begin."""
    return np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])[: len(numbers)])


def report(
    documents: Sequence[Path], attributes: Sequence[Path], index: Path, frequency: Path, out: Path, options: Options
) -> Counts:
    """Write as JSON, for every item: how many n-grams it has, and how many of these are common; how many documents show
    evidence of it, how many of them hold `max_coverage` or more; and those that hold most, each with an excerpt."""
    known, common = ngrams.load(index), np.load(frequency) > options.common_documents
    shared = np.bincount(known.owners[np.repeat(common, known.num_items)], minlength=len(known.names))
    found: dict[str, dict[str, Any]] = {
        name: {
            "item": name,
            "longest_passage": int(known.longest[i]),
            "ngrams": int(known.sizes[i]),
            "common_ngrams": int(shared[i]),
            "documents": 0,
            "documents_over": 0,
            "best": [],
        }
        for i, name in enumerate(known.names)
    }
    for place, row in _held(documents, attributes):
        for held in row["contaminated_items"]:
            item = found[held["item"]]
            item["documents"] += 1
            item["documents_over"] += int(held["coverage"] >= np.float32(options.max_coverage))
            entry = {"id": row["id"].hex(), "source": row["source"], "path": row["path"], **held, "at": place}
            item["best"] = heapq.nsmallest(REPORTED, [*item["best"], entry], key=_first_reported)
    _quote(documents, [entry for item in found.values() for entry in item["best"]])
    write_atomic(out, json.dumps([*found.values()], ensure_ascii=False, indent=1))
    held = sum(item["documents_over"] > 0 for item in found.values())
    return {"items": len(found), "found": held, "too_short": int((known.sizes == 0).sum())}


def _first_reported(entry: dict[str, Any]) -> tuple[Any, ...]:
    return -entry["coverage"], -entry["words"], entry["id"], entry["source"], entry["path"]


def _held(documents: Sequence[Path], attributes: Sequence[Path]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Documents with evidence, and where they are: which file, which row."""
    for number, (path, beside) in enumerate(zip(documents, attributes)):
        first = 0
        for group in read_groups(path, ["id", "source", "path"], {beside: ["contaminated_items"]}):
            rows = np.flatnonzero(pa.concat_arrays(group["contaminated_items"].chunks).value_lengths().to_numpy())
            for row, values in zip(rows.tolist(), group.take(rows).to_pylist()):
                yield (number, first + row), values
            first += group.num_rows


def _quote(documents: Sequence[Path], entries: Sequence[dict[str, Any]]) -> None:
    """Put what stands at their places into entries, by reading only the files that they are in."""
    wanted: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for entry in entries:
        number, row = entry.pop("at")
        wanted.setdefault(number, {}).setdefault(row, []).append(entry)
    for number, rows in sorted(wanted.items()):
        first = 0
        for group in read_groups(documents[number], ["text"]):
            for row in rows.keys() & range(first, first + group.num_rows):
                text = group["text"][row - first].as_py().encode()
                for entry in rows[row]:
                    entry["excerpt"] = text[entry["start"] : entry["stop"]].decode()[:EXCERPT]
            first += group.num_rows
