"""A layout with what is predicted of it, and the predictors that say so. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import MemoryPrediction
from parallel.planning.placement import Placement, place
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.calibration import Calibration, load_calibration
from parallel.planning.timing.step_time import TimePrediction, predict_time
from parallel.planning.timing.work import WorkTable
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload


class MemoryPredictor(Protocol):
    def __call__(
        self, workload: Workload, plan: ParallelPlan, execution: Execution, topology: HardwareTopology
    ) -> MemoryPrediction: ...


class TimePredictor:
    """``predict_time`` under a calibration that remembers the work of the layers it has met."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self._tables: dict[tuple[int, Execution, HardwareTopology], WorkTable] = {}

    def __call__(
        self, workload: Workload, plan: ParallelPlan, execution: Execution, topology: HardwareTopology
    ) -> TimePrediction:
        key = (id(workload), execution, topology)  # the table keeps the workload alive, so the id is its own
        if key not in self._tables:
            self._tables[key] = WorkTable(workload, execution, topology)
        return predict_time(workload, plan, execution, topology, self.calibration, self._tables[key])


def remembering_time(calibration: Calibration | None = None) -> TimePredictor:
    """For one search or a few. ``calibration`` left out: the one that comes with Stoker."""
    return TimePredictor(calibration or load_calibration())


@dataclass(frozen=True)
class Scored:
    """A layout, how and on what it is run, and what is predicted. ``domain_ranks``: ranks that a domain takes."""

    workload: Workload = field(repr=False)
    plan: ParallelPlan
    execution: Execution
    topology: HardwareTopology
    domain_ranks: int
    time: TimePrediction
    memory: MemoryPrediction

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.topology)

    @property
    def placement(self) -> Placement:
        return place(self.plan, self.topology, self.domain_ranks)

    @property
    def tokens_per_s(self) -> float:
        return self.plan.global_batch * self.workload.seq_len / self.time.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs against the device's peak in the precision of the layers' products."""
        peak = self.plan.world_size * self.topology.peak(self.execution.precision)
        return self.tokens_per_s * self.workload.training_flops / peak

    @property
    def label(self) -> str:
        return label(self.plan, self.execution)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "label": self.label,
            "plan": self.plan.to_dict(),
            "execution": asdict(self.execution),
            "domain_ranks": self.domain_ranks,
            "step_time_s": self.time.step_s,
            "step_time_low_s": self.time.low_s,
            "step_time_high_s": self.time.high_s,
            "parts_s": dict(self.time.parts),
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s / self.plan.world_size,
            "mfu": self.mfu,
            "memory_bytes": self.memory.peak,
            "memory_upper_bytes": self.memory.upper,
            "fits": self.fits,
        }


def label(plan: ParallelPlan, execution: Execution) -> str:
    """A layout in a few words: "tp 4, pp 8, dp 16, micro-batch 2, recompute full"."""
    words = [f"{axis} {plan.degree(axis)}" for axis in ("tp", "cp", "pp", "vpp", "ep", "etp") if plan.degree(axis) > 1]
    words += [f"dp {plan.dp}", f"micro-batch {plan.micro_batch}"]
    words += [f"recompute {plan.recompute}"] * (plan.recompute != "none")
    words += [f"recompute of {'+'.join(execution.recompute_modules)}"] * bool(execution.recompute_modules)
    words += [f"offload of {' and '.join(execution.offload)}"] * bool(execution.offload)
    words += [("optimizer replicated", "", "gradients sharded", "weights sharded")[plan.zero]] * (plan.zero != 1)
    words += ["zero bubble"] * (execution.schedule == "zero_bubble")
    words += ["expert overlap"] * execution.expert_overlap
    words += [execution.precision] * execution.quantised
    return ", ".join(words)
