"""Every value of code agrees with its definition, written slowly; every rule drops what it names and no more."""

from __future__ import annotations

import base64
import inspect
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataio import languages
from dataio.documents import Document, read_groups, write_documents
from dataio.filters import code
from dataio.filters.code_marks import HEAD_BYTES, TAIL_BYTES, generated, lock_file, minified, vendored
from dataio.filters.code_values import COMMENTS, code_values, comment_style

LANGUAGES = ("python", "c", "lua", "sql", "haskell", "xml", "pascal", "f#", "batchfile", "json")


def measured(*texts: str, language: str = "python") -> list[dict[str, int]]:
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    styles = np.full(len(texts), comment_style(language))
    found = code_values(np.frombuffer(b"".join(encoded), np.uint8), offsets, styles)
    return [{name: int(values[i]) for name, values in found.items()} for i in range(len(texts))]


def in_comments(text: str, language: str) -> str:
    """What is in comments, by a regular expression: at each line's beginning, and again after what ended there."""
    marks = next((marks.split(" ") for marks, names in COMMENTS.items() if language in names.split(", ")), [])
    parts = [
        re.escape(mark).replace("…", r"(?:(?s:.)*?)(?:") + r"|\Z)" if "…" in mark else re.escape(mark) + r"[^\n]*"
        for mark in marks
    ]
    if not parts:
        return ""
    comment, found, at = re.compile("|".join(parts), re.IGNORECASE), [], 0
    while at < len(text):
        blank = re.compile(r"[^\S\n]*").match(text, at)
        assert blank is not None
        if match := comment.match(text, blank.end()):
            found.append(match[0])
            at = match.end()
        elif blank.end() == len(text) or text[blank.end()] == "\n":
            at = blank.end() + 1
        else:
            at = text.find("\n", at) + 1 or len(text)
    return "".join(found)


def defined(text: str, language: str) -> dict[str, int]:
    lines = text.split("\n")
    lines = lines if lines[-1] else lines[:-1]
    letters, digits = sum(map(str.isalpha, text)), len(re.findall("[0-9]", text))
    # Letters, digits, white space, separators and the rest: all that decides about tokens and runs of numbers.
    kinds = "".join(
        "a" if c.isalpha() or c == "_" else "0" if c in "0123456789" else " " if c.isspace() else c for c in text
    )
    tokens = re.findall("[a0]+", kinds)
    number, between = "(?<![a0])0[a0]*", r"[ ,.;+\-()\[\]{}'\"\\]+"
    encoded = [
        run for run in re.findall(r"[A-Za-z0-9+/=\\\n]{64,}", text) if 16 * len(re.findall("[0-9]", run)) >= len(run)
    ]
    return {
        "characters": len(text),
        "visible": sum(not c.isspace() for c in text),
        "letters": letters,
        "alphanumerics": letters + digits,
        "lines": len(lines),
        "newlines": text.count("\n"),
        "longest_line": max(map(len, lines), default=0),
        "tokens": len(tokens),
        "numbers": sum(token[0] == "0" for token in tokens),
        "comment_characters": sum(not c.isspace() for c in in_comments(text, language)),
        "encoded": sum(map(len, encoded)),
        "longest_encoded": max(map(len, encoded), default=0),
        "in_number_runs": sum(len(m[0]) for m in re.finditer(f"{number}(?:{between}{number}){{15,}}", kinds)),
    }


PIECES = st.one_of(
    st.text(st.sampled_from("aZ_09 \n\t#/*-{}()<>!;:.,'\"\\+=[]é漢😀\u00a0\x00|"), max_size=9),
    st.sampled_from([part for marks in COMMENTS for mark in marks.split(" ") for part in mark.split("…")]),
    st.sampled_from(
        ["REM ", "\n", "\n  ", "12, " * 9, "0xFF,\n" * 16, "1 2 " * 8, "a1B2" * 16, "Zm9v" * 20, "\\x41" * 17]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=30), st.sampled_from(LANGUAGES))
@example(["1 " * 16], "c")
@example(["1 " * 15, "a"], "c")
@example(["a" * 60, "1234"], "c")
@example(["/*/ a */ b\n/* c"], "c")
@example(["/* a */ // b\n/* c */ d // e\n"], "c")
@example(["  REM a\n:: b\nremark"], "batchfile")
def test_every_value_is_what_its_definition_says(pieces: list[str], language: str) -> None:
    text = "".join(pieces)
    assert measured(text, language=language) == [defined(text, language)]


