"""Languages by name: one vocabulary, told apart into prose and code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio import languages
from dataio.languages import CODE, PROSE, is_code, named, of_path


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("a.py", "python"),
        ("A/B.PYI", "python"),
        ("a.test.tsx", "typescript"),
        ("x.h", "c"),
        ("x.hpp", "c++"),
        ("x.cu", "cuda"),
        ("Cargo.toml", "toml"),
        ("Makefile.am", "makefile"),
        ("Dockerfile.gpu", "dockerfile"),
        ("config.h.in", "c"),
        ("CMakeLists.txt", "cmake"),
        ("requirements.txt", "pip requirements"),
        ("notes.txt", "text"),
        ("README", "text"),
        ("README.md", "markdown"),
        ("LICENSE-MIT", "text"),
        ("index.html", "html"),
        ("Nb.ipynb", "jupyter notebook"),
        (".gitignore", "ignore list"),
        (".py", None),
        ("libx.so.1", None),
        ("a.png", None),
        ("py", None),
        ("dir.py/file", None),
        ("", None),
    ],
)
def test_a_name_tells_the_language(path: str, language: str | None) -> None:
    assert of_path(path) == language


def test_an_ending_means_one_language() -> None:
    endings = [
        ending for table in (languages._PROSE, languages._CODE) for all in table.values() for ending in all.split()
    ]
    assert len(endings) == len(set(endings)) and all(ending == ending.lower() for ending in endings)


def test_prose_and_natural_languages_and_the_unknown_are_not_code() -> None:
    assert not PROSE & CODE
    assert [is_code(name) for name in ("python", "c++", "json", "jupyter notebook")] == [True] * 4
    assert [is_code(name) for name in ("markdown", "html", "text", "en", "zh", "brainfuck", "", None)] == [False] * 8
    two = {name for name in CODE if len(name) == 2 and name.isalpha()}
    assert two <= {"go"}, f"{two} could be codes of natural languages"


@given(st.text())
def test_every_statement_has_a_name_and_known_names_stay(name: str) -> None:
    assert named(named(name)) == named(name)
    for known in CODE | PROSE:
        assert named(known) == known == named(known.upper())
