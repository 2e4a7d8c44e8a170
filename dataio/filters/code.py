"""Quality of code by the rules that code corpora were filtered by, each a measured value or mark and a threshold.

StarCoder: Li et al., 2023 (arXiv 2305.06161), 3. StarCoder 2: Lozhkov et al., 2024 (arXiv 2402.19173), 2. What a line,
a token and an encoded run is stands in code_values.py, by which names and words a file gives itself away in
code_marks.py. Languages in which long lines are usual or data is written have rules of their own.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from dataio.filters.code_marks import generated, head_and_tail, lock_file, minified, vendored
from dataio.filters.code_values import code_values, comment_style
from dataio.filters.rules import Values, judge_bounds, utf8, write_attributes
from dataio.stages import Counts
from stoker.sections import Section

VERSION = 1

#: Written in lines of any length (StarCoder 2 leaves these out of its limits, and allows 100,000 characters).
_LONG_LINES = frozenset({"json", "xml", "svg", "tex", "csv", "jupyter notebook"})
#: Hold data more often than anything to learn from (StarCoder 2: JSON and YAML; CSV is ours).
_DATA = frozenset({"json", "yaml", "csv"})
#: Have few letters by nature (StarCoder 2 asks them for letters and digits only).
_FEW_LETTERS = frozenset({"assembly", "webassembly", "llvm"})
#: Minified where lines have more characters than this on average (linguist, generated.rb).
_MINIFIED_LANGUAGES, _MINIFIED_LINE = frozenset({"javascript", "css"}), 110


class Options(Section):
    """Thresholds and marks; None or False switches a rule off. Shares are of 1, characters include white space."""

    drop_lock_file: bool = Field(True, description="lists of resolved dependencies, by name")
    drop_vendored: bool = Field(
        True, description="copies of other people's code, by path (after linguist's vendor.yml)"
    )
    drop_minified: bool = Field(
        True, description="by name, or JavaScript and CSS with lines of more than 110 characters on average (linguist)"
    )
    drop_generated: bool = Field(True, description="by name, or as a comment at the head or tail says (StarCoder 2)")

    min_code_characters: int | None = Field(
        20, description="characters outside comments and white space: not empty, more than a licence (ours)"
    )
    max_lines: int | None = Field(100_000, description="lines (StarCoder 2)")
    max_data_lines: int | None = Field(512, description="lines of JSON, YAML and CSV (StarCoder 2)")
    max_mean_line_length: float | None = Field(100, description="characters; not of data and markup (StarCoder 2)")
    max_longest_line: int | None = Field(1000, description="characters; not of data and markup (StarCoder 2)")
    max_longest_data_line: int | None = Field(100_000, description="characters; of data and markup (StarCoder 2)")
    min_alphanumeric_share: float | None = Field(0.25, description="letters and digits among characters (StarCoder 2)")
    min_letter_share: float | None = Field(0.25, description="letters among characters, not of assembly (StarCoder 2)")
    min_alpha_token_share: float | None = Field(0.4, description="tokens that are not numbers (ours)")
    max_number_run_share: float | None = Field(0.5, description="characters in runs of 16 numbers and more (ours)")
    max_longest_encoded: int | None = Field(1024, description="characters of base64, hex or escapes (StarCoder 2)")
    max_encoded_share: float | None = Field(0.5, description="characters of base64, hex or escapes (StarCoder 2)")
    max_comment_share: float | None = Field(
        0.8, description="characters in comments, without white space (StarCoder: in comments and docstrings)"
    )
    max_notebook_output_share: float | None = Field(0.5, description="a notebook's characters that are outputs (ours)")


#: No option changes what is measured.
MEASURED: frozenset[str] = frozenset()
_MARKS = {"generated": pa.string(), "vendored": pa.bool_(), "lock_file": pa.bool_(), "minified": pa.bool_()}
_INTEGERS = ("code_characters", "lines", "data_lines", "longest_line", "longest_data_line", "longest_encoded")
_COLUMNS = [name.partition("_")[2] for name in Options.model_fields]
#: Beside the documents, null for prose and where a value does not apply. `generated`: what says so.
SCHEMA = pa.schema(
    [pa.field(name, _MARKS.get(name, pa.int32() if name in _INTEGERS else pa.float32())) for name in _COLUMNS]
)
COLUMNS: tuple[str, ...] = ()


def measure(documents: Path, attributes: Path, options: Options) -> Counts:
    """Write the values and marks of every document that is code."""
    return write_attributes(documents, attributes, SCHEMA, ["text", "language", "path"], code=True, values=_values)


def judge(table: pa.Table, options: Options) -> list[str | None]:
    """Of every document the rule that drops it, or None."""
    return judge_bounds(table, options)


def _values(group: pa.Table) -> Values:
    text, offsets = utf8(group["text"])
    content, bounds = text.tobytes(), list(pairwise(offsets.tolist()))
    languages, paths = group["language"].to_pylist(), group["path"].to_pylist()
    counts = code_values(text, offsets, np.array([comment_style(language) for language in languages]))
    characters, visible, lines = counts["characters"], counts["visible"], counts["lines"]
    mean_line = _ratio(characters - counts["newlines"], lines)

    def among(names: frozenset[str]) -> NDArray[np.bool_]:
        return np.array([language in names for language in languages])

    long, data, few_letters = among(_LONG_LINES), among(_DATA), among(_FEW_LETTERS)
    dense = among(_MINIFIED_LANGUAGES) & (mean_line > _MINIFIED_LINE)
    return {
        "lock_file": np.array([lock_file(path) for path in paths]),
        "vendored": np.array([vendored(path) for path in paths]),
        "minified": dense | np.array([minified(path) for path in paths]),
        "generated": pa.array(
            [generated(path, *head_and_tail(content, *ends)) for path, ends in zip(paths, bounds)], pa.string()
        ),
        "code_characters": visible - counts["comment_characters"],
        "lines": lines,
        "data_lines": np.where(data, lines, np.nan),
        "mean_line_length": np.where(long, np.nan, mean_line),
        "longest_line": np.where(long, np.nan, counts["longest_line"]),
        "longest_data_line": np.where(long, counts["longest_line"], np.nan),
        "alphanumeric_share": _ratio(counts["alphanumerics"], characters),
        "letter_share": np.where(few_letters, np.nan, _ratio(counts["letters"], characters)),
        "alpha_token_share": _ratio(counts["tokens"] - counts["numbers"], counts["tokens"]),
        "number_run_share": _ratio(counts["in_number_runs"], characters),
        "longest_encoded": counts["longest_encoded"],
        "encoded_share": _ratio(counts["encoded"], characters),
        "comment_share": _ratio(counts["comment_characters"], visible),
        "notebook_output_share": np.array(
            [
                notebook_output_share(content[start:end]) if language == "jupyter notebook" else np.nan
                for language, (start, end) in zip(languages, bounds)
            ]
        ),
    }


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def notebook_output_share(content: bytes) -> float:
    """Share of a Jupyter notebook's bytes that are outputs of its cells; NaN where it is no notebook.

    >>> round(notebook_output_share(b'{"cells": [{"source": "1", "outputs": ["1"]}]}'), 3)
    0.109
    """
    try:
        outputs = [cell["outputs"] for cell in json.loads(content)["cells"] if "outputs" in cell]
        return min(1.0, sum(len(json.dumps(output, ensure_ascii=False).encode()) for output in outputs) / len(content))
    except (ValueError, KeyError, TypeError, RecursionError):
        return np.nan
