"""The machine that a plan is for: device, NVLink domain, network, host link, each number with its source. No torch.

Presets are the files of ``hardware/``; a file of one's own in the same form may be named instead. Base units
throughout: bytes, seconds, FLOP/s without sparsity, bytes/s *one way* for *one device* (half of what vendors print).
A number that nobody knows is ``None``; ``HardwareTopology.known`` refuses where a prediction needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from parallel.planning.hardware.quantities import Source, Sources, Values, read_quantities, write_quantities
from stoker.errors import Refusal
from stoker.nearest import nearest

FORMAT, VERSION = "topology", 1
PRESETS = Path(__file__).parent / "hardware"

#: What ``peak_flops`` may name. float32 means products in float32 proper, not TF32.
PRECISIONS = ("float64", "float32", "float16", "bfloat16", "fp8", "mxfp8", "nvfp4")
#: A precision of ``Execution`` that multiplies at the rate of another.
RATE_OF = {"fp8_block": "fp8"}


@dataclass(frozen=True)
class Device:
    """One accelerator: what one rank runs on. ``memory_bytes``: usable, which is less than on the box.

    ``processors``: SMs, compute units or cores, over which the tiles of a product go in waves.
    """

    name: str
    vendor: str
    architecture: str
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bytes: float | None
    memory_bandwidth: float | None
    processors: int | None
    power_w: float | None


@dataclass(frozen=True)
class Domain:
    """Devices that reach one another at full speed: an 8-GPU board, an NVL72 rack, a torus of Trainium.

    ``per_host``: devices of one host (tray). ``bandwidth``: all links of a device together. ``switched``: any pair gets
    all of it; otherwise a group of k in a full mesh gets (k - 1)/(size - 1). ``latency_s``: a step of a collective.
    ``practice``: sizes at which such domains are used, ascending; below ``size`` they leave spares.
    """

    size: int
    per_host: int
    bandwidth: float | None
    latency_s: float | None
    switched: bool
    in_network_reduction: bool
    practice: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """Between domains: what one device gets of its host's network cards."""

    bandwidth: float | None
    latency_s: float | None


@dataclass(frozen=True)
class HostLink:
    """Device to host memory. ``bandwidth``: of one device while all devices of the host use theirs."""

    kind: Literal["pcie", "c2c", "memory"]
    bandwidth: float | None