def test_every_value_of_real_code_is_what_its_definition_says() -> None:
    texts = [inspect.getsource(module) for module in (re, random, inspect, json, code, languages)]
    for language in ("python", "c"):
        assert measured(*texts, language=language) == [defined(text, language) for text in texts]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80), st.integers(0, len(COMMENTS)))
def test_bytes_that_are_no_utf8_are_measured_without_harm(text: bytes, style: int) -> None:
    values = code_values(np.frombuffer(text, np.uint8), np.array([0, len(text)]), np.array([style]))
    assert 0 <= values["comment_characters"][0] <= values["visible"][0] <= len(text)


def test_comments_are_known_of_languages_that_exist_each_in_one_way() -> None:
    names = [name for group in COMMENTS.values() for name in group.split(", ")]
    assert len(set(names)) == len(names) and set(names) <= languages.CODE


GOOD = '"""Numbers."""\n\n\ndef mean(values):\n    """Of a list."""\n    return sum(values) / len(values)\n'
ENCODED = base64.b64encode(random.Random(0).randbytes(1200)).decode()
NOTEBOOK = {"cells": [{"source": ["print(1)"], "outputs": [{"text": ["1"] * 99}]}, {"source": ["2"]}], "nbformat": 4}
BAD = {
    "drop_lock_file": ("web/package-lock.json", '{"name": "of something"}'),
    "drop_vendored": ("a/third_party/mean.py", GOOD),
    "drop_minified": ("a.js", f"{'let a = b + c;' * 20}\n" * 3),
    "drop_generated": ("a.py", f"# Generated by a program. DO NOT EDIT.\n{GOOD}"),
    "min_code_characters": ("__init__.py", "# Licensed under the terms of the Apache License\n" * 9 + "import a\n"),
    "max_lines": ("a.py", "a = b\n" * 100_001),
    "max_data_lines": ("a.yaml", "key: value\n" * 513),
    "max_mean_line_length": ("a.py", f"{'value + ' * 13}\n" * 9),
    "max_longest_line": ("a.py", GOOD * 9 + "value = " + "other + " * 125),
    "max_longest_data_line": ("a.json", f"[{json.dumps('word ' * 20_000)}]"),
    "min_alphanumeric_share": ("a.py", "x = [((), ()), ((), ())], {}, -+-+-+-, ((((()))))\n"),
    "min_letter_share": ("a.py", "x = 1234567890 + 1234567890 / 1234567890\n"),
    "min_alpha_token_share": ("a.py", "table = 1 * 2 * 3 * 4 * 5 * 6\n"),
    "max_number_run_share": ("a.c", f"int table[] = {{{', '.join(map(hex, range(999)))}}};\n"),
    "max_longest_encoded": ("a.py", GOOD * 40 + f'data = "{ENCODED}"'),
    "max_encoded_share": (
        "a.py",
        "data = (\n" + "".join(f'  "{ENCODED[i : i + 76]}"\n' for i in range(0, 1500, 76)) + ")",
    ),
    "max_comment_share": (
        "a.c",
        f"/*\n{'All of this is explained at length.' * 20}\n*/\nint main(void) {{ return 0; }}\n",
    ),
    "max_notebook_output_share": ("a.ipynb", json.dumps(NOTEBOOK)),
}
OFF = {name: False if name.startswith("drop_") else None for name in code.Options.model_fields}


def attributes(folder: Path, *files: tuple[str, str]) -> pa.Table:
    held = [
        Document(text, "s", path, file=0, row=row, language=languages.of_path(path))
        for row, (path, text) in enumerate(files)
    ]
    write_documents(folder / "d.parquet", held)
    counts = code.measure(folder / "d.parquet", folder / "a.parquet", code.Options())
    assert counts["documents"] == len(held) and counts["bytes_in"] == sum(len(d.text.encode()) for d in held)
    return pa.concat_tables(read_groups(folder / "d.parquet", ["id"], {folder / "a.parquet": code.SCHEMA.names}))


def test_every_rule_drops_its_file_and_is_switched_off(tmp_path: Path) -> None:
    assert BAD.keys() == OFF.keys()
    table = attributes(tmp_path, *BAD.values(), ("mean.py", GOOD))
    assert code.judge(table, code.Options(**OFF)) == [None] * table.num_rows
    for row, rule in enumerate(BAD):
        only = code.Options(**{**OFF, rule: code.Options.model_fields[rule].default})
        reasons = code.judge(table, only)
        assert reasons[row] == rule and reasons[-1] is None, rule
    assert code.judge(table, code.Options())[-1] is None


