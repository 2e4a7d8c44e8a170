"""A git checkout as its files tell, without running git: repository, revision, and which files belong to it.

Formats as in git's documentation: gitrepository-layout(5), gitformat-index(5).
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from dataio.ingest.repositories import Repository

_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ADDRESS = re.compile(r"(?:[a-z+]+://)?(?:[^@/]*@)?([^/:]+)(?::\d+)?[:/](.+?)(?:\.git)?/?")
#: Bits of an entry's mode that say what it is, and those of a regular file.
_KIND, _REGULAR = 0o170000, 0o100000


def checkout(folder: Path) -> Repository | None:
    """Repository of a folder with a ``.git`` in it; None if that is none. Its name is where it was cloned from, without
    credentials, or the folder's name; `revision` is the commit that is checked out."""
    git = _git_folder(folder)
    if git is None:
        return None
    common = git / _read(git / "commondir") if (git / "commondir").is_file() else git
    return Repository(_origin(common) or folder.name, revision=_revision(git, common))


def tracked(folder: Path) -> frozenset[str] | None:
    """Paths of the files that the checkout's index lists, links and submodules left out; None if it cannot be read."""
    git = _git_folder(folder)
    try:
        index = (git / "index").read_bytes() if git else b""
    except OSError:
        return None
    common = git / _read(git / "commondir") if git and (git / "commondir").is_file() else git
    wide = common is not None and "objectformat = sha256" in _read(common / "config").lower()
    try:
        return frozenset(_entries(index, 32 if wide else 20))
    except (IndexError, ValueError):
        return None


def _git_folder(folder: Path) -> Path | None:
    git = folder / ".git"
    if git.is_file():  # of a worktree or a submodule: it says where
        git = folder / _read(git).removeprefix("gitdir:").strip()
    return git if (git / "HEAD").is_file() else None


def _revision(git: Path, common: Path) -> str | None:
    head = _read(git / "HEAD")
    if not head.startswith("ref:"):
        return head if _REVISION.fullmatch(head) else None
    name = head[4:].strip()
    if ".." in name or name.startswith("/"):
        return None
    for place in (git, common):
        if _REVISION.fullmatch(found := _read(place / name)):
            return found
    for line in _read(common / "packed-refs").splitlines():
        revision, _, packed = line.partition(" ")
        if packed == name and _REVISION.fullmatch(revision):
            return revision
    return None


def _origin(common: Path) -> str | None:
    config = configparser.RawConfigParser(strict=False, allow_no_value=True)
    try:
        config.read_string(re.sub(r"^[ \t]+", "", _read(common / "config"), flags=re.MULTILINE))
        url = config.get('remote "origin"', "url", fallback="").strip()
    except (configparser.Error, AttributeError):
        return None
    match = None if url.startswith(("/", ".")) else _ADDRESS.fullmatch(url)
    return f"{match[1]}/{match[2].strip('/')}" if match else None


def _entries(index: bytes, hash_bytes: int) -> list[str]:
    version, count = int.from_bytes(index[4:8]), int.from_bytes(index[8:12])
    if index[:4] != b"DIRC" or version not in (2, 3, 4):
        raise ValueError("no index")
    names, at, name = [], 12, b""
    for _ in range(count):
        start = at
        mode = int.from_bytes(index[at + 24 : at + 28])
        at += 40 + hash_bytes
        extended = index[at] & 0x40 and version > 2
        at += 4 if extended else 2
        if version == 4:
            strip, at = _varint(index, at)
            end = index.index(b"\0", at)
            name = name[: len(name) - strip] + index[at:end]
            at = end + 1
        else:
            end = index.index(b"\0", at)
            name = index[at:end]
            at = start + (end - start + 8) // 8 * 8
        if mode & _KIND == _REGULAR:
            names.append(name.decode("utf-8", "surrogateescape"))
    return names


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, offset behind it), as offsets in git's packs are written."""
    value = data[at] & 0x7F
    while data[at] & 0x80:
        at += 1
        value = ((value + 1) << 7) | (data[at] & 0x7F)
    return value, at + 1


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
