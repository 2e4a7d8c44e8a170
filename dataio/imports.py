"""What a file imports, as far as a light parser sees it: Python, JavaScript and TypeScript, Go, C and C++.

    dependencies("python", "pkg/a.py", "from .b import c")        ["/pkg/b/c"]

A name is a path without the ending that the language leaves out: ``/pkg/b`` from the root of the repository, ``pkg/b``
from anywhere in it. What lies outside the repository is a name that no file of it answers to (see ``code_order.py``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator

#: Languages whose files can import one another.
FAMILIES = {"python": "python", "cython": "python", "go": "go"}
FAMILIES |= dict.fromkeys(("javascript", "typescript", "vue", "svelte"), "javascript")
FAMILIES |= dict.fromkeys(("c", "c++", "objective-c", "objective-c++", "cuda", "opencl"), "c")

#: Of a file. No person wrote more of them, or longer ones.
MOST_NAMES, LONGEST_NAME = 400, 200

# Quantifiers are possessive where what follows could make them give back: a line of a million blanks costs linear time.
_PYTHON = re.compile(
    r"^(?:from[ \t]++(\.*+)[ \t]*+((?:(?!import\b)[\w.]++)?+)[ \t]*+"
    r"\bimport\b[ \t]*+(\([^()]*+\)|(?:[^\n\\]|\\\r?+\n)*+)"
    r"|import[ \t]++((?:[^\n\\]|\\\r?+\n)*+))",
    re.MULTILINE,
)
_COMMENT = re.compile(r"#[^\n]*+")
_JAVASCRIPT = re.compile(r"""\b(?:from|import|require)\s*+\(?+\s*+(['"])([^'"\n]{1,200}+)\1""")
_GO = re.compile(
    r'^import\s++(?:\(((?:[^)\n]|\n(?!import))*+)\)|(?:[\w.]++[ \t]++)?+(["`][^"`\n]++["`]))', re.MULTILINE
)
_GO_PATH = re.compile(r'["`]([^"`\n]++)["`]')
_INCLUDE = re.compile(r'^[ \t]*+#[ \t]*+(?:include|import)[ \t]*+(["<])([^">\n]++)[">]', re.MULTILINE)


def dependencies(language: str | None, path: str, text: str) -> list[str]:
    """Names of what the file at `path` of its repository imports, in the order of the text; none in other languages.

    Of Python, imports in functions and blocks do not count: many stand there to break a cycle.
    """
    find = _FINDERS.get(FAMILIES.get(language or "", ""))
    if find is None:
        return []
    names = dict.fromkeys(name for name in find(posixpath.dirname(path), text) if 0 < len(name) <= LONGEST_NAME)
    return list(names)[:MOST_NAMES]


def _python(folder: str, text: str) -> Iterator[str]:
    for match in _PYTHON.finditer(text):
        dots, module, imported, modules = match.groups()
        if modules is not None:
            yield from (name.replace(".", "/") for name in _listed(modules))
        elif not dots:
            yield from (f"{module}.{name}".replace(".", "/") for name in _listed(imported))
        else:
            above = folder.split("/") if folder else []
            if len(dots) - 1 <= len(above):
                start = [*above[: len(above) - len(dots) + 1], *filter(None, module.split("."))]
                yield from ("/" + "/".join([*start, name]) for name in _listed(imported))


def _listed(imported: str) -> Iterator[str]:
    """``a.b`` and ``d`` of ``a.b as c, d  # why``, in parentheses or not."""
    for clause in _COMMENT.sub("", imported).strip("() \t\r\n").split(","):
        words = clause.replace("\\", " ").replace(";", " ").split()
        yield from words[:1]


def _javascript(folder: str, text: str) -> Iterator[str]:
    for match in _JAVASCRIPT.finditer(text):
        name = match[2].partition("?")[0]
        if name.startswith("."):
            yield posixpath.normpath(f"/{folder}/{name}")
        elif "/" in name:  # one without is a package's
            yield name.removeprefix("@/").removeprefix("~/").strip("/")


def _go(folder: str, text: str) -> Iterator[str]:
    for match in _GO.finditer(text):
        yield from (found[1].strip("/") for found in _GO_PATH.finditer(match[1] or match[2] or ""))


def _c(folder: str, text: str) -> Iterator[str]:
    for match in _INCLUDE.finditer(text):
        quote, name = match.groups()
        if name.startswith("."):
            yield posixpath.normpath(f"/{folder}/{name}")
        elif quote == '"' or "/" in name:
            yield posixpath.normpath(name).strip("/")
        else:  # mostly the system's; the repository's only where it keeps such files
            yield f"include/{name}"


_FINDERS: dict[str, Callable[[str, str], Iterator[str]]] = {
    "python": _python,
    "javascript": _javascript,
    "go": _go,
    "c": _c,
}
