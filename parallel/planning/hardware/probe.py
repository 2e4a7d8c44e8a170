"""The machine one is on: its GPUs by nvidia-smi, else its cores and memory, as a HardwareTopology. No torch.

Speeds are those of the preset that the GPU's name matches. What is not tabulated stays unknown unless a hardware file
of the same device fills it, as ``stoker plan calibrate`` writes.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from parallel.planning.hardware.quantities import Source
from parallel.planning.topology import SCHEMA, HardwareTopology, from_fields, load_hardware, to_fields
from stoker.errors import Refusal

#: Presets by what nvidia-smi calls the part. Names that are not here (PCIe cards, NVL pairs) have no preset.
PRESET_OF = (
    (r"A100-SXM4-80GB", "a100-80gb"),
    (r"A100-SXM4-40GB", "a100-40gb"),
    (r"H100 80GB HBM3", "h100"),
    (r"H200", "h200"),
    (r"H800", "h800"),
    (r"B200", "b200"),
    (r"B300.*", "b300"),
    (r"GB200", "gb200-nvl72"),
    (r"GB300", "gb300-nvl72"),
)
#: Where a container's memory limit stands: control groups version 2, version 1.
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi reports it.

    ``cluster_uuid`` and ``clique``: the NVLink domain beyond its host; None where there is none or it is not up.
    ``trouble``: what is wrong with its NVLink fabric, in words; None where all is well or there is no fabric.
    """

    name: str
    memory_bytes: float | None
    cluster_uuid: str | None = None
    clique: str | None = None
    trouble: str | None = None


@dataclass(frozen=True)
class Machine:
    """What ``survey`` found; ``warnings`` say what is degraded or guessed."""

    topology: HardwareTopology
    gpus: tuple[Gpu, ...] = ()
    warnings: tuple[str, ...] = ()


def probe(measured: str | Path | None = None) -> HardwareTopology:
    """The topology of this machine; numbers that it leaves unknown are taken from the file `measured`, if given."""
    return survey(measured).topology


def survey(measured: str | Path | None = None) -> Machine:
    """As ``probe``, with each GPU and what is wrong. Raises Refusal where `measured` is of another device."""
    text, failure = _nvidia_smi()
    gpus = parse_nvidia_smi(text)
    machine = gpu_machine(gpus) if gpus else Machine(cpu_topology(_cores(), _memory_bytes(), _processor_name()))
    warnings = (*machine.warnings, *((failure,) if failure else ()))
    topology = machine.topology if measured is None else fill_unknown(machine.topology, load_hardware(str(measured)))
    return Machine(topology, gpus, warnings)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """The GPUs in what ``nvidia-smi -q`` printed; none in anything else."""
    return tuple(gpu for settings in gpu_settings(text) if (gpu := _gpu(settings)) is not None)


def gpu_settings(text: str) -> list[dict[str, str]]:
    """Everything that ``nvidia-smi -q`` printed of each GPU: {"Fabric/Health/Summary": "Healthy", ...}."""
    blocks = re.split(r"(?m)^GPU [0-9A-Fa-f:.]+\s*$", text)[1:]
    return [_settings(block) for block in blocks]


