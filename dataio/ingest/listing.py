"""What lies where: the files under paths, patterns and URLs, in an order that depends on their names only."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dataio.ingest.streams import filesystem, is_remote, opened
from stoker.errors import Refusal

#: What version control keeps for itself.
_CONTROL = frozenset({".git", ".hg", ".svn", ".bzr", "CVS"})


@dataclass(frozen=True, slots=True)
class Entry:
    """A file. `path`: within its root. `stamp`: changes when its contents do."""

    url: str
    path: str
    size: int
    stamp: str


@dataclass
class Root:
    """What one of the paths of a source names: a folder with all that lies in it, or a file."""

    url: str
    entries: list[Entry]
    checkouts: list[str] = field(default_factory=list)  # folders in it that hold a .git; of local ones only

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def read(self, path: str, most: int) -> bytes:
        """First bytes of the file of a path."""
        with opened(f"{self.url}/{path}") as file:
            return file.read(most)


def roots(path: str, base: Path) -> Iterator[Root]:
    """The roots that a path of a source stands for: one, or those that match its pattern, sorted. Links are followed
    where they are named, not where they are met; a pattern's wild cards do not match a leading dot. Refuses a path or
    pattern that names nothing."""
    found = list(_remote(path) if _is_far(path) else _local(path, base))
    if not found:
        raise Refusal(f"{path}: there is no such file or folder; paths are relative to {base}")
    yield from found


def reaches(path: str, base: Path, folder: Path) -> bool:
    """Whether `folder`, which need not be there yet, lies in what a path of a source names, or holds some of it: with
    ``in/*/x.md`` any folder in ``in`` may."""
    if _is_far(path):
        return False
    pattern = _absolute(path, base)
    names = _named(pattern)
    wanted = Path(os.path.realpath(folder))
    if any(wanted.is_relative_to(os.path.realpath(name)) for name in names if os.path.isdir(name)):
        return True
    if pattern in names:  # not a pattern
        return False
    top = Path(os.path.realpath(_literal(pattern)))
    if not wanted.is_relative_to(top):
        return False
    for wild, part in zip(Path(pattern).relative_to(_literal(pattern)).parts, wanted.relative_to(top).parts):
        if wild == "**":
            return True
        if not fnmatch.fnmatchcase(part, wild):
            return False
    return True


def matches(patterns: tuple[str, ...], path: str) -> bool:
    """Whether a path matches one of the patterns: ``*`` and ``?`` stay within a folder, ``**`` does not; a pattern
    without a slash is about names, wherever they lie; one that ends with a slash is about all that lies in a folder.

    >>> from functools import partial
    >>> takes = partial(matches, ("*.py", "docs/**/*.md", "build/"))
    >>> [takes(path) for path in ("a/b.py", "docs/x.md", "docs/a/b/x.md", "x.md", "build/a/b", "a/build/b")]
    [True, True, True, False, True, True]
    """
    return _compiled(patterns).fullmatch(path) is not None


@cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(_translated(pattern) for pattern in patterns) or r"(?!)", re.DOTALL)


def _translated(pattern: str) -> str:
    anywhere = "/" not in pattern.rstrip("/")
    pattern = ("**/" if anywhere else "") + pattern.lstrip("/") + ("**" if pattern.endswith("/") else "")
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern)
    return "".join(wild.get(part) or _class(part) or re.escape(part) for part in parts)


def _class(part: str) -> str | None:
    if not re.fullmatch(r"\[[^]/]+\]", part):
        return None
    inside = part[1:-1].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
    return f"[^{inside[1:]}]" if inside.startswith("!") and len(inside) > 1 else f"[{inside}]"


def _local(path: str, base: Path) -> Iterator[Root]:
    pattern = _absolute(path, base)
    top = _literal(pattern)
    for name in _named(pattern):
        if os.path.isdir(name):
            root = Root(name, [])
            _walk(root, name)
            yield root
        elif os.path.isfile(name):
            folder = os.path.dirname(name) if top == name else top
            yield Root(folder, [_entry(name, os.path.relpath(name, folder), os.stat(name))])


def _is_far(path: str) -> bool:
    return is_remote(path) and not path.startswith("file://")


def _absolute(path: str, base: Path) -> str:
    return os.path.abspath(base / Path(path.removeprefix("file://")).expanduser())


def _named(pattern: str) -> list[str]:
    """The files and folders that a path or pattern stands for. A file of that very name is meant before a pattern."""
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern] if os.path.exists(pattern) else []
    return sorted(glob.glob(pattern, recursive=True))


def _walk(root: Root, top: str) -> None:
    """Fill a root with what lies in the folder `top`, at any depth, sorted by path."""
    prefixes = [""]
    while prefixes:
        prefix = prefixes.pop()
        folder = os.path.join(top, prefix)
        try:
            found = list(os.scandir(folder))
        except OSError as error:
            raise Refusal(
                f"{folder}: cannot be listed ({error}); make it readable, or name its parts in paths"
            ) from None
        for entry in found:
            if entry.name == ".git":
                root.checkouts.append(prefix)
            elif entry.name in _CONTROL:
                continue
            elif entry.is_dir(follow_symlinks=False):
                prefixes.append(f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                root.entries.append(_entry(entry.path, prefix + entry.name, entry.stat(follow_symlinks=False)))
    root.entries.sort(key=lambda entry: entry.path)


def _entry(url: str, path: str, status: os.stat_result) -> Entry:
    return Entry(url, path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _literal(pattern: str) -> str:
    """The folder above the first part of a path with a wild card in it."""
    parts = pattern.split("/")
    wild = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:wild]) or "/"


def _remote(url: str) -> Iterator[Root]:
    system, pattern = filesystem(url)
    scheme = url.split("://")[0]
    try:
        if glob.has_magic(pattern):
            names = sorted(system.glob(pattern))
        else:
            names = [pattern] if system.exists(pattern) else []
        for name in names:
            folder = name.rstrip("/") if system.isdir(name) else name.rpartition("/")[0]
            if not system.isdir(name) and glob.has_magic(pattern):
                folder = _literal(pattern)
            infos = system.find(folder, detail=True) if system.isdir(name) else {name: system.info(name)}
            root = Root(f"{scheme}://{folder.lstrip('/')}", [])
            for found, info in sorted(infos.items()):
                inside = found.removeprefix(folder).lstrip("/")
                if info.get("type") == "file" and not _CONTROL.intersection(inside.split("/")):
                    root.entries.append(Entry(f"{root.url}/{inside}", inside, *_stamp(info)))
            yield root
    except Exception as error:  # the clients of stores raise what they like
        raise Refusal(f"{url}: cannot be listed ({error}); check the address and the credentials") from error


def _stamp(info: dict[str, object]) -> tuple[int, str]:
    """(size, stamp) from what a store says about a file: its hash where it has one, else when it was written."""
    names = ("ETag", "etag", "e_tag", "md5Hash", "version", "LastModified", "last_modified", "mtime", "created")
    size = info.get("size")
    said = next((str(info[name]) for name in names if info.get(name)), "unknown")
    return size if isinstance(size, int) else 0, f"{size}-{said}"
