"""A control group with little memory, in which the kernel kills what takes too much."""

from __future__ import annotations

import functools
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Two ranks, two spares and their agent take 1.8 GiB at most. What is left must be taken within a second, lest it be a
#: hang: to touch memory for the first time takes five seconds a GiB on some virtual machines, once a GiB is touched.
LIMIT_BYTES = 5 * 2**29


class Group:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def take(self, pid: int) -> None:
        """A process, and what it will start."""
        (self.path / "cgroup.procs").write_text(str(pid))


@functools.cache
def missing() -> str | None:
    """Why there can be no such group here; None where there can."""
    if os.geteuid() != 0:
        return "a control group of memory needs root"
    try:
        with limited(LIMIT_BYTES):
            return None
    except OSError as error:
        return f"no control group of memory can be made: {error}"


@contextmanager
def limited(limit_bytes: int) -> Iterator[Group]:
    parent, limit = _own()
    group = Group(parent / f"stoker-{uuid.uuid4().hex[:8]}")
    try:
        (group.path / limit).write_text(str(limit_bytes))
        yield group
    finally:
        for _ in range(100):  # its last processes are about to end
            with suppress(OSError):
                group.path.rmdir()
                break
            time.sleep(0.05)


def _own() -> tuple[Path, str]:
    """The memory group of this process and the name of its limit (versions 1 and 2)."""
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            return root / "memory" / group.lstrip("/"), "memory.limit_in_bytes"
        if not controllers and (root / group.lstrip("/") / "memory.max").exists():
            return root / group.lstrip("/"), "memory.max"
    raise OSError("this process is in no control group of memory")
