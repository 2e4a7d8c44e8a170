"""Which repository a file belongs to, and the licence of each."""

from __future__ import annotations

import csv
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from dataio.licences import is_licence_file, is_package_metadata, of_files

#: "root": what `paths` names, or the archive, is one. "first": every folder in it is one. "nearest": the nearest folder
#: that holds a licence or a package's metadata. "git": the checkout. "distribution": the installed Python distribution
#: whose RECORD lists the file.
Rule = Literal["none", "root", "first", "nearest", "git", "distribution"]
#: Bytes of a licence or metadata file that are read.
MAX_TELLING_BYTES = 256 << 10
#: How many of them of one repository.
_MAX_FILES = 32
_DIST_INFO = re.compile(r"((?:.*/)?)([^/]+?)-([^/-]+)\.dist-info/")
_LICENCE_FOLDER = re.compile(r"(?:[^/]+\.(?:dist|egg)-info/)?(?:licen[cs]es/)?[^/]+", re.IGNORECASE)

Read = Callable[[str, int], bytes]


@dataclass(frozen=True, slots=True)
class Repository:
    """`folder`: how the paths of its files begin ("", or with a slash at the end); what follows is the path in it."""

    name: str
    folder: str = ""
    revision: str | None = None
    licence: str | None = None


@dataclass
class Repositories:
    """The repositories of the files of one root. `paths`: of all its files, wanted or not. `read(path, most)`: their
    first bytes. `checkouts`: repositories known beforehand, by folder."""

    rule: Rule
    name: str
    paths: Sequence[str]
    read: Read
    checkouts: Mapping[str, Repository] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._telling: dict[str, list[str]] = defaultdict(list)  # by folder
        if self.rule != "none":
            for path in self.paths:
                if is_licence_file(path) or is_package_metadata(path):
                    for folder in _above(path):
                        if _LICENCE_FOLDER.fullmatch(path[len(folder) :]):
                            self._telling[folder].append(path)
        self._top = _common_top(self.paths)
        self._recorded = dict(self._records()) if self.rule == "distribution" else {}
        self._found: dict[str, Repository] = {}
        self._folders: dict[str, str | None] = {}

    def of(self, path: str) -> Repository | None:
        """The repository of a file."""
        parent = path[: path.rfind("/") + 1]
        if self.rule == "distribution":
            folder = self._recorded.get(path)
        elif parent in self._folders:
            folder = self._folders[parent]
        else:
            folder = self._folders[parent] = self._folder(parent)
        if folder is None:
            return None
        if folder not in self._found:
            self._found[folder] = self._repository(folder)
        return self._found[folder]

    def _folder(self, parent: str) -> str | None:
        """Of files directly in the folder `parent`."""
        if self.rule == "root":
            return self._top
        if self.rule == "first":
            return parent[: parent.find("/") + 1]
        known: Iterable[str] = self.checkouts if self.rule == "git" else self._telling if self.rule == "nearest" else ()
        return next((folder for folder in _above(parent) if folder in known), None)

    def _repository(self, folder: str) -> Repository:
        licence = self._licence(folder)
        if self.rule == "git":
            return replace(self.checkouts[folder], licence=licence)
        if self.rule == "distribution" and (match := _DIST_INFO.fullmatch(folder)):
            return Repository(match[2], match[1], match[3], licence)
        if self.rule == "nearest" and licence is None:
            licence = next((found for above in _above(folder[:-1]) if (found := self._licence(above))), None)
        own = folder if self.rule != "root" else ""
        return Repository(own.rstrip("/") or self.name, folder, None, licence)

    def _licence(self, folder: str) -> str | None:
        # Few and near: a folder that is full of licences is a collection of texts, not a statement.
        files = sorted(self._telling.get(folder, ()), key=lambda path: (path.count("/"), path))[:_MAX_FILES]
        texts = {path[len(folder) :]: self.read(path, MAX_TELLING_BYTES).decode("utf-8", "replace") for path in files}
        return of_files(texts)

    def _records(self) -> Iterable[tuple[str, str]]:
        """(path, folder of the .dist-info that lists it)."""
        for path in self.paths:
            folder, _, name = path.rpartition("/")
            match = _DIST_INFO.fullmatch(f"{folder}/")
            if match and name == "RECORD":
                lines = self.read(path, 64 << 20).decode("utf-8", "replace").splitlines()
                with suppress(csv.Error):  # what a damaged RECORD lists from there on is of no distribution
                    for row in csv.reader(lines):
                        if row:
                            yield posixpath.normpath(match[1] + row[0]), f"{folder}/"


def _above(path: str) -> Iterable[str]:
    """The folders that a path lies in, the nearest first.

    >>> list(_above("a/b/c"))
    ['a/b/', 'a/', '']
    """
    at = len(path)
    while (at := path.rfind("/", 0, at)) >= 0:
        yield path[: at + 1]
    yield ""


def _common_top(paths: Sequence[str]) -> str:
    """The folder that all of an archive's files lie in, if there is one."""
    top = paths[0][: paths[0].find("/") + 1] if paths else ""
    return top if all(path.startswith(top) for path in paths) else ""
