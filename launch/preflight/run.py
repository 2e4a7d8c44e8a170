"""``quick``, before ranks start on this machine; ``preflight``, on every node of a launch before its ranks meet.

    quick(config, ranks=2).refuse()
    report = preflight(config, ranks=8, launch=Launch(id, node, nodes, needed=len(nodes)))
    report.refuse(); report.verdict.good

All checks run, whatever another found. One that fails in itself is a warning; one that does not come back is refused,
since the run would hang in the same place. No torch in this process.
"""

from __future__ import annotations

import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from launch import doctor
from launch.machine import cores, cuda_devices
from launch.preflight import compute, disk, gpu, host
from launch.preflight.facts import facts
from launch.preflight.need import Need, need_of
from launch.preflight.report import Finding, Report, Status
from launch.preflight.shared import Launch, exchange
from parallel.planning.hardware.probe import gpu_machine, parse_nvidia_smi
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import HardwareTopology
from pretrain.config import RunConfig
from pretrain.run import decide
from stoker.errors import Refusal

#: Seconds until a check counts as hung; products load torch, from a network file system at worst.
LIMIT_S, COMPUTE_LIMIT_S = 12.0, 50.0


@dataclass(frozen=True)
class Outcome:
    """Of one check: what it found, and what it measured, to compare with other nodes."""

    findings: list[Finding]
    rates: Mapping[str, float] = field(default_factory=dict)


Check = Callable[[], Outcome]


def quick(config: RunConfig, ranks: int, plan: ParallelPlan | None = None) -> Report:
    """What can be told of this machine within a second, for all ``ranks`` of a run; nothing is written or started.
    ``plan``: the layout, where it is known (to search for one takes longer)."""
    began = time.monotonic()
    need = need_of(config, plan or decide(config, ranks), ranks)
    findings = _host(config, need, cuda_devices())
    return Report(platform.node(), tuple(findings), time.monotonic() - began)


def preflight(config: RunConfig, ranks: int, launch: Launch | None = None) -> Report:
    """Every check of this node, which is to run ``ranks`` ranks; then, in a ``launch``, the comparison with the others.

    Takes part in the comparison whatever was found here: the others learn of it, and a spare can take this one's place.
    Raises Refusal where the configuration has no plan for so many ranks, or the nodes' common folder cannot be used.
    """
    began = time.monotonic()
    world = ranks * (launch.needed if launch else 1)
    smi, topology, findings = _gpus()
    gpus = parse_nvidia_smi(smi)
    need = need_of(config, decide(config, world), ranks, topology)
    findings += _host(config, need, len(gpus))
    outcomes = together(_slow_checks(config, need, smi, topology, launch))
    findings += [finding for outcome in outcomes for finding in outcome.findings]
    name = launch.node if launch else platform.node()
    report = Report(name, tuple(findings), time.monotonic() - began)
    if launch is None:
        return report
    stated = facts(config)
    driver = re.search(r"(?m)^Driver Version\s*: (\S+)", smi)
    stated = replace(
        stated,
        devices=gpu.uuids(smi),
        clique=gpu.clique_of(gpus),
        remarks={**stated.remarks, "driver": driver[1] if driver else None, "GPU": gpus[0].name if gpus else None},
        rates={name: rate for outcome in outcomes for name, rate in outcome.rates.items()},
        refused="; ".join(map(str, report.refused)) or None,
    )
    verdict, aside = exchange(launch, stated, config.run_dir)
    return replace(report, verdict=verdict, aside=aside, seconds=time.monotonic() - began)


