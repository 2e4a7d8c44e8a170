"""This host as the operating system states it: clock, limits, shared memory, control groups, cores, memory, port.

Each check reads and returns; none takes longer than a twentieth of a second, starts a process or writes.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from launch.preflight.need import Need
from launch.preflight.report import Finding

GIB, MIB = 2**30, 2**20
SHM = Path("/dev/shm")
CGROUPS = Path("/sys/fs/cgroup")
#: Open files of one rank: itself (38 were counted), and for every peer the connections of the process groups that they
#: share (5 over gloo); with room for a loader that opens many shards.
FILES, FILES_PER_PEER = 256, 8
#: Threads of a rank beyond those that compute: gloo's or NCCL's, the loader's, wandb's, numba's.
THREADS = 64
#: Shared memory that a rank takes: heartbeats; on GPUs also NCCL's buffers, for which NVIDIA asks for more than
#: docker's 64 MB (NCCL user guide, troubleshooting, shared memory: --shm-size=1g).
SHM_RANK, SHM_GPU_RANK, SHM_GPU_WANTED = 4 * MIB, 64 * MIB, GIB
#: A rank before it holds a tensor, at least: 370 to 460 MiB of its own, torch 2.13 on a CPU.
PROCESS_BYTES = 350 * MIB
#: Load, a core, from which a host counts as taken.
BUSY = 0.75
#: Start of the year of this release: no clock that is right shows less.
RELEASED = 1767225600.0


def clock(
    wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic, pause_s: float = 0.02
) -> Finding:
    """That the monotonic clock runs, that the other one runs with it, and that it can be right."""
    before, wall_before = monotonic(), wall()
    time.sleep(pause_s)
    passed, wall_passed = monotonic() - before, wall() - wall_before
    if not pause_s / 2 <= passed <= pause_s + 30:
        found = f"the monotonic clock moved by {passed:.3f} s in a pause of {pause_s} s"
        return Finding("clock", "refuse", found, "time-outs cannot work on this host: restart it or take another")
    if abs(wall_passed - passed) > 1:
        found = f"the wall clock moved by {wall_passed:.1f} s while {passed:.2f} s passed"
        return Finding("clock", "warn", found, "times in logs will be wrong: see to NTP or chrony")
    if wall() < RELEASED:
        found = f"the wall clock says {time.strftime('%Y-%m-%d', time.gmtime(wall()))}"
        return Finding("clock", "warn", found, "times in logs will be wrong: set it, or start NTP or chrony")
    return Finding("clock", "ok", "runs evenly")


def open_files(need: Need) -> Finding:
    """RLIMIT_NOFILE of what is started from here."""
    wanted = FILES + FILES_PER_PEER * need.world
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _at_least(soft, wanted):
        return Finding("open files", "ok", f"{_limit(soft)} a process")
    advice = f"ulimit -n {wanted}" if _at_least(hard, wanted) else f"raise nofile in limits.conf to {wanted}"
    found = f"{soft} a process where {need.world} ranks need {wanted}"
    return Finding("open files", "refuse", found, f"{advice} (Slurm: PropagateResourceLimits; docker: --ulimit nofile)")


def processes(need: Need, threads: int) -> Finding:
    """RLIMIT_NPROC, which counts the threads of a user and does not bind root; and the control group's pids.max."""
    wanted = need.ranks * (threads + THREADS)
    room = _pids_room()
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:
        room.append((soft - _threads_of(os.getuid()), f"ulimit -u {soft}"))
    if not room:
        return Finding("processes", "ok", "unlimited")
    left, limit = min(room)
    if left >= wanted:
        return Finding("processes", "ok", f"{left} more threads ({limit})")
    found = f"{limit} leaves {max(0, left)} threads, and {need.ranks} ranks need {wanted}"
    return Finding("processes", "refuse", found, "raise it (limits.conf nproc, docker --pids-limit, podPidsLimit)")


