"""Disks that a run must not start on: not writable, full, slow, or giving back other bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.preflight import disk
from launch.preflight.disk import Probe
from pretrain.checkpoint import folders
from tests.house.sources import HOME
from tests.launch.preflight.needs import GB, need
from tests.launch.preflight.test_host import tmpfs


def test_a_run_directory_that_this_user_may_not_write_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        Path(folder).chmod(0o755)
        program = f"""
import os
from pathlib import Path
from launch.preflight import disk
os.setuid(65534)
print(disk.writable(Path({folder!r}) / "runs" / "new"))
print(disk.speed(Path({folder!r}), None)[0])
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first == f"run directory: {folder} cannot be written by user 65534; {disk.ADVICE}"
    assert second == f"disk speed: {folder} cannot be written: Permission denied; {disk.ADVICE}"


def test_a_read_only_file_system_is_refused_even_for_root(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "ro", "1m") as path:
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        assert "read-only file system" in disk.writable(path / "runs").found
        told, rate = disk.speed(path, need())
        assert told.status == "refuse" and "Read-only file system" in told.found and rate is None


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert disk.writable(tmp_path / "runs" / "demo").found == f"{tmp_path / 'runs'} is a file"


def test_room_is_for_the_checkpoints_that_are_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = need(checkpoint_bytes=10 * GB, checkpoints=3)
    told = disk.room(tmp_path, asked, free=29 * GB)
    assert told.status == "refuse" and "29 GB free" in told.found and "3 checkpoints of 10 GB" in told.found
    assert disk.room(tmp_path, asked, free=30 * GB).status == "ok"
    monkeypatch.setattr(folders, "committed", lambda root: [100, 200])
    assert disk.room(tmp_path, asked, free=10 * GB).status == "ok", "one is to come, then older ones give way"
    monkeypatch.setattr(folders, "committed", lambda root: [100, 200, 300, 400])
    assert disk.room(tmp_path, asked, free=9 * GB).status == "refuse", "a new one is written before an old one goes"


def test_a_full_disk_is_refused_by_the_probe(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", "2m") as path:
        told, rate = disk.speed(path, need())
        assert told.status == "refuse" and rate is None and str(path) in told.found
        assert disk.room(path, need(checkpoint_bytes=10**7)).status == "refuse"


def test_the_probe_reads_back_what_it_wrote_and_leaves_nothing(tmp_path: Path) -> None:
    found = disk.measure(tmp_path)
    assert found.damaged is None and found.rate > 0
    assert list(tmp_path.iterdir()) == []


def test_the_rate_is_bytes_over_the_time_of_the_writes(tmp_path: Path) -> None:
    ticks = iter(range(10**6))
    slow = disk.measure(tmp_path, timer=lambda: 0.25 * next(ticks))  # each write takes a quarter of a second
    assert slow.rate == disk.PIECE / 0.25


def test_a_disk_that_gives_back_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = disk._write

    def flipping(descriptor: int, buffer: bytearray, number: int) -> None:
        if number == 3:
            buffer[1234567] ^= 4
        write(descriptor, buffer, number)  # type: ignore[arg-type]

    monkeypatch.setattr(disk, "_write", flipping)
    told, _ = disk.speed(tmp_path, need())
    assert told.status == "refuse" and f"from offset {3 * disk.PIECE} of the probe" in told.found


@pytest.mark.parametrize(("rate", "status"), [(1e6, "refuse"), (3e6, "warn"), (4.1e6, "ok")])
def test_a_disk_too_slow_for_an_urgent_checkpoint_is_refused(rate: float, status: str, tmp_path: Path) -> None:
    """120 MB of 240 on this of two hosts, within a grace of 60 s: 120 s, 40 s, 29 s."""
    asked = need(checkpoint_bytes=240 * 10**6, ranks=2, world=4)
    told, measured = disk.speed(tmp_path, asked, lambda folder: Probe(rate, None, True))
    assert told.status == status and measured == rate
    if status == "refuse":
        assert "takes 120 s, and an urgent one must be done in launch.grace_s=60 s" in told.found