def test_prose_has_no_values_and_what_does_not_apply_is_null(tmp_path: Path) -> None:
    table = attributes(tmp_path, ("README.md", GOOD), ("a.py", GOOD), ("a.json", "[1]"), ("a.s", "mov"), ("b.py", ""))
    rows = [{name for name, value in row.items() if value is None} for row in table.to_pylist()]
    usual = {"generated", "data_lines", "longest_data_line", "notebook_output_share"}
    shares = {name for name in code.SCHEMA.names if name.endswith("_share")} | {"mean_line_length"}
    assert rows[0] == set(code.SCHEMA.names)
    assert rows[1] == usual
    assert rows[2] == usual - {"data_lines", "longest_data_line"} | {"mean_line_length", "longest_line"}
    assert rows[3] == usual | {"letter_share"}
    assert rows[4] == usual | shares
    assert code.judge(table, code.Options())[4] == "min_code_characters"


@pytest.mark.parametrize(
    "text",
    [
        "// Code generated by protoc-gen-go. DO NOT EDIT.",
        "# -*- coding: utf-8 -*-\n# Generated by the protocol buffer compiler.  DO NOT EDIT!",
        "/* A Bison parser.\n * This file was automatically generated by SWIG */",
        '"""\nAuto-generated by a tool.\n"""',
        "<!-- @generated -->",
        "# This is a header.\n#\n# This file is auto-generated; don't edit it by hand.",
        "-- THIS FILE HAS BEEN AUTOMATICALLY GENERATED",
        "/*\n  Please do not edit this file.\n*/",
        "dnl Generated from configure.in by autoheader",
    ],
)
def test_a_file_that_says_it_is_generated_is(text: str) -> None:
    assert generated("a.x", text.encode(), b"")
    assert generated("a.x", b"", f"x = 1\n{text}".encode())


@pytest.mark.parametrize(
    "text",
    [
        'print("// Code generated by us. DO NOT EDIT.")',
        "# The id is generated by the caller.",
        "# do not modify the list while it is walked",
        "generated = by(from_file)",
        "def generated(by): ...",
        "# names are automatically generated if there is none",
        "/* returns the generated code */",
        "header = '# This file is generated'",
        "",
    ],
)
def test_a_file_that_speaks_of_generating_is_not_generated(text: str) -> None:
    assert generated("a.x", text.encode(), text.encode()) is None


def test_marks_far_from_both_ends_are_not_looked_at(tmp_path: Path) -> None:
    filler = "value = other\n" * (HEAD_BYTES // 10)
    mark = "# Code generated by a tool. DO NOT EDIT.\n"
    quoted = f'{filler}print("{mark[2:-1].ljust(TAIL_BYTES)}'
    texts = [filler + mark + filler, filler + mark, quoted]
    table = attributes(tmp_path, *((f"{i}.py", text) for i, text in enumerate(texts)))
    assert table["generated"].to_pylist() == [None, "code generated by", None]


def test_names_tell_what_is_generated_vendored_locked_and_minified() -> None:
    assert all(generated(path, b"", b"") for path in ("x/a_pb2.py", "a.pb.go", "x/generated/b.rs", "A.Designer.cs"))
    assert not any(generated(path, b"", b"") for path in ("generated.py", "x/pb2.py", "generated_by.go", "a.map.ts"))
    copies = (
        "node_modules/a/b.js",
        "x/_vendor/y.py",
        "js/jquery.min.js",
        "js/react-17.0.2.js",
        "vue.min.js",
        "gradlew",
    )
    assert all(map(vendored, copies))
    own = ("src/vendor.py", "x/react.js", "chart.js", "lib/python3/site-packages/x.py", "my_vendors/x.go", "jquery.ts")
    assert not any(map(vendored, own))
    assert all(map(lock_file, ("Cargo.lock", "a/go.sum", "x/pnpm-lock.yaml"))) and not lock_file("x/lock.py")
    assert minified("a.min.js") and minified("b-min.css") and not minified("admin.js") and not minified("min.js")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ('{"cells": []}', 0),
        ('{"cells": [{"outputs": ["é"]}]}', 6 / 32),
        ("not json", math.nan),
        ("[1]", math.nan),
        ('{"cells": 3}', math.nan),
        ('{"cells": [[]]}', 0),
        ("[" * 100_000, math.nan),
    ],
)
def test_the_share_of_outputs_of_a_notebook_or_of_what_is_none(text: str, share: float) -> None:
    assert code.notebook_output_share(text.encode()) == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize(
    "line", ["# generated " * 400, "#" * 4000, " " * 4000 + "do not", "this file " * 400, "/" * 4000 + "t edit"]
)
def test_lines_that_nearly_match_take_no_time(line: str) -> None:
    start = time.process_time()
    generated("a.x", (line + " generated t edit").encode(), b"")
    assert time.process_time() - start < 0.5
