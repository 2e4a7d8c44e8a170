"""What the planner says of a run on this machine: the layout that ``parallel: auto`` takes, and how long a step takes.

Both stand on ``parallel/planning/hardware/this_machine.py``: what is known of a CPU is what ``stoker plan calibrate``
measured there. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallel.planning.execution import Execution
from parallel.planning.hardware.this_machine import Known, here, this_machine
from parallel.planning.memory.prediction import MemoryPrediction, predict_memory
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.step_time import TimePrediction, predict_time
from parallel.planning.workload import Workload
from pretrain.machine import Machine
from pretrain.workload import workload_of
from stoker.errors import Refusal

if TYPE_CHECKING:
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class Forecast:
    """What is expected of a step. ``memory``: None on a CPU, whose ranks share memory that nothing accounts for."""

    time: TimePrediction
    memory: MemoryPrediction | None
    model_flops: float
    peak_flops: float
    basis: str

    def mfu(self, step_s: float, model_flops: float) -> float:
        """Model FLOPs of a step that took so long, against the peak of all devices."""
        return model_flops / step_s / self.peak_flops

    def beside_step(self, measured_s: float) -> str:
        step = self.time
        return (
            f"step time: predicted {step.step_s:.3g} s ({step.low_s:.3g} to {step.high_s:.3g}), "
            f"measured {measured_s:.3g} s ({measured_s / step.step_s - 1:+.0%})"
        )

    def beside_memory(self, measured_bytes: int) -> str:
        """What torch's allocator held at most on rank 0, which begins every pipeline."""
        if self.memory is None:
            return f"memory of rank 0: predicted unknown, measured {measured_bytes / 1e9:.3g} GB"
        stage = self.memory.stages[0]
        return (
            f"memory of rank 0: predicted {stage.allocated / 1e9:.3g} GB (at most {stage.allocated_upper / 1e9:.3g}), "
            f"measured {measured_bytes / 1e9:.3g} GB"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, what is not known left out."""
        step, memory = self.time, self.memory
        known = {"step_time_s": step.step_s, "step_time_low_s": step.low_s, "step_time_high_s": step.high_s}
        if memory is not None:
            known |= {"memory_bytes": memory.allocated, "memory_upper_bytes": memory.upper}
        return {**known, "basis": self.basis}


def forecast(config: RunConfig, plan: ParallelPlan) -> Forecast:
    """What is expected of a step under this plan on this machine; Refusal that says why nothing is."""
    return _forecast(config, plan, _known(config, plan.world_size))


def recorded(config: RunConfig, plan: ParallelPlan) -> tuple[Forecast | None, dict[str, Any]]:
    """What is expected of a step, and what ``plan.json`` keeps of it: the same, and the machine that it stands on, for
    a report that is made elsewhere. A run goes on where nothing is known."""
    try:
        known = _known(config, plan.world_size)
        expected = _forecast(config, plan, known)
    except Refusal as unknown:
        with suppress(Refusal):
            return None, {"unknown": str(unknown), "machine": Machine(here()).to_dict()}
        return None, {"unknown": str(unknown)}
    return expected, expected.to_dict() | {"machine": Machine(known.topology, known.calibration).to_dict()}


def _forecast(config: RunConfig, plan: ParallelPlan, known: Known) -> Forecast:
    topology, execution, workload = known.topology, execution_of(config), workload_at(config)
    return Forecast(
        predict_time(workload, plan, execution, topology, known.calibration),
        None if _is_cpu(known) else predict_memory(workload, plan, execution, topology),
        workload.training_flops * plan.global_batch * workload.seq_len,
        plan.world_size * topology.peak(execution.precision),
        known.basis,
    )


def automatic(config: RunConfig, world_size: int, announce: Callable[[str], None]) -> ParallelPlan:
    """The layout of ``parallel: auto``: the planner's, or data parallelism where nothing is known of this machine.

    Depends on what was measured on the machine that asks: of several hosts one decides (``pretrain.run.decide``).
    Raises Refusal where no layout divides the model and the batch, or none fits.
    """
    from parallel.planning.search.planner import Problem, search
    from parallel.planning.search.scored import remembering_time

    try:
        known = _known(config, world_size)
    except Refusal as unknown:
        announce(f"parallel: auto takes data parallelism over all {world_size} ranks: {unknown}")
        return ParallelPlan(
            world_size, config.train.global_batch, config.train.micro_batch, num_layers=len(config.model.layers)
        )
    problem = Problem(
        workload_at(config),
        config.train.global_batch,
        known.topology,
        world_size,
        dtype=config.run.dtype,
        execution=execution_of(config),
        exact=True,
        fixed={"micro_batch": config.train.micro_batch},
    )
    answer = search(problem, remembering_time(known.calibration))
    winner, others = answer.winner, answer.runners_up
    reason = f"; {others[0].scored.label}: {others[0].reason}" if others else ""
    announce(f"parallel: auto takes {winner.label}, {winner.time.step_s:.3g} s a step ({known.basis}){reason}")
    return winner.plan


def execution_of(config: RunConfig) -> Execution:
    """How the trainer runs a plan: masters in float32 beside bfloat16 weights, everything of one width else."""
    wide = 8 if config.run.dtype == "float64" else 4
    return Execution(
        precision=config.run.dtype,
        gradient_bytes=wide,
        moment_bytes=wide,
        master_bytes=4 if config.run.dtype == "bfloat16" else 0,
        deterministic=config.run.deterministic,
        routing="real",
    )


def workload_at(config: RunConfig) -> Workload:
    """The model's work at the run's windows and dtype."""
    element_bytes = {"float64": 8, "float32": 4, "bfloat16": 2}[config.run.dtype]
    return workload_of(config.model_spec(), config.data.seq_len, element_bytes)


def _is_cpu(known: Known) -> bool:
    return known.topology.device.architecture == "cpu"


def _known(config: RunConfig, ranks: int) -> Known:
    """What is known of this machine for ranks with the threads that they have; Refusal where nothing is.

    torchrun gives each of several ranks one thread unless told otherwise; ``stoker train`` shares out the cores.
    """
    known = this_machine(ranks, config.run.dtype)
    threads, measured = os.environ.get("OMP_NUM_THREADS"), known.topology.device.processors
    if _is_cpu(known) and threads is not None and threads != str(measured):
        raise Refusal(f"ranks have {threads} threads (OMP_NUM_THREADS) and were measured with {measured}")
    return known
