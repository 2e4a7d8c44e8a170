"""The folder of finished builds: an entry is whole or not there, and nobody loses one that is in use."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kernels.toolchain import cache
from stoker.errors import Refusal
from tests.house.sources import HOME


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def make(key: str, content: bytes = b"a library") -> cache.Entry:
    """An entry whose library is that content, found or made."""

    def build(place: Path) -> dict[str, Any]:
        (place / "library").write_bytes(content)
        return {"library": "library", "sha256": hashlib.sha256(content).hexdigest()}

    return cache.obtain(key, "host", build)


def forget_use() -> None:
    """As if the processes that used the entries so far had ended."""
    while cache._in_use:
        cache._in_use.popitem()[1].close()


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if not path.name.startswith(".")}


def test_of_each_target_the_last_used_entries_are_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 3)
    cache.obtain("sm_90a-0", "sm_90a", lambda place: make("host-0").record | {"library": "../host-0/library"})
    for age, key in enumerate(("host-1", "host-2", "host-3", "host-4")):
        make(key)
        forget_use()
        os.utime(own_cache / key / cache.RECORD, (time.time() - 1e6 + age,) * 2)
    assert kept(own_cache) == {"sm_90a-0", "host-0", "host-3", "host-4"}, "host-0 has the latest time"
    make("host-3")
    forget_use()
    make("host-5")
    assert kept(own_cache) == {"sm_90a-0", "host-0", "host-3", "host-5"}, "host-3 was used after host-4"
    assert not list(own_cache.glob(".*.tmp"))


def test_what_a_living_process_uses_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process, and by another one that shares its lock with nobody, until it is killed."""
    monkeypatch.setattr(cache, "KEPT", 1)
    for key in ("host-here", "host-there"):
        make(key)
    program = "import sys, time; from kernels.toolchain import cache; cache.find(sys.argv[1]); print(flush=True);"
    command = [sys.executable, "-c", program + "time.sleep(60)", "host-there"]
    with subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        forget_use()
        assert cache.find("host-here")
        make("host-next")
        assert kept(own_cache) == {"host-here", "host-there", "host-next"}
        process.kill()
    make("host-last")
    assert kept(own_cache) == {"host-here", "host-next", "host-last"}


def test_entries_that_no_known_target_names_go_after_a_day_without_use(own_cache: Path) -> None:
    """As the first versions named them, by a hash alone: no build of a target would ever count them."""
    days = {"0a" * 16: 2.0, "1b" * 16: 0.9, "2c" * 16: 2.0, "sm_10-0": 2.0, "sm_90a-0": 2.0, "host_avx512-0": 2.0}
    for key in days:
        make(key)
    forget_use()
    for key, age in days.items():
        os.utime(own_cache / key / cache.RECORD, (time.time() - age * 86400,) * 2)
    with open(own_cache / ("2c" * 16) / cache.RECORD, "rb") as used:
        cache.fcntl.flock(used, cache.fcntl.LOCK_SH)
        make("host-1")
        assert kept(own_cache) == {"1b" * 16, "2c" * 16, "sm_90a-0", "host_avx512-0", "host-1"}
    make("host-2")
    assert kept(own_cache) == {"1b" * 16, "sm_90a-0", "host_avx512-0", "host-1", "host-2"}
    assert not list(own_cache.glob(".*.tmp"))


