"""Real text that every machine with Stoker on it has: the sources and the documentation of installed Python packages.

What goes in is the standard library and every installed distribution whose metadata states a permissive licence. A
source file becomes either a code document or, through its docstrings, a prose document, never both; which of the two
is a hash of its path. READMEs (the body of a distribution's metadata), Markdown, reStructuredText and text files, and
the topics of Python's own help are prose too.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from dataio import licences

Kind = Literal["code", "docstrings", "document"]

#: Our own text would teach the demo model its own program.
_LEFT_OUT = {"stoker"}
_VENDORED = re.compile(r"(^|/)(_?vendor(ed)?|_distutils|third_party|extern(al)?s?)(/|$)")
_NOT_PROSE = re.compile(
    r"licen[cs]e|copying|notice|authors|top_level|entry_points|requirements|sources?\.txt|cmakelists", re.IGNORECASE
)
_STDLIB_TESTS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
_GENERATED = re.compile(r"@generated|do not edit|auto-?generated|automatically generated", re.IGNORECASE)
#: A triple-quoted string that opens a module, or follows a line that ends with a colon. By pattern: parsing the same
#: files takes eight times as long.
_DOCSTRING = re.compile(
    r"(?:\A(?:[ \t]*(?:#[^\n]*)?\n)*|:[ \t]*(?:#[^\n]*)?\n)[ \t]*[rRuU]?(?:\"\"\"(.*?)\"\"\"|'''(.*?)''')", re.DOTALL
)


@dataclass(frozen=True)
class Candidate:
    """A text that could become a document. `text` is at hand for those that are no files."""

    kind: Kind
    distribution: str
    licence: str
    name: str  # stable name: path within the distribution
    path: Path | None = None
    text: str | None = None

    @property
    def key(self) -> int:
        """Hash of distribution and name: a random order that does not depend on the file system's."""
        return xxhash.xxh3_64_intdigest(f"{self.distribution}/{self.name}".encode(), seed=1)


@dataclass(frozen=True)
class Document:
    text: str
    distribution: str
    licence: str
    name: str


def candidates() -> tuple[list[Candidate], Counter[str]]:
    """Everything usable on this machine, in key order, and how many files were left out by which reason."""
    found, dropped = list(_standard_library()), Counter[str]()
    seen = set(_LEFT_OUT)
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"].lower()
        if name not in seen:
            seen.add(name)
            found += _distribution(distribution, dropped)
    return sorted(found, key=lambda candidate: (candidate.key, candidate.name)), dropped


def read(candidate: Candidate) -> Document | str:
    """The document of a candidate, or the reason why it is none."""
    try:
        text = candidate.text if candidate.path is None else candidate.path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return "not UTF-8 text"
    text = (text or "").replace("\r\n", "\n").strip("\ufeff\n ")
    if candidate.kind == "docstrings":
        text = "\n\n".join(textwrap.dedent("    " + (a or b)).strip() for a, b in _DOCSTRING.findall(text))
    reason = _code_fault(text) if candidate.kind == "code" else _prose_fault(text)
    return reason or Document(text + "\n", candidate.distribution, candidate.licence, candidate.name)


def _code_fault(text: str) -> str | None:
    lines = text.split("\n")
    if len(text) < 200:
        return "shorter than 200 characters"
    if len(text) > 60_000:
        return "longer than 60,000 characters"
    if max(map(len, lines)) > 400 or len(text) > 80 * len(lines):
        return "long lines: data or minified"
    if _GENERATED.search(text[:2000]):
        return "says that it is generated"
    return None


def _prose_fault(text: str) -> str | None:
    if len(text) < 400:
        return "shorter than 400 characters"
    if len(text) > 200_000:
        return "longer than 200,000 characters"
    if sum(char.isalpha() or char == " " for char in text) < 0.7 * len(text):
        return "less than 70 % letters and spaces"
    return None


def _standard_library() -> Iterator[Candidate]:
    root = Path(sysconfig.get_path("stdlib"))
    name = f"CPython {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if not _STDLIB_TESTS.intersection(inner.parts):
            yield from _source(name, "PSF-2.0", str(inner), path)
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield Candidate("document", name, "PSF-2.0", f"help/{topic}", text=text)


def _distribution(distribution: importlib.metadata.Distribution, dropped: Counter[str]) -> Iterator[Candidate]:
    name = f"{distribution.metadata['Name']} {distribution.version}"
    licence = licences.of_files({"METADATA": str(distribution.read_text("METADATA") or "")})
    files = [file for file in distribution.files or [] if ".." not in file.parts]
    if licence is None or not licences.permissive(licence):
        dropped["licence not stated" if licence is None else "licence not permissive"] += len(files)
        return
    readme = distribution.metadata.get_payload()  # type: ignore[attr-defined]  # it is an email.message.Message
    if isinstance(readme, str):
        yield Candidate("document", name, licence, "README", text=readme)
    for file in files:
        path = Path(str(distribution.locate_file(file)))
        if file.suffix == ".py":
            if _VENDORED.search(file.as_posix()):
                dropped["vendored: another licence may hold"] += 1
            else:
                yield from _source(name, licence, file.as_posix(), path)
        elif file.suffix in (".md", ".rst", ".txt") and not _NOT_PROSE.search(file.as_posix()):
            yield Candidate("document", name, licence, file.as_posix(), path)


def _source(distribution: str, licence: str, name: str, path: Path) -> Iterable[Candidate]:
    candidate = Candidate("code", distribution, licence, name, path)
    if candidate.key % 2:
        return [candidate]
    return [Candidate("docstrings", distribution, licence, name, path)]