def locked_memory(gpus: int, infiniband: Path = Path("/sys/class/infiniband")) -> Finding:
    """RLIMIT_MEMLOCK, which binds what is registered with a network card."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    cards = sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else []
    if soft == resource.RLIM_INFINITY or not cards or not gpus:
        return Finding("locked memory", "ok", _limit(soft) if soft == resource.RLIM_INFINITY else "not needed here")
    found = f"{soft // 1024} KiB, and NCCL registers its buffers with {', '.join(cards)}"
    return Finding("locked memory", "refuse", found, "ulimit -l unlimited (docker: --ulimit memlock=-1)")


def shared_memory(need: Need, gpus: int, path: Path = SHM) -> Finding:
    """Room in /dev/shm."""
    advice = "docker run --shm-size=8g, or a memory-backed emptyDir at /dev/shm in the pod"
    if not path.is_dir():
        return Finding(str(path), "refuse", "not there", advice)
    usage = shutil.disk_usage(path)
    wanted = need.ranks * (SHM_GPU_RANK if gpus else SHM_RANK)
    found = f"{_size(usage.free)} free of {_size(usage.total)}"
    if not os.access(path, os.W_OK | os.X_OK):
        return Finding(str(path), "refuse", "cannot be written", f"chmod 1777 {path}")
    if usage.free < wanted:
        found = f"{found}, and {need.ranks} ranks need {_size(wanted)}"
        return Finding(str(path), "refuse", found, f"{advice}, or delete what is left there")
    if gpus > 1 and usage.free < SHM_GPU_WANTED:
        return Finding(str(path), "warn", f"{found}; NVIDIA asks for 1 GiB", advice)
    return Finding(str(path), "ok", found)


def memory(need: Need, gpus: int, available: int | None = None, total: int | None = None) -> Finding:
    """Host memory against what the ranks hold there: processes and, without GPUs, the whole model's state.

    The state is a lower bound, so a host that is smaller is refused; the estimate of the peak only warns.
    """
    here = psutil.virtual_memory()
    total = min([here.total, *_memory_limits()]) if total is None else total
    available = min(here.available, total) if available is None else available
    state, peak = (0.0, 0.0) if gpus else (need.state_bytes, need.peak_bytes)
    floor = need.ranks * PROCESS_BYTES + state
    if floor > total:
        found = f"{_size(total)}, and {need.ranks} ranks hold {_size(floor)} before the first step"
        return Finding("memory", "refuse", found, "fewer ranks a host, more model parallelism, or a larger host")
    likely = need.ranks * PROCESS_BYTES + peak
    if likely > available:
        found = f"{_size(available)} available, and {need.ranks} ranks are expected to take {_size(likely)}"
        return Finding("memory", "warn", found, "a smaller train.micro_batch, parallel.recompute, or free some")
    return Finding("memory", "ok", f"{_size(available)} available, {_size(likely)} expected")


def cores(need: Need, usable: int | None = None, load: float | None = None) -> Finding:
    """Cores of this process, by affinity and by quota, against its ranks and against what runs here already."""
    count = len(os.sched_getaffinity(0)) if usable is None else usable
    quota = min(_cpu_quotas(), default=float(count))
    found = f"{count}" if quota >= count else f"{count}, of which the control group grants {quota:g}"
    if min(count, quota) < need.ranks:
        return Finding("cores", "warn", f"{found}, for {need.ranks} ranks", "ranks take turns: start fewer")
    busy = os.getloadavg()[0] if load is None else load
    if busy > BUSY * (os.cpu_count() or 1):
        found = f"{found}, and a load of {busy:.1f} before the run has started"
        return Finding("cores", "warn", found, "another job is on this host: ranks will wait for cores")
    return Finding("cores", "ok", f"{found}, for {need.ranks} ranks")


def port(number: int) -> Finding:
    """That nothing listens on the port on which nodes are to meet."""
    check = f"port {number}"
    if not 0 < number < 2**16:
        return Finding(check, "refuse", "no port", "give one between 1 and 65535")
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, number))
                probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Finding(check, "refuse", f"taken by {_listener(number)}", "end that process, or choose another")
            if error.errno == errno.EACCES:
                return Finding(check, "refuse", "may not be used by this user", "choose one from 1024 on")
            if family == socket.AF_INET:
                return Finding(check, "refuse", str(error), "choose another port")
            # Hosts without IPv6 are common.
    return Finding(check, "ok", "free")


def _listener(number: int) -> str:
    try:
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr.port == number and found.pid:
                return f"process {found.pid} ({psutil.Process(found.pid).name()})"
    except (psutil.Error, OSError):
        pass  # another user's: the kernel does not say whose
    return "another process"


def _at_least(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def _threads_of(user: int) -> int:
    """Threads of all processes of a user: what RLIMIT_NPROC counts."""
    threads = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == user:
            threads += process.info["num_threads"] or 0
    return threads


def _control_groups() -> Iterator[Path]:
    """Folders of this process's control group (version 2) and of those that it lies in, which bind it as well."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    inside = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = CGROUPS / inside
    while folder.is_relative_to(CGROUPS):
        if folder.is_dir():
            yield folder
        folder = folder.parent


def _settings(name: str) -> Iterator[tuple[Path, str]]:
    for folder in _control_groups():
        try:
            yield folder, (folder / name).read_text().strip()
        except OSError:
            continue  # the root has no limits


def _memory_limits() -> Iterator[int]:
    """Of the control groups, version 2 and 1."""
    yield from (int(text) for _, text in _settings("memory.max") if text.isdigit())
    older = CGROUPS / "memory" / "memory.limit_in_bytes"
    if older.is_file():
        yield int(older.read_text())


def _cpu_quotas() -> Iterator[float]:
    """Cores that control groups grant: quota over period of cpu.max."""
    for _, text in _settings("cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)


def _pids_room() -> list[tuple[int, str]]:
    room = []
    for folder, text in _settings("pids.max"):
        if text.isdigit():
            used = int((folder / "pids.current").read_text())
            room.append((int(text) - used, f"pids.max {text} of {folder}"))
    return room
