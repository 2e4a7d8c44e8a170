"""The disk that a run writes to: may it be written, is there room for its checkpoints, is it fast enough for an urgent
one, and does it give back what was written."""

from __future__ import annotations

import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.preflight.need import Need
from launch.preflight.report import Finding
from pretrain.checkpoint import folders
from pretrain.rundir import CHECKPOINTS
from stoker.hashing import crc32c

GB = 1e9
#: Bytes of one write of the probe, about a chunk of a checkpoint, and how many it writes at most.
PIECE, PIECES = 4 * 2**20, 16
#: Seconds after which the probe begins no further write.
PROBE_S = 1.0
#: Free files below which a file system counts as full.
FEWEST_FILES = 1000
ADVICE = "choose another run.dir, or its permissions"


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the one that it would be made in."""
    return next(found for found in (path, *path.absolute().parents) if found.exists())


def writable(path: Path, key: str = "run directory") -> Finding:
    """That this user may write where the run directory is, or would be made."""
    there = nearest_folder(path)
    if not there.is_dir():
        return Finding(key, "refuse", f"{there} is a file", ADVICE)
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return Finding(key, "refuse", f"{there} lies on a read-only file system", ADVICE)
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(key, "refuse", f"{there} cannot be written by user {os.geteuid()}", ADVICE)
    return Finding(key, "ok", str(path))


def room(run_dir: Path, need: Need, free: int | None = None) -> Finding:
    """Free bytes against the checkpoints that are still to come; those that are there take the place of older ones."""
    there = nearest_folder(run_dir)
    state = os.statvfs(there)
    free = shutil.disk_usage(there).free if free is None else free
    held = len(folders.committed(run_dir / CHECKPOINTS))
    missing = max(1, need.checkpoints - held)
    wanted = missing * need.checkpoint_bytes
    found = f"{free / GB:.3g} GB free"
    if state.f_files and state.f_favail < FEWEST_FILES:
        return Finding("disk space", "refuse", f"{there} has room for {state.f_favail} more files", "delete some")
    if free < wanted:
        found = f"{found} at {there}, and {missing} checkpoints of {need.checkpoint_bytes / GB:.3g} GB are to come"
        return Finding("disk space", "refuse", found, "free some, or choose another run.dir")
    return Finding("disk space", "ok", f"{found}, {wanted / GB:.3g} GB wanted")


@dataclass(frozen=True)
class Probe:
    """What a short write showed: durable bytes a second; the first offset that did not read back (None: all did)."""

    rate: float
    damaged: int | None
    direct: bool


def speed(folder: Path, need: Need, probe: Callable[[Path], Probe] | None = None) -> tuple[Finding, float | None]:
    """Write a little, make it durable, read it back. An urgent checkpoint must fit into ``launch.grace_s``.

    Also returns the rate in bytes/s, to compare with other nodes'; None where nothing could be written.
    """
    check, there = "disk speed", nearest_folder(folder)
    try:
        found = (probe or measure)(there)
    except OSError as error:
        return Finding(check, "refuse", f"{there} cannot be written: {error.strerror or error}", ADVICE), None
    rate = f"{found.rate / 1e6:.0f} MB/s durable{'' if found.direct else ' (without O_DIRECT)'}"
    if found.damaged is not None:
        said = f"{there} gave back other bytes than were written, from offset {found.damaged} of the probe on"
        return Finding(check, "refuse", said, "do not use this disk: see to its host or its server"), found.rate
    took = need.checkpoint_bytes / need.hosts / found.rate
    said = f"{rate}; this host's part of a checkpoint takes {took:.3g} s"
    if took > need.grace_s:
        said = f"{said}, and an urgent one must be done in launch.grace_s={need.grace_s:g} s"
        advice = "a faster disk, or a longer launch.grace_s if the scheduler allows it"
        return Finding(check, "refuse", said, advice), found.rate
    if 2 * took > need.grace_s:
        said = f"{said}, more than half of launch.grace_s={need.grace_s:g} s"
        return Finding(check, "warn", said, "a faster disk, or a longer launch.grace_s"), found.rate
    return Finding(check, "ok", said), found.rate


def measure(folder: Path, timer: Callable[[], float] = time.monotonic) -> Probe:
    """Durable writes of fresh bytes for a second at most, then all of it read back. Nothing is left behind.

    Raises OSError where the folder cannot be written, is full, or fails.
    """
    path = folder / f".preflight-{uuid.uuid4().hex}"
    descriptor, direct = _open(path)
    try:
        path.unlink()  # gone with its last reader, however this process ends
        with mmap.mmap(-1, PIECE) as buffer:  # page-aligned, as O_DIRECT wants it
            sums: list[int] = []
            took = 0.0
            while len(sums) < PIECES and took < PROBE_S:
                buffer[:] = os.urandom(PIECE)
                sums.append(crc32c(buffer))
                began = timer()
                _write(descriptor, buffer, len(sums) - 1)
                took += timer() - began
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            damaged = next((i * PIECE for i, wanted in enumerate(sums) if _read(descriptor, buffer, i) != wanted), None)
        return Probe(len(sums) * PIECE / max(took, 1e-9), damaged, direct)
    finally:
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError:  # tmpfs and some network file systems have no O_DIRECT; the name may have been made all the same
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o600), False


def _write(descriptor: int, buffer: mmap.mmap, number: int) -> None:
    done = os.pwrite(descriptor, buffer, number * PIECE)
    if done != PIECE:
        raise OSError(f"wrote {done} of {PIECE} bytes: the disk is full")
    os.fsync(descriptor)


def _read(descriptor: int, buffer: mmap.mmap, number: int) -> int | None:
    buffer[:] = bytes(PIECE)
    if os.preadv(descriptor, [buffer], number * PIECE) != PIECE:
        return None
    return crc32c(buffer)
