"""A job: what every node of a launch must know, in one file that the scheduler's program reads. No torch.

request = Request("hybrid-moe-30b-a3b", (), hardware="gb200-nvl72", nodes=32)
prepared = prepare(request)                      # refuses; else: the resolved configuration and its layout
job = prepared.job(Path("runs/x/launch/0001"))   # what is written there as launch.json
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from launch.launching.layout import Request, fit
from launch.launching.values import concealed, holds_secret, refuse_control, refuse_folder
from parallel.planning.hardware.settings import LaunchSettings
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import HardwareTopology
from pretrain.config import RunConfig
from pretrain.config_base import leaves
from stoker import formats
from stoker.errors import Refusal

FORMAT, VERSION = "launch", 1
JOB, CONFIG = "launch.json", "config.yaml"
#: Ports that ranks and agents may meet on: below those that Linux gives out by itself (ip_local_port_range, 32768).
PORTS = range(20_000, 30_000)
#: Schedulers count in 32 bits (Kubernetes: activeDeadlineSeconds of a pod; Slurm: minutes).
MOST_SECONDS = 2**31 - 1


@dataclass(frozen=True)
class Role:
    """What a node of a job is for: ``domain`` is its NVLink domain, None where a domain is one node."""

    domain: int | None
    spare: bool


@dataclass(frozen=True)
class Job:
    """``nodes`` train and ``spares`` wait to replace one; each runs ``ranks_per_node`` ranks.

    ``config``: path of the resolved configuration, secrets masked; ``directory``: where its relative paths begin, None
    where the node's own folder is it. ``segment``: training nodes of an NVLink domain, with ``segment_spares`` more;
    None where a domain is one node or no segment fits. ``ranks_per_numa``: ranks that share a NUMA node, None: not
    bound. ``environment``: of the ranks, where the node has not set it. ``hosts``: names of all nodes in order, where
    they are known before the start (Kubernetes). ``number``: of the launch of its run.
    """

    name: str
    run_dir: str
    config: str
    directory: str | None
    nodes: int
    spares: int
    ranks_per_node: int
    ranks_per_numa: int | None
    segment: int | None
    segment_spares: int
    port: int
    environment: dict[str, str]
    checks: tuple[str, ...]
    plan: dict[str, Any]
    hosts: tuple[str, ...] = ()
    number: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.spares < 0 or self.ranks_per_node < 1:
            raise Refusal(f"{self.name}: {self.nodes} nodes, {self.spares} spares of {self.ranks_per_node} ranks each")
        if self.plan.get("world_size") != self.nodes * self.ranks_per_node:
            raise Refusal(
                f"{self.name}: the plan has {self.plan.get('world_size')} ranks, and {self.nodes} nodes of "
                f"{self.ranks_per_node} run {self.nodes * self.ranks_per_node}"
            )
        if self.segment is not None and self.all_nodes != self.domains * (self.segment + self.segment_spares):
            raise Refusal(f"{self.name}: {self.all_nodes} nodes are no whole segments of {self.segment}")
        if self.hosts and len(self.hosts) != self.all_nodes:
            raise Refusal(f"{self.name}: {len(self.hosts)} host names for {self.all_nodes} nodes")

    @property
    def all_nodes(self) -> int:
        return self.nodes + self.spares

    @property
    def domains(self) -> int:
        """NVLink domains that the job asks for; 1 where a domain is one node."""
        return 1 if self.segment is None else self.nodes // self.segment

    def roles(self) -> tuple[Role, ...]:
        """What each node is for, in the order of the scheduler's node list: a domain's training nodes, then its spares;
        without segments all spares are last."""
        if self.segment is None:
            return (Role(None, False),) * self.nodes + (Role(None, True),) * self.spares
        whole = self.segment + self.segment_spares
        return tuple(Role(index // whole, index % whole >= self.segment) for index in range(self.all_nodes))

    def bind(self, local_rank: int) -> list[str]:
        """What goes before the command of a rank: numactl, which keeps it on the processor beside its GPU."""
        if self.ranks_per_numa is None:
            return []
        node = local_rank // self.ranks_per_numa
        return ["numactl", f"--cpunodebind={node}", f"--membind={node}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the format stamp; ``from_dict`` gives the same back."""
        return {"format": formats.stamp(FORMAT, VERSION), **asdict(self)}

    def to_json(self) -> str:
        """A line for each key."""
        lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in self.to_dict().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_dict(cls, values: Any, source: str | Path = "job") -> Job:
        formats.require(values, FORMAT, VERSION, source)
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name != "format"
        }
        try:
            return cls(**given)
        except TypeError as error:
            known = ", ".join(field.name for field in fields(cls))
            raise Refusal(f"{source}: damaged or of another release ({error}); its keys are {known}") from None

    @classmethod
    def read(cls, path: str | Path) -> Job:
        """The job in a launch.json; Refusal where it cannot be read."""
        try:
            values = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise Refusal(
                f"{path} cannot be read ({error.strerror}): the run directory must be one shared path on every node, "
                "and in a container one of launch.mounts"
            ) from None
        except ValueError as error:
            raise Refusal(f"{path} is damaged ({error}): launch again") from None
        return cls.from_dict(values, path)


