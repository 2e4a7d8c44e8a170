"""A folder of finished builds, each named by the hash of what went into it: whole and checked, or not there.

``$STOKER_CACHE/native/<key>/`` (default ``~/.cache/stoker``, or under XDG_CACHE_HOME) holds the library and
``build.json``, its record, with the library's SHA-256. An entry is made in a folder beside it and renamed, by one
process of a machine at a time; one that is killed leaves a folder that is never read, and the next one removes it.

Who builds also removes what was not used for longest, and what has no target of today in its name. A process locks the
record of an entry that it found, shared, for as long as it lives, and an entry goes only under a lock that nobody
shares, damaged or not: on a file system of several machines a library that vanished would take its users with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kernels.toolchain import sources
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic

FORMAT, VERSION = "native-build", 1
RECORD = "build.json"
#: Entries of a target that are left when another is made, and how stale the time of their last use may be.
KEPT, USE_SECONDS = 8, 3600.0
#: Unused for so long, an entry that no known target names, as those of former versions, is removed.
FORMER_SECONDS = 24 * 3600.0

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
    """The entry, its library compared with its hash, and in use from now on; None if it is not there. Damage is told,
    and counts as absence."""
    place = folder() / key
    if not os.access(place, os.X_OK):
        return None
    try:
        return _read(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if place.exists():  # and was not removed meanwhile
            logger.warning("damaged build %s (%s): it is not used", place, error)
        return None


#: Folder of each entry that is in use in this process -> its record, open and locked.
_in_use: dict[Path, BinaryIO] = {}


def _read(place: Path) -> Entry:
    file = open(place / RECORD, "rb")  # noqa: SIM115 - closed with the process, unless something is wrong
    try:
        with suppress(OSError):  # of file systems without locks, where nothing is removed
            fcntl.flock(file, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(place / RECORD)):
            raise FileNotFoundError(f"{place} was removed, and made anew, while the lock was waited for")
        record = json.loads(file.read())
        formats.require(record, FORMAT, VERSION, place / RECORD)
        library = place / record["library"]
        with open(library, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != record["sha256"]:
            raise ValueError(f"{library.name} is not what was built")
    except BaseException:
        file.close()
        raise
    if time.time() - os.fstat(file.fileno()).st_mtime > USE_SECONDS:
        with suppress(OSError):  # of a cache that only others may write
            os.utime(place / RECORD)
    if former := _in_use.get(place):
        former.close()
    _in_use[place] = file
    return Entry(library, record)


def find_built_elsewhere(contents: str) -> Entry | None:
    """The last used whole entry of the same `contents` (a hash), by whatever compiler: for machines that have none."""
    for place in sorted(_entries(), key=_last_use, reverse=True):
        with suppress(FileNotFoundError):  # removed meanwhile
            if contents in (place / RECORD).read_text() and (entry := find(place.name)):
                return entry
    return None


def obtain(key: str, target: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    """The entry `key`, made first if it is not there by ``build(empty folder) -> record``, which leaves its library in
    that folder and names it in the record. Processes that want it meanwhile wait for the one that builds.

    Refusal if the cache cannot be written, or if the entry is damaged while a process uses it; whatever `build` raises,
    with nothing left behind.
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
            _remove_damaged(place, target)
        staging = folder() / f".{target}-{uuid.uuid4().hex}.tmp"
        staging.mkdir()
        try:
            record = build(staging)
            write_atomic(staging / RECORD, json.dumps({"format": formats.stamp(FORMAT, VERSION), **record}, indent=1))
            _publish(staging, place)
            entry = find(key)
            if alone:
                _prune(target, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
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


def _prune(target: str, made: Path) -> None:
    """Remove all entries of a target but ``made``, the KEPT - 1 that were used last, and those in use; and all that no
    target names, unless they are in use or were within FORMER_SECONDS."""
    others = sorted(set(_entries()) - {made}, key=_last_use, reverse=True)
    surplus = [place for place in others if place.name.startswith(f"{target}-")][KEPT - 1 :]
    named = tuple(f"{name}-" for name in (target, *sources.all_targets()))
    since = time.time() - FORMER_SECONDS
    former = [place for place in others if not place.name.startswith(named) and _last_use(place) < since]
    for place in (*surplus, *former):
        with suppress(OSError):
            _remove(place, target)


def _remove(place: Path, target: str) -> None:
    """OSError, and nothing is removed, if a process uses the entry, if it is gone, or if nobody can lock it."""
    with open(place / RECORD, "r+b") as record:  # NFS locks alone what is open for writing only
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(record.fileno()), os.stat(place / RECORD)):
            raise OSError(f"{place} was made anew before it was locked")
        shutil.rmtree(_set_aside(place, target), ignore_errors=True)


def _remove_damaged(place: Path, target: str) -> None:
    """Refusal if a process uses the entry: what could not be read here, for once, may be whole where it is mapped."""
    try:
        _remove(place, target)
    except FileNotFoundError:  # without a record nobody finds it, so nobody uses it
        with suppress(FileNotFoundError):
            shutil.rmtree(_set_aside(place, target), ignore_errors=True)
    except OSError as error:
        raise Refusal(
            f"{place} is damaged, and not replaced because a process uses it or it cannot be locked "
            f"({error.strerror or error}): end what uses it and remove the folder, or set STOKER_CACHE to another one"
        ) from error


def _set_aside(place: Path, target: str) -> Path:
    return place.rename(folder() / f".{target}-{uuid.uuid4().hex}.tmp")


def _entries() -> list[Path]:
    """Every entry. Names that begin with a dot are of what is unfinished, or about to be removed."""
    return [record.parent for record in folder().glob(f"[!.]*/{RECORD}")]


def _last_use(place: Path) -> float:
    try:
        return (place / RECORD).stat().st_mtime
    except OSError:
        return 0.0


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
