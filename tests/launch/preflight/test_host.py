"""Faults of a host that are there before a run starts: each is found in a real process, and named."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.preflight import host
from tests.house.sources import HOME
from tests.launch.preflight.needs import GB, need

MIB = 2**20


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A real file system of that size."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def limited(limits: str, check: str) -> str:
    """Status and words of a check in a process that has these limits."""
    program = f"""
import os, resource
from launch.preflight import host
from tests.launch.preflight.needs import need
{limits}
found = {check}
print(found.status, "|", found)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_too_few_open_files_are_refused_and_the_remedy_depends_on_the_hard_limit() -> None:
    soft = "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 4096))"
    told = limited(soft, "host.open_files(need())")
    assert told.startswith("refuse") and "128 a process where 2 ranks need 272; ulimit -n 272" in told
    hard = "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))"
    assert "raise nofile in limits.conf" in limited(hard, "host.open_files(need())")
    assert limited("", "host.open_files(need())").startswith("ok")


def test_a_world_of_thousands_needs_more_open_files() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    world = soft  # so many peers that the limit of this very process is too low
    assert host.open_files(need(world=world)).status == "refuse"


def test_too_few_processes_are_refused_for_a_user_and_do_not_bind_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    few = "resource.setrlimit(resource.RLIMIT_NPROC, (20, 20))"
    check = "host.processes(need(), threads=1)"
    told = limited(f"{few}; os.setuid(65534)", check)
    assert told.startswith("refuse") and "ulimit -u 20" in told and "2 ranks need 130" in told
    assert limited(few, check).startswith("ok")


def test_a_small_dev_shm_is_refused_with_its_size(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "shm", "3m") as shm:
        told = host.shared_memory(need(), gpus=0, path=shm)
        assert told.status == "refuse" and "3 MiB free of 3 MiB, and 2 ranks need 8 MiB" in told.found
        assert "--shm-size" in told.what_to_do
        assert host.shared_memory(need(ranks=1, world=1), gpus=0, path=shm).status == "refuse"
    with tmpfs(tmp_path / "docker", "64m") as docker:
        assert host.shared_memory(need(), gpus=0, path=docker).status == "ok"
        assert host.shared_memory(need(ranks=8, world=8), gpus=8, path=docker).status == "refuse"
    assert host.shared_memory(need(), 0, tmp_path / "nowhere").found == "not there"


def test_a_dev_shm_that_is_full_is_refused(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "shm", "16m") as shm:
        assert host.shared_memory(need(), gpus=0, path=shm).status == "ok"
        (shm / "left behind").write_bytes(bytes(12 * MIB))
        told = host.shared_memory(need(), gpus=0, path=shm)
        assert told.status == "refuse" and "delete what is left there" in told.what_to_do


def test_a_port_that_is_taken_is_refused_and_its_holder_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        number = listener.getsockname()[1]
        told = host.port(number)
        assert told.status == "refuse" and told.check == f"port {number}"
        assert f"process {os.getpid()}" in told.found
    assert host.port(number).status == "ok", "a port that was closed a moment ago is free"
    assert host.port(70000).status == "refuse"


def test_a_host_smaller_than_the_state_is_refused_and_one_that_may_be_tight_is_warned_of() -> None:
    large = need(state_bytes=90 * GB, peak_bytes=120 * GB)
    told = host.memory(large, gpus=0, available=60 * GB, total=64 * GB)
    assert told.status == "refuse" and "59.6 GiB, and 2 ranks hold 84.5 GiB" in told.found
    assert host.memory(large, gpus=0, available=100 * GB, total=128 * GB).status == "warn"
    assert host.memory(large, gpus=0, available=125 * GB, total=128 * GB).status == "ok"
    assert host.memory(large, gpus=2, available=60 * GB, total=64 * GB).status == "ok", "the state lies on the GPUs"


def test_limits_of_every_control_group_above_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for folder, name, text in (
        (tmp_path / "job", "memory.max", "700000000"),
        (inner, "memory.max", "max"),
        (inner, "cpu.max", "150000 100000"),
        (tmp_path / "job", "pids.max", "100"),
        (tmp_path / "job", "pids.current", "40"),
    ):
        (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "_control_groups", lambda: iter((inner, tmp_path / "job")))
    assert "700 MB" not in host.memory(need(), 0).found  # in MiB, as the rest
    assert host.memory(need(), 0).status == "refuse" and "668 MiB" in host.memory(need(), 0).found
    assert "grants 1.5" in host.cores(need(), usable=8, load=0.0).found
    assert host.cores(need(), usable=8, load=0.0).status == "warn"
    told = host.processes(need(), threads=1)
    assert told.status == "refuse" and "pids.max 100" in told.found and "leaves 60 threads" in told.found


def test_the_control_groups_of_this_process_are_found() -> None:
    folders = list(host._control_groups())
    if not folders:
        pytest.skip("no control group of version 2 here")
    assert folders[-1] == host.CGROUPS and all(folder.is_dir() for folder in folders)


def test_more_ranks_than_cores_and_a_host_in_use_are_warned_of() -> None:
    assert host.cores(need(ranks=6, world=6), usable=2, load=0.0).status == "warn"
    assert "a load of 900.0" in host.cores(need(), usable=2, load=900.0).found
    assert host.cores(need(), usable=2, load=0.0).status == "ok"


def test_a_clock_that_stands_is_refused_and_one_that_jumps_or_is_wrong_is_warned_of() -> None:
    assert host.clock().status == "ok"
    told = host.clock(monotonic=lambda: 5.0)
    assert told.status == "refuse" and "moved by 0.000 s" in told.found
    jumping = iter([1.8e9, 1.8e9 + 3600, 1.8e9 + 3600])
    assert "the wall clock moved by 3600.0 s" in host.clock(wall=lambda: next(jumping)).found
    assert "1970-01-01" in host.clock(wall=lambda: 7.0).found


def test_locked_memory_matters_to_gpus_with_network_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    told = host.locked_memory(8, tmp_path)
    assert told.status == "refuse" and "64 KiB" in told.found and "mlx5_0" in told.found
    assert host.locked_memory(0, tmp_path).status == host.locked_memory(8, tmp_path / "none").status == "ok"