@dataclass(frozen=True)
class Prepared:
    """A request that fits: ``config`` with its layout and an absolute ``run.dir``; ``secrets``: keys whose values are
    masked in what is written, with the values."""

    config: RunConfig
    plan: ParallelPlan
    topology: HardwareTopology
    settings: LaunchSettings
    spares_per_segment: int
    notes: tuple[str, ...]
    secrets: Mapping[str, Any]

    def job(
        self, name: str, folder: str | Path, number: int, directory: str | None = None, hosts: tuple[str, ...] = ()
    ) -> Job:
        """``folder``: where launch.json and config.yaml are, as nodes see it; ``number``: of the launch."""
        settings, launch = self.settings, self.config.launch
        interface = launch.network_interface
        meeting = {} if interface is None else {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
        return Job(
            name=name,
            run_dir=str(self.config.run_dir),
            config=str(Path(folder) / CONFIG),
            directory=directory,
            nodes=settings.nodes,
            spares=launch.spare_nodes,
            ranks_per_node=settings.ranks_per_node,
            ranks_per_numa=settings.ranks_per_numa,
            segment=settings.segment,
            segment_spares=self.spares_per_segment,
            port=port(self.config.run_dir, number),
            environment={**settings.environment, **meeting},
            checks=settings.checks,
            plan=self.plan.to_dict(),
            hosts=hosts,
            number=number,
        )


def prepare(request: Request, announce: Callable[[str], None] = print) -> Prepared:
    """What a request comes to: configuration, plan and settings. Raises Refusal with what is nearest where it does not
    fit; nothing is written."""
    config, plan, topology, settings = fit(request, announce)
    _refuse_values(config)
    return Prepared(
        config=config,
        plan=plan,
        topology=topology,
        settings=settings,
        spares_per_segment=_spares_per_segment(settings, topology, config.launch.spare_nodes),
        notes=settings.warnings,
        secrets=concealed(config),
    )


def _refuse_values(config: RunConfig) -> None:
    """Refuse what no scheduler takes, and secrets in values that stand in the job as they are."""
    refuse_folder("run directory", config.run_dir)
    launch, limit_min = config.launch, config.launch.time_limit_min or 0
    for key, seconds in (("grace_s", launch.grace_s), ("time_limit_min", 60 * limit_min)):
        if seconds > MOST_SECONDS:
            raise Refusal(f"launch.{key}={getattr(launch, key):.15g}: no scheduler waits so long, lower it")
    for key, value in (("run.name", config.run.name), ("run.dir", config.run.dir), *leaves(launch, "launch.")):
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str) or key == "launch.webhook":
                continue
            if holds_secret(text):
                raise Refusal(
                    f"{key} holds a secret, by its look or as a value of the environment (not shown here), and the job "
                    "says it to everybody: leave it out"
                )
            refuse_control(key, text)


def port(run_dir: Path, number: int) -> int:
    """Where the nodes of a launch meet: the same for all of them, another for each launch of a machine's users."""
    return PORTS[zlib.crc32(f"{run_dir}\0{number}".encode()) % len(PORTS)]


def _spares_per_segment(settings: LaunchSettings, topology: HardwareTopology, spares: int) -> int:
    """A spare replaces a node of its own NVLink domain, and Slurm gives every segment as many nodes."""
    if settings.segment is None or spares == 0:
        return 0
    domains = settings.nodes // settings.segment
    room = topology.domain.size // topology.domain.per_host - settings.segment
    if spares % domains or spares // domains > room:
        fitting = [domains * each for each in range(room + 1)]
        near = sorted(sorted(fitting, key=lambda count: (abs(count - spares), count))[:2])
        raise Refusal(
            f"launch.spare_nodes={spares}: each of the {domains} NVLink domains of {topology.name} trains on "
            f"{settings.segment} nodes and has {room} more, and a spare serves its own: choose {_either(near)}"
        )
    return spares // domains


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
