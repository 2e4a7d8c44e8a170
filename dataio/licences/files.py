"""The licence of a repository, from its licence files and what its packages say of themselves."""

from __future__ import annotations

import email
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from dataio.licences.expressions import RESTRICTED, all_of, any_of, family, names, permissive
from dataio.licences.headers import stated
from dataio.licences.texts import LONGEST, identify
from dataio.licences.wordings import normalise

_LICENCE_FILE = re.compile(
    r"(?:un)?licen[sc]es?(?:[-_.].*)?|copying(?:[-_.].*)?|copyright(?:\.\w+)?|[\w.]+[-_]licen[sc]e(?:\.\w+)?",
    re.IGNORECASE,
)
# fmt: off
_NOT_TEXT = frozenset([
    ".py", ".pyi", ".js", ".mjs", ".cjs", ".ts", ".tsx", ".jsx", ".go", ".rs", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs",
    ".java", ".kt", ".scala", ".rb", ".php", ".pl", ".pm", ".sh", ".swift", ".lua", ".sql", ".json", ".yaml", ".yml",
    ".toml", ".xml", ".css", ".scss", ".vue", ".svg", ".png", ".jpg", ".ejs", ".erb", ".tmpl", ".j2", ".in", ".header",
])
# fmt: on
_RESTRICTION = re.compile(
    r"commons clause|not\s+for\s+commercial|non-?commercial(?:ly)?\s+(?:use|purpose|research)|nuclear\s+facilit"
    r"|good,\s+not\s+evil|(?:academic|research)\s+(?:use|purposes)\s+only|right\s+to\s+sell\s+the\s+software",
    re.IGNORECASE,
)


def is_licence_file(name: str) -> bool:
    """Whether a path is, by its name, that of a licence text.

    >>> [name for name in ("LICENSE-MIT", "COPYING.LESSER", "license.py", "LICENSES/ISC.txt") if is_licence_file(name)]
    ['LICENSE-MIT', 'COPYING.LESSER', 'LICENSES/ISC.txt']
    """
    path = PurePosixPath(name)
    if path.parent.name == "LICENSES":  # https://reuse.software
        return path.suffix == ".txt"
    return _LICENCE_FILE.fullmatch(path.name) is not None and path.suffix.lower() not in _NOT_TEXT


def is_package_metadata(name: str) -> bool:
    """Whether a path is, by its name, that of a file in which a package states its licence."""
    return _reader(name) in _READERS


def of_files(files: Mapping[str, str]) -> str | None:
    """Expression of a repository from its licence and metadata files, {path: text}; None if nothing is stated.

    The files nearest to the root speak for it. What the metadata say holds, and licence texts that they do not name
    hold with it: a package.json is born saying ISC, whatever the author then chose.
    """
    texts = _nearest({path: text for path, text in files.items() if is_licence_file(path)})
    described = _nearest({path: text for path, text in files.items() if is_package_metadata(path)})
    found = [name for text in texts.values() if (name := of_licence_file(text))]
    said = all_of(name for path, text in described.items() if (name := of_metadata(path, text)))
    if said is None:
        return all_of(found)
    families = {family(name) for name in names(said)}
    if found and len(families) == 1 and all({family(each) for each in names(name)} == families for name in found):
        # The same licence; the more exact name of it: BSD says less than BSD-3-Clause, -only than -or-later.
        return all_of(found) if said.startswith("LicenseRef-") else said
    return all_of([said, *(name for name in found if not {family(each) for each in names(name)} <= families)])


def of_licence_file(text: str) -> str | None:
    """Licence of a licence file: its text, or what it refers to, and conditions added to a permissive one."""
    name = identify(text) or stated(text)
    if name == "Apache-2.0" and "llvm exceptions to the apache" in text[:LONGEST].lower():
        return "Apache-2.0 WITH LLVM-exception"
    if name and permissive(name) and _RESTRICTION.search(text[:LONGEST]):
        return all_of([name, RESTRICTED])
    return name


def of_metadata(path: str, text: str) -> str | None:
    """What a package's metadata file states; None if it says nothing that can be told, or cannot be read."""
    try:
        said = _READERS[_reader(path)](text)
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None
    return all_of(name for each in said if isinstance(each, str) and (name := _statement(each)))


def _nearest(files: Mapping[str, str]) -> dict[str, str]:
    depths = {path: _depth(path) for path in files}
    return {path: text for path, text in sorted(files.items()) if depths[path] == min(depths.values())}


def _depth(path: str) -> int:
    """Folders above a file; a folder of licences counts as the one it is in."""
    return sum(part.lower() not in ("licenses", "licences", ".") for part in PurePosixPath(path).parts[:-1])


def _reader(path: str) -> str:
    name = PurePosixPath(path).name
    return "*.gemspec" if name.endswith(".gemspec") else name


def _statement(text: str) -> str | None:
    """Of a name, or of a whole text in place of one."""
    return normalise(text) if len(text) < 200 and "\n" not in text.strip() else of_licence_file(text)


def _core_metadata(text: str) -> list[str]:
    """Of a Python distribution: the field that says most exactly what can be told."""
    message = email.message_from_string(text.split("\n\n")[0] + "\n\n")
    for field in ("License-Expression", "Classifier", "License"):
        said = [str(value) for value in message.get_all(field, [])]
        said = [value for value in said if field != "Classifier" or value.startswith("License ::")]
        if any(_statement(value) for value in said):
            return said
    return []


def _json_licence(text: str) -> list[str]:
    content = json.loads(text)
    said = content.get("license") or content.get("licenses") or []
    entries = said if isinstance(said, list) else [said]
    wordings = [entry.get("type") or entry.get("name") if isinstance(entry, dict) else entry for entry in entries]
    found = [name for wording in wordings if isinstance(wording, str) and (name := normalise(wording))]
    # A list means a choice, in npm's old form as in Composer's.
    choice = any_of(found) if len(found) == len(wordings) else None
    return [] if choice is None else [choice]


def _cargo(text: str) -> list[Any]:
    return [tomllib.loads(text).get("package", {}).get("license")]


def _pyproject(text: str) -> list[Any]:
    content = tomllib.loads(text)
    project, poetry = content.get("project", {}), content.get("tool", {}).get("poetry", {})
    said = project.get("license") or poetry.get("license")
    said = said.get("text") if isinstance(said, dict) else said
    if isinstance(said, str) and _statement(said):
        return [said]
    return [text for text in project.get("classifiers", []) if text.startswith("License ::")]


def _gemspec(text: str) -> list[str]:
    found = re.search(r"\.licenses?\s*=\s*([^\n]{1,200})", text)
    return re.findall(r"[\"']([^\"']+)[\"']", found[1]) if found else []


_READERS = {
    "PKG-INFO": _core_metadata,
    "METADATA": _core_metadata,
    "package.json": _json_licence,
    "composer.json": _json_licence,
    "Cargo.toml": _cargo,
    "pyproject.toml": _pyproject,
    "*.gemspec": _gemspec,
}