@dataclass(frozen=True)
class HardwareTopology:
    """A machine of any number of equal domains. ``spares``: devices of a domain kept aside where a run spans several.

    ``sources`` by dotted field ("device.peak_flops.bfloat16"). Hashable, so that caches may be keyed by it.

    >>> load_hardware("gb200-nvl72").domain.size
    72
    """

    name: str
    device: Device
    domain: Domain
    network: Network
    host_link: HostLink
    spares: int
    sources: Mapping[str, Source] = field(hash=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        domain = self.domain
        if min(domain.size, domain.per_host) < 1 or domain.size % domain.per_host:
            raise Refusal(f"{self.name}: hosts of {domain.per_host} devices do not make up a domain of {domain.size}")
        if list(domain.practice) != sorted(domain.practice) or not all(0 < n <= domain.size for n in domain.practice):
            raise Refusal(f"{self.name}: domain.practice {domain.practice} must ascend within 1 to {domain.size}")
        if not 0 <= self.spares < domain.size or self.spares % domain.per_host:
            raise Refusal(f"{self.name}: spares={self.spares} must be whole hosts of {domain.per_host}, and not all")

    @property
    def rack_scale(self) -> bool:
        """Whether a domain reaches beyond one host."""
        return self.domain.size > self.domain.per_host

    def peak(self, precision: str) -> float:
        """FLOP/s of the device in `precision` (of an ``Execution``), refused where it has none or nobody knows it."""
        rate = RATE_OF.get(precision, precision)
        if rate not in self.device.peak_flops:
            has = ", ".join(self.device.peak_flops) or "none: `stoker plan calibrate` measures the machine one is on"
            raise Refusal(f"{self.name}: no peak is known for {precision}; known are {has}")
        return self.device.peak_flops[rate]

    def known(self, path: str) -> float:
        """The number at a dotted field such as "domain.bandwidth"; Refusal where it is unknown."""
        value: Any = self
        for part in path.split("."):
            value = getattr(value, part)
        if value is None:
            raise Refusal(
                f"{self.name}: {path} is unknown; `stoker plan calibrate` measures the machine one is on, or name a "
                "hardware file of your own that has it"
            )
        return float(value)


#: What a hardware file holds: dotted field -> unit (see ``quantities``).
SCHEMA: Mapping[str, str] = {
    "name": "word",
    "device.name": "word",
    "device.vendor": "word",
    "device.architecture": "word",
    **{f"device.peak_flops.{precision}": "FLOP/s" for precision in PRECISIONS},
    "device.memory_bytes": "bytes",
    "device.memory_bandwidth": "bytes/s",
    "device.processors": "count",
    "device.power_w": "W",
    "domain.size": "count",
    "domain.per_host": "count",
    "domain.bandwidth": "bytes/s",
    "domain.latency_s": "s",
    "domain.switched": "flag",
    "domain.in_network_reduction": "flag",
    "domain.practice": "counts",
    "network.bandwidth": "bytes/s",
    "network.latency_s": "s",
    "host_link.kind": "word",
    "host_link.bandwidth": "bytes/s",
    "spares": "count",
}
PEAKS = "device.peak_flops."


def hardware_names() -> list[str]:
    """Presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_hardware(name: str) -> HardwareTopology:
    """The preset `name`, or the file at that path. Refuses an unknown name (with the nearest) and a malformed file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        presets = hardware_names()
        if name not in presets:
            alike = [preset for preset in presets if preset.startswith(name)] or [nearest(name, presets) or ""]
            guess = f" Did you mean {' or '.join(alike)}?" if any(alike) else ""
            raise Refusal(f"no hardware {name!r}.{guess} Presets are {', '.join(presets)}; or give the path of a .yaml")
        path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise Refusal(f"hardware file {path} is not there")
    state = path.stat()
    return _load(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@cache
def _load(path: Path, state: tuple[int, int, int]) -> HardwareTopology:
    return from_fields(*read_quantities(path, FORMAT, VERSION, SCHEMA, optional=PEAKS))


def save_hardware(path: str | Path, topology: HardwareTopology) -> None:
    """Write a file that ``load_hardware`` reads back equal."""
    write_quantities(path, FORMAT, VERSION, SCHEMA, *to_fields(topology))


def from_fields(values: Values, sources: Sources) -> HardwareTopology:
    """A topology from dotted fields; the peaks under "device.peak_flops." that are there and not None."""
    peaks = {path.removeprefix(PEAKS): value for path, value in values.items() if path.startswith(PEAKS) and value}

    def part(section: str, kind: type) -> Any:
        plain = {one.name: values[f"{section}.{one.name}"] for one in fields(kind) if one.name != "peak_flops"}
        return kind(**plain, **({"peak_flops": peaks} if kind is Device else {}))

    return HardwareTopology(
        name=values["name"],
        device=part("device", Device),
        domain=part("domain", Domain),
        network=part("network", Network),
        host_link=part("host_link", HostLink),
        spares=values["spares"],
        sources=sources,
    )


def to_fields(topology: HardwareTopology) -> tuple[Values, Sources]:
    """The inverse of ``from_fields``."""
    values: Values = {}
    for path in SCHEMA:
        if path.startswith(PEAKS):
            if (precision := path.removeprefix(PEAKS)) in topology.device.peak_flops:
                values[path] = topology.device.peak_flops[precision]
            continue
        value: Any = topology
        for name in path.split("."):
            value = getattr(value, name)
        values[path] = value
    return values, dict(topology.sources)
