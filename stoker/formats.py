"""The stamp that everything written carries, so that an old reader refuses a new file instead of misreading it."""

from __future__ import annotations

import os
from typing import Any

from stoker.errors import Refusal


def stamp(name: str, version: int) -> dict[str, Any]:
    """The value of the key ``format`` in a file of the format `name`."""
    return {"name": name, "version": version}


def require(content: Any, name: str, max_version: int, path: str | os.PathLike[str]) -> int:
    """The version of `content` (an object read from `path` with a key ``format``), between 1 and `max_version`.

    Refuses another format, a version this release does not know yet, and a stamp that is missing or damaged.
    """
    found = content.get("format") if isinstance(content, dict) else None
    version = found.get("version") if isinstance(found, dict) else None
    if not isinstance(found, dict) or type(version) is not int or version < 1:
        raise Refusal(f"{path}: no readable format stamp, where {name} was expected: a damaged or another file")
    if found.get("name") != name:
        raise Refusal(f"{path}: this is a {found.get('name')!r} file where {name!r} was expected; give the right path")
    if version > max_version:
        raise Refusal(
            f"{path}: written as {name} version {version} by a newer release; this one reads up to {max_version}: "
            "upgrade Stoker to read it"
        )
    return version
