"""What this machine offers a run: devices, cores, and the number of ranks that suits them. No torch."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable
from importlib import metadata

from pretrain.config import RunConfig
from pretrain.config_sections import LaunchSection, ParallelSection

#: Ranks on a machine without a GPU, unless told otherwise: the least that trains in parallel.
CPU_RANKS = 2
#: glibc gives memory of large tensors back to the kernel at once, to be zeroed for the next one (mallopt(3)). Kept up
#: to these bytes, a step of tiny-dense takes 0.82 of the time, one of demo the same.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def choose_ranks(config: RunConfig, announce: Callable[[str], None] = print) -> int:
    """How many ranks suit this machine: every CUDA device, or two processes; in each case what the model-parallel
    degrees need. Degrees that do not fit the devices are left to the plan, which refuses them by name."""
    unit = model_parallel_ranks(config)
    if devices := cuda_devices():
        return devices // unit * unit or devices
    ranks = -(-min(CPU_RANKS, cores()) // unit) * unit
    if ranks > cores():
        announce(f"{ranks} ranks on {cores()} cores: the layout needs them, and they take turns")
    return ranks


def model_parallel_ranks(config: RunConfig) -> int:
    """The smallest number of ranks that the degrees of the configuration divide."""
    degrees = config.parallel
    if not isinstance(degrees, ParallelSection):
        return 1
    return degrees.pp * math.lcm(degrees.tp * degrees.cp, degrees.ep * degrees.etp)


def cuda_devices() -> int:
    """CUDA devices that the installed torch could use, without importing it."""
    if metadata.version("torch").endswith("+cpu"):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    devices = len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if visible is None else min(devices, len([name for name in visible.split(",") if name.strip()]))


def environment_for(config: RunConfig, ranks: int) -> dict[str, str]:
    """Variables that ranks need before they start; what the caller has set stands."""
    wanted = rank_environment(max(1, cores() // ranks), cuda_devices() > 0, config.run.deterministic)
    wanted |= node_environment(config.launch)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def node_environment(launch: LaunchSection) -> dict[str, str]:
    """Variables for the interface that ranks meet on, and for the caches that a node keeps to itself."""
    wanted: dict[str, str] = {}
    if launch.network_interface is not None:
        wanted |= {f"{library}_SOCKET_IFNAME": launch.network_interface for library in ("NCCL", "GLOO")}
    if launch.scratch is not None:
        caches = {"CUDA_CACHE_PATH": "cuda", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        wanted |= {name: f"{launch.scratch.rstrip('/')}/stoker-{os.getuid()}/{cache}" for name, cache in caches.items()}
    return wanted


def rank_environment(threads: int, cuda: bool, deterministic: bool) -> dict[str, str]:
    """Variables of one rank that computes on so many threads."""
    wanted = {"OMP_NUM_THREADS": str(threads)}
    if not cuda:
        return wanted | KEEP_MEMORY
    # Megatron-core orders communication before computation on one queue (its assertion for tp > 1).
    wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if deterministic:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return wanted
