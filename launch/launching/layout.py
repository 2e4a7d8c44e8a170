"""From a configuration, hardware and a number of nodes to a layout that fills them, or a refusal that says what would.
No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from parallel.planning.hardware.settings import LaunchSettings, launch_settings
from parallel.planning.placement import place
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import HardwareTopology, load_hardware
from pretrain.config import RunConfig, load, parse
from pretrain.config_sections import ParallelSection
from pretrain.forecast import execution_of, workload_at
from stoker.errors import Refusal

#: Nodes, and ranks of a node without devices. A choice of ours: more is a slip of the keyboard.
MOST_NODES, MOST_RANKS = 65_536, 1024
#: Numbers of nodes that are tried for a refusal's "nearest", at most.
TRIES = 256


@dataclass(frozen=True)
class Request:
    """What a person typed. ``ranks_per_node``: of machines without accelerators; elsewhere one rank a device."""

    config: str
    overrides: tuple[str, ...]
    hardware: str
    nodes: int
    ranks_per_node: int | None = None


def fit(
    request: Request, announce: Callable[[str], None]
) -> tuple[RunConfig, ParallelPlan, HardwareTopology, LaunchSettings]:
    """The configuration with its layout written out and an absolute ``run.dir``, the plan on all devices of the nodes,
    the hardware, and what a launcher has to set for it."""
    if not 1 <= request.nodes <= MOST_NODES:
        raise Refusal(f"--nodes {request.nodes}: give the number of nodes that train, 1 to {MOST_NODES}")
    config = load(request.config, request.overrides)
    if config.launch.spare_nodes > MOST_NODES:
        raise Refusal(f"launch.spare_nodes={config.launch.spare_nodes}: up to {MOST_NODES}")
    if "://" in config.run.dir:
        raise Refusal("run.dir is an address (not shown here), and must be a path on a file system that all nodes see")
    topology = _topology(request)
    plan = _plan(config, topology, request.nodes, announce)
    settings = launch_settings(place(plan, topology), execution_of(config))
    values = config.resolved()
    try:
        values["run"]["dir"] = os.path.normpath(os.path.join(os.getcwd(), config.run.dir))
    except OSError as error:
        raise Refusal(f"this folder cannot be told ({error.strerror}): launch from another one") from None
    if config.parallel == "auto":
        # Decided once, here: nodes would each ask again, and another release might answer otherwise after a requeue.
        degrees = {name: getattr(plan, name) for name in ParallelSection.model_fields if name != "stages"}
        values["parallel"] = {**degrees, "stages": [len(chunk) for chunk in plan.stages]}
    return parse(values, request.config), plan, topology, settings


def _topology(request: Request) -> HardwareTopology:
    topology, ranks = load_hardware(request.hardware), request.ranks_per_node
    if ranks is None:
        return topology
    if topology.device.vendor != "generic":
        raise Refusal(
            f"--ranks-per-node: a node of {topology.name} runs {topology.domain.per_host} ranks, one for each device; "
            "leave it out"
        )
    if not 1 <= ranks <= MOST_RANKS:
        raise Refusal(f"--ranks-per-node {ranks}: give 1 to {MOST_RANKS}")
    return replace(topology, domain=replace(topology.domain, size=ranks, per_host=ranks, practice=(ranks,)))


def _plan(config: RunConfig, topology: HardwareTopology, nodes: int, announce: Callable[[str], None]) -> ParallelPlan:
    try:
        return _filling(_layout(config, topology, nodes, announce), topology, nodes)
    except Refusal as refusal:
        if config.parallel == "auto":  # the planner has said what would do, and asking it again takes a second each
            raise
        near = " or ".join(map(str, _nearest(config, topology, nodes)))
        advice = f" With this layout nearest that fit are --nodes {near}" if near else ""
        raise Refusal(f"--nodes {nodes} of {topology.name}: {str(refusal).rstrip('.')}.{advice}") from None


def _layout(config: RunConfig, topology: HardwareTopology, nodes: int, announce: Callable[[str], None]) -> ParallelPlan:
    world_size = nodes * topology.domain.per_host
    if config.parallel != "auto" or topology.device.vendor == "generic":
        return config.plan(world_size, announce)
    from parallel.planning.search.planner import search
    from parallel.planning.search.problem import Problem
    from parallel.planning.search.scored import remembering_time
    from parallel.planning.timing.calibration import load_calibration

    problem = Problem(
        workload_at(config),
        config.train.global_batch,
        topology,
        world_size,
        dtype=config.run.dtype,
        execution=execution_of(config),
        exact=True,
        fixed={"micro_batch": config.train.micro_batch},
    )
    answer = search(problem, remembering_time(load_calibration()))
    announce(f"parallel: auto takes {answer.winner.label}, {answer.winner.time.step_s:.3g} s a step predicted")
    return answer.winner.plan


def _filling(plan: ParallelPlan, topology: HardwareTopology, nodes: int) -> ParallelPlan:
    """The plan, refused where its ranks do not fill the nodes."""
    placement = place(plan, topology)
    if placement.hosts != nodes:
        raise Refusal(
            f"this layout uses {placement.host_ranks} of the {topology.domain.per_host} devices of a node, and would "
            f"take {placement.hosts} nodes"
        )
    return plan


def _nearest(config: RunConfig, topology: HardwareTopology, nodes: int) -> list[int]:
    """The next smaller and the next larger number of nodes that the layout of the configuration fills."""

    def fits(count: int) -> bool:
        try:
            _filling(config.plan(count * topology.domain.per_host, lambda text: None), topology, count)
        except Refusal:
            return False
        return True

    def first(counts: Iterator[int]) -> list[int]:
        return next(([count] for count in counts if fits(count)), [])

    below = iter(range(nodes - 1, max(0, nodes - TRIES // 2), -1))
    above = iter(range(nodes + 1, min(MOST_NODES, nodes + TRIES // 2)))
    return first(below) + first(above)
