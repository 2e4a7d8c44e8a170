"""What is kept, and why the rest is not: thresholds on what was measured, then what every stage says, in one place.

    judge      of one document file: the reason, if any, for which the filters drop each document
    select     of one document file: the reason of whichever stage came first, weight, language and flags

Both read measured values and decisions, never texts, so a threshold can move without measuring again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataio.dedup.arrays import save
from dataio.documents import ParquetFile, read_groups
from dataio.languages import is_code
from dataio.stages import Counts


@dataclass(frozen=True)
class Verdict:
    """What a stage says of documents: its attribute columns, the document columns it needs beside them, and for every
    row of a table of both why it is dropped, or None."""

    stage: str
    attributes: Sequence[str]
    documents: Sequence[str]
    judge: Callable[[pa.Table], Sequence[str | None]]


REASON = pa.schema([pa.field("reason", pa.string())])
#: Beside the documents. `reason`: <stage>.<rule>, null where kept. `language`: of a program by its file's name, of
#: prose as identified, else as stated.
SELECTED = pa.schema(
    [
        pa.field("reason", pa.string()),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
        pa.field("flags", pa.uint32(), nullable=False),
    ]
)
#: Bits of `flags`: what a trainer or a reader may want to know of a document that was kept.
FLAGS = {"code": 1, "redacted": 2, "cut": 4, "had_exact_copies": 8, "had_near_copies": 16}
UNKNOWN, KEPT = "unknown", "kept"


def judge(
    documents: Path, measured: Mapping[str, Path], verdicts: Sequence[Verdict], attributes: Path, alive: Path
) -> Counts:
    """Write of a document file the first reason that any of `verdicts` has for each document, and who is alive then.

    `measured`: attribute files by stage.
    """
    living = [np.empty(0, np.bool_)]
    opinions = [read_groups(documents, v.documents, {measured[v.stage]: v.attributes}) for v in verdicts]
    with ParquetFile(attributes, REASON) as file:
        for group in read_groups(documents, ["file"]):
            reasons: list[str | None] = [None] * group.num_rows
            for verdict, opinion in zip(verdicts, opinions):
                _first(reasons, verdict, next(opinion))
            file.write(pa.table([pa.array(reasons, pa.string())], schema=REASON))
            living.append(np.array([reason is None for reason in reasons], np.bool_))
    kept = np.concatenate(living)
    save(alive, kept)
    return {"documents": len(kept), "dropped": int((~kept).sum())}


def _first(reasons: list[str | None], verdict: Verdict, table: pa.Table) -> None:
    for row, reason in enumerate(verdict.judge(table)):
        if reason is not None and reasons[row] is None:
            reasons[row] = f"{verdict.stage}.{reason}"


def _exact_copies(table: pa.Table) -> list[str | None]:
    return [None if keep else "copy" for keep in table["exact_keep"].to_pylist()]


def _near_copies(table: pa.Table) -> list[str | None]:
    return [None if keep else "copy" for keep in table["near_keep"].to_pylist()]


def _none(table: pa.Table) -> list[str | None]:
    return [None] * table.num_rows


EXACT = Verdict("exact", ("exact_keep", "exact_copies"), (), _exact_copies)
NEAR = Verdict("near", ("near_keep", "near_size"), (), _near_copies)
#: Where every near-duplicate stays, with a weight.
NEAR_WEIGHED = Verdict("near", ("near_keep", "near_size"), (), _none)


def select(
    documents: Path,
    files: Mapping[str, Path],
    verdicts: Sequence[Verdict],
    weigh_clusters: bool,
    attributes: Path,
) -> Counts:
    """Write what becomes of every document of a file. `files`: attribute files by stage, "filter" among them, and
    "language" and "redact" where they took part; `verdicts`: of the stages after the filters, in their order.

    Counts hold the funnel: "documents/<reason or kept>/<language>", and "bytes/..." of their texts in UTF-8.
    """
    facts = {"filter": ("reason",), "language": ("natural_language",), "redact": ("redactions",)}
    beside: dict[str | os.PathLike[str], Sequence[str]] = {
        files[stage]: columns for stage, columns in facts.items() if stage in files
    }
    beside |= {files[verdict.stage]: tuple(verdict.attributes) for verdict in verdicts}
    columns = {"language", "bytes", *(column for verdict in verdicts for column in verdict.documents)}
    counts: Counter[str] = Counter()
    with ParquetFile(attributes, SELECTED) as out:
        for table in read_groups(documents, sorted(columns), beside):
            reasons = table["reason"].to_pylist()  # of the filters: they come first, and name their stage already
            for verdict in verdicts:
                _first(reasons, verdict, table)
            languages, sizes = _languages(table), table["bytes"].to_pylist()
            cluster = _numbers(table, "near_size", 1)
            weights = 1 / cluster if weigh_clusters else np.ones(len(cluster))
            kept = [pa.array(reasons, pa.string()), weights.astype(np.float32), languages, _flags(table, languages)]
            out.write(pa.table(kept, schema=SELECTED))
            counts["documents"] += len(reasons)
            counts["dropped"] += sum(reason is not None for reason in reasons)
            for reason, language, size in zip(reasons, languages, sizes):
                counts[f"documents/{reason or KEPT}/{language}"] += 1
                counts[f"bytes/{reason or KEPT}/{language}"] += size
    return dict(counts)


def _languages(table: pa.Table) -> list[str]:
    stated = table["language"].to_pylist()
    identified = table["natural_language"].to_pylist() if "natural_language" in table.column_names else stated
    return [(s if is_code(s) else i or s) or UNKNOWN for s, i in zip(stated, identified)]


def _flags(table: pa.Table, languages: Sequence[str]) -> Any:
    found = {
        "code": np.array([is_code(language) for language in languages], np.bool_),
        "redacted": _spans(table, "redactions") > 0,
        "cut": _spans(table, "substring") > 0,
        "had_exact_copies": _numbers(table, "exact_copies", 1) > 1,
        "had_near_copies": _numbers(table, "near_size", 1) > 1,
    }
    flags = np.zeros(table.num_rows, np.uint32)
    for name, rows in found.items():
        flags[rows] |= np.uint32(FLAGS[name])
    return flags


def _numbers(table: pa.Table, column: str, otherwise: int) -> Any:
    return table[column].to_numpy() if column in table.column_names else np.full(table.num_rows, otherwise)


def _spans(table: pa.Table, column: str) -> Any:
    """How many there are in each row; none where the column is missing or null."""
    if column not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return np.array([len(spans or ()) for spans in table[column].to_pylist()], np.int64)
