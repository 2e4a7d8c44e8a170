"""A folder of finished builds, each named by the hash of what went into it: whole and checked, or not there.

``$STOKER_CACHE/native/<key>/`` (default ``~/.cache/stoker``, or under XDG_CACHE_HOME) holds the library and
``build.json``, its record, with the library's SHA-256. An entry is made in a folder beside it and renamed, by one
process of a machine at a time; one that is killed leaves a folder that is never read, and the next one removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic

FORMAT, VERSION = "native-build", 1
RECORD = "build.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A library whose bytes are those that were built; `made` by this call, or found."""

    library: Path
    record: dict[str, Any]
    made: bool = False


def folder() -> Path:
    """Where builds are kept; it need not exist. Refusal if no variable and no home says where."""
    if chosen := os.environ.get("STOKER_CACHE"):
        return Path(chosen).expanduser().absolute() / "native"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG base directory specification has it
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise Refusal("no home folder to keep compiled kernels in: set STOKER_CACHE to a folder") from None
    return base / "stoker" / "native"


def find(key: str) -> Entry | None:
    """The entry, its library compared with its hash; None if it is not there. Damage is told, and counts as absence."""
    place = folder() / key
    if not os.access(place, os.X_OK):
        return None
    try:
        return _read(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("damaged build %s (%s): it is not used", place, error)
        return None


def _read(place: Path) -> Entry:
    record = json.loads((place / RECORD).read_bytes())
    formats.require(record, FORMAT, VERSION, place / RECORD)
    library = place / record["library"]
    with open(library, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != record["sha256"]:
        raise ValueError(f"{library.name} is not what was built")
    return Entry(library, record)


def find_built_elsewhere(contents: str) -> Entry | None:
    """The newest whole entry of the same `contents` (a hash), by whatever compiler: for machines that have none."""
    newest_first = sorted(folder().glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime, reverse=True)
    alike = (path.parent.name for path in newest_first if contents in path.read_text())
    return next((entry for key in alike if (entry := find(key))), None)


def obtain(key: str, target: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    """The entry `key`, made first if it is not there by ``build(empty folder) -> record``, which leaves its library in
    that folder and names it in the record. Processes that want it meanwhile wait for the one that builds.

    Refusal if the cache cannot be written; whatever `build` raises, with nothing left behind.
    """
    if entry := find(key):
        return entry
    place = folder() / key
    with _writing(), _sole_builder(target) as alone:
        if alone:
            for left in folder().glob(f".{target}-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        if place.exists():
            if entry := find(key):
                return entry
            place.rename(folder() / f".{target}-{uuid.uuid4().hex}.tmp")
        staging = folder() / f".{target}-{uuid.uuid4().hex}.tmp"
        staging.mkdir()
        try:
            record = build(staging)
            write_atomic(staging / RECORD, json.dumps({"format": formats.stamp(FORMAT, VERSION), **record}, indent=1))
            _publish(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    entry = find(key)
    if entry is None:
        raise Refusal(f"{place}: what was just built cannot be read back; set STOKER_CACHE to a folder on a sound disk")
    return Entry(entry.library, entry.record, made=True)


def _publish(staging: Path, place: Path) -> None:
    """Give the finished folder its name. Without a lock another process may have been first: its build is as good."""
    try:
        staging.rename(place)
    except OSError:
        if not place.exists():
            raise


@contextmanager
def _writing() -> Iterator[None]:
    try:
        folder().mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise Refusal(
            f"compiled kernels cannot be kept in {folder()} ({error.strerror or error}): "
            "set STOKER_CACHE to a folder that can be written, or STOKER_NATIVE=0 to run without them"
        ) from error


@contextmanager
def _sole_builder(target: str) -> Iterator[bool]:
    """Waits until no other process builds `target`. The system lets go of the lock when its holder dies.

    Yields False where the file system has no locks: then several may build, and the first to finish is taken.
    """
    with open(folder() / f".{target}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            logger.info("waiting for another process, which builds the %s kernels", target)
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
