"""From what was measured to what the planner reads: figures to hardware, timed trainings to constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata

import numpy as np

from launch.calibration_runs import Timed
from parallel.planning.hardware.collectives import Span, all_gather_s
from parallel.planning.hardware.probe import with_measured
from parallel.planning.timing.calibration import CONSTANTS, Constant, load_calibration
from parallel.planning.timing.fit import Observed, Runs, fit
from parallel.planning.timing.work import WorkTable
from parallel.planning.topology import HardwareTopology
from pretrain.forecast import execution_of, workload_at
from pretrain.step_probe import Figures

#: Operations of torch in one kernel as the planner counts them (a norm, a rotation), about.
OPERATIONS_PER_KERNEL = 8
#: What is believed of a CPU before it has trained: prior and width (``calibration.Constant``). Rates are shares of what
#: the same machine reached in ``step_probe.measure``.
ON_CPU: Mapping[str, tuple[float, float]] = {
    "product": (0.7, 0.3),
    "experts": (0.8, 0.3),
    "attention": (0.4, 0.5),
    "linear": (0.3, 0.7),
    "memory": (0.5, 0.5),
    "routing": (0.4, 0.5),
    "links": (0.6, 0.5),
    "exchange": (0.6, 0.5),
    "step_s": (0.01, 0.7),
}
#: What the runs cannot tell, and the width that keeps it: cores hide nothing, since they do the sending too; routing is
#: always a router's own; eight ranks or fewer wait for nobody.
HELD_ON_CPU: Mapping[str, float] = {"contention": 0.999, "real_routing": 1.0, "stragglers": 1e-9}
HELD = 1e-3
#: Width of a constant on a GPU, about the value that published runs gave it.
ON_GPU = 0.3
#: Share of held-out runs that lie within the spread, and the least that a spread is.
WITHIN, LEAST_SPREAD = 0.8, 1.05


@dataclass(frozen=True)
class Fitted:
    """``values``: every constant; ``fitted_s`` of each run, and ``held_out_s``: by a fit that did not see its model."""

    values: Mapping[str, float]
    spreads: Mapping[str, float]
    fitted_s: np.ndarray
    held_out_s: np.ndarray


def fitted(timed: Sequence[Timed], hardware: Mapping[int, HardwareTopology], constants: Sequence[Constant]) -> Fitted:
    """Constants that explain the trainings, and how far they can be trusted for models that they were not fitted to."""
    observed = [_observed(run, hardware[run.training.ranks]) for run in timed]
    models = np.array([run.training.model.name for run in timed])
    is_anchor = np.array([run.training.model.anchor for run in timed])
    values = fit(observed, constants=constants)
    fitted_s = Runs(observed).predict(values)
    held_out_s = fitted_s.copy()
    for model in dict.fromkeys(models[~is_anchor]):
        others = [run for run, name in zip(observed, models, strict=True) if name != model]
        if others:
            left = np.flatnonzero(models == model)
            without = fit(others, start=values, constants=constants)
            held_out_s[left] = Runs([observed[index] for index in left]).predict(without)
    errors = np.abs(np.log(held_out_s / [run.step_s for run in timed]))
    is_moe = np.array([run.config.model.moe is not None for run in timed])
    judged = {"dense": ~is_moe & ~is_anchor, "moe": is_moe & ~is_anchor}
    spreads = {kind: _spread(errors[chosen]) for kind, chosen in judged.items() if chosen.any()}
    return Fitted(values, spreads, fitted_s, held_out_s)


def _spread(errors: np.ndarray) -> float:
    return max(LEAST_SPREAD, math.exp(float(np.quantile(errors, WITHIN))))


def _observed(run: Timed, topology: HardwareTopology) -> Observed:
    config, execution = run.config, execution_of(run.config)
    plan = config.plan(run.training.ranks)
    return Observed(WorkTable(workload_at(config), execution, topology).step(plan), topology, execution, run.step_s)


def described(topology: HardwareTopology, figures: Figures, ranks: int, threads: int) -> HardwareTopology:
    """The machine as it is for one of so many ranks at once. On a CPU all speeds are measured ones; a GPU keeps what
    its preset says, and gets what that does not."""
    numbers: dict[str, float] = {f"device.peak_flops.{dtype}": flops for dtype, flops in figures.flops.items()}
    numbers["device.memory_bandwidth"] = figures.copy
    if figures.gather_s:
        numbers["domain.bandwidth"], numbers["domain.latency_s"] = link(topology, figures.gather_s, ranks)
    if topology.device.architecture == "cpu":
        numbers["device.processors"] = threads
        numbers["device.memory_bytes"] = (topology.device.memory_bytes or 0.0) * topology.domain.size / ranks
    else:
        numbers = {field: number for field, number in numbers.items() if _unknown(topology, field)}
    how = f"stoker plan calibrate, {ranks} ranks at once, torch {metadata.version('torch')}"
    return with_measured(topology, numbers, how)


def _unknown(topology: HardwareTopology, field: str) -> bool:
    section, name, *dtype = field.split(".")
    value = getattr(getattr(topology, section), name)
    return dtype[0] not in value if dtype else value is None


def link(topology: HardwareTopology, gather_s: Mapping[int, float], ranks: int) -> tuple[float, float]:
    """Bandwidth and latency of which the planner's all-gather takes these seconds, by bytes: least squares of
    logarithms, on a grid that is made finer."""
    sizes, seconds = np.array(list(gather_s), dtype=float), np.array(list(gather_s.values()))

    def error(bandwidth: float, latency_s: float) -> float:
        domain = replace(topology.domain, bandwidth=bandwidth, latency_s=latency_s, switched=True)
        said = all_gather_s(sizes, Span(ranks, ranks), replace(topology, domain=domain))
        return float(np.square(np.log(said / seconds)).sum())

    at, step = (float(max(sizes / seconds)), float(min(seconds))), 4.0
    while step > 1.01:
        around = [(at[0] * step**i, at[1] * step**j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        best = min(around, key=lambda point: error(*point))
        step, at = (math.sqrt(step), at) if best == at else (step, best)
    return at


def constants(figures: Figures, cuda: bool) -> list[Constant]:
    """What is believed before the trainings."""
    if cuda:
        shipped = load_calibration().values
        return [replace(c, prior=shipped[c.name], width=min(c.width, ON_GPU)) for c in CONSTANTS]
    kernel_s = (OPERATIONS_PER_KERNEL * figures.operation_s, 0.7)
    free = {**ON_CPU, "kernel_gap_s": kernel_s, "routed_kernel_s": kernel_s, "expert_kernel_s": kernel_s}
    found = []
    for constant in CONSTANTS:
        prior, width = free.get(constant.name, (HELD_ON_CPU.get(constant.name, constant.prior), HELD))
        found.append(replace(constant, prior=prior, width=width))
    return found