def test_an_entry_replaced_while_its_lock_was_waited_for_is_neither_taken_nor_removed(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the lock would be on a record that is gone, and what lies in its place could vanish while in use."""
    place, lock = make("host-1").library.parent, cache.fcntl.flock
    forget_use()

    def late(*arguments: Any) -> None:
        shutil.copytree(place, own_cache / "anew")
        shutil.rmtree(place)
        (own_cache / "anew").rename(place)
        lock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache.fcntl, "flock", late)
        assert cache.find("host-1") is None and not cache._in_use
        with pytest.raises(OSError, match="host-1 was made anew"):
            cache._remove(place, "host")
    assert cache.find("host-1")


def unsupported(*arguments: object) -> None:
    """flock, on a file system without locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def test_where_nobody_can_lock_nothing_is_removed(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 1)
    monkeypatch.setattr(cache.fcntl, "flock", unsupported)
    for key in ("host-1", "host-2"):
        make(key)
        forget_use()
    assert kept(own_cache) == {"host-1", "host-2"}


#: For a second and a half: either makes one entry after the other, each of which removes what it can, or takes one
#: entry again and again, each time as a process that has just begun, and reads its library, as loading it would.
RACE = """
import sys, time
from tests.kernels.test_toolchain_cache import cache, forget_use, make
cache.KEPT, remover, made = 1, sys.argv[1] == "remover", 0
end = time.monotonic() + 1.5
while time.monotonic() < end:
    entry = make(f"host-{made}" if remover else "host-wanted", b"wanted" * 1000)
    assert entry.library.read_bytes() == b"wanted" * 1000
    made += entry.made
    forget_use()
    time.sleep(0.0 if remover else 0.001)
print(made)
"""


def test_whoever_has_found_an_entry_can_load_it_though_another_removes_what_it_can(own_cache: Path) -> None:
    racing = [
        subprocess.Popen([sys.executable, "-c", RACE, role], cwd=HOME, stdout=subprocess.PIPE, text=True)
        for role in ("user", "user", "remover")
    ]
    made = [process.communicate(timeout=60)[0] for process in racing]
    assert [process.returncode for process in racing] == [0] * 3
    remade = sum(map(int, made[:2]))
    print(f"removed {remade} times")
    assert remade >= 5, "too seldom to prove anything"
    assert not list(own_cache.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["a flipped bit", "a torn record", "no library", "no record", "a newer format"])
def test_a_damaged_entry_is_told_and_built_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    built = make("host-1")
    forget_use()
    record = built.library.with_name(cache.RECORD)
    if damage == "a flipped bit":
        built.library.write_bytes(b"a l\xe9brary")
    elif damage == "a torn record":
        record.write_text(record.read_text()[:50])
    elif damage == "no library":
        built.library.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"format": {"name": cache.FORMAT, "version": 2}}))
    again = make("host-1")
    assert again.made and again.library == built.library
    assert "damaged build" in caplog.text and built.library.parent.name in caplog.text
    assert not make("host-1").made


@pytest.mark.parametrize("lockable", [True, False])
def test_an_entry_that_cannot_be_read_for_once_is_not_taken_from_those_who_use_it(
    lockable: bool, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where nobody can say whether it is in use."""
    used = make("host-1").library.stat()
    if not lockable:
        forget_use()
        monkeypatch.setattr(cache.fcntl, "flock", unsupported)

    def unreadable(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(cache.hashlib, "file_digest", unreadable)
        with pytest.raises(Refusal, match=r"host-1 is damaged, and not replaced because .* set STOKER_CACHE"):
            make("host-1")
    again = make("host-1")
    assert not again.made and os.path.samestat(again.library.stat(), used)
    assert not list(own_cache.glob(".*.tmp"))


def test_an_unfinished_folder_is_never_read(own_cache: Path) -> None:
    """Though it hold a record, as one does whose process was killed before it gave the folder its name."""
    made = make("host-1")
    shutil.copytree(own_cache / "host-1", own_cache / ".host-2.tmp")
    os.utime(own_cache / ".host-2.tmp" / cache.RECORD, (time.time() + 60,) * 2)
    found = cache.find_built_elsewhere(made.record["sha256"])
    assert found and found.library == made.library
    shutil.rmtree(own_cache / "host-1")
    assert cache.find_built_elsewhere(made.record["sha256"]) is None


def test_a_cache_that_cannot_be_written_is_refused_unless_the_library_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("host-1")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_writing", None)
        assert not make("host-1").made

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "file"))
    with pytest.raises(Refusal, match=r"cannot be kept in .*/file/native \(Not a directory\): set STOKER_CACHE"):
        make("host-1")
    with _read_only(tmp_path / "locked") as locked:
        monkeypatch.setenv("STOKER_CACHE", str(locked))
        with pytest.raises(Refusal, match=r"cannot be kept in .*/locked/native \(Permission denied\): set STOKER"):
            make("host-1")


@contextmanager
def _read_only(folder: Path) -> Iterator[Path]:
    """A folder in which this process may not write, though it be root's."""
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(was)
        folder.chmod(stat.S_IRWXU)