def _host(config: RunConfig, need: Need, gpus: int) -> list[Finding]:
    """The checks that take no time."""
    threads = max(1, cores() // need.ranks)
    checks: dict[str, Callable[[], Finding]] = {
        "packages": _software,
        "clock": host.clock,
        "open files": lambda: host.open_files(need),
        "processes": lambda: host.processes(need, threads),
        "locked memory": lambda: host.locked_memory(gpus),
        "shared memory": lambda: host.shared_memory(need, gpus),
        "memory": lambda: host.memory(need, gpus),
        "cores": lambda: host.cores(need),
        "run directory": lambda: disk.writable(config.run_dir),
        "disk space": lambda: disk.room(config.run_dir, need),
    }
    if (scratch := config.launch.scratch) is not None:
        checks["launch.scratch"] = lambda: disk.writable(Path(scratch), "launch.scratch")
    outcomes = together({name: (partial(_alone, check), LIMIT_S) for name, check in checks.items()})
    return [outcome.findings[0] for outcome in outcomes]


def _alone(check: Callable[[], Finding]) -> Outcome:
    return Outcome([check()])


def _software() -> Finding:
    """What the doctor holds for wrong among the packages that Stoker needs."""
    wrong = [found for found in doctor.required() if found.status == "wrong"]
    if not wrong:
        return Finding("packages", "ok", "as required")
    told = "; ".join(f"{found.name} {found.found}: {found.cost_of_absence}" for found in wrong)
    return Finding("packages", "refuse", told, "; ".join(found.what_to_do for found in wrong))


def _slow_checks(
    config: RunConfig, need: Need, smi: str, topology: HardwareTopology | None, launch: Launch | None
) -> dict[str, tuple[Check, float]]:
    """Checks that write, start a process or ask the driver, by name, with the seconds that they may take."""
    gpus = parse_nvidia_smi(smi)
    checks: dict[str, tuple[Check, float]] = {
        "disk speed": (lambda: _disk(config, need), LIMIT_S),
        "products": (lambda: _compute(len(gpus), topology), COMPUTE_LIMIT_S + LIMIT_S),
    }
    if gpus:
        checks["GPUs"] = lambda: Outcome([*gpu.health(smi), *gpu.memory(need, gpus)]), LIMIT_S
    if len(gpus) > 1:
        checks["NVLink"] = (
            lambda: Outcome(gpu.nvlink(*(gpu.ask("nvidia-smi", "nvlink", o) for o in ("-s", "-e")))),
            20.0,
        )
    if topology is not None and topology.rack_scale and launch is not None and len(launch.nodes) > 1:
        checks["IMEX"] = lambda: Outcome(gpu.imex()), LIMIT_S
    if launch is not None and launch.port is not None and (launch.index == 0 or not launch.share_hosts):
        number = launch.port  # of every node: each may come to lead
        checks["port"] = lambda: Outcome([host.port(number)]), LIMIT_S
    return checks


def _disk(config: RunConfig, need: Need) -> Outcome:
    finding, rate = disk.speed(config.run_dir, need)
    return Outcome([finding], {} if rate is None else {"disk writes": rate})


def _compute(gpus: int, topology: HardwareTopology | None) -> Outcome:
    """On GPUs of a torch that can use them, a process each; else one for all cores."""
    devices = min(gpus, cuda_devices())
    try:
        found = compute.measure(max(1, devices), cores() // max(1, devices) or 1, COMPUTE_LIMIT_S)
    except OSError as error:
        # Cores that are only busy come back in the end; a GPU that does not is out of order.
        status: Status = "warn" if isinstance(error, TimeoutError) and not devices else "refuse"
        return Outcome([Finding("computes", status, str(error), "python -m launch.preflight.compute 0 1 0 says more")])
    return Outcome(compute.judge(found, topology), compute.rates_of(found))


def _gpus() -> tuple[str, HardwareTopology | None, list[Finding]]:
    """What ``nvidia-smi -q`` printed, the topology of the GPUs, and what is wrong with either."""
    if shutil.which("nvidia-smi") is None:
        return "", None, []
    try:
        text = gpu.ask("nvidia-smi", "-q", timeout_s=20.0)
        gpus = parse_nvidia_smi(text)
        return text, gpu_machine(gpus).topology if gpus else None, []
    except OSError as error:
        advice = "see to the driver of this node: dmesg names the fault (Xid)"
        return "", None, [Finding("GPUs", "refuse", str(error), advice)]
    except Refusal as refusal:
        return text, None, [Finding("GPUs", "refuse", str(refusal), "run on GPUs of one kind: CUDA_VISIBLE_DEVICES")]


def _guarded(name: str, check: Check) -> Outcome:
    """The outcome of a check, also of one that fails in itself."""
    try:
        return check()
    except Exception as error:
        said = f"could not be checked ({type(error).__name__}: {error})"
        return Outcome([Finding(name, "refuse" if isinstance(error, Refusal) else "warn", said)])


def together(checks: Mapping[str, tuple[Check, float]]) -> list[Outcome]:
    """All checks at once, in threads that do not keep the process from ending; their outcomes in the checks' order."""
    done: dict[str, Outcome] = {}

    def run(name: str, check: Check) -> None:
        done[name] = _guarded(name, check)

    began = time.monotonic()
    threads = {
        name: threading.Thread(target=run, args=(name, check), daemon=True) for name, (check, _) in checks.items()
    }
    for thread in threads.values():
        thread.start()
    for name, (_, limit_s) in checks.items():
        threads[name].join(max(0.0, began + limit_s - time.monotonic()))
        said = f"did not come back within {limit_s:g} s"
        done.setdefault(name, Outcome([Finding(name, "refuse", said, "the run would hang there too: see to the node")]))
    return [done[name] for name in checks]
