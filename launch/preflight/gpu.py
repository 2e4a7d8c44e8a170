"""The GPUs of this host by what NVIDIA's tools say of them: memory errors, throttling, NVLink, fabric, IMEX.

Only reads: ``nvidia-smi -q``, ``nvidia-smi nvlink -s`` and ``-e``, ``nvidia-imex-ctl -N -j``. How fast GPUs compute,
and whether rightly, is ``compute.py``. Which memory errors take a GPU out of use: NVIDIA, "GPU
Memory Error Management" (docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt, row remapping and RMA policy; read 2026-11).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from launch.preflight.need import Need
from launch.preflight.report import Finding, Status
from parallel.planning.hardware.probe import Gpu, gpu_settings, parse_nvidia_smi

#: Where the driver puts the channels by which trays share memory (NVIDIA IMEX guide).
CHANNELS = Path("/dev/nvidia-caps-imex-channels")
#: Memory in use on a GPU before a run starts that is somebody's; the driver itself takes less.
FOREIGN_BYTES = 2 * 2**30
#: Words of the fabric section that mean no or wrong routes; others are lost speed.
BROKEN_FABRIC = ("State ", "Status ", "Route Unhealthy ", "Incorrect Configuration ", "Summary Unhealthy")
RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset)"

Trouble = tuple[Status, str, str]
Run = Callable[..., str]


def ask(*command: str, timeout_s: float = 8.0) -> str:
    """What a tool of NVIDIA's prints. Raises FileNotFoundError where it is absent, OSError where it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not answer in {timeout_s:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"{' '.join(command)} failed: {said[0] if said else f'exit {done.returncode}'}")
    return done.stdout


def health(text: str) -> list[Finding]:
    """One finding for all GPUs that are well, one for each trouble. ``text``: what ``nvidia-smi -q`` printed."""
    findings: list[Finding] = []
    for index, settings in enumerate(gpu_settings(text)):
        name = f"GPU {index}"
        findings += [Finding(name, *trouble) for trouble in (*_memory_errors(settings), *_clocks(settings))]
        findings += [Finding(name, *trouble) for trouble in _use(settings)]
    for index, gpu in enumerate(parse_nvidia_smi(text)):
        findings += [Finding(f"GPU {index}", *trouble) for trouble in _fabric(gpu)]
    findings += _one_clique(parse_nvidia_smi(text))
    count = len(gpu_settings(text))
    return findings or [Finding("GPUs", "ok", f"{count}: memory, clocks and fabric are well")]


def _memory_errors(settings: Mapping[str, str]) -> Iterator[Trouble]:
    if settings.get("ECC Mode/Current") == "Disabled":
        yield "warn", "ECC is off: flipped bits go unseen", "nvidia-smi -e 1, then reset the GPU"
    fresh, ever = (_uncorrectable(settings, f"ECC Errors/{since}/") for since in ("Volatile", "Aggregate"))
    if fresh:
        yield "refuse", f"{fresh} uncorrectable memory errors since the driver was loaded", RESET
    elif ever:
        yield "warn", f"{ever} uncorrectable memory errors in its life", "watch it; if it errs again, replace it"
    if settings.get("ECC Errors/Aggregate/SRAM Threshold Exceeded") == "Yes":
        yield "refuse", "SRAM errors are over the vendor's threshold", "have the GPU replaced"
    if settings.get("Remapped Rows/Remapping Failure Occurred") == "Yes":
        yield "refuse", "a row of memory could not be remapped", "have the GPU replaced"
    if "Yes" in (settings.get("Remapped Rows/Pending"), settings.get("Retired Pages/Pending Page Blacklist")):
        yield "refuse", "damaged memory waits to be mapped out", RESET


def _uncorrectable(settings: Mapping[str, str], section: str) -> int:
    """Drivers name them SRAM or DRAM Uncorrectable, older ones Double Bit / Total."""
    names = [key for key in settings if key.startswith(section) and ("Uncorrectable" in key or "Double Bit" in key)]
    return sum(int(settings[key]) for key in names if settings[key].isdigit() and not key.endswith("/Total"))


def _clocks(settings: Mapping[str, str]) -> Iterator[Trouble]:
    active = {
        key.rpartition("/")[2]
        for key, value in settings.items()
        if key.startswith(("Clocks Event Reasons/", "Clocks Throttle Reasons/")) and value == "Active"
    }
    if hardware := sorted(name for name in active if name.startswith("HW ")):
        yield "refuse", f"slowed down by its hardware: {', '.join(hardware)}", "see to cooling and power of the node"
    if "SW Thermal Slowdown" in active:
        yield "warn", "slowed down for its temperature", "see to the cooling of the node"


def _use(settings: Mapping[str, str]) -> Iterator[Trouble]:
    used = re.fullmatch(r"(\d+) MiB", settings.get("FB Memory Usage/Used", ""))
    if used and int(used[1]) * 2**20 > FOREIGN_BYTES:
        yield "warn", f"{used[1]} MiB of its memory are in use", "another job is on it: nvidia-smi says whose"
    if settings.get("MIG Mode/Current") == "Enabled":
        yield "warn", "cut into MIG instances", "a run counts on whole GPUs: nvidia-smi -mig 0"