def _settings(block: str) -> dict[str, str]:
    """``key : value`` lines under their indented headings -> {"Fabric/Health/Summary": "Healthy"}."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        key, colon, value = line.strip().partition(" : ")
        indent = len(line) - len(line.lstrip())
        path = [(depth, name) for depth, name in path if depth < indent] + [(indent, key.strip())]
        if colon:
            found.setdefault("/".join(name for _, name in path), value.strip())
    return found


def _gpu(settings: Mapping[str, str]) -> Gpu | None:
    name = settings.get("Product Name")
    if name is None:
        return None
    memory = re.fullmatch(r"(\d+) MiB", settings.get("FB Memory Usage/Total", ""))
    uuid = settings.get("Fabric/ClusterUUID", "N/A")
    is_up = (settings.get("Fabric/State"), settings.get("Fabric/Status")) == ("Completed", "Success")
    beyond_host = is_up and uuid != "N/A" and uuid.strip("0-") != ""
    return Gpu(
        name=name.removeprefix("NVIDIA "),
        memory_bytes=int(memory[1]) * 2**20 if memory else None,
        cluster_uuid=uuid if beyond_host else None,
        clique=settings.get("Fabric/CliqueId") if beyond_host else None,
        trouble="; ".join(_troubles(settings)) or None,
    )


def _troubles(settings: Mapping[str, str]) -> Iterator[str]:
    """Every line of the fabric section that does not read as healthy; drivers that lack one leave it out or say N/A."""
    healthy = {
        "State": {"Completed"},
        "Status": {"Success"},
        "Health/Summary": {"Healthy"},
        "Health/Bandwidth": {"Full"},
        "Health/Route Recovery in progress": {"False"},
        "Health/Route Unhealthy": {"False"},
        "Health/Access Timeout Recovery": {"False"},
        "Health/Incorrect Configuration": {"None"},
    }
    for key, wanted in healthy.items():
        value = settings.get(f"Fabric/{key}", "N/A")
        if value not in wanted | {"N/A", "Not Supported"}:
            yield f"{key.removeprefix('Health/')} {value}"


def gpu_machine(gpus: Sequence[Gpu]) -> Machine:
    """The topology of a host with these GPUs. Refuses GPUs of different kinds.

    A rack-scale domain is believed only where every GPU is in one clique of one cluster and its fabric came up;
    otherwise the domain is this host, and a warning says why.
    """
    kinds = sorted({gpu.name for gpu in gpus})
    if len(kinds) > 1:
        raise Refusal(f"this host has GPUs of different kinds ({', '.join(kinds)}): a plan is for equal ones")
    preset = next((name for pattern, name in PRESET_OF if re.fullmatch(pattern, kinds[0])), None)
    base = load_hardware(preset or "cpu")
    values, sources = to_fields(base)
    here = Source("nvidia-smi -q on this machine", "measured", date=date.today().isoformat())
    warnings = [
        f"GPU {index} ({gpu.name}), NVLink fabric: {gpu.trouble}" for index, gpu in enumerate(gpus) if gpu.trouble
    ]
    if preset is None:
        warnings.append(f"{kinds[0]} has no preset: its speeds are unknown, `stoker plan calibrate` measures them")
        values |= {
            "name": kinds[0],
            "device.name": kinds[0],
            "device.vendor": "nvidia",
            "device.architecture": "unknown",
        }
        values["host_link.kind"] = "pcie"
    memories = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None]
    if memories:
        values["device.memory_bytes"], sources["device.memory_bytes"] = min(memories), here
    cliques = {(gpu.cluster_uuid, gpu.clique) for gpu in gpus}
    whole_rack = base.rack_scale and len(cliques) == 1 and (None, None) not in cliques
    if base.rack_scale and (not whole_rack or len(gpus) != base.domain.per_host):
        warnings.append(
            f"{len(gpus)} GPUs of {len(cliques)} cliques where a tray has {base.domain.per_host} of one: the domain is "
            f"taken to be this host, not the {base.domain.size} of {base.name}"
        )
        whole_rack = False
    if not whole_rack:
        count = len(gpus)
        fields = {"domain.size": count, "domain.per_host": count, "domain.practice": (count,), "spares": 0}
        values |= fields
        sources |= dict.fromkeys(fields, here)
    return Machine(from_fields(values, sources), tuple(gpus), tuple(warnings))


def cpu_topology(cores: int, memory_bytes: float, name: str) -> HardwareTopology:
    """A machine without GPUs: a device is one core with its share of the memory, the domain is the host."""
    here = Source("read from the operating system of this machine", "measured", date=date.today().isoformat())
    values, sources = to_fields(load_hardware("cpu"))
    fields = {
        "device.memory_bytes": memory_bytes / cores,
        "device.processors": 1,
        "domain.size": cores,
        "domain.per_host": cores,
        "domain.practice": (cores,),
    }
    return from_fields(values | fields | {"device.name": name}, sources | dict.fromkeys(fields, here))


def fill_unknown(topology: HardwareTopology, measured: HardwareTopology) -> HardwareTopology:
    """`topology` with what it does not know from `measured`, which must be of the same device (Refusal)."""
    if measured.device.name != topology.device.name:
        raise Refusal(
            f"measured on {measured.device.name}, and this machine has {topology.device.name}: run "
            "`stoker plan calibrate` here"
        )
    values, sources = to_fields(topology)
    more, their_sources = to_fields(measured)
    for path, value in more.items():
        if values.get(path) is None and value is not None:
            values[path] = value
            if path in their_sources:
                sources[path] = their_sources[path]
    return from_fields(values, sources)


def with_measured(topology: HardwareTopology, numbers: Mapping[str, float], how: str) -> HardwareTopology:
    """`topology` with these numbers (dotted field -> base units) in place of what it had; `how`: device and versions.

    >>> measured = with_measured(load_hardware("cpu"), {"device.peak_flops.float32": 5e10}, "torch 2.13")
    >>> measured.peak("float32"), measured.sources["device.peak_flops.float32"].tag
    (50000000000.0, 'measured')
    """
    if unknown := set(numbers) - set(SCHEMA):
        raise KeyError(f"not fields of a topology: {sorted(unknown)}")
    values, sources = to_fields(topology)
    source = Source(how, "measured", date=date.today().isoformat())
    return from_fields(values | dict(numbers), sources | dict.fromkeys(numbers, source))


def _nvidia_smi() -> tuple[str, str | None]:
    """What nvidia-smi printed, and what went wrong if it is there and failed."""
    try:
        done = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return "", None
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi did not answer ({error}): no GPU is used"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return "", f"nvidia-smi failed ({said[0] if said else f'exit {done.returncode}'}): no GPU is used"
    return done.stdout, None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> float:
    """Of the machine, or of the container that this process runs in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in MEMORY_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return float(min(limits))


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"(?m)^model name\s*: (.+)$", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return names[0].strip() if names else platform.processor() or platform.machine()