def _fabric(gpu: Gpu) -> Iterator[Trouble]:
    if gpu.trouble is None:
        return
    said = f"NVLink fabric: {gpu.trouble}"
    if any(words in gpu.trouble for words in BROKEN_FABRIC):
        yield "refuse", said, "restart the fabric manager, or take another node"
    else:
        yield "warn", said, "slower than its peers; NCCL may need NCCL_MNNVL_ENABLE=0 (NVIDIA/nccl issue 2186)"


def _one_clique(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    cliques = {(gpu.cluster_uuid, gpu.clique) for gpu in gpus}
    if len(cliques) > 1:
        named = ", ".join(sorted(f"{uuid} clique {clique}" for uuid, clique in cliques))
        yield Finding("GPUs", "refuse", f"of several NVLink partitions: {named}", "have the fabric set up again")


def clique_of(gpus: Sequence[Gpu]) -> tuple[str, str] | None:
    """ClusterUUID and clique of a host in a rack-scale domain; None elsewhere."""
    first = gpus[0] if gpus else None
    return (first.cluster_uuid, first.clique or "") if first and first.cluster_uuid else None


def uuids(text: str) -> tuple[str, ...]:
    return tuple(settings["GPU UUID"] for settings in gpu_settings(text) if "GPU UUID" in settings)


def memory(need: Need, gpus: Sequence[Gpu]) -> list[Finding]:
    """GPU memory against what one rank keeps there, and against the estimate of its peak."""
    sizes = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None]
    if not sizes:
        return []
    size, state, peak = min(sizes), need.state_bytes / need.ranks, need.peak_bytes / need.ranks
    found = f"{size / 1e9:.4g} GB, {peak / 1e9:.3g} GB expected"
    advice = "more model parallelism, parallel.recompute, or a smaller train.micro_batch: `stoker plan` says which"
    if state > size:
        found = f"{size / 1e9:.4g} GB, and the model's state alone takes {state / 1e9:.4g} GB of it"
        return [Finding("GPU memory", "refuse", found, advice)]
    return [Finding("GPU memory", "warn" if peak > size else "ok", found, advice if peak > size else "")]


def nvlink(status: str, errors: str) -> list[Finding]:
    """Links that are down where a sister GPU has them up, and links that count errors.

    ``status``: of ``nvidia-smi nvlink -s``; ``errors``: of ``nvidia-smi nvlink -e``.
    """
    up = {gpu: sum("GB/s" in line for line in lines) for gpu, lines in _by_gpu(status).items()}
    most = max(up.values(), default=0)
    findings = [
        Finding(f"GPU {gpu}", "refuse", f"{count} of {most} NVLinks are up", "reset or replace it")
        for gpu, count in up.items()
        if count < most
    ]
    for gpu, lines in _by_gpu(errors).items():
        counted: Counter[str] = Counter()
        for line in lines:
            if found := re.search(r"Link \d+: (.+ Errors?): (\d+)\s*$", line):
                counted[found[1]] += int(found[2])
        if bad := {kind: number for kind, number in counted.items() if number}:
            said = ", ".join(f"{number} {kind}" for kind, number in bad.items())
            findings.append(Finding(f"GPU {gpu}", "warn", f"NVLink: {said}", "links that err are slow: watch it"))
    return findings or ([Finding("NVLink", "ok", f"{most} links a GPU are up")] if most else [])


def _by_gpu(text: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            found[int(head[1])] = []
        elif found:
            found[max(found)].append(line)
    return found


def imex(run: Run = ask, channels: Path = CHANNELS) -> list[Finding]:
    """What NVLink between trays needs: a channel in this container, and the daemon's domain up on all trays."""
    check = "IMEX"
    if not channels.is_dir() or not any(channels.glob("channel*")):
        advice = "the job needs a channel: ComputeDomain on Kubernetes, switch/nvidia_imex or a prolog on Slurm"
        return [Finding(check, "refuse", f"no channel in {channels}", advice)]
    try:
        state = json.loads(run("nvidia-imex-ctl", "-N", "-j"))
    except FileNotFoundError:
        return [Finding(check, "warn", "a channel, and no nvidia-imex-ctl to ask", "the node's own check must do it")]
    except (OSError, ValueError) as error:
        return [Finding(check, "refuse", str(error), "systemctl status nvidia-imex on the node")]
    nodes = state.get("nodes") or {}
    waiting = sorted(str(node.get("host")) for node in nodes.values() if node.get("status") != "READY")
    if state.get("status") != "UP" or waiting:
        found = f"the domain is {state.get('status', 'unknown')}"
        found += f", not ready: {', '.join(waiting)}" if waiting else ""
        return [Finding(check, "refuse", found, "nvidia-imex must run on every tray with one list of nodes")]
    return [Finding(check, "ok", f"the domain of {len(nodes)} nodes is up")]
